"""Into the pod network by other ways than a frame of its own: behind another's frame, beside the tunnel, by a container that
shares the node's address. Each with the guard off as the control."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from lease.model import ip_number
from overlay.lab import matrix, netns, topology
from overlay.lab.matrix import End
from tests.agent.test_guard import PORT, UDP_PORT, Listener, frame, send
from tests.support.wait import until

SOL_UDP, UDP_SEGMENT = 17, 103
guarded_or_not = pytest.mark.parametrize("guarded", [False, True], ids=["control", "guarded"])
CONTAINERS = "172.17.0"
"""A network of docker's, on node1."""


@pytest.fixture
def listener(closing) -> Callable[[End], Listener]:
    return lambda pod: closing(Listener(pod))


def two_nodes(world, guarded: bool, *flags: str, **config: object):
    world.config(**config)
    flags = (f"--vxlan-guard={str(guarded).lower()}", *flags)
    agents = [world.agent(world.node(number), f"--node-name=node{number}", *flags).wait_ready() for number in (1, 2)]
    for agent in agents:
        until("it has its peer", lambda agent=agent: agent.status()["peers"] and not agent.status()["differences"])
    return agents, [world.pod(agent, "pod") for agent in agents]


def dropped(agent, what: str) -> int:
    return agent.status()["counters"].get(f"dropped_{what}", 0)


def send_segments(namespace: str, source: str, target: str, frames: list[bytes]) -> None:
    """One datagram for the kernel, taken apart where it is read (udp(7))."""
    assert len({len(each) for each in frames}) == 1

    def act() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((source, 0))
            sender.setsockopt(SOL_UDP, UDP_SEGMENT, len(frames[0]))
            sender.sendto(b"".join(frames), (target, PORT))

    netns.inside(namespace, act)


@guarded_or_not
def test_a_frame_behind_one_of_another_network(world, listener, guarded):
    """A filter sees the datagram as the first of its segments says it is."""
    (agent, _), (pod, other) = two_nodes(world, guarded)
    there, underlay = listener(pod), topology.underlay_name(world.lab)
    before = dropped(agent, "from_unknown_senders") if guarded else 0  # of a peer that was not known yet
    frames = [frame(agent.mac(), other.address, pod.address, b"behind", vni) for vni in (99, 1)]
    send_segments(underlay, topology.GATEWAY, "192.168.1.2", frames)
    assert there.hears(b"behind") != guarded
    if not guarded:
        return
    assert dropped(agent, "from_unknown_senders") - before in (1, 2), "5.10 takes it apart on the way"
    # a peer's datagram is taken apart as ever
    send_segments(world.namespace("node2"), "192.168.1.3", "192.168.1.2", frames[1:] * 2)
    assert there.hears(b"behind")


def test_a_port_that_two_networks_share_is_said(world, listener):
    """There the other's frames must pass, and what is behind them does."""
    (agent, _), (pod, other) = two_nodes(world, True)
    there, underlay = listener(pod), topology.underlay_name(world.lab)
    world.run("node1", "ip", "link", "add", "flannel.9", "type", "vxlan", "id", "9", "dstport", "8472", "local",
              "192.168.1.2", "nolearning")  # fmt: skip
    until("it is said", lambda: "flannel.9 uses" in agent.problems().get("shared port", ""))
    assert agent.ready()
    send(underlay, topology.GATEWAY, "192.168.1.2", frame(agent.mac(), other.address, pod.address, b"theirs", 9))
    assert dropped(agent, "from_unknown_senders") == 0, "not ours to judge"
    send(underlay, topology.GATEWAY, "192.168.1.2", frame(agent.mac(), other.address, pod.address, b"ours", 1))
    assert not there.hears(b"ours")
    assert dropped(agent, "from_unknown_senders") == 1
    world.run("node1", "ip", "link", "del", "flannel.9")
    until("it is over", lambda: "shared port" not in agent.problems())
    send(underlay, topology.GATEWAY, "192.168.1.2", frame(agent.mac(), other.address, pod.address, b"theirs", 9))
    assert dropped(agent, "from_unknown_senders") == 1, "of a table that was made again"


def send_plain(namespace: str, source: str, target: str, payload: bytes, protocol: int = 17) -> None:
    """UDP in IPv4, from any address (raw(7))."""
    udp = struct.pack(">HHHH", 1234, UDP_PORT, 8 + len(payload), 0) + payload
    ends = ip_number(source, 4).to_bytes(4, "big") + ip_number(target, 4).to_bytes(4, "big")
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, protocol, 0) + ends

    def act() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            sender.sendto(head + udp, (target, 0))

    netns.inside(namespace, act)


@pytest.mark.parametrize("rp_filter", [0, 2])
@guarded_or_not
def test_plain_packets_of_a_neighbour_in_the_name_of_pods(world, listener, guarded, rp_filter):
    (agent, _), (pod, other) = two_nodes(world, guarded)
    there, underlay = listener(pod), topology.underlay_name(world.lab)
    for name in ("all", "eth0"):
        world.run("node1", "sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter={rp_filter}")
    subnet = str(agent.subnet())
    world.run("underlay", "ip", "route", "add", subnet, "via", "192.168.1.2")
    own = f"{subnet.removesuffix('0/24')}77"
    for number, source in enumerate((other.address, own, "10.244.254.9"), start=1):
        send_plain(underlay, source, pod.address, source.encode())
        assert there.hears(source.encode()) != guarded, source
        assert not guarded or dropped(agent, "beside_the_tunnel") == number
    # whom the network does not know may come, as ever: routers may lead to pods
    send_plain(underlay, topology.GATEWAY, pod.address, b"a client")
    assert there.hears(b"a client")


def test_pods_reach_nodes_and_their_peers_as_they_did(world):
    """Without masquerade a pod's packets reach another node's own address beside the tunnel."""
    agents, there = two_nodes(world, True)
    there.append(world.pod(agents[0], "near"))
    nodes = [
        End(agent.node, "node", world.namespace(agent.node), f"192.168.1.{2 + at}", agent.node)
        for at, agent in enumerate(agents)
    ]
    with matrix.Wires([*there, *nodes]) as wires:
        cells = wires.all()
    assert len(cells) > 6
    assert all(cell.ok for cell in cells), cells
    assert [dropped(agent, "beside_the_tunnel") for agent in agents] == [0, 0]


def test_peers_that_are_reached_directly_may_come_so(world, listener):
    (agent, second), (pod, other) = two_nodes(world, True, Backend={"Type": "vxlan", "DirectRouting": True})
    there, underlay = listener(pod), topology.underlay_name(world.lab)
    with world.stream(other, pod) as stream:
        world.restart(agent).wait_ready()
        assert "eth0" in world.run("node2", "ip", "route", "get", pod.address)
        until("packets pass", lambda: len(stream.came) > 20)
    assert stream.lost() == 0
    world.run("underlay", "ip", "route", "add", str(agent.subnet()), "via", "192.168.1.2")
    send_plain(underlay, "10.244.254.9", pod.address, b"of no peer")
    assert not there.hears(b"of no peer")
    send_plain(underlay, other.address, pod.address, b"as its neighbour")
    assert there.hears(b"as its neighbour"), "SECURITY.md says so"
    del second


def test_a_neighbour_that_sees_the_link_wider_is_named(world, listener):
    """It sends directly to a node that finds no neighbour in it, and so does not take that."""
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    for number in (1, 2):
        world.node(number)
    world.run("node1", "ip", "addr", "add", "192.168.1.2/32", "dev", "eth0")
    world.run("node1", "ip", "addr", "del", "192.168.1.2/24", "dev", "eth0")
    world.run("node1", "ip", "route", "add", "192.168.1.0/24", "dev", "eth0")
    for name in ("all", "eth0"):
        world.run("node1", "sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")
    agents = [world.agent(f"node{n}", f"--node-name=node{n}", "--iface=eth0").wait_ready() for n in (1, 2)]
    until("they have their peer", lambda: all(len(agent.status()["peers"]) == 1 for agent in agents))
    assert [agent.status()["peers"][0]["path"] for agent in agents] == ["vxlan", "direct"]
    pods = [world.pod(agent, "pod") for agent in agents]
    there = listener(pods[0])
    netns.inside(pods[1].namespace, lambda: _say(pods[1].address, 1234, pods[0].address, UDP_PORT, b"beside"))
    assert not there.hears(b"beside")
    assert dropped(agents[0], "beside_the_tunnel") >= 1, "its agent's probes come so, too"
    told = until("it is named", lambda: agents[0].problems().get("beside the tunnel"), 75)  # looked for each minute
    assert pods[1].address in told
    assert "--underlay-cidr" in told
    assert agents[0].ready()
    agents[0].stop()
    world.agent("node1", "--node-name=node1", "--iface=eth0", "--underlay-cidr=192.168.1.0/24").wait_ready()
    netns.inside(pods[1].namespace, lambda: _say(pods[1].address, 1234, pods[0].address, UDP_PORT, b"expected"))
    assert there.hears(b"expected")


def test_a_pod_that_another_program_attached_keeps_a_subnet_that_the_node_lost(world, listener):
    """Calico beside flannel: a veth without an address, on no bridge, from which nobody tells the subnet."""
    (_agent, _), (pod, _) = two_nodes(world, True)
    there = listener(pod)
    name = world.namespace("node1-theirs")
    netns.create(name)
    for words in (
        f"ip link add cali1 address 02:00:00:00:00:01 type veth peer name eth0 netns {name}",
        "ip link set cali1 up",
        "ip route add 10.244.254.5 dev cali1",
    ):
        world.run("node1", *words.split())
    for words in (
        "ip addr add 10.244.254.5/32 dev eth0",
        "ip link set eth0 up",
        "ip route add 169.254.1.1 dev eth0",
        "ip neigh add 169.254.1.1 dev eth0 lladdr 02:00:00:00:00:01",
        "ip route add default via 169.254.1.1",
    ):
        world.run("node1-theirs", *words.split())
    netns.inside(str(name), lambda: _say("10.244.254.5", 1234, pod.address, UDP_PORT, b"of ours once"))
    assert there.hears(b"of ours once")


@pytest.fixture
def container(world) -> Iterator[Callable[[], str]]:
    """A namespace behind a bridge of docker's, which masquerades it behind node1, ports kept."""

    def make() -> str:
        name = world.namespace("node1-container")
        netns.create(name)
        world.run("node1", "ip", "link", "add", "docker0", "type", "bridge")
        world.run("node1", "ip", "addr", "add", f"{CONTAINERS}.1/16", "dev", "docker0")
        world.run("node1", "ip", "link", "set", "docker0", "up")
        world.run("node1", "ip", "link", "add", "vdocker", "type", "veth", "peer", "name", "eth0", "netns", name)
        world.run("node1", "ip", "link", "set", "vdocker", "master", "docker0", "up")
        world.run("node1-container", "ip", "addr", "add", f"{CONTAINERS}.2/16", "dev", "eth0")
        world.run("node1-container", "ip", "link", "set", "eth0", "up")
        world.run("node1-container", "ip", "route", "add", "default", "via", f"{CONTAINERS}.1")
        world.run("node1", "sysctl", "-qw", "net.ipv4.ip_forward=1")
        world.run("node1", "nft", "add table ip docker; add chain ip docker post { type nat hook postrouting priority 100; };"
                  f" add rule ip docker post ip saddr {CONTAINERS}.0/16 oifname != docker0 masquerade")  # fmt: skip
        return str(name)

    return make


@guarded_or_not
def test_a_container_of_another_program_is_not_taken_for_its_node(world, listener, container, guarded):
    agents, (_, pod) = two_nodes(world, guarded)
    there, inside = listener(pod), container()
    send(inside, f"{CONTAINERS}.2", "192.168.1.3", frame(agents[1].mac(), "10.244.1.9", pod.address, b"as node1"))
    assert there.hears(b"as node1") != guarded
    assert not guarded or dropped(agents[0], "forwarded") == 1
    # other ports are nobody's business, nor is ours where no peer is
    with netns.inside(world.namespace("node2"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as ear:
        ear.bind(("192.168.1.3", 9999))
        ear.settimeout(2)
        netns.inside(inside, lambda: _say(f"{CONTAINERS}.2", 1234, "192.168.1.3", 9999, b"hello"))
        assert ear.recv(10) == b"hello"
    with netns.inside(
        topology.underlay_name(world.lab), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ) as ear:
        ear.bind((topology.GATEWAY, PORT))
        ear.settimeout(2)
        netns.inside(inside, lambda: _say(f"{CONTAINERS}.2", 1234, topology.GATEWAY, PORT, b"theirs"))
        assert ear.recv(10) == b"theirs"


def _say(source: str, port: int, target: str, target_port: int, data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((source, port))
        sender.sendto(data, (target, target_port))


@guarded_or_not
def test_nobody_gets_a_peers_frames_by_masquerade_of_others(world, listener, container, guarded):
    """A container sends from VXLAN's port to one that a peer sends its frames from: they are answers then, to conntrack."""
    agents, (pod, other) = two_nodes(world, guarded)
    there, inside = listener(pod), container()
    netns.inside(inside, lambda: _say(f"{CONTAINERS}.2", PORT, "192.168.1.3", 40000, b"open"))
    honest = frame(agents[0].mac(), other.address, pod.address, b"honest")
    netns.inside(world.namespace("node2"), lambda: _say("192.168.1.3", 40000, "192.168.1.2", PORT, honest))
    assert there.hears(b"honest") == guarded
    assert not guarded or dropped(agents[0], "forwarded") == 1
