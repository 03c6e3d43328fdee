"""Link and address messages against pyroute2's encoding of the same, and what is read against its decoding."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from lease.families import V4
from lease.model import ip_text, mac_text
from overlay.kernel.route import link_wire, wire


def theirs(kind: type, message_type: int, flags: int, seq: int, header: dict, attrs: list) -> bytes:
    made = kind()
    made["header"] = {"type": message_type, "flags": flags, "sequence_number": seq, "pid": 0}
    for name, value in header.items():
        made[name] = value
    made["attrs"] = attrs
    made.encode()
    return bytes(made.data)


def tree(data: memoryview, depth: int = 0) -> object:
    """Attributes by type, nested ones taken apart: their order, and the bit that says nested, mean nothing to the kernel."""
    nested = {0: (wire.IFLA_LINKINFO,), 1: (link_wire.IFLA_INFO_DATA,)}.get(depth, ())
    return {
        kind: tree(value, depth + 1)
        if kind in nested
        else bytes(value).rstrip(b"\0")
        if len(value) > 4
        else bytes(value)
        for kind, value in wire.attributes(data, 0).items()
    }


def normal(message: bytes, fixed: int) -> tuple:
    length, kind, flags, seq, pid = struct.unpack_from("=LHHLL", message)
    assert length == len(message)
    return kind, flags, seq, pid, message[16 : 16 + fixed], tree(memoryview(message)[16 + fixed :])


@given(
    st.integers(0, (1 << 24) - 1), st.integers(1, 65535), st.integers(1, (1 << 32) - 1), st.integers(1, 1 << 20),
    st.integers(68, 65535), st.integers(1, (1 << 48) - 1), st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_vxlan_device_is_made(vni, port, local, lower, mtu, mac, gbp, learning):
    ours = link_wire.vxlan_create(
        V4, 9, link_wire.VxlanDevice(f"flannel.{vni}", vni, port, local, lower, mtu, mac, gbp, learning)
    )
    data = [
        ("IFLA_VXLAN_ID", vni), ("IFLA_VXLAN_PORT", port), ("IFLA_VXLAN_LOCAL", ip_text(4, local)),
        ("IFLA_VXLAN_LINK", lower), ("IFLA_VXLAN_LEARNING", int(learning)), *([("IFLA_VXLAN_GBP", True)] if gbp else []),
    ]  # fmt: skip
    info = {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]}
    attrs = [
        ("IFLA_IFNAME", f"flannel.{vni}"),
        ("IFLA_ADDRESS", mac_text(mac)),
        ("IFLA_MTU", mtu),
        ("IFLA_LINKINFO", info),
    ]
    assert normal(ours, 16) == normal(theirs(ifinfmsg, 16, 0x1 | 0x400 | 0x200, 9, {}, attrs), 16)


def test_a_link_is_asked_for_and_set_up():
    asked = theirs(ifinfmsg, 18, 0x1, 4, {}, [("IFLA_IFNAME", "flannel.1")])
    assert normal(link_wire.link_by_name(4, "flannel.1"), 16) == normal(asked, 16)
    up = theirs(ifinfmsg, 16, 0x1, 5, {"index": 7, "flags": 1, "change": 1}, [])
    assert normal(link_wire.link_up(5, 7), 16) == normal(up, 16)


def test_an_address_is_added():
    attrs = [("IFA_LOCAL", "10.244.1.0"), ("IFA_ADDRESS", "10.244.1.0")]
    header = {"family": 2, "prefixlen": 32, "index": 7}
    ours = link_wire.address_add(V4, 3, 7, 0x0AF40100, 32)
    assert normal(ours, 8) == normal(theirs(ifaddrmsg, 20, 0x1 | 0x400 | 0x200, 3, header, attrs), 8)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {}),
        ([("IFLA_VXLAN_GBP", True)], {"gbp": True}),
        ([("IFLA_VXLAN_LEARNING", 1)], {"learning": True}),
        ([("IFLA_VXLAN_UDP_CSUM", 0)], {"checksums": False}),
        ([("IFLA_VXLAN_UDP_ZERO_CSUM6_TX", 1)], {"checksums": False}),
        ([("IFLA_VXLAN_UDP_ZERO_CSUM6_RX", 1)], {"checksums": False}),
        ([("IFLA_VXLAN_GROUP", "239.1.2.3")], {"special": "group 239.1.2.3"}),
        ([("IFLA_VXLAN_COLLECT_METADATA", 1)], {"special": "external (collect metadata) mode"}),
        ([("IFLA_VXLAN_L2MISS", 1), ("IFLA_VXLAN_GROUP6", "ff02::1")], {"special": "an IPv6 group and l2miss"}),
        ([("IFLA_VXLAN_LOCAL", "192.168.7.9")], {"local": 0xC0A80709}),
        ([("IFLA_VXLAN_PORT", 4789)], {"port": 4789}),
    ],
)
def test_a_vxlan_device_is_read(more, expected):
    usual = [("IFLA_VXLAN_ID", 5), ("IFLA_VXLAN_PORT", 8472), ("IFLA_VXLAN_LINK", 2), ("IFLA_VXLAN_UDP_CSUM", 1)]
    data = [*(attr for attr in usual if attr[0] not in dict(more)), *more]
    info = {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]}
    attrs = [
        ("IFLA_IFNAME", "flannel.5"),
        ("IFLA_MTU", 1450),
        ("IFLA_ADDRESS", "0a:00:00:00:00:07"),
        ("IFLA_LINKINFO", info),
    ]
    message = theirs(ifinfmsg, 16, 0, 1, {"index": 9, "flags": 1}, attrs)
    plain = link_wire.DeviceAttributes(
        ifindex=9, kind="vxlan", up=True, mtu=1450, mac=0x0A0000000007, vni=5, port=8472, local=0, lower=2, gbp=False,
        learning=False, checksums=True, special="",
    )  # fmt: skip
    assert link_wire.parse_device(memoryview(message)[16:]) == plain._replace(**expected)


def test_a_device_of_another_kind_is_no_vxlan():
    attrs = [("IFLA_IFNAME", "flannel.1"), ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]})]
    found = link_wire.parse_device(memoryview(theirs(ifinfmsg, 16, 0, 1, {"index": 3}, attrs))[16:])
    assert (found.kind, found.vni, found.port, found.up) == ("bridge", -1, -1, False)
