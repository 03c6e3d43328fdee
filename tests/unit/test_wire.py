"""Our packed messages against pyroute2's encoding of the same, attribute by attribute; and what we read back."""

import struct

import pytest
from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from lease.families import V4, V6
from lease.model import ip_number, ip_text, mac_text
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    ELSEWHERE,
    PROTOCOL,
    TUNNEL,
    UNDERLAY,
    FdbValue,
    FoundFdb,
    FoundNeighbour,
    FoundRoute,
    NeighbourValue,
    RouteKey,
    RouteValue,
    fdb_is_ours,
    neighbour_is_ours,
    route_role,
)  # fmt: skip

BASE, MAC, DST = 0x0AF40900, 0x0A0000000009, 0xC0A80109


def theirs(kind: type[nlmsg], message_type: int, flags: int, seq: int, header: dict, attrs: list) -> bytes:
    """What pyroute2 makes of the same."""
    made = kind()
    made["header"] = {"type": message_type, "flags": flags, "sequence_number": seq, "pid": 0}
    for name, value in header.items():
        made[name] = value
    made["attrs"] = attrs
    made.encode()
    return bytes(made.data)


def normal(message: bytes):
    """Header, fixed part and attributes in order of type: the order of attributes means nothing to the kernel."""
    length, kind, flags, seq, pid = struct.unpack_from("=LHHLL", message)
    assert length == len(message)
    fixed = 12
    attrs = wire.attributes(memoryview(message), 16 + fixed)
    return kind, flags, seq, pid, message[16 : 16 + fixed], sorted((k, bytes(v)) for k, v in attrs.items())


ROUTE_HEADER = {"src_len": 0, "tos": 0, "table": 254, "proto": PROTOCOL, "scope": 0, "type": 1}
FORMS = [
    pytest.param(V4, BASE, 24, DST, id="IPv4"),
    pytest.param(V6, ip_number("fd00:10:244:9::", 6), 64, ip_number("fd01::9", 6), id="IPv6"),
]


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize(("family", "base", "length", "dst"), FORMS)
def test_route_add(family, base, length, dst, replace):
    ours = wire.route_add(family, 5, RouteKey(base, length, 10), RouteValue(TUNNEL, base, True, PROTOCOL), 7, replace)
    flags, text = 0x1 | 0x400 | (0x100 if replace else 0x200), ip_text(family.number, base)
    attrs = [("RTA_DST", text), ("RTA_OIF", 7), ("RTA_PRIORITY", 10), ("RTA_GATEWAY", text)]
    header = ROUTE_HEADER | {"family": family.af, "dst_len": length, "flags": 4}
    assert normal(ours) == normal(theirs(rtmsg, 24, flags, 5, header, attrs))


@pytest.mark.parametrize(("family", "base", "length", "dst"), FORMS)
def test_route_delete_of_a_direct_route(family, base, length, dst):
    ours = wire.route_delete(family, 6, RouteKey(base, length, 10), RouteValue(UNDERLAY, dst, False, PROTOCOL), 2)
    base_text, via = ip_text(family.number, base), ip_text(family.number, dst)
    attrs = [("RTA_DST", base_text), ("RTA_OIF", 2), ("RTA_PRIORITY", 10), ("RTA_GATEWAY", via)]
    # as `ip route del` has it
    any_form = ROUTE_HEADER | {"family": family.af, "dst_len": length, "flags": 0, "scope": 255, "type": 0}
    assert normal(ours) == normal(theirs(rtmsg, 25, 0x1, 6, any_form, attrs))


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("family", "base", "length", "dst"), FORMS)
def test_neighbour(family, base, length, dst, add):
    ours = (wire.neighbour_add if add else wire.neighbour_delete)(family, 7, base, NeighbourValue(MAC), 4)
    header = {"family": family.af, "ifindex": 4, "state": 0x80, "flags": 0, "ndm_type": 1}
    attrs = [("NDA_DST", ip_text(family.number, base)), ("NDA_LLADDR", mac_text(MAC))]
    assert normal(ours) == normal(theirs(ndmsg, 28 if add else 29, 0x501 if add else 0x1, 7, header, attrs))


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("family", "base", "length", "dst"), FORMS)
def test_fdb(family, base, length, dst, add):
    ours = (wire.fdb_add if add else wire.fdb_delete)(family, 8, MAC, FdbValue(dst), 4)
    header = {"family": 7, "ifindex": 4, "state": 0x80, "flags": 0x02, "ndm_type": 0}
    attrs = [("NDA_LLADDR", mac_text(MAC)), ("NDA_DST", ip_text(family.number, dst))]
    assert normal(ours) == normal(theirs(ndmsg, 28 if add else 29, 0x501 if add else 0x1, 8, header, attrs))


def test_messages_in_one_buffer_are_told_apart():
    one = wire.fdb_add(V4, 1, MAC, FdbValue(DST), 4)
    two = wire.neighbour_add(V4, 2, BASE, NeighbourValue(MAC), 4)
    assert [message.seq for message in wire.split(one + two)] == [1, 2]
    assert [message.seq for message in wire.split(one + two[:-9])] == [1], "a cut message is not guessed at"
    assert list(wire.split(b"\x00" * 16)) == []


def body(message: bytes) -> memoryview:
    return next(wire.split(message)).body


@pytest.mark.parametrize(("family", "base", "length", "dst"), FORMS)
def test_what_we_write_is_what_we_read(family, base, length, dst):
    key, value = RouteKey(base, length, 10), RouteValue(TUNNEL, base, True, PROTOCOL)
    route = wire.parse_route(family, body(wire.route_add(family, 1, key, value, 7, True)))
    assert route == FoundRoute(key, 7, base, 4, PROTOCOL, ())
    neighbour = body(wire.neighbour_add(family, 1, base, NeighbourValue(MAC), 4))
    assert wire.parse_neighbour(family, neighbour) == FoundNeighbour(4, base, MAC, 0x80, ())
    entry = body(wire.fdb_add(family, 1, MAC, FdbValue(dst), 4))
    assert wire.parse_fdb(family, entry) == FoundFdb(4, MAC, dst, 0x80, ())
    assert wire.parse_neighbour(family, entry) is None
    assert wire.parse_fdb(family, neighbour) is None


def test_what_is_of_the_other_family_is_none_of_ours():
    for family, other in ((V4, V6), (V6, V4)):
        key, value = RouteKey(1, 24, 10), RouteValue(TUNNEL, 1, True, PROTOCOL)
        assert wire.parse_route(other, body(wire.route_add(family, 1, key, value, 7, True))) is None
        assert wire.parse_neighbour(other, body(wire.neighbour_add(family, 1, 1, NeighbourValue(MAC), 4))) is None
        found = wire.parse_fdb(other, body(wire.fdb_add(family, 1, MAC, FdbValue(9), 4)))
        assert found is not None
        assert (found.dst, found.unexpected) == (None, (("dst", family.packed(9)),))


def route(oif=4, protocol=PROTOCOL, via=BASE, flags=4, base=BASE, unexpected=()) -> FoundRoute:
    return FoundRoute(RouteKey(base, 24, 10), oif, via, flags, protocol, unexpected)


ROLES, NETWORK = {4: TUNNEL, 2: UNDERLAY}, (0x0AF40000, 0x0AF4FFFF)


@pytest.mark.parametrize(
    ("found", "role"),
    [
        pytest.param(route(), TUNNEL, id="ours on the tunnel"),
        pytest.param(route(oif=2, via=DST, flags=0), UNDERLAY, id="ours on the underlay"),
        pytest.param(route(protocol=3), TUNNEL, id="flannel's form on the tunnel"),
        pytest.param(route(protocol=3, flags=0), None, id="boot on the tunnel, not onlink: somebody's"),
        pytest.param(route(protocol=3, via=BASE + 1), None, id="boot on the tunnel by another gateway: somebody's"),
        pytest.param(route(protocol=3, oif=2), None, id="flannel's form on the underlay: somebody's"),
        pytest.param(route(protocol=2, via=0, flags=0), None, id="the kernel's own"),
        pytest.param(route(protocol=4), None, id="static on the tunnel: somebody's"),
        pytest.param(route(oif=2, base=0x0B000000), None, id="our number on the underlay, outside our network: another agent's"),
        pytest.param(route(oif=9), ELSEWHERE, id="ours on an earlier underlay"),
        pytest.param(route(oif=9, base=0x0B000000), None, id="our number on another device, outside our network: another agent's"),
        pytest.param(route(protocol=3, unexpected=(("scope", 253),)), None, id="flannel's form, but altered"),
    ],
)  # fmt: skip
def test_what_is_ours(found, role):
    assert route_role(found, ROLES, NETWORK) == role


@pytest.mark.parametrize(
    ("found", "ours"),
    [
        (FoundNeighbour(4, BASE, MAC, 0x80, ()), True),
        (FoundNeighbour(4, BASE, None, 0x01, ()), False),
        (FoundNeighbour(4, BASE, MAC, 0x02, ()), False),
        (FoundNeighbour(4, BASE, MAC, 0x40, ()), False),
        (FoundNeighbour(2, BASE, MAC, 0x80, ()), False),
    ],
    ids=["permanent", "incomplete", "reachable", "noarp", "another device"],
)
def test_which_neighbours_are_ours(found, ours):
    assert neighbour_is_ours(found, 4) == ours


@pytest.mark.parametrize(
    ("found", "ours"),
    [
        (FoundFdb(4, MAC, DST, 0x80, ()), True),
        (FoundFdb(4, 0, DST, 0x80, ()), True),
        (FoundFdb(4, 0x3333_0000_0001, None, 0x80, ()), False),
        (FoundFdb(5, MAC, DST, 0x80, ()), False),
        (FoundFdb(4, MAC, DST, 0x02, ()), False),
    ],
    ids=["a peer", "the default destination", "multicast", "another device", "learned"],
)
def test_which_fdb_entries_are_ours(found, ours):
    assert fdb_is_ours(found, 4) == ours


def test_the_end_of_a_batch_asks_for_an_ack_and_does_nothing():
    (found,) = wire.split(wire.end_mark(9))
    assert (found.kind, found.flags, found.seq, len(found.body)) == (1, 0x1 | 0x4, 9, 0)  # NLMSG_NOOP, REQUEST | ACK


def test_what_rtnetlink_says_of_an_fdb_entry_beside_vxlan_is_no_news():
    """Kernels before 6.13: a second notification with the MAC alone (rtnl_fdb_notify), recorded on 6.1."""
    mac = wire.attr(wire.NDA_LLADDR, MAC.to_bytes(6, "big"))
    header = struct.pack("=BBHlHBB", wire.AF_BRIDGE, 0, 0, 4, 0x80, wire.NTF_SELF, 0)
    assert wire.parse_fdb(V4, memoryview(header + mac)) is None
    cache = wire.attr(wire.NDA_CACHEINFO, bytes(16))
    assert wire.parse_fdb(V4, memoryview(header + mac + cache)) == FoundFdb(4, MAC, None, 0x80, ())
