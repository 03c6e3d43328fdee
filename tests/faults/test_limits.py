"""The kernel refuses, the node is at its limits, the clock jumps."""

from __future__ import annotations

import errno
import resource
import subprocess
import time
from datetime import datetime

import pytest

from lease.model import ip_text
from tests.support.faults import picture
from tests.support.wait import until

REFUSING = """
import errno, os, overlay.kernel.netlink as netlink, overlay.kernel.nftables.socket as netfilter
from overlay.kernel.netlink import KernelError, Refusal
SWITCH, CODE = {switch!r}, {code}

def refusing():
    return os.path.exists(SWITCH)

real = netlink.RequestSocket.execute

def execute(self, messages, first, count=0):
    if not refusing():
        return real(self, messages, first, count)
    return {{place: Refusal(CODE, "made by the test") for place in range(count or len(messages))}}

def commit(self, messages, what):
    if refusing():
        raise KernelError(CODE, what + ": " + str(Refusal(CODE, "made by the test")))
    return real_commit(self, messages, what)

def refusing_too(plain):
    def asked(self, *args, **named):
        if refusing():
            raise KernelError(CODE, str(Refusal(CODE, "made by the test")))
        return plain(self, *args, **named)
    return asked

netlink.RequestSocket.execute = execute
for name in ("ask", "dump", "matched", "_answers"):
    setattr(netlink.RequestSocket, name, refusing_too(getattr(netlink.RequestSocket, name)))
for name in ("_get", "_read", "_receipts"):
    setattr(netfilter.NetfilterSocket, name, refusing_too(getattr(netfilter.NetfilterSocket, name)))
real_commit, netfilter.NetfilterSocket._commit = netfilter.NetfilterSocket._commit, commit
from overlay.main import main
main()
"""


def _route_gone(scene) -> list[str]:
    (base, length), route = next(iter(scene.world.kernel("node1")["routes"].items()))
    return ["ip", "route", "del", f"{ip_text(4, base)}/{length}", "metric", str(route.key.metric)]


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.EBUSY, errno.ENOSPC, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("long", [False, True], ids=["once", "long"])
def test_the_kernel_refuses(scene, code, long):
    """For a moment, or for ten seconds, while a route is gone, a peer joins and the guard's table is flushed."""
    world, switch = scene.world, scene.world.folder / "refuse"
    scene.begin()
    scene.agents[0].stop()
    scene.agents[0] = world.agent(
        "node1", "--node-name=node1", run_dir="node1", program=REFUSING.format(switch=str(switch), code=code)
    ).wait_ready()
    name = errno.errorcode[code]

    def inject() -> None:
        switch.touch()
        world.run("node1", *_route_gone(scene))
        world.run("node1", "nft", "flush set ip overlay-1-guard vteps")
        world.put_peer(99)

    def bites() -> bool:
        return world.peers("node1") == 0

    def recover() -> bool:
        if long:
            cpu, lines = scene.idle_cost(10)
            told = scene.agents[0].status()
            assert any(name in difference["error"] for difference in told["differences"]), told["differences"]
            assert name in next(p["text"] for p in told["problems"] if p["subject"] == "guard")
            assert cpu < 0.05
            assert lines < 15
        switch.unlink()
        return True

    def whole() -> bool:
        return world.peers("node1") == 2 and "guard" not in scene.agents[0].problems()

    scene.suffer(
        f"the kernel says {name} {'for 10 s' if long else 'for a moment'}",
        "every answer of netlink replaced in the process, while a route and the guard's addresses are gone and a peer joins",
        inject, bites, 60, recover, whole,
    )  # fmt: skip


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOBUFS])
def test_the_kernel_refuses_all_at_a_first_start(scene, code):
    """No device, no link is told, no table: it waits, says what it is refused, and is whole as soon as it may."""
    world, switch = scene.world, scene.world.folder / "refuse"
    scene.begin("--ip-masq")
    name = errno.errorcode[code]

    def inject() -> None:
        scene.agents[0].stop()
        world.run(
            "node1", "sh", "-c", f"nft flush ruleset; ip link del flannel.1; rm {scene.agents[0].run_dir}/subnet.env"
        )
        switch.touch()
        program = REFUSING.format(switch=str(switch), code=code)
        scene.agents[0] = world.agent("node1", "--node-name=node1", "--ip-masq", run_dir="node1", program=program)

    def bites() -> bool:
        return any(name in text for text in scene.agents[0].problems().values())

    def recover() -> bool:
        cpu, lines = scene.idle_cost(5)
        assert world.device("node1") is None
        assert not scene.agents[0].ready()
        assert cpu < 0.1
        assert lines < 15
        switch.unlink()
        return True

    scene.suffer(
        f"the kernel says {name} to all at a first start, for 5 s", "every answer of netlink replaced in the process; no device, no rules",
        inject, bites, 30, recover,
    )  # fmt: skip
    assert scene.agents[0].wait_ready().problems() == {}


def test_no_descriptor_left(scene):
    """RLIMIT_NOFILE lowered to what is open: no look, no nft, no new connection."""
    scene.begin("--ip-masq")
    pid = scene.agents[0].process.pid

    def limit(soft: int) -> None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    def told(subject: str) -> bool:
        problems = scene.agents[0].events("problem")
        return any(event["subject"] == subject and "Too many open files" in event["what"] for event in problems)

    before, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def inject() -> None:
        limit(3)
        scene.world.run("node1", "nft", "delete table ip overlay-1")
        scene.world.run("node1", *_route_gone(scene))

    def recover() -> bool:
        time.sleep(5)
        limit(before)
        return True

    scene.suffer(
        "no file descriptor for 5 s", "`prlimit --nofile=3`; the nat table and a route deleted", inject,
        lambda: told("nat"), 30, recover,
    )  # fmt: skip
    assert scene.agents[0].process.poll() is None


def test_no_memory_left(scene):
    """RLIMIT_AS what it has, and a record of a megabyte: it may end, with a word, and who started it starts it again; the pods
    never notice."""
    scene.begin()
    agent = scene.agents[0]
    pid = agent.process.pid
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])

    def inject() -> None:
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * 4096, resource.RLIM_INFINITY))
        scene.world.put_record("10.244.250.0-24", "x" * 1_000_000)
        scene.world.put_peer(99)

    def bites() -> bool:
        return "MemoryError" in agent.log() or agent.process.poll() not in (None, 0)

    def recover() -> bool:
        time.sleep(3)
        if agent.process.poll() is not None:
            scene.agents[0] = scene.world.restart(agent).wait_ready()
        else:
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return True

    lost = scene.suffer(
        "no memory left", "`prlimit --as` what it has, a record of 1 MB and a peer; an agent that ended started again after 3 s",
        inject, bites, 40, recover, lambda: scene.world.peers("node1") == 2 and scene.agents[0].ready(),
    )  # fmt: skip
    assert lost == 0


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_the_disk(scene, how):
    """Where the CNI list stands."""
    folder = scene.world.folder / "node1/cni"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "overlay-test", folder], check=True)
    try:
        scene.begin()
        conflist, junk = folder / "10-flannel.conflist", folder / "junk"

        def inject() -> None:
            conflist.unlink()
            if how == "full":
                subprocess.run(["sh", "-c", f"cat /dev/zero > {junk}"], check=False, stderr=subprocess.DEVNULL)
            else:
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            scene.world.run("node1", *_route_gone(scene))

        def bites() -> bool:
            words = "No space left on device" if how == "full" else "Read-only file system"
            return f"{conflist}: {words}" in scene.agents[0].problems().get("files", "")

        def recover() -> bool:
            assert scene.world.peers("node1") == 1, "all else goes on"
            cpu, lines = scene.idle_cost(8)
            assert cpu < 0.03
            assert lines < 8
            if how == "full":
                junk.unlink()
            else:
                subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            return True

        scene.suffer(
            f"the disk {how}", "a tmpfs that is filled, or mounted read-only; the CNI list and a route deleted", inject, bites,
            30, recover,
        )  # fmt: skip
        assert not list(folder.glob(".*"))
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_start_on_a_full_disk(scene):
    """All that the agent writes is on it: run directory, lock, log, subnet.env, CNI list. And a new kernel: no device."""
    world = scene.world
    folder = world.folder / "node1"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "overlay-test", folder], check=True)
    (world.folder / "node1.log").symlink_to(folder / "log")
    junk = folder / "junk"
    try:
        scene.begin()

        def inject() -> None:
            scene.agents[0].kill()
            for name in ("subnet.env", "device", "lease.json", "lock", "cni/10-flannel.conflist"):
                (folder / name).unlink()
            world.run("node1", "ip", "link", "del", "flannel.1")
            # and the rest of the log's last page
            fill = f"cat /dev/zero > {junk}; yes '' >> {folder}/log"
            subprocess.run(["sh", "-c", fill], check=False, stderr=subprocess.DEVNULL)
            scene.agents[0] = world.agent("node1", "--node-name=node1", run_dir="node1")

        def bites() -> bool:
            return "No space left on device" in scene.agents[0].problems().get("files", "")

        def recover() -> bool:
            until("the datapath is there all the same", lambda: world.peers("node1") == 1)
            said = len(scene.agents[0].log())
            time.sleep(3)
            assert len(scene.agents[0].log()) == said, "control: there is no place for a line of log"
            assert not (folder / "subnet.env").exists()
            assert not scene.agents[0].ready()
            junk.unlink()
            return True

        scene.suffer(
            "a start on a full disk", "a tmpfs that is filled: run directory, log, subnet.env, CNI list; the device deleted",
            inject, bites, 30, recover,
        )  # fmt: skip
        assert scene.agents[0].wait_ready().events("log.lost")
        assert not list(folder.glob(".*"))
    finally:
        log = world.folder / "node1.log"
        said = log.read_bytes()
        subprocess.run(["umount", "-l", folder], check=True)
        log.unlink()
        log.write_bytes(said)


JUMPING = """
import os, time
plain, switch = time.time, {switch!r}
time.time = lambda: plain() + (9 * 86400 if os.path.exists(switch) else 0)
from overlay.main import main
main()
"""


def test_the_clock_jumps(scene):
    """Nine days ahead, then back: nothing here goes by the clock on the wall."""
    world, switch = scene.world, scene.world.folder / "jump"
    scene.begin()
    scene.agents[0].stop()
    scene.agents[0] = world.agent(
        "node1",
        "--node-name=node1",
        "--subnet-lease-ttl=15",
        run_dir="node1",
        program=JUMPING.format(switch=str(switch)),
    ).wait_ready()
    records = world.records().keys()

    def inject() -> None:
        switch.touch()
        world.run("node1", "nft", "delete table ip overlay-1")

    def bites() -> bool:
        last = datetime.fromisoformat(scene.agents[0].events("nat.mended")[-1]["timestamp"])
        return last.timestamp() > time.time() + 8 * 86400

    def recover() -> bool:
        cpu, lines = scene.idle_cost(12)
        assert cpu < 0.03
        assert lines < 5
        switch.unlink()
        time.sleep(12)
        return True

    lost = scene.suffer(
        "the clock jumps nine days ahead and back", "time.time() in the process; leases of 15 s; the nat table deleted", inject,
        bites, 30, recover, lambda: scene.agents[0].ready() and world.records().keys() == records,
    )  # fmt: skip
    assert lost == 0
    assert picture(world, scene.agents[0])


def test_a_refused_change_of_the_guard_does_not_spin(scene):
    """An address whose time is over cannot be taken out: it is tried again every two seconds, not in every turn."""
    world, switch = scene.world, scene.world.folder / "refuse"
    scene.begin()
    scene.agents[0].stop()
    program = "import overlay.firewall.let_in\noverlay.firewall.let_in.GRACE_S = 1.0\n" + REFUSING.format(
        switch=str(switch), code=errno.EPERM
    )
    scene.agents[0] = world.agent("node1", "--node-name=node1", run_dir="node1", program=program).wait_ready()
    world.put_peer(99)
    until("a peer", lambda: world.peers("node1") == 2)
    switch.touch()
    world.drop_record("10.244.99.0-24")
    until("it is told", lambda: "EPERM" in scene.agents[0].problems().get("guard", ""))
    cpu, lines = scene.idle_cost(8)
    assert cpu < 0.05
    assert lines < 15
    switch.unlink()
    until("it is solved", lambda: "guard" not in scene.agents[0].problems())
    until("and the address is gone", lambda: "192.168.1.99" not in world.run("node1", "nft", "list", "ruleset"))
