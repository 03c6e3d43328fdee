"""WireGuard: what is encrypted, keys that change, and what of a device is put back."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import time
from contextlib import closing, suppress

import pytest

from lease.model import key_text
from overlay.kernel.wireguard import userspace
from overlay.lab.matrix import Wires
from tests.backends.contract import pods_of, well
from tests.support.reach import all_reach
from tests.support.wait import until
from tests.support.world import World

BACKEND = {"Type": "wireguard"}
SECRET = b"the pods' plaintext, as nobody on the underlay shall see it"


@pytest.fixture
def network(tmp_path):
    with closing(World(tmp_path / "world")) as made:
        made.config(Backend=BACKEND)
        yield made


def key_of(agent) -> str:
    return str(agent.status()["lease"]["public_key"])


def shown(world, node, what="dump") -> list[list[str]]:
    """What `wg show` says of the device: lines of fields; the first is the device's own."""
    node_dir = next(agent.run_dir for agent in world.agents if agent.node == node)
    command = f'mkdir -p {userspace.SOCKETS} && mount --bind "{node_dir}/wireguard" {userspace.SOCKETS} 2>/dev/null; wg show flannel-wg {what}'
    out = world.run(node, "unshare", "--mount", "sh", "-c", command)
    return [line.split("\t") for line in out.splitlines()]


def wg(world, node, *words: str) -> None:
    node_dir = next(agent.run_dir for agent in world.agents if agent.node == node)
    mounted = f'mount --bind "{node_dir}/wireguard" {userspace.SOCKETS} 2>/dev/null; exec wg set flannel-wg "$@"'
    world.run(node, "unshare", "--mount", "sh", "-c", mounted, "sh", *words)


def seen_on_underlay(world, node, act) -> int:
    """How many frames of the node's eth0 hold the pods' plaintext, of those that pass while something is done."""

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("eth0", 0))
        made.setblocking(False)
        return made

    with world.inside(node, listen) as listening:
        act()
        time.sleep(0.3)
        count = 0
        while True:
            try:
                count += SECRET in listening.recv(1 << 16)
            except BlockingIOError:
                return count


def send(world, source, target, count=20) -> None:
    def from_pod() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            for _ in range(count):
                made.sendto(SECRET, (target.address, 9))

    world.inside(source.namespace.removeprefix(f"overlay-{world.lab}-"), from_pod)


def test_the_underlay_sees_plaintext_with_vxlan_alone(network):
    agents = network.nodes(2)
    source, target = pods_of(network, agents)
    assert seen_on_underlay(network, "node2", lambda: send(network, source, target)) == 0
    network.config(Backend={"Type": "vxlan"})
    for agent in agents:
        until("it follows", lambda agent=agent: agent.status()["device"]["name"] == "flannel.1" and well(agent), 30)
    pods_of(network, agents, "b")
    assert seen_on_underlay(network, "node2", lambda: send(network, source, target)) >= 20


def test_the_device_holds_what_the_records_say(network):
    network.config(Backend={**BACKEND, "PSK": key_text(bytes(range(32))), "PersistentKeepaliveInterval": 25})
    agents = network.nodes(3, "--log-level=debug")
    pods_of(network, agents)
    device, *peers = shown(network, "node1")
    assert (device[1], device[2]) == (key_of(agents[0]), "51820")
    wanted = {
        (
            key_of(agent), key_text(bytes(range(32))), f"192.168.1.{number}:51820",
            ",".join(sorted((str(agent.subnet()), f"192.168.1.{number}/32"))), "25",
        )
        for number, agent in ((3, agents[1]), (4, agents[2]))
    }  # fmt: skip
    assert {(p[0], p[1], p[2], ",".join(sorted(p[3].split(","))), p[7]) for p in peers} == wanted
    mode = stat.S_IMODE((agents[0].run_dir / "wgkey").stat().st_mode)
    assert (mode, len((agents[0].run_dir / "wgkey").read_text())) == (0o400, 44)
    status = json.dumps(agents[0].status()) + agents[0].log()
    assert (agents[0].run_dir / "wgkey").read_text() not in status
    for secret in (key_text(bytes(range(32))), bytes(range(32)).hex(), repr(bytes(range(32)))[2:-1], "\\x1d\\x1e\\x1f"):
        assert secret not in status, "the pre-shared key is shown to nobody"


def test_a_key_is_rotated_without_a_lost_packet(network):
    agents = network.nodes(2)
    source, target = pods_of(network, agents)
    command = (agents[0].command[2], "-m", "overlay.cli.app", "rotate-key", f"--run-dir={agents[0].run_dir}")

    def rotated() -> int:
        """How many packets of both directions were lost by it; they come again after it."""
        with network.stream(source, target) as there, network.stream(target, source) as back:
            until("the handshake of before is past", lambda: there.sent > 1100)  # REKEY_TIMEOUT, 5 s
            network.run("node1", *command)
            until("its peer has it", lambda: [peer[0] for peer in shown(network, "node2")[1:]] == [key_of(agents[0])])
            until("more was sent", lambda sent=there.sent: there.sent > sent + 300)
            for stream in (there, back):
                until("they come again", lambda stream=stream, sent=stream.sent: max(stream.came) > sent)
        return there.lost() + back.lost()

    before = key_of(agents[0])
    if network.device("node1", "flannel-wg").kind == "wireguard":
        assert rotated() == 0
    else:  # wireguard-go stands still for 5 s where two handshakes cross, as both ends' do that send all the time
        rotated()  # (that nothing is lost is the kernel's: make kernel-test)
    after = key_of(agents[0])
    assert before != after
    assert [peer[0] for peer in shown(network, "node2")[1:]] == [after], "the old key is no peer's any more"
    assert shown(network, "node1")[0][1] == after


@pytest.mark.parametrize("what", ["peer", "allowed", "stranger", "key", "port", "program"])
def test_what_somebody_alters_of_the_device_is_put_back(network, what):
    agents = network.nodes(2)
    ends = pods_of(network, agents)
    before = [[line[0:3] if not at else (line[0], line[3]) for at, line in enumerate(shown(network, "node1"))]]
    peer = key_of(agents[1])
    stranger = key_text(bytes([9] * 31 + [64]))
    if what == "peer":
        wg(network, "node1", "peer", peer, "remove")
    elif what == "allowed":
        wg(network, "node1", "peer", peer, "allowed-ips", "10.9.9.0/24")
    elif what == "stranger":
        wg(network, "node1", "peer", stranger, "allowed-ips", str(agents[1].subnet()))
    elif what == "key":
        other = network.folder / "other"
        other.write_text(stranger)
        wg(network, "node1", "private-key", str(other))
    elif what == "port":
        wg(network, "node1", "listen-port", "50000")
    else:
        ours = os.stat(f"/run/netns/{network.namespace('node1')}").st_ino
        for pid in userspace.running():
            with suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/net").st_ino == ours:
                    os.kill(pid, signal.SIGKILL)

    def as_before() -> bool:
        now = [[line[0:3] if not at else (line[0], line[3]) for at, line in enumerate(shown(network, "node1"))]]
        assert now == before
        return True

    until("the device is as before", as_before, 25)
    until("pods reach each other", lambda: all_reach(ends), 25)
    until("nothing is wrong", lambda: well(agents[0]), 20)


def record(number: int, **data) -> dict:
    return {
        "PublicIP": f"192.168.1.{number}", "PublicIPv6": None, "BackendType": "wireguard", "BackendData": data,
    }  # fmt: skip


def test_hostile_records_cost_nobody_a_packet(network):
    # the records' subnets are nobody's
    network.config(Backend=BACKEND, SubnetMin="10.244.2.0", SubnetMax="10.244.150.0")
    agents = network.nodes(2)
    source, target = pods_of(network, agents)
    victim, own = key_of(agents[1]), key_of(agents[0])
    good = key_text(bytes([7] * 32))
    records = {
        "10.244.200.0-24": (record(200, PublicKey=own, Port=51820), "is our own"),
        "10.244.201.0-24": (record(201, PublicKey=victim, Port=51820), "PublicKey is already used by"),
        "10.244.202.0-24": (record(202, PublicKey=key_text(bytes(32)), Port=51820), "all zero"),
        "10.244.203.0-24": (record(203, PublicKey="short", Port=51820), "PublicKey"),
        "10.244.204.0-24": (record(204, PublicKey=good), "Port"),
        "10.244.205.0-24": (record(205, PublicKey=good, Port=70000), "Port"),
        "10.244.206.0-24": (record(206), "PublicKey: missing"),
        "10.244.0.0-23": (record(207, PublicKey=good, Port=51820), ""),
    }
    with network.stream(source, target) as there, network.stream(target, source) as back:
        for key, (value, _) in records.items():
            network.put_record(key, value)
        for key, (_, reason) in records.items():
            if reason:
                until(f"{key} is refused", lambda key=key: key in agents[0].refused_records())
                assert reason in agents[0].refused_records()[key]
        until("enough was sent", lambda: there.sent > 400)
    assert (there.lost(), back.lost()) == (0, 0)
    peers = {line[0]: line[3] for line in shown(network, "node1")[1:]}
    assert peers.keys() == {victim, good}
    assert str(agents[1].subnet()) in peers[victim].split(",")


def test_the_backend_of_a_running_cluster_is_another_live(network):
    agents = network.nodes(2)
    pods_of(network, agents)
    subnets = [agent.subnet() for agent in agents]
    for count, (kind, device) in enumerate(
        (("host-gw", "eth0"), ("vxlan", "flannel.1"), ("host-gw", "eth0"), ("wireguard", "flannel-wg"))
    ):
        network.config(Backend={"Type": kind})
        for agent in agents:
            until(
                "it follows",
                lambda agent=agent, device=device: agent.status()["device"]["name"] == device and well(agent),
                30,
            )
        fitting = [end for agent in agents for end in network.pod_ends(agent, f"p{count}")]  # made for the MTU of now
        until("pods reach each other", lambda fitting=fitting: all_reach(fitting), 25)
        with Wires(fitting) as wires:
            assert all(cell.ok for cell in wires.all())
        for agent in agents:
            links = network.run(agent.node, "ip", "-o", "link")
            assert links.count("flannel") == (device != "eth0"), "no device of the backend before is left"
            tables = network.run(agent.node, "nft", "list", "tables")
            assert len({line.split()[2].split("-")[1] for line in tables.splitlines() if "overlay-" in line}) == 1
    assert [agent.subnet() for agent in agents] == subnets


def test_a_family_that_is_switched_off_costs_the_other_nothing(tmp_path):
    with closing(World(tmp_path / "world")) as world:
        world.use(4, 6, Backend=BACKEND)
        agents = world.nodes(2)
        ends = pods_of(world, agents)
        source, target = (next(e for e in ends if e.node == node and e.family == 4) for node in ("node1", "node2"))
        index = world.index("node1", "flannel-wg")
        with world.stream(source, target) as there, world.stream(target, source) as back:
            world.use(4, Backend=BACKEND)
            for agent in agents:
                until("IPv6 is gone", lambda agent=agent: world.index(agent.node, "flannel-wg-v6") == 0, 20)
            until("enough was sent", lambda sent=there.sent: there.sent > sent + 300)
        assert (there.lost(), back.lost()) == (0, 0)
        assert world.index("node1", "flannel-wg") == index, "the same device"
        assert agents[0].events("guard.mended") == agents[0].events("nat.mended") == []
        for agent in agents:
            until("nothing is wrong", lambda agent=agent: well(agent), 20)


def test_a_backend_that_cannot_be_made_puts_nothing_on_the_one_before(network):
    """Else packets that were to be encrypted would go out as they are. (No kernel has a program in ipip's place.)"""
    network.config(Backend={"Type": "host-gw"})
    agents = network.nodes(2)
    pods_of(network, agents)
    agents[0].stop()
    one = network.agent("node1", "--node-name=node1", run_dir="node1", program=NO_WIREGUARD).wait_ready()
    network.config(Backend=BACKEND)
    until("it says why", lambda: "wireguard-go" in one.problems().get("device", ""), 20)
    routes = network.run("node1", "ip", "route", "show", "proto", "111")
    assert "flannel-wg" not in routes
    assert all("via 192.168.1.3 dev eth0" in line for line in routes.splitlines()), "as planned for host-gw, or none"
    until("it is not ready", lambda: not one.ready(), 30)


NO_WIREGUARD = """
import errno, shutil
from overlay.kernel.netlink import KernelError
from overlay.kernel.route import links
from overlay.kernel.route.link_wire import WireguardDevice
make = links.Links.create
def create(self, device):
    if isinstance(device, WireguardDevice):
        raise KernelError(errno.EOPNOTSUPP, "Unknown device type")
    make(self, device)
links.Links.create = create
which = shutil.which
shutil.which = lambda name: None if name == "wireguard-go" else which(name)
from overlay.__main__ import main
raise SystemExit(main())
"""


def test_modes_are_changed_live(tmp_path):
    """One device for both families or two: what a family had on a device that stays the other's goes with it."""
    with closing(World(tmp_path / "world")) as world:
        world.use(4, 6, Backend={**BACKEND, "Mode": "auto"})
        agents = world.nodes(2)
        ends = pods_of(world, agents)
        bases = [agent.status()["lease"]["subnet_ipv6"].partition("/")[0] for agent in agents]
        for mode, device6 in (("separate", "flannel-wg-v6"), ("auto", "flannel-wg"), ("ipv6", "flannel-wg")):
            world.use(4, 6, Backend={**BACKEND, "Mode": mode})
            for agent, base in zip(agents, bases, strict=True):
                until(
                    "it follows",
                    lambda agent=agent, device6=device6: (
                        agent.status()["device_ipv6"]["name"] == device6 and well(agent)
                    ),
                    30,
                )
                shown6 = world.run(agent.node, "ip", "-6", "-o", "addr", "show", "scope", "global").splitlines()
                assert [line.split()[1] for line in shown6 if f"{base}/128" in line] == [device6]
            until("pods reach each other", lambda: all_reach(ends), 25)


def test_a_peer_without_the_family_that_the_mode_wants_is_told_of(tmp_path):
    with closing(World(tmp_path / "world")) as world:
        world.use(4, 6, Backend={**BACKEND, "Mode": "ipv4"})
        (agent,) = world.nodes(1)
        key = key_text(os.urandom(32))
        world.put_record(
            "0.0.0.0-0&fd00:10:244:77::-64",
            {
                "PublicIP": "0.0.0.0", "PublicIPv6": "fd00:192:168:1::1", "BackendType": "wireguard",
                "BackendData": None, "BackendV6Data": {"PublicKey": key, "Port": 51821},
            },
        )  # fmt: skip
        words = "with Mode ipv4 these records name no address of a family that this node has an underlay of"
        until("it is said", lambda: words in agent.problems().get("endpoints", ""), 20)
        assert "0.0.0.0-0&fd00:10:244:77::-64" in agent.problems()["endpoints"]
        world.use(4, 6, Backend={**BACKEND, "Mode": "auto"})
        until("it is over", lambda: "endpoints" not in agent.problems(), 20)
        assert key in {line[0] for line in shown(world, "node1")[1:]}
