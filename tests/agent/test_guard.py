"""Who may send VXLAN to a node, and who may not: shown by frames that are forged, with the guard off as the control."""

from __future__ import annotations

import socket
import struct

import pytest

from lease.model import ip_number, mac_number
from overlay.lab import netns, topology
from overlay.lab.matrix import End
from tests.support.wait import until

PORT, UDP_PORT = 8472, 7007
TABLE = "overlay-1-guard"


def frame(mac: str, source: str, target: str, payload: bytes, vni: int = 1) -> bytes:
    """VXLAN (RFC 7348) around Ethernet, IPv4 and UDP; a UDP checksum of zero is none (RFC 768)."""
    udp = struct.pack(">HHHH", 1234, UDP_PORT, 8 + len(payload), 0) + payload
    ends = ip_number(source, 4).to_bytes(4, "big") + ip_number(target, 4).to_bytes(4, "big")
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + ends
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    macs = mac_number(mac).to_bytes(6, "big") + bytes.fromhex("0a0000000001")
    return struct.pack(">BxxxI", 8, vni << 8) + macs + b"\x08\x00" + head + udp


class Listener:
    """A pod's UDP socket, and what came to it."""

    def __init__(self, pod: End) -> None:
        self.address = pod.address
        self._socket = netns.inside(pod.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._socket.bind((pod.address, UDP_PORT))
        self._socket.settimeout(0.5)

    def hears(self, payload: bytes) -> bool:
        try:
            while self._socket.recv(2000) != payload:
                pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def send(namespace: str, source: str, target: str, data: bytes) -> None:
    def act() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)  # a subnet's .0 is one before 5.14
            sender.bind((source, 0))
            sender.sendto(data, (target, PORT))

    netns.inside(namespace, act)


@pytest.fixture
def listener(closing):
    return lambda pod: closing(Listener(pod))


@pytest.mark.parametrize("guarded", [False, True], ids=["control", "guarded"])
def test_a_frame_from_no_peer_never_reaches_a_pod(world, listener, guarded):
    world.config()
    flag = f"--vxlan-guard={str(guarded).lower()}"
    agents = [world.agent(world.node(number), f"--node-name=node{number}", flag).wait_ready() for number in (1, 2)]
    until("they know each other", lambda: world.peers("node1") == world.peers("node2") == 1)
    pod, other = world.pod(agents[0], "pod"), world.pod(agents[1], "pod")
    there = listener(pod)
    before = agents[0].status()["counters"]["dropped_from_unknown_senders"] if guarded else 0  # of a peer not known yet
    forged = frame(agents[0].mac(), other.address, pod.address, b"forged")
    send(topology.underlay_name(world.lab), topology.GATEWAY, "192.168.1.2", forged)
    assert there.hears(b"forged") != guarded
    # the peer itself is heard, by its own address and by its tunnel
    send(
        world.namespace("node2"),
        "192.168.1.3",
        "192.168.1.2",
        frame(agents[0].mac(), other.address, pod.address, b"peer"),
    )
    assert there.hears(b"peer")
    if guarded:
        counters = agents[0].status()["counters"]
        assert counters["dropped_from_unknown_senders"] == before + 1
        assert counters["dropped_from_pods"] == 0


@pytest.mark.parametrize("guarded", [False, True], ids=["control", "guarded"])
def test_a_pod_sends_no_vxlan_to_a_node(world, listener, guarded):
    """Neither to another, by way of its own (whose address is a peer's), nor to its own; by none of their addresses, also those
    of the pod network, which pods may reach; from its own address or a peer's. The guard alone: a pod's port is not bound."""
    world.config()
    flags = (f"--vxlan-guard={str(guarded).lower()}", "--ip-masq", "--pod-antispoof=false")
    agents = [world.agent(world.node(number), f"--node-name=node{number}", *flags).wait_ready() for number in (1, 2)]
    until("they know each other", lambda: world.peers("node1") == world.peers("node2") == 1)
    evil, pod, near = world.pod(agents[0], "evil"), world.pod(agents[1], "pod"), world.pod(agents[0], "near")
    far, here = listener(pod), listener(near)
    tried = 0
    for agent, ear, target, public_ip in ((agents[1], far, pod, "192.168.1.3"), (agents[0], here, near, "192.168.1.2")):
        base, sources = str(agent.subnet()).removesuffix("0/24"), [evil.address]
        if agent is agents[0]:  # a peer's, to its own node
            netns_run(world, evil, "ip addr add 192.168.1.3/32 dev eth0")
            sources.append("192.168.1.3")
        for there in (public_ip, f"{base}1", f"{base}0"):
            for source in sources:
                tried += 1
                payload = f"{there} from {source}".encode()
                send(evil.namespace, source, there, frame(agent.mac(), "10.244.77.7", target.address, payload))
                assert ear.hears(payload) != guarded, payload
    if guarded:
        dropped = [agent.status()["counters"]["dropped_from_pods"] for agent in agents]
        assert sum(dropped) == tried, dropped
    # from pod to pod any port is free
    plain = netns.inside(pod.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with plain:
        plain.bind((pod.address, PORT))
        plain.settimeout(10)
        send(evil.namespace, evil.address, pod.address, b"hello")
        assert plain.recv(100) == b"hello"


def netns_run(world, pod: End, command: str) -> None:
    world.run(f"{pod.node}-{pod.name.rpartition('-')[2]}", *command.split())


def addresses(world, node: str) -> str:
    return world.run(node, "nft", "list", "set", "ip", TABLE, "vteps")


def test_what_somebody_does_to_the_table_is_undone(world):
    first, _ = world.nodes(2)
    assert "192.168.1.3" in addresses(world, "node1")
    world.settled(first)
    for memory in ("unknown_senders", "beside_sources"):  # who sent before his record had come here is remembered
        world.run("node1", "nft", f"flush set ip {TABLE} {memory}")
    ruleset = world.run("node1", "nft", "-s", "list", "table", "ip", TABLE)
    for command in (
        f"delete table ip {TABLE}", f"flush set ip {TABLE} vteps", f"flush chain ip {TABLE} input",
        f"insert rule ip {TABLE} input accept", f"delete element ip {TABLE} vteps {{ 192.168.1.3 }}",
        f"add element ip {TABLE} pod_interfaces {{ lo }}", f"flush set ip {TABLE} pod_interfaces",
    ):  # fmt: skip
        world.run("node1", "nft", command)
        until(
            f"{command}: undone",
            lambda: world.run("node1", "nft", "-s", "list", "ruleset").find(ruleset.strip()) >= 0,
        )
    assert first.status()["counters"]["mended_guard"] >= 5
    world.run("node1", "nft", f"add element ip {TABLE} vteps {{ 192.168.1.99 }}")
    world.settled(first)
    assert "192.168.1.99" in addresses(world, "node1"), "one too many is given its time"


def test_peers_come_and_go(world):
    first, second = world.nodes(2)
    second.stop()
    [key] = [key for key, record in world.records().items() if record["PublicIP"] == "192.168.1.3"]
    world.put_record(
        "10.244.200.0-24",
        {"PublicIP": "192.168.1.40", "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:40"},
         "OverlaySource": "192.168.1.41"},
    )  # fmt: skip
    until(
        "both addresses of the record",
        lambda: "192.168.1.40, 192.168.1.41" in " ".join(addresses(world, "node1").split()),
    )
    world.drop_record(key)
    until("the peer is gone", lambda: world.peers("node1") == 1)
    assert "192.168.1.3" in addresses(world, "node1"), "for a minute"
    first.kill()
    before = addresses(world, "node1")
    told = len(first.events("guard"))
    again = world.restart(first).wait_ready()
    assert addresses(world, "node1") == before
    assert len(again.events("guard")) == told, "it was made again"
    assert not again.events("guard.mended")


def test_a_node_whose_frames_leave_by_another_address_says_so(world, listener):
    """Its public IP is a router's, before it. (Here nobody translates: its frames come from its own address.)"""
    world.config()
    agents = [
        world.agent(world.node(1), "--node-name=node1").wait_ready(),
        world.agent(world.node(2), "--node-name=node2", "--public-ip=192.168.1.77").wait_ready(),
    ]
    [record] = [record for record in world.records().values() if record["PublicIP"] == "192.168.1.77"]
    assert record["OverlaySource"] == "192.168.1.3"
    until("it is known", lambda: world.peers("node1") == 1)
    pod, source = world.pod(agents[0], "pod"), world.pod(agents[1], "pod")
    there = listener(pod)
    netns.inside(source.namespace, lambda: _say(source.address, pod.address, b"hello"))
    assert there.hears(b"hello")


def _say(source: str, target: str, data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((source, 0))
        sender.sendto(data, (target, UDP_PORT))


def test_a_stranger_is_named(world):
    """Within a minute: at a check."""
    first, _ = world.nodes(2)
    send(
        topology.underlay_name(world.lab), topology.GATEWAY, "192.168.1.2",
        frame(first.mac(), "10.244.9.9", "10.244.1.1", b"x"),
    )  # fmt: skip
    remembered = ("nft", "list", "set", "ip", TABLE, "unknown_senders")
    until("it is remembered", lambda: topology.GATEWAY in world.run("node1", *remembered))
    again = world.restart(first).wait_ready()
    until("it is named", lambda: f"from {topology.GATEWAY}" in again.problems().get("unknown senders", ""))
    assert again.ready()


@pytest.mark.parametrize("random_ports", [True, False])
def test_no_masqueraded_packet_leaves_from_the_port_of_vxlan(world, random_ports):
    """Conntrack would take a peer's frames for the answers, and hand them to the pod. (The control: other ports are kept.)"""
    world.config()
    flags = ("--ip-masq", f"--ip-masq-fully-random-disable={str(not random_ports).lower()}")
    agent = world.agent(world.node(1), "--node-name=node1", *flags).wait_ready()
    pod = world.pod(agent, "pod")
    outside = netns.inside(topology.underlay_name(world.lab), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with outside:
        outside.bind((topology.GATEWAY, 9999))
        outside.settimeout(10)

        def seen(port: int) -> tuple[str, int]:
            def act() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.bind((pod.address, port))
                    sender.sendto(b"x", (topology.GATEWAY, 9999))

            netns.inside(pod.namespace, act)
            return outside.recvfrom(10)[1]

        for _ in range(20 if random_ports else 1):
            assert seen(PORT)[0] == "192.168.1.2"
            assert seen(PORT)[1] > PORT
        assert random_ports or seen(40_000) == ("192.168.1.2", 40_000)
