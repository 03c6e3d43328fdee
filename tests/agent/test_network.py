"""The main job: nodes lease subnets, pods reach pods, and a restart costs no packet."""

import json
import re
import signal
import socket
import stat
from pathlib import Path

import pytest

from lease.model import mac_number, prefix
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.lab import matrix, netns, pods
from overlay.lab.processes import LabError
from tests.support.wait import PATIENCE, until
from tests.support.world import ROOT, made_up_peer, number


def test_after_a_boot_pods_wait_for_subnet_env(world):
    """The network list outlives a boot, /run does not: as with flannel's plugin no pod is made before the agent has spoken."""
    world.config()
    agent = world.nodes(1)[0]
    world.pod(agent, "before")
    conflist, namespace = agent.run_dir / "cni" / "10-flannel.conflist", world.namespace("node1-after")
    agent.kill()
    for device in ("flannel.1", "cni0"):
        world.run("node1", "ip", "link", "del", device)
    (agent.run_dir / "subnet.env").unlink()
    netns.create(namespace)
    for _ in range(2):
        with pytest.raises(LabError, match=r"subnet\.env: no such file|bridge's mac"):
            pods.attach(world.namespace("node1"), conflist, namespace)
        pods.detach(world.namespace("node1"), conflist, namespace)  # as a runtime does then, without that file
    world.restart(agent).wait_ready()

    def made() -> bool:
        try:
            return bool(pods.attach(world.namespace("node1"), conflist, namespace))
        except LabError:
            pods.detach(world.namespace("node1"), conflist, namespace)
            raise OSError("not yet") from None

    until("the bridge that was left unfinished is no hindrance", made)


def test_pods_reach_pods_without_nat_and_records_files_and_device_are_flannels(world):
    one, two = world.nodes(2)
    ends = [world.pod(one, "a"), world.pod(one, "b"), world.pod(two, "a")]
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 6
    assert all(cell.ok for cell in cells), cells

    subnet = one.subnet()
    record = world.records()[f"{str(subnet).replace('/', '-')}"]
    assert list(json.loads(record["value"])) == ["PublicIP", "PublicIPv6", "BackendType", "BackendData", "OverlayNode"]
    assert record["PublicIP"] == "192.168.1.2"
    assert record["BackendData"] == {"VNI": 1, "VtepMAC": one.mac()}
    assert 86_000 < world.etcd.time_to_live(record["lease"]) <= 86_400

    env = one.run_dir / "subnet.env"
    assert (
        env.read_text()
        == f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={str(subnet).replace('.0/', '.1/')}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    assert stat.S_IMODE(env.stat().st_mode) == 0o644

    device = world.device("node1")
    assert (device.kind, device.vni, device.port, device.mtu, device.learning, device.up) == (
        "vxlan",
        1,
        8472,
        1450,
        False,
        True,
    )
    assert device.local == number("192.168.1.2")
    assert device.mac == mac_number(one.mac())
    peer = two.subnet()
    there = world.kernel("node1")
    route = there["routes"][peer[1:]]
    assert (route.via, route.flags & 4, route.protocol, route.key.metric) == (
        peer.base,
        4,
        111,
        1 + ((peer.base >> 8) & 0xFF),
    )
    assert there["neighbours"] == {peer.base: mac_number(two.mac())}
    assert there["fdb"] == {mac_number(two.mac()): number("192.168.1.3")}
    addresses = world.run("node1", "ip", "-4", "-br", "addr", "show", "flannel.1")
    assert addresses.split()[2:] == [f"{subnet}".replace("/24", "/32")]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
def test_a_restart_costs_no_packet_and_writes_nothing(world, how):
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    before = (world.kernel("node1"), world.etcd.revision(), one.subnet(), one.mac())
    with world.stream(source, target) as stream:
        code = one.stop(how)
        assert code == (0 if how == signal.SIGTERM else -9)
        assert world.kernel("node1") == before[0], "the datapath stays"
        again = world.restart(one).wait_ready()
        until("it follows", lambda: len(again.status()["peers"]) == 1)
        until("traffic went on behind it", lambda: stream.sent > 50)
    assert stream.lost() == 0
    assert (world.kernel("node1"), world.etcd.revision(), again.subnet(), again.mac()) == before
    assert not [name for name in again.status()["counters"] if name.startswith("writes_")], "zero writes to the kernel"


def test_nothing_of_a_peer_is_touched_before_the_first_list(world):
    one, _ = world.nodes(2)
    before = world.kernel("node1")
    one.stop()
    world.etcd.kill()
    again = world.restart(one)
    until("it says that it waits", lambda: "first list" in again.problems().get("waiting", ""))
    assert not again.ready()
    assert world.kernel("node1") == before
    world.etcd.start()
    again.wait_ready()
    assert world.kernel("node1") == before


def test_what_left_while_we_were_down_is_swept(world):
    one, two, _three = world.nodes(3)
    one.stop()
    two.stop()
    gone = next(key for key, record in world.records().items() if record["PublicIP"] == "192.168.1.3")
    world.etcd.delete(f"{ROOT}/subnets/{gone}")
    assert world.peers("node1") == 2
    world.restart(one).wait_ready()
    until("only the third is left", lambda: world.peers("node1") == 1)
    there = world.kernel("node1")
    assert (len(there["routes"]), len(there["neighbours"]), len(there["fdb"])) == (1, 1, 1)


def test_join_change_and_leave(world):
    (one,) = world.nodes(1)
    record = {
        "PublicIP": "192.168.1.50",
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:50"},
    }
    world.put_record("10.244.0.0-24", record)
    until("it joined", lambda: world.peers("node1") == 1)
    world.put_record(
        "10.244.0.0-24",
        record | {"PublicIP": "192.168.1.51", "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:51"}},
    )
    moved = {mac_number("0a:00:00:00:00:51"): number("192.168.1.51")}
    until("it changed, and its old MAC is gone", lambda: world.kernel("node1")["fdb"] == moved)
    world.etcd.delete(f"{ROOT}/subnets/10.244.0.0-24")
    until("it left", lambda: world.kernel("node1") == {"routes": {}, "neighbours": {}, "fdb": {}})


def test_bad_records_cost_their_own_entry_only(world):
    (one,) = world.nodes(1)
    good = {
        "PublicIP": "192.168.1.50",
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:50"},
    }

    def with_(**change):
        return good | change

    bad = {
        "not-a-subnet": "x",
        "10.244.0.0-16": good,
        "192.168.1.0-24": good,
        "0.0.0.0-1": good,
        "10.245.0.0-24": good,
        str(one.subnet()).replace("/24", "-25"): good,
        "10.244.3.0-24": with_(BackendType="host-gw"),
        "10.244.4.0-24": with_(PublicIP="192.168.1.2"),
        "10.244.5.0-24": with_(BackendData={"VNI": 1, "VtepMAC": one.mac()}),
        "10.244.6.0-24": with_(BackendData={"VNI": 7, "VtepMAC": "0a:00:00:00:00:56"}),
        "10.244.7.0-24": "{" * 5000,
        "10.244.8.0-24": "y" * 200_000,
    }
    for key, value in bad.items():
        world.put_record(key, value)
    world.put_record(
        "10.244.0.0-24", with_(PublicIP="192.168.1.51", BackendData={"VNI": 1, "VtepMAC": "0a:00:00:00:00:51"})
    )
    until("the good one is a peer", lambda: world.peers("node1") == 1)
    refused = one.refused_records()
    assert refused.keys() == bad.keys()
    assert all(refused.values()), "each with its reason"
    assert one.ready()
    assert len(one.events("record.refused")) == len(bad)
    assert "192.168.1.0/24 dev eth0" in world.run("node1", "ip", "route")
    # and the same at a start
    again = world.restart(one).wait_ready()
    until("again", lambda: again.refused_records().keys() == bad.keys())
    assert world.peers("node1") == 1


def test_direct_routing_and_its_toggling(world):
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    there = world.kernel("node1")
    (route,) = there["routes"].values()
    assert (route.via, route.protocol, route.oif) == (number("192.168.1.3"), 111, world.index("node1", "eth0"))
    assert (there["neighbours"], there["fdb"]) == ({}, {})
    with world.stream(source, target) as stream:
        for toggle, whole in ((False, 1), (True, 0), (False, 1)):
            world.config(Backend={"Type": "vxlan", "DirectRouting": toggle})
            until("both have changed over", lambda whole=whole: world.peers("node1") == whole == world.peers("node2"))
            until("nothing else is left", lambda whole=whole: len(world.kernel("node1")["fdb"]) == whole)
    assert stream.lost() == 0
    assert one.ready()
    assert two.ready()


def test_a_vxlan_side_and_a_direct_side_under_strict_rp_filter(world):
    """Half-way through a roll-out one side sends directly, the other by the tunnel: strict filtering would drop all."""
    names = [world.node(1), world.node(2)]
    for name in names:
        world.run(
            name,
            "sh",
            "-c",
            "echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter",
        )
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    one, two = [world.agent(name, f"--node-name={name}").wait_ready() for name in names]
    until("peers", lambda: len(one.status()["peers"]) == len(two.status()["peers"]) == 1)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    two.stop()
    world.config(Backend={"Type": "vxlan", "DirectRouting": False})
    until(
        "one uses the tunnel, two still sends directly", lambda: world.peers("node1") == 1 and world.peers("node2") == 0
    )
    with matrix.Wires([source, target]) as wires:
        assert all(cell.ok for cell in wires.all()), "decapsulated packets pass where the way back is direct"


def test_many_agents_share_one_file_system_and_two_on_one_run_dir_do_not(world):
    one, _two = world.nodes(2)
    second = world.agent("node1", "--node-name=x", run_dir="node1")
    assert second.process.wait(20) == 1
    assert f"pid {one.process.pid}" in second.log()
    assert one.ready()


def test_the_environment_works_as_flannelds(world):
    node = world.node(1)
    agent = world.agent(
        node, environ={"FLANNELD_IP_MASQ": "true", "FLANNELD_IFACE": "eth0", "FLANNELD_TYPO": "1"}
    ).wait_ready()
    assert "FLANNEL_IPMASQ=true" in (agent.run_dir / "subnet.env").read_text()
    assert "--iface eth0" in agent.status()["underlay"]["reason"]
    assert agent.events("environment")[0]["variable"] == "FLANNELD_TYPO"


@pytest.mark.parametrize(
    "flags",
    [
        ["--bogus"],
        ["--ip-masq=perhaps"],
        ["--etcd-endpoints=ftp://x"],
        ["--etcd-cafile=/no/such", "--etcd-endpoints=https://h:1"],
        ["--kube-subnet-mgr"],
    ],
)
def test_a_wrong_command_line_is_one_line_and_no_traceback(world, flags):
    agent = world.agent(world.node(1), *flags)
    assert agent.process.wait(20) in (1, 2)
    lines = [line for line in agent.log().strip().splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert lines[0].startswith("overlayd: ")


def test_health_and_readiness_over_tcp(world):
    node = world.node(1)
    agent = world.agent(node, "--healthz-ip=127.0.0.1", "--healthz-port=18471").wait_ready()

    def ask(path: str) -> tuple[int, str]:
        import http.client
        import socket

        connection = http.client.HTTPConnection("127.0.0.1", 18471)
        connection.sock = world.inside(node, lambda: socket.create_connection(("127.0.0.1", 18471), 5))
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    assert ask("/healthz")[0] == 200
    assert ask("/readyz")[0] == 200
    assert ask("/nothing")[0] == 404
    with agent.paused():
        pass
    assert ask("/healthz")[0] == 200


def test_a_prefix_of_its_own(world):
    world.etcd.put("/lab/net/config", '{"Network":"10.99.0.0/16","SubnetLen":25}')
    agent = world.agent(world.node(1), "--etcd-prefix=/lab/net").wait_ready()
    assert prefix("10.99.0.0/16").covers(agent.subnet())
    assert agent.subnet().length == 25
    assert world.etcd.get("/lab/net/subnets/")
    assert world.records() == {}


def test_systemd_is_told_when_it_is_ready(world, tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20 * PATIENCE)
        agent = world.agent(world.node(1), environ={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert listening.recv(100) == b"READY=1"
        assert agent.ready()


def test_sighup_reads_the_files_again_and_ends_nothing(world, tmp_path):
    live = tmp_path / "live.json"
    live.write_text("{}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20 * PATIENCE)
        agent = world.agent(
            world.node(1), f"--live-settings={live}", environ={"NOTIFY_SOCKET": str(tmp_path / "notify")}
        ).wait_ready()
        assert listening.recv(100) == b"READY=1"
        live.write_text('{"log-level": "debug"}')
        agent.process.send_signal(signal.SIGHUP)
        assert listening.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert listening.recv(100) == b"READY=1"
    until("the new setting is in effect", lambda: agent.events("live_settings"), 10)
    assert str(live) in agent.events("reload")[0]["files"]
    until("at debug it says what it does", lambda: agent.events("controller") and agent.events("pass"), 10)
    assert agent.process.poll() is None
    assert agent.ready()


def test_systemds_watchdog_is_told_while_the_loop_turns(world, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20 * PATIENCE)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        agent = world.agent(world.node(1), environ=environ)
        assert [listening.recv(100) for _ in range(4)].count(b"WATCHDOG=1") >= 3
        listening.settimeout(2.5)

        def read_all() -> None:
            while True:
                listening.recv(100)

        with agent.paused(), pytest.raises(TimeoutError):
            read_all()
        listening.settimeout(20 * PATIENCE)
        assert listening.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("masq", [False, True], ids=["control", "masquerade"])
def test_what_a_node_sends_to_a_pod_elsewhere_comes_from_the_pod_network(world, masq):
    """flannel's A13: its rule for that stands behind one that takes all. From its underlay address the answer would go past the
    tunnel."""
    world.config()
    one, two = world.nodes(2, f"--ip-masq={str(masq).lower()}")
    pod = world.pod(two, "a")
    with (
        netns.inside(pod.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as ear,
        netns.inside(world.namespace("node1"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as mouth,
    ):
        ear.bind((pod.address, 7007))
        ear.settimeout(3)
        mouth.bind(("192.168.1.2", 0))
        mouth.settimeout(3)
        mouth.sendto(b"hello", (pod.address, 7007))
        data, (source, port) = ear.recvfrom(100)
        assert data == b"hello"
        assert source == (str(one.subnet()).removesuffix("/24") if masq else "192.168.1.2")
        ear.sendto(b"answer", (source, port))
        assert mouth.recv(100) == b"answer"


def test_records_of_both_families_beside_those_of_one(world):
    """flannel's A8, in a network of IPv4 alone."""
    world.config(SubnetMin="10.244.100.0")  # ours: 60 and 61 are others'
    one, _ = world.nodes(2)
    both = made_up_peer(60, PublicIPv6="fd00:192:168:1::60", BackendV6Data={"VNI": 1, "VtepMAC": "0a:00:00:00:06:60"})
    world.put_record("10.244.60.0-24&fd00:10:244:60::-64", both)
    world.put_record("10.244.61.0-24", made_up_peer(61))
    until("both are peers", lambda: world.peers("node1") == 3)
    assert one.problems() == {}


def _names(value: object, at: str = "") -> set[str]:
    """The names in a status, of the objects in its lists too."""
    if isinstance(value, list):
        return set().union(*(_names(item, at) for item in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return set(value) | set().union(*(_names(item, name) for name, item in value.items()))


def test_the_reference_names_all_that_status_and_metrics_say(world):
    one, two = (world.agent(world.node(number), f"--node-name=node{number}") for number in (1, 2))
    one.wait_ready()
    two.wait_ready()
    world.put_record("10.244.250.0-24", "x")
    until("a peer and a refused record", lambda: world.peers("node1") == 1 and one.refused_records())
    world.run("node1", "ip", "route", "add", "blackhole", f"{two.subnet()!s}")
    until("a conflicting route", lambda: one.status()["conflicting_routes"])
    page = (Path(__file__).parents[2] / "docs/reference.md").read_text()
    status = one.status()
    assert status["schema"] == 1
    assert status["node_name"] == "node1"
    said = {word for cell in re.findall(r"`([a-z0-9_.\[\]]+)`", page) for word in re.findall(r"[a-z0-9_]+", cell)}
    assert _names(status) - said == set()
    metrics = ask_unix(str(one.run_dir / SOCKET_NAME), "/metrics")[1]
    assert {name for name in re.findall(r"^# TYPE (\w+)", metrics, re.M) if name not in said} == set()
    for problem in status["problems"]:
        assert set(problem) == {"subject", "text", "since", "keeps_unready"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", problem["since"])


def test_a_dry_run_of_uninstall_and_release_removes_nothing_and_names_what_would_go(world):
    one, _ = world.nodes(2, "--ip-masq")
    world.pod(one, "a")
    one.stop()

    def everything() -> tuple:
        left = sorted(str(path) for path in one.run_dir.rglob("*"))
        rules = world.run("node1", "nft", "list", "tables")
        return world.kernel("node1"), rules, left, world.records()

    before = everything()
    flags = one.command[one.command.index("-m") + 2 :]
    command = (one.command[2], "-m", "overlay.cli.app")
    said = world.run("node1", *command, "uninstall", "--dry-run", *flags)
    lines = said.splitlines()
    assert all(line.startswith("would remove ") for line in lines)
    for part in ("device flannel.1", "10-flannel.conflist", "subnet.env", "nft table ip overlay-1"):
        assert any(part in line for line in lines), part
    assert world.run("node1", *command, "release", "--dry-run", *flags).startswith("would release 10.244.")
    assert everything() == before
    done = world.run("node1", *command, "uninstall", *flags)
    assert [line.replace("removed", "would remove") for line in done.splitlines()] == lines, "it does what it said"
