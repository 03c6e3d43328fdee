"""VLAN tags beside the frame, as hardware and vlan devices hand them over: nothing hides behind one. Each with the check
off as the control."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lease.model import ip_number, mac_number
from overlay.lab import netns, topology
from overlay.lab.matrix import End
from tests.agent.test_antispoof import Port, bound, frames, honest, ipv4
from tests.agent.test_guard import UDP_PORT, Listener, frame
from tests.agent.test_other_doors import dropped, two_nodes
from tests.support.wait import until

BPF_PROG_LOAD, BPF_PROG_TYPE_SCHED_CLS, BPF_FUNC_SKB_VLAN_PUSH = 5, 3, 18
SYS_BPF = {"x86_64": 321, "aarch64": 280}
EGRESS = 0xFFFFFFF3
"""TC_H_CLSACT, TC_H_MIN_EGRESS."""
VLAN, STACKED = 0x8100, 0x88A8
checked_or_not = pytest.mark.parametrize("checked", [False, True], ids=["control", "checked"])


@pytest.fixture
def ports(world, closing):
    return lambda pod: closing(Port(world, pod))


def pushes(ethertype: int, tag: int) -> int:
    """A program for tc that puts a tag beside each frame (bpf-helpers(7), bpf_skb_vlan_push); its descriptor."""
    steps = (
        (0xB7, 2, socket.htons(ethertype)),
        (0xB7, 3, tag),
        (0x85, 0, BPF_FUNC_SKB_VLAN_PUSH),
        (0xB7, 0, 0),
        (0x95, 0, 0),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=BBhi", op, to, 0, value) for op, to, value in steps))
    licence = ctypes.create_string_buffer(b"GPL")
    asked = struct.pack("=IIQQ", BPF_PROG_TYPE_SCHED_CLS, len(steps), ctypes.addressof(code), ctypes.addressof(licence))
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(SYS_BPF[platform.machine()], BPF_PROG_LOAD, asked.ljust(128, b"\0"), 128)
    if found < 0:
        raise OSError(ctypes.get_errno(), "bpf(BPF_PROG_LOAD)")
    return int(found)


@contextmanager
def tagged(world, node: str, ethertype: int, tag: int) -> Iterator[None]:
    """All that leaves a pod's eth0 has the tag beside it."""
    index, program = world.index(node, "eth0"), pushes(ethertype, tag)
    try:
        world.ipr(node, lambda ipr: ipr.tc("add", "clsact", index))
        world.ipr(node, lambda ipr: ipr.tc("add-filter", "bpf", index, ":1", fd=program, name="tag", parent=EGRESS,
                                           classid=1, direct_action=True))  # fmt: skip
        yield
        world.ipr(node, lambda ipr: ipr.tc("del", "clsact", index))
    finally:
        os.close(program)


@pytest.mark.parametrize(("ethertype", "tag"), [(VLAN, 0), (VLAN, 5), (VLAN, 0xE000), (STACKED, 0), (STACKED, 5)])
@checked_or_not
def test_what_claims_to_be_another_behind_a_tag_beside_the_frame(world, ports, closing, ethertype, tag, checked):
    """Alone, and in front of tags in the frame. A tag of VLAN 0 is a priority: the node and pods take what is behind it."""
    agent = world.agent(world.node(1), "--node-name=node1", f"--pod-antispoof={str(checked).lower()}").wait_ready()
    evil, other, near = (ports(world.pod(agent, name)) for name in ("evil", "other", "near"))
    bridge = json.loads(world.run("node1", "ip", "-j", "addr", "show", "cni0"))[0]
    gateway = next(each["local"] for each in bridge["addr_info"] if each["family"] == "inet")
    ears = [closing(Listener(End("node1", "node", world.namespace("node1"), gateway, "node1")))]
    ears.append(closing(Listener(near.pod)))
    macs = [mac_number(bridge["address"]).to_bytes(6, "big"), near.mac]
    if checked:
        until("all are bound", lambda: len(bound(world, "node1")) == 3)
    with tagged(world, evil.node, ethertype, tag):
        for name in ("ipv4", "arp", "ipv6", "advertisement"):
            evil.send(honest(evil, near)[name])
            assert near.hears(f"{name}-honest".encode()), name
        arrived = {}
        for name, sent in frames(evil, other, near).items():
            evil.send(sent)
            arrived[name] = near.hears(f"{name}-spoofed".encode())
        assert arrived == dict.fromkeys(arrived, not checked)
        assert not checked or agent.status()["counters"]["dropped_spoofed"] >= len(arrived)
        for ear, mac in zip(ears, macs, strict=True):
            target = ip_number(ear.address, 4).to_bytes(4, "big")
            evil.send(mac + evil.mac + b"\x08\x00" + ipv4(other.ip, target, b"as another"))
            assert ear.hears(b"as another") == (not checked and not tag & 0xFFF)


@pytest.mark.parametrize("tags", [(VLAN,), (STACKED,), (VLAN, VLAN)], ids=["802.1Q", "802.1ad", "two"])
@checked_or_not
def test_a_neighbours_packets_with_a_priority_tag(world, closing, tags, checked):
    """Plain ones in the name of pods, and VXLAN: the kernel takes the tag of VLAN 0 off, and the guard sees what it had."""
    (agent, _), (pod, other) = two_nodes(world, checked)
    there, underlay = closing(Listener(pod)), topology.underlay_name(world.lab)
    before = dropped(agent, "from_unknown_senders") if checked else 0  # of a peer that was not known yet
    mac = json.loads(world.run("node1", "ip", "-j", "link", "show", "eth0"))[0]["address"]
    head = mac_number(mac).to_bytes(6, "big") + bytes.fromhex("0a0000000009")
    head += b"".join(each.to_bytes(2, "big") + b"\0\0" for each in tags) + b"\x08\x00"
    gateway, node, pod_ip = (
        ip_number(text, 4).to_bytes(4, "big") for text in (topology.GATEWAY, "192.168.1.2", pod.address)
    )
    own = f"{str(agent.subnet()).removesuffix('0/24')}77"
    sender = closing(netns.inside(underlay, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)))
    sender.bind((topology.BRIDGE, 0))
    for number, source in enumerate((other.address, own, "10.244.254.9"), start=1):
        sender.send(head + ipv4(ip_number(source, 4).to_bytes(4, "big"), pod_ip, source.encode()))
        assert there.hears(source.encode()) != checked, source
        assert not checked or dropped(agent, "beside_the_tunnel") == number
    forged = frame(agent.mac(), other.address, pod.address, b"forged")
    sender.send(head + ipv4(gateway, node, forged).replace(struct.pack(">H", UDP_PORT), struct.pack(">H", 8472), 1))
    assert there.hears(b"forged") != checked
    assert not checked or dropped(agent, "from_unknown_senders") == before + 1
    sender.send(head + ipv4(gateway, pod_ip, b"a client"))
    assert there.hears(b"a client")
