"""What keeps a pod from its own address: each with the check off as the control."""

from __future__ import annotations

import json
import struct
from ipaddress import IPv6Address

import pytest

from tests.agent.test_antispoof import Port, arp, bound, ipv6
from tests.support.wait import meanwhile, until

ALL_NODES = IPv6Address("ff02::1").packed
NOWHERE, SOLICIT, ADVERT = bytes(16), 135, 136
PAD = b"\x01\x04" + bytes(4)
checked_or_not = pytest.mark.parametrize("checked", [False, True], ids=["control", "checked"])


@pytest.fixture
def ports(world, closing):
    return lambda pod: closing(Port(world, pod))


def group_of(address: bytes) -> bytes:
    """The solicited-node multicast address (RFC 4291, 2.7.1)."""
    return IPv6Address("ff02::1:ff00:0").packed[:13] + address[13:]


def to_group(evil: Port, group: bytes) -> bytes:
    return b"\x33\x33" + group[12:] + evil.mac + b"\x86\xdd"


def behind_options(packet: bytes) -> bytes:
    """The same ICMPv6 behind a hop-by-hop header that says nothing."""
    options = bytes([packet[6], 0]) + PAD
    length = struct.pack(">H", len(packet) - 40 + len(options))
    return packet[:4] + length + b"\x00" + packet[7:40] + options + packet[40:]


def denials(evil: Port, target: bytes) -> dict[str, bytes]:
    """What makes who checks an address believe that it is another's (RFC 4862, 5.4.3 and 5.4.4)."""
    answer = ipv6(evil.v6, ALL_NODES, ADVERT, b"\x20\0\0\0" + target + b"\x02\x01" + evil.mac)
    probe = ipv6(NOWHERE, group_of(target), SOLICIT, bytes(4) + target)
    return {
        "answer": to_group(evil, ALL_NODES) + answer,
        "answer behind options": to_group(evil, ALL_NODES) + behind_options(answer),
        "probe": to_group(evil, group_of(target)) + probe,
        "probe behind options": to_group(evil, group_of(target)) + behind_options(probe),
    }


def settled(world, node: str, address: str) -> str:
    """What became of an address of eth0, "" while it is being checked."""
    links = json.loads(world.run(node, "ip", "-j", "-6", "addr", "show", "dev", "eth0"))
    (found,) = [each for link in links for each in link.get("addr_info", ()) if each.get("local") == address]
    return "denied" if found.get("dadfailed") else "" if found.get("tentative") else "it holds"


@checked_or_not
def test_nobody_keeps_a_pod_from_an_ipv6_address(world, ports, checked):
    """That its interface makes of its MAC, by answering when it checks it or by a check at the same time."""
    agent = world.agent(world.node(1), "--node-name=node1", f"--pod-antispoof={str(checked).lower()}").wait_ready()
    evil, near = (ports(world.pod(agent, name)) for name in ("evil", "near"))
    if checked:
        until("both are bound", lambda: len(bound(world, "node1")) == 2)
    world.run(near.node, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1", "net.ipv6.conf.eth0.dad_transmits=1")
    address, found = str(IPv6Address(near.v6)), {}
    for kind, frame in denials(evil, near.v6).items():
        world.run(near.node, "ip", "addr", "del", f"{address}/64", "dev", "eth0")
        with meanwhile(lambda _count, frame=frame: evil.send(frame), 0.02):
            world.run(near.node, "ip", "addr", "add", f"{address}/64", "dev", "eth0")
            found[kind] = until("it was checked", lambda: settled(world, near.node, address))
    assert found == dict.fromkeys(found, "it holds" if checked else "denied")
    assert not checked or agent.status()["counters"]["dropped_spoofed"] > len(found)


@checked_or_not
def test_nor_from_an_ipv4_address(world, ports, checked):
    """RFC 5227, 2.1.1: whoever answers from it, asks for it or probes for it too has it."""
    agent = world.agent(world.node(1), "--node-name=node1", f"--pod-antispoof={str(checked).lower()}").wait_ready()
    evil, near = (ports(world.pod(agent, name)) for name in ("evil", "near"))
    if checked:
        until("both are bound", lambda: len(bound(world, "node1")) == 2)
    head = near.mac + evil.mac + b"\x08\x06"
    probe = arp(evil.mac, bytes(4), near.ip)
    answer = arp(evil.mac, near.ip, bytes(4))
    answer = answer[:7] + b"\x02" + answer[8:]
    found = {}
    for name, packet in (("probe", probe), ("answer", answer), ("announcement", arp(evil.mac, near.ip, near.ip))):
        mark = f"{name}-denies".encode()
        evil.send(head + packet + mark)
        found[name] = near.hears(mark)
    near.send(b"\xff" * 6 + near.mac + b"\x08\x06" + arp(near.mac, bytes(4), near.ip) + b"its own check")
    assert evil.hears(b"its own check"), "a pod checks its own address"
    assert found == dict.fromkeys(found, not checked)
