"""A pod sends from its own addresses alone: frames of every kind that claim others', with the check off as the control."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import struct
import time
from ipaddress import IPv6Address

import pytest

from lease.model import ip_number, mac_number
from overlay.firewall.antispoof import SETTLED_S
from overlay.lab import netns
from overlay.lab.matrix import End
from tests.support.wait import until
from tests.support.world import made_up_peer

TABLE = "overlay-1-pods"
ROUTER = "fe80::1"


class Port:
    """A pod's eth0 as raw frames."""

    def __init__(self, world, pod: End) -> None:
        self.node = f"{pod.node}-{pod.name.rpartition('-')[2]}"
        self.pod, self.ip = pod, ip_number(pod.address, 4).to_bytes(4, "big")
        link = json.loads(world.run(self.node, "ip", "-j", "addr", "show", "eth0"))[0]
        self.mac = mac_number(link["address"]).to_bytes(6, "big")
        self.v6 = until("it has a link-local address", lambda: self._link_local(world))
        self._socket = netns.inside(
            pod.namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        )
        self._socket.bind(("eth0", 3))
        self._socket.settimeout(0.4)

    def _link_local(self, world) -> bytes:
        found = json.loads(world.run(self.node, "ip", "-j", "-6", "addr", "show", "eth0", "-tentative"))
        texts = [a["local"] for link in found for a in link.get("addr_info", []) if a.get("scope") == "link"]
        return IPv6Address(texts[0]).packed if texts else b""

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def hears(self, payload: bytes) -> bool:
        try:
            while payload not in self._socket.recv(2000):
                pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


def ipv4(source: bytes, target: bytes, payload: bytes) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(payload), 1, 0, 64, 17, 0) + source + target
    head = head[:10] + checksum(head) + head[12:]
    return head + struct.pack(">HHHH", 1000, 7007, 8 + len(payload), 0) + payload


def ipv6(source: bytes, target: bytes, kind: int, body: bytes) -> bytes:
    """ICMPv6: type and body, the checksum over both and the pseudo header (RFC 4443, 2.3)."""
    message = struct.pack(">BBH", kind, 0, 0) + body + bytes(len(body) % 2)
    pseudo = source + target + struct.pack(">IxxxB", len(message), 58)
    message = message[:2] + checksum(pseudo + message) + message[4:]
    return struct.pack(">IHBB", 6 << 28, len(message), 58, 255) + source + target + message


def arp(sender_mac: bytes, sender: bytes, target: bytes) -> bytes:
    return struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + sender_mac + sender + bytes(6) + target


def frames(evil: Port, other: Port, near: Port) -> dict[str, bytes]:
    """What a pod may not send, all of it to `near`; each with its name in it, to be known by."""
    to = near.mac + evil.mac
    router = IPv6Address(ROUTER).packed
    return {
        "ipv4": to + b"\x08\x00" + ipv4(other.ip, near.ip, b"ipv4-spoofed"),
        "beyond": to + b"\x08\x00" + ipv4(b"\x08\x08\x08\x08", near.ip, b"beyond-spoofed"),
        "mac": near.mac + other.mac + b"\x08\x00" + ipv4(evil.ip, near.ip, b"mac-spoofed!"),
        "arp": to + b"\x08\x06" + arp(evil.mac, other.ip, near.ip) + b"arp-spoofed",
        "ipv6": to + b"\x86\xdd" + ipv6(other.v6, near.v6, 128, b"\0\0\0\0ipv6-spoofed"),
        "advertisement": to
        + b"\x86\xdd"
        + ipv6(evil.v6, near.v6, 136, b"\x20\0\0\0" + other.v6 + b"advertisement-spoofed"),
        "router": to + b"\x86\xdd" + ipv6(evil.v6, near.v6, 134, b"\x40\0\x07\x08" + bytes(8) + b"router-spoofed"),
        "redirect": to + b"\x86\xdd" + ipv6(evil.v6, near.v6, 137, bytes(4) + router + other.v6 + b"redirect-spoofed"),
        "tagged": to + b"\x81\x00\x00\x05\x08\x00" + ipv4(other.ip, near.ip, b"tagged-spoofed"),
        "tagged twice": to
        + b"\x81\x00\x00\x05\x81\x00\x00\x06\x08\x00"
        + ipv4(other.ip, near.ip, b"tagged twice-spoofed"),
    }


def honest(evil: Port, near: Port) -> dict[str, bytes]:
    to = near.mac + evil.mac
    solicit = b"\0\0\0\0" + evil.v6
    return {
        "ipv4": to + b"\x08\x00" + ipv4(evil.ip, near.ip, b"ipv4-honest"),
        "arp": to + b"\x08\x06" + arp(evil.mac, evil.ip, near.ip) + b"arp-honest",
        "probe": to + b"\x08\x06" + arp(evil.mac, bytes(4), evil.ip) + b"probe-honest",
        "ipv6": to + b"\x86\xdd" + ipv6(evil.v6, near.v6, 128, b"\0\0\0\0ipv6-honest"),
        "advertisement": to
        + b"\x86\xdd"
        + ipv6(evil.v6, near.v6, 136, b"\x20\0\0\0" + evil.v6 + b"advertisement-honest"),
        "is it free": to + b"\x86\xdd" + ipv6(bytes(16), near.v6, 135, solicit + b"is it free-honest"),
    }


def bound(world, node: str, name: str = "ports6") -> list:
    listed = json.loads(world.run(node, "nft", "-j", "list", "set", "bridge", TABLE, name))["nftables"]
    return listed[1]["set"].get("elem", [])


@pytest.fixture
def ports(world, closing):
    return lambda pod: closing(Port(world, pod))


@pytest.mark.parametrize("checked", [False, True], ids=["control", "checked"])
def test_what_claims_to_be_another_does_not_arrive(world, ports, checked):
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1", f"--pod-antispoof={str(checked).lower()}").wait_ready()
    evil, other, near = (ports(world.pod(agent, name)) for name in ("evil", "other", "near"))
    if checked:
        until("all are bound", lambda: len(bound(world, "node1")) == 3)
    for name, frame in honest(evil, near).items():
        evil.send(frame)
        assert near.hears(f"{name}-honest".encode()), name
    arrived = {}
    for name, frame in frames(evil, other, near).items():
        evil.send(frame)
        arrived[name] = near.hears(f"{name}-spoofed".encode())
    assert arrived == dict.fromkeys(arrived, not checked)
    if checked:
        assert agent.status()["counters"]["dropped_spoofed"] == len(arrived)
        assert agent.problems() == {}


def test_what_a_pod_gives_itself_later_is_not_its_own(world, ports):
    """Nor after the agent was started again, nor when somebody altered the table."""
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1").wait_ready()
    evil, other, near = (ports(world.pod(agent, name)) for name in ("evil", "other", "near"))
    until("all are bound", lambda: len(bound(world, "node1")) == 3)
    world.run(evil.node, "ip", "addr", "add", "10.244.99.99/32", "dev", "eth0")
    world.run(evil.node, "ip", "addr", "add", f"{other.pod.address}/32", "dev", "eth0")
    spoofed = frames(evil, other, near)
    agent = world.restart(agent).wait_ready()
    for command in (
        "",
        f"delete table bridge {TABLE}",
        f"flush set bridge {TABLE} addresses",
        f"flush set bridge {TABLE} ports",
    ):
        if command:
            world.run("node1", "nft", command)
            until(
                "it is mended",
                lambda: len(bound(world, "node1", "addresses")) == len(bound(world, "node1", "ports")) == 3,
            )
        evil.send(honest(evil, near)["ipv4"])
        assert near.hears(b"ipv4-honest")
        evil.send(spoofed["ipv4"])
        assert not near.hears(b"ipv4-spoofed"), command
    assert agent.status()["counters"]["mended_pods"] == 3


@pytest.mark.parametrize("checked", [False, True], ids=["control", "checked"])
def test_nor_is_an_ipv6_address_or_anothers_mac_that_it_takes_at_once(world, ports, checked):
    """Within the seconds in which an interface makes its own link-local address: another pod's, and one that is nobody's."""
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1", f"--pod-antispoof={str(checked).lower()}").wait_ready()
    evil, other, near = (ports(world.pod(agent, name)) for name in ("evil", "other", "near"))
    if checked:
        until("all are bound", lambda: len(bound(world, "node1")) == 3)
    nobodys = IPv6Address("fe80::bad").packed
    for address in (other.v6, nobodys):
        world.run(evil.node, "ip", "addr", "add", f"{IPv6Address(address)}/128", "dev", "eth0", "nodad")
    world.run(evil.node, "ip", "link", "set", "eth0", "address", other.mac.hex(":"))
    spoofed = frames(evil, other, near)
    to = near.mac + evil.mac
    spoofed["nobody's"] = to + b"\x86\xdd" + ipv6(nobodys, near.v6, 128, b"\0\0\0\0nobody's-spoofed")
    end = time.monotonic() + SETTLED_S + 1
    while True:  # at once, at its end, and after it
        last = time.monotonic() > end
        for name in ("ipv6", "advertisement", "nobody's", "mac"):
            evil.send(spoofed[name])
            assert near.hears(f"{name}-spoofed".encode()) is not checked, name
        if last or not checked:
            break
    evil.send(honest(evil, near)["ipv6"])
    assert near.hears(b"ipv6-honest")


def test_pods_that_come_and_go_also_while_no_agent_runs(world, ports):
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1").wait_ready()
    near = ports(world.pod(agent, "near"))
    until("it is bound", lambda: len(bound(world, "node1")) == 1)
    agent.stop()
    late = ports(world.pod(agent, "late"))
    late.send(honest(late, near)["ipv4"])
    assert near.hears(b"ipv4-honest"), "it has its network without an agent"
    assert len(bound(world, "node1")) == 1
    agent = world.restart(agent).wait_ready()
    until("now it is bound, too", lambda: len(bound(world, "node1")) == 2)
    late.close()  # it would keep the namespace
    netns.delete(late.pod.namespace)
    until("its port is forgotten", lambda: len(bound(world, "node1", "addresses")) == 1)
    world.pod(agent, "next")
    until("and the next is bound", lambda: len(bound(world, "node1")) == 2)
    world.settled(agent)
    assert agent.problems() == {}
    assert not agent.events("pods.mended")


def test_two_pods_of_one_address_the_first_has_it(world, ports):
    """What was there before the first agent came is believed, but for one address twice."""
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1", "--pod-antispoof=false").wait_ready()
    first, second, near = (ports(world.pod(agent, name)) for name in ("first", "second", "near"))
    world.run(second.node, "ip", "addr", "add", f"{first.pod.address}/32", "dev", "eth0")
    agent = world.restart(agent).wait_ready()
    until("all are bound", lambda: len(bound(world, "node1")) == 3)
    second.send(frames(second, first, near)["ipv4"])
    assert not near.hears(b"ipv4-spoofed")
    second.send(honest(second, near)["ipv4"])
    assert near.hears(b"ipv4-honest")
    assert agent.events("pods.address_taken")


def test_an_address_that_was_anothers_is_the_pods_once_the_other_is_gone(world, ports):
    """A sandbox that is left over has the address of the pod that took its place."""
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1", "--pod-antispoof=false").wait_ready()
    left, pod, near = (world.pod(agent, name) for name in ("left", "pod", "near"))
    node = f"{pod.node}-{pod.name.rpartition('-')[2]}"
    world.run(node, "ip", "addr", "flush", "dev", "eth0", "scope", "global")
    world.run(node, "ip", "addr", "add", f"{left.address}/24", "dev", "eth0")
    agent = world.restart(agent).wait_ready()
    until("all are bound", lambda: len(bound(world, "node1")) == 3)
    assert len(bound(world, "node1", "addresses")) == 2
    here, there = ports(dataclasses.replace(pod, address=left.address)), ports(near)

    def arrives() -> bool:
        here.send(honest(here, there)["ipv4"])
        return there.hears(b"ipv4-honest")

    assert not arrives(), "it is another's"
    netns.delete(left.namespace)
    until("it may send from its address", arrives, 20)


@pytest.mark.parametrize("running", [True, False], ids=["while it runs", "over a restart"])
def test_a_veth_that_takes_the_number_of_another_is_not_bound_to_what_that_had(world, ports, running):
    """Plugins that make the veth in the pod's namespace move its other end out with a number of that namespace, which is
    soon used again."""
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1").wait_ready()
    gone, near = world.pod(agent, "gone"), ports(world.pod(agent, "near"))
    until("both are bound", lambda: len(bound(world, "node1")) == 2)
    names = {link["ifindex"]: link["ifname"] for link in json.loads(world.run("node1", "ip", "-j", "link"))}
    first = min(index for index, name in names.items() if name.startswith("veth"))
    address = str(agent.subnet()).replace("0/24", "200")
    if running:
        agent.process.send_signal(signal.SIGSTOP)
    else:
        agent.stop()
    netns.delete(gone.namespace)
    until("its port is gone", lambda: not world.index("node1", names[first]))
    namespace = world.namespace("node1-next")
    netns.create(namespace)
    world.run(
        "node1-next", "ip", "link", "add", "vethnext", "index", str(first), "type", "veth", "peer", "name", "eth0"
    )
    world.run("node1-next", "ip", "link", "set", "vethnext", "netns", world.namespace("node1"))
    world.run("node1", "ip", "link", "set", "vethnext", "master", "cni0", "up")
    assert world.index("node1", "vethnext") == first
    world.run("node1-next", "ip", "addr", "add", f"{address}/24", "dev", "eth0")
    world.run("node1-next", "ip", "link", "set", "eth0", "up")
    if running:
        agent.process.send_signal(signal.SIGCONT)
    else:
        agent = world.restart(agent).wait_ready()
    here = ports(End("node1-next", "pod", namespace, address, "node1"))
    until("it is bound", lambda: address in [each["concat"][1] for each in bound(world, "node1", "addresses")])
    here.send(honest(here, near)["ipv4"])
    assert near.hears(b"ipv4-honest")
    here.send(
        near.mac
        + here.mac
        + b"\x08\x00"
        + ipv4(ip_number(gone.address, 4).to_bytes(4, "big"), near.ip, b"as the other")
    )
    assert not near.hears(b"as the other")


@pytest.mark.parametrize("change", ["another form", "a lost subnet"])
def test_bindings_outlive_a_restart_that_changes_much(world, ports, change):
    """The table is made anew with an upgrade; the bridge of a lost subnet is in no list any more. Without the bindings the
    pod had what it gave itself meanwhile."""
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1").wait_ready()
    evil, other, near = (ports(world.pod(agent, name)) for name in ("evil", "other", "near"))
    until("all are bound", lambda: len(bound(world, "node1")) == 3)
    before = agent.subnet()
    agent.stop()
    world.run(evil.node, "ip", "addr", "add", "10.244.99.99/32", "dev", "eth0")
    if change == "another form":
        world.run("node1", "nft", f"delete set bridge {TABLE} ends; add chain bridge {TABLE} more")
    else:
        key = str(before).replace("/", "-")
        world.drop_record(key)
        world.put_record(key, made_up_peer(77))
    agent = world.restart(agent).wait_ready()
    assert (agent.subnet() == before) == (change == "another form")
    world.settled(agent)
    evil.send(honest(evil, near)["ipv4"])
    assert near.hears(b"ipv4-honest")
    evil.send(near.mac + evil.mac + b"\x08\x00" + ipv4(bytes((10, 244, 99, 99)), near.ip, b"given itself"))
    assert not near.hears(b"given itself")
    if change == "a lost subnet":
        world.pod(agent, "late")
        until("pods of the new bridge are bound, too", lambda: len(bound(world, "node1")) == 4)
