"""Entries <-> netlink messages by struct. Pure; tests compare every message with pyroute2's encoding of the same.

Why not pyroute2 here: building one message through it costs 1-2 orders of magnitude more, and there are 60,000 of them
for 20,000 peers (facts in docs/decisions.md). Everything rare goes through pyroute2 (device.py).

Source: include/uapi/linux/{netlink,rtnetlink,neighbour,if_link,if_addr}.h.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lease.families import BY_AF, FAMILIES, Family
from overlay.kernel.route.entries import (
    NUD_PERMANENT,
    RT_TABLE_MAIN,
    RTNH_F_ONLINK,
    Address,
    FdbValue,
    FoundFdb,
    FoundNeighbour,
    FoundRoute,
    Link,
    NeighbourValue,
    RouteKey,
    RouteValue,
)

NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE = 1, 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWNETCONF = 80
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
AF_UNSPEC, AF_INET, AF_BRIDGE, AF_INET6 = 0, 2, 7, 10
NTF_SELF, NTF_ROUTER, NTF_EXT_LEARNED = 0x02, 0x80, 0x10
RTN_UNICAST = 1
RTN_UNSPEC = 0
RT_SCOPE_UNIVERSE, RT_SCOPE_NOWHERE = 0, 255
IFF_UP, IFF_LOOPBACK, IFF_NOARP, IFF_LOWER_UP = 0x1, 0x8, 0x80, 0x10000
IFA_F_SECONDARY, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x01, 0x20, 0x80

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_CACHEINFO, RTA_TABLE, RTA_PREF = 1, 4, 5, 6, 7, 12, 15, 20
NDA_DST, NDA_LLADDR, NDA_CACHEINFO, NDA_IFINDEX = 1, 2, 3, 8
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_LINK_NETNSID, IFLA_TARGET_NETNSID, IFA_TARGET_NETNSID = 37, 46, 10
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_VXLAN_PORT, IFLA_VXLAN_GROUP6, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_COLLECT_METADATA = 15, 16, 17, 25
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8

NESTED, KIND = 0x8000, 0x3FFF
"""Of an attribute's type: the bit of one that holds others; the type without that and the byte order's."""
_HEADER = struct.Struct("=LHHLL")
_ATTR = struct.Struct("=HH")


class _Forms(NamedTuple):
    """A family's messages, whole: nlmsghdr, rtmsg or ndmsg, and the attributes that we set, which are filled up to a
    multiple of four bytes."""

    route: struct.Struct
    """RTA_DST, RTA_OIF, RTA_PRIORITY."""
    gateway: struct.Struct
    """RTA_GATEWAY, behind a route."""
    neighbour: struct.Struct
    """NDA_DST, NDA_LLADDR."""
    fdb: struct.Struct
    """NDA_LLADDR, NDA_DST."""


def _forms(size: int) -> _Forms:
    return _Forms(
        struct.Struct(f"=LHHLLBBBBBBBBLHH{size}sHHLHHL"),
        struct.Struct(f"=HH{size}s"),
        struct.Struct(f"=LHHLLBBHlHBBHH{size}sHH6s2x"),
        struct.Struct(f"=LHHLLBBHlHBBHH6s2xHH{size}s"),
    )


_FORMS = {family.number: _forms(family.size) for family in FAMILIES.values()}
RTMSG = struct.Struct("=BBBBBBBBL")
"""struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags."""
_NDMSG = struct.Struct("=BBHlHBB")
_IFINFO = struct.Struct("=BBHlLL")
_IFADDR = struct.Struct("=BBBBL")

_FORM = "scope, type, tos"
_KNOWN_ROUTE = {RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE, RTA_CACHEINFO, RTA_PREF}
"""Those that we set, and two that every dump has."""


ABSENT = (errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL)
"""What the kernel says when it is asked to delete what is not there."""


def route_add(family: Family, seq: int, key: RouteKey, value: RouteValue, oif: int, replace: bool) -> bytes:
    """RTM_NEWROUTE. replace only over a route found to be ours; otherwise EXCL, so that a foreign one is never lost."""
    flags = NLM_F_REQUEST | NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL)
    return _route(family, RTM_NEWROUTE, flags, seq, key, value, oif)


def route_delete(family: Family, seq: int, key: RouteKey, value: RouteValue, oif: int) -> bytes:
    """RTM_DELROUTE. The protocol in it makes the kernel match only a route of that protocol; its scope and type may be any
    (with those of our own form, one that somebody made in another stays, and the kernel says that there is none)."""
    tos = next((int(str(form[3])) for form in value.unexpected if isinstance(form, tuple) and form[0] == _FORM), 0)
    return _route(family, RTM_DELROUTE, NLM_F_REQUEST, seq, key, value, oif, RT_SCOPE_NOWHERE, RTN_UNSPEC, tos)


def _route(
    family: Family, kind: int, flags: int, seq: int, key: RouteKey, value: RouteValue, oif: int,
    scope: int = RT_SCOPE_UNIVERSE, form: int = RTN_UNICAST, tos: int = 0,
) -> bytes:  # fmt: skip
    forms, size = _FORMS[family.number], family.size + 4
    head = forms.route.pack(
        forms.route.size + (forms.gateway.size if value.via else 0), kind, flags, seq, 0,
        family.af, key.length, 0, tos, RT_TABLE_MAIN, value.protocol, scope, form,
        RTNH_F_ONLINK if value.onlink else 0,
        size, RTA_DST, family.packed(key.base), 8, RTA_OIF, oif, 8, RTA_PRIORITY, key.metric,
    )  # fmt: skip
    return head + forms.gateway.pack(size, RTA_GATEWAY, family.packed(value.via)) if value.via else head


def neighbour_add(family: Family, seq: int, address: int, value: NeighbourValue, oif: int) -> bytes:
    """RTM_NEWNEIGH, always replacing: EXCL would fail on an INCOMPLETE entry that traffic made."""
    flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE
    return _neighbour(family, RTM_NEWNEIGH, flags, seq, address, value, oif)


def neighbour_delete(family: Family, seq: int, address: int, value: NeighbourValue, oif: int) -> bytes:
    """RTM_DELNEIGH."""
    return _neighbour(family, RTM_DELNEIGH, NLM_F_REQUEST, seq, address, value, oif)


def _neighbour(family: Family, kind: int, flags: int, seq: int, address: int, value: NeighbourValue, oif: int) -> bytes:
    form = _FORMS[family.number].neighbour
    return form.pack(
        form.size, kind, flags, seq, 0,
        family.af, 0, 0, oif, NUD_PERMANENT, 0, RTN_UNICAST,
        family.size + 4, NDA_DST, family.packed(address), 10, NDA_LLADDR, value.mac.to_bytes(6, "big"),
    )  # fmt: skip


def fdb_add(family: Family, seq: int, mac: int, value: FdbValue, oif: int) -> bytes:
    """RTM_NEWNEIGH of AF_BRIDGE on the device itself; REPLACE changes the destination, an address of `family`, in place."""
    return _fdb(family, RTM_NEWNEIGH, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE, seq, mac, value, oif)


def fdb_delete(family: Family, seq: int, mac: int, value: FdbValue, oif: int) -> bytes:
    """RTM_DELNEIGH of family AF_BRIDGE. With a wrong destination (port, VNI, interface) the kernel says 0 and deletes
    nothing; one with anything unexpected goes with all destinations of its MAC."""
    return _fdb(family, RTM_DELNEIGH, NLM_F_REQUEST, seq, mac, FdbValue(0) if value.unexpected else value, oif)


def _fdb(family: Family, kind: int, flags: int, seq: int, mac: int, value: FdbValue, oif: int) -> bytes:
    form = _FORMS[family.number].fdb
    return form.pack(
        form.size, kind, flags, seq, 0,
        AF_BRIDGE, 0, 0, oif, NUD_PERMANENT, NTF_SELF, 0,
        10, NDA_LLADDR, mac.to_bytes(6, "big"), family.size + 4, NDA_DST, family.packed(value.dst),
    )  # fmt: skip


def route_dump(family: Family, seq: int) -> bytes:
    """All routes of the main table (strict checking filters in the kernel)."""
    body = RTMSG.pack(family.af, 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0) + _ATTR.pack(8, RTA_TABLE)
    return dump_request(RTM_GETROUTE, seq, body + struct.pack("=L", RT_TABLE_MAIN))


def neighbour_dump(family: Family, seq: int, oif: int) -> bytes:
    """The neighbours of one device."""
    body = _NDMSG.pack(family.af, 0, 0, 0, 0, 0, 0) + _ATTR.pack(8, NDA_IFINDEX)
    return dump_request(RTM_GETNEIGH, seq, body + struct.pack("=L", oif))


def fdb_dump(seq: int, oif: int) -> bytes:
    """The forwarding table of one vxlan device; here the device stands in the header."""
    return dump_request(RTM_GETNEIGH, seq, _NDMSG.pack(AF_BRIDGE, 0, 0, oif, 0, 0, 0))


def link_dump(seq: int) -> bytes:
    """All network interfaces."""
    return dump_request(RTM_GETLINK, seq, _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0, 0))


def address_dump(family: Family, seq: int) -> bytes:
    """All addresses of a family."""
    return dump_request(RTM_GETADDR, seq, _IFADDR.pack(family.af, 0, 0, 0, 0))


def link_elsewhere(seq: int, netnsid: int, ifindex: int) -> bytes:
    """An interface of another namespace."""
    where = struct.pack("=HHl", 8, IFLA_TARGET_NETNSID, netnsid)
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, ifindex, 0, 0) + where
    return _HEADER.pack(_HEADER.size + len(body), RTM_GETLINK, NLM_F_REQUEST, seq, 0) + body


def addresses_elsewhere(seq: int, netnsid: int, ifindex: int) -> bytes:
    """The addresses, of both families, of an interface of another namespace."""
    where = struct.pack("=HHl", 8, IFA_TARGET_NETNSID, netnsid)
    return dump_request(RTM_GETADDR, seq, _IFADDR.pack(AF_UNSPEC, 0, 0, 0, ifindex) + where)


def parse_address_elsewhere(body: memoryview) -> tuple[int, int] | None:
    """Family (4 or 6) and address; None for others."""
    family = BY_AF.get(body[0])
    attrs = attributes(body, _IFADDR.size)
    address = attrs.get(IFA_LOCAL, attrs.get(IFA_ADDRESS))
    return None if family is None or address is None else (family.number, int.from_bytes(address, "big"))


def end_mark(seq: int) -> bytes:
    """A message that does nothing but ask for an ACK (NLMSG_NOOP; net/netlink/af_netlink.c netlink_rcv_skb)."""
    return _HEADER.pack(_HEADER.size, NLMSG_NOOP, NLM_F_REQUEST | NLM_F_ACK, seq, 0)


def request(kind: int, seq: int, body: bytes) -> bytes:
    """A request that has one answer."""
    return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST, seq, 0) + body


def dump_request(kind: int, seq: int, body: bytes) -> bytes:
    """A request for all there is."""
    return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, seq, 0) + body


class Message(NamedTuple):
    """One netlink message as received: its header's fields, and its body."""

    kind: int
    flags: int
    seq: int
    sender: int
    body: memoryview


def split(data: bytes | memoryview) -> Iterator[Message]:
    """The messages in what one recv() gave."""
    view = memoryview(data)
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, seq, sender = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield Message(kind, flags, seq, sender, view[at + _HEADER.size : at + length])
        at += (length + 3) & ~3


def is_neighbour(data: bytes) -> bool:
    """Whether a notification is one of a neighbour or FDB entry."""
    return len(data) > 16 and int.from_bytes(data[4:6], sys.byteorder) in (RTM_NEWNEIGH, RTM_DELNEIGH)


def of_neighbours_on(messages: Iterable[bytes], ifindex: int) -> list[bytes]:
    """Of such notifications, one message each, those of one device (ndm_ifindex of the kernel's struct ndmsg)."""
    device = ifindex.to_bytes(4, sys.byteorder)
    return [data for data in messages if data[20:24] == device]


def message(kind: int, flags: int, seq: int, body: bytes) -> bytes:
    """A request with a body of any kind."""
    return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, seq, 0) + body


def attr(kind: int, data: bytes) -> bytes:
    """An attribute, filled up to a multiple of four bytes."""
    return _ATTR.pack(_ATTR.size + len(data), kind) + data + bytes(-len(data) % 4)


def text(value: str) -> bytes:
    """A text as attributes hold it."""
    return value.encode() + b"\0"


def attributes(body: memoryview, offset: int) -> dict[int, memoryview]:
    """The attributes behind a fixed header, by type (without the nested and byte-order bits)."""
    found: dict[int, memoryview] = {}
    end = len(body)
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(body, offset)
        if length < 4 or offset + length > end:
            break
        found[kind & KIND] = body[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def number(attr: memoryview | None) -> int:
    """An attribute in host byte order, 0 where there is none."""
    return 0 if attr is None else int.from_bytes(attr, sys.byteorder)


def address_of(attr: memoryview | None) -> int:
    return 0 if attr is None else int.from_bytes(attr, "big")


def parse_route(family: Family, body: memoryview) -> FoundRoute | None:
    """A unicast route of the main table; None for anything else."""
    af, length, _, tos, table, protocol, scope, kind, flags = RTMSG.unpack_from(body)
    if af != family.af:
        return None
    attrs = attributes(body, RTMSG.size)
    if (number(attrs[RTA_TABLE]) if RTA_TABLE in attrs else table) != RT_TABLE_MAIN:
        return None
    more: list[object] = []
    if scope != RT_SCOPE_UNIVERSE or kind != RTN_UNICAST or tos:
        more.append((_FORM, scope, kind, tos))
    more += [(kind, bytes(attrs[kind])) for kind in sorted(attrs.keys() - _KNOWN_ROUTE)]
    key = RouteKey(address_of(attrs.get(RTA_DST)), length, number(attrs.get(RTA_PRIORITY)))
    return FoundRoute(key, number(attrs.get(RTA_OIF)), address_of(attrs.get(RTA_GATEWAY)), flags, protocol, tuple(more))


def parse_neighbour(family: Family, body: memoryview) -> FoundNeighbour | None:
    """A neighbour; None for anything else."""
    af, _, _, oif, state, flags, _ = _NDMSG.unpack_from(body)
    if af != family.af:
        return None
    attrs = attributes(body, _NDMSG.size)
    if NDA_DST not in attrs:
        return None
    more: tuple[object, ...] = (flags,) if flags & (NTF_ROUTER | NTF_EXT_LEARNED) else ()
    return FoundNeighbour(oif, address_of(attrs[NDA_DST]), _mac(attrs), state, more)


def parse_fdb(family: Family, body: memoryview) -> FoundFdb | None:
    """An entry of a vxlan's own FDB whose underlay is of a family; None for anything else (a bridge's FDB).

    Kernels before 6.13 tell of each add and delete by netlink twice: vxlan does, and then rtnetlink, which knows the MAC
    alone (rtnl_fdb_notify). vxlan always says NDA_CACHEINFO (vxlan_fdb_info), rtnetlink never (nlmsg_populate_fdb_fill).
    """
    af, _, _, oif, state, flags, _ = _NDMSG.unpack_from(body)
    if af != AF_BRIDGE or not flags & NTF_SELF:
        return None
    attrs = attributes(body, _NDMSG.size)
    mac, dst = _mac(attrs), attrs.get(NDA_DST)
    if mac is None or (dst is None and NDA_CACHEINFO not in attrs):
        return None
    # 6, 7, 8: NDA_PORT, NDA_VNI, NDA_IFINDEX of the entry itself; 13: NDA_NH_ID
    more = tuple((kind, bytes(attrs[kind])) for kind in (6, 7, NDA_IFINDEX, 13) if kind in attrs)
    if dst is not None and len(dst) != family.size:
        return FoundFdb(oif, mac, None, state, (*more, ("dst", bytes(dst))))
    return FoundFdb(oif, mac, address_of(dst) if dst is not None else None, state, more)


def _mac(attrs: dict[int, memoryview]) -> int | None:
    found = attrs.get(NDA_LLADDR)
    return int.from_bytes(found, "big") if found is not None and len(found) == 6 else None


def parse_link(body: memoryview) -> Link:
    """A network interface."""
    _, _, _, index, flags, _ = _IFINFO.unpack_from(body)
    attrs = attributes(body, _IFINFO.size)
    kind, port, over = "", 0, 0
    info = attributes(attrs[IFLA_LINKINFO], 0) if IFLA_LINKINFO in attrs else {}
    if (name := info.get(IFLA_INFO_KIND)) is not None:
        kind = bytes(name).rstrip(b"\0").decode("ascii", "replace")
    if kind == "vxlan" and (data := info.get(IFLA_INFO_DATA)) is not None:
        there = attributes(data, 0)
        port = int.from_bytes(there.get(IFLA_VXLAN_PORT, b""), "big")
        if not any(there.get(IFLA_VXLAN_COLLECT_METADATA, b"")):  # such a one listens in both
            over = 6 if IFLA_VXLAN_LOCAL6 in there or IFLA_VXLAN_GROUP6 in there else 4
    name = attrs.get(IFLA_IFNAME)
    mac, netnsid = attrs.get(IFLA_ADDRESS), attrs.get(IFLA_LINK_NETNSID)
    return Link(
        index,
        bytes(name).rstrip(b"\0").decode("utf-8", "replace") if name is not None else "",
        bool(flags & IFF_UP),
        number(attrs.get(IFLA_MTU)),
        int.from_bytes(mac, "big") if mac is not None and len(mac) == 6 else 0,
        kind,
        not flags & (IFF_NOARP | IFF_LOOPBACK) and mac is not None and len(mac) == 6,
        bool(flags & IFF_LOWER_UP),
        bool(flags & IFF_LOOPBACK),
        number(attrs.get(IFLA_MASTER)),
        number(attrs.get(IFLA_LINK)) if netnsid is not None else 0,
        int.from_bytes(netnsid, sys.byteorder, signed=True) if netnsid is not None else -1,
        port,
        over,
    )


def parse_address(family: Family, body: memoryview) -> Address | None:
    """An address of an interface; None for one of another family."""
    af, length, flags, scope, index = _IFADDR.unpack_from(body)
    if af != family.af:
        return None
    attrs = attributes(body, _IFADDR.size)
    local = attrs.get(IFA_LOCAL, attrs.get(IFA_ADDRESS))
    if local is None:
        return None
    if IFA_FLAGS in attrs:
        flags = number(attrs[IFA_FLAGS])
    return Address(
        family.number,
        index,
        address_of(local),
        length,
        scope,
        bool(flags & IFA_F_SECONDARY),
        bool(flags & IFA_F_DEPRECATED),
        bool(flags & IFA_F_PERMANENT),
    )
