"""Where the kernel would send a packet, and by which rule and route: questions and answers as netlink messages. Pure.

Source: include/uapi/linux/{rtnetlink,fib_rules}.h; `ip route get`, `ip rule`.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from lease.families import Family
from overlay.kernel.route import wire
from overlay.kernel.route.entries import RT_TABLE_MAIN

RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTA_SRC, RTA_IIF, RTA_MARK, RTA_IP_PROTO, RTA_DPORT = 2, 3, 16, 27, 29
RTM_F_LOOKUP_TABLE = 0x1000
_FLAGS = {4: RTM_F_LOOKUP_TABLE, 6: 0}
"""By family: IPv6 always says the table, and refuses the flag (net/ipv6/route.c inet6_rtm_valid_getroute_req)."""
FRA_DST, FRA_SRC, FRA_IIFNAME, FRA_PRIORITY, FRA_FWMARK = 1, 2, 3, 6, 10
FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_FWMASK, FRA_OIFNAME, FRA_L3MDEV = 14, 15, 16, 17, 19
FRA_IP_PROTO, FRA_DPORT_RANGE = 22, 24
_OTHER_SELECTORS = {12, 20, 23}
"""FRA_TUN_ID, FRA_UID_RANGE, FRA_SPORT_RANGE: of these we cannot say whether they match."""
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
FR_ACT_TO_TBL, FR_ACT_UNREACHABLE = 1, 7
FIB_RULE_INVERT = 2
RTN_UNICAST, RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT, RTN_THROW = 1, 6, 7, 8, 9
TYPES = {RTN_BLACKHOLE: "blackhole", RTN_UNREACHABLE: "unreachable", RTN_PROHIBIT: "prohibit", RTN_THROW: "throw"}
"""Of routes that lead nowhere, as `ip route` writes them; of rules the same numbers mean the same."""
TABLES = {253: "default", RT_TABLE_MAIN: "main", 255: "local"}
NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES, errno.EXDEV)
"""What the kernel says where a packet would go nowhere: no route; unreachable, or forwarding is off; blackhole; prohibit;
a source that comes by the wrong interface (rp_filter)."""


class Packet(NamedTuple):
    """What the kernel is asked about. source: 0: it says which. iif: the interface by which it comes, 0: it is our own; oif:
    the one that its socket is bound to, 0: none. protocol, port: IP's number, and the destination's port; 0: any."""

    address: int
    source: int = 0
    iif: int = 0
    oif: int = 0
    mark: int = 0
    protocol: int = 0
    port: int = 0


class Way(NamedTuple):
    """Where it would go. via: the gateway, 0: on-link. table: of the route, 0 where none matched and the interface that was
    asked for is believed to have it on its link. error: one of NO_WAY, else 0."""

    oif: int
    source: int
    via: int
    table: int = RT_TABLE_MAIN
    error: int = 0


class Rule(NamedTuple):
    """A routing policy rule. Lengths are -1 where there is no such selector. table: 0 where action is not to look one up.
    suppress: the table's routes of at most so long prefixes do not count, -1: all do. unclear: it has selectors that are
    not known here (source ports, users). protocol: IP's number, 0: any; ports: of the destination, first and last."""

    priority: int
    action: int
    table: int
    source: int
    source_length: int
    destination: int
    destination_length: int
    iif: str
    oif: str
    mark: int
    mask: int
    invert: bool
    suppress: int
    l3mdev: bool
    unclear: bool
    protocol: int = 0
    ports: tuple[int, int] = (0, 0xFFFF)


class AnyRoute(NamedTuple):
    """A route of any table and type. oif: 0 where it has none or several."""

    base: int
    length: int
    table: int
    kind: int
    oif: int
    via: int


def route_lookup(family: Family, seq: int, packet: Packet) -> bytes:
    """`ip route get`."""
    source_length = family.bits if packet.source else 0
    body = wire.RTMSG.pack(family.af, family.bits, source_length, 0, 0, 0, 0, 0, _FLAGS[family.number])
    body += wire.attr(wire.RTA_DST, family.packed(packet.address))
    if packet.source:
        body += wire.attr(RTA_SRC, family.packed(packet.source))
    for kind, value in ((RTA_IIF, packet.iif), (wire.RTA_OIF, packet.oif), (RTA_MARK, packet.mark)):
        if value:
            body += wire.attr(kind, struct.pack("=L", value))
    if packet.protocol:
        body += wire.attr(RTA_IP_PROTO, bytes([packet.protocol]))
    if packet.port:
        body += wire.attr(RTA_DPORT, packet.port.to_bytes(2, "big"))
    return wire.request(wire.RTM_GETROUTE, seq, body)


def parse_lookup(body: memoryview) -> Way:
    """The answer to route_lookup."""
    attrs = wire.attributes(body, wire.RTMSG.size)
    table = wire.number(attrs.get(wire.RTA_TABLE)) if wire.RTA_TABLE in attrs else body[4]
    oif, source, via = (attrs.get(kind) for kind in (wire.RTA_OIF, wire.RTA_PREFSRC, wire.RTA_GATEWAY))
    return Way(wire.number(oif), wire.address_of(source), wire.address_of(via), table)


def rule_dump(family: Family, seq: int) -> bytes:
    """All rules of a family."""
    return wire.dump_request(RTM_GETRULE, seq, struct.pack("=BBBBBBBBL", family.af, 0, 0, 0, 0, 0, 0, 0, 0))


def parse_rule(body: memoryview) -> Rule:
    """A rule (struct fib_rule_hdr: family, dst_len, src_len, tos, table, 2 reserved, action, flags)."""
    _, dst_len, src_len, tos, table, _, _, action, flags = struct.unpack_from("=BBBBBBBBL", body)
    attrs = wire.attributes(body, 12)
    to_table = action == FR_ACT_TO_TBL
    suppress = wire.number(attrs.get(FRA_SUPPRESS_PREFIXLEN)) if FRA_SUPPRESS_PREFIXLEN in attrs else 0xFFFFFFFF
    mark = wire.number(attrs.get(FRA_FWMARK))
    l3mdev = attrs.get(FRA_L3MDEV)
    ports = attrs.get(FRA_DPORT_RANGE)
    return Rule(
        priority=wire.number(attrs.get(FRA_PRIORITY)),
        action=action,
        table=(wire.number(attrs.get(FRA_TABLE)) or table) if to_table else 0,
        source=wire.address_of(attrs.get(FRA_SRC)),
        source_length=src_len if FRA_SRC in attrs else -1,
        destination=wire.address_of(attrs.get(FRA_DST)),
        destination_length=dst_len if FRA_DST in attrs else -1,
        iif=_name(attrs.get(FRA_IIFNAME)),
        oif=_name(attrs.get(FRA_OIFNAME)),
        mark=mark,
        mask=wire.number(attrs.get(FRA_FWMASK)) if FRA_FWMASK in attrs else (0xFFFFFFFF if mark else 0),
        invert=bool(flags & FIB_RULE_INVERT),
        suppress=-1 if suppress == 0xFFFFFFFF else suppress,
        l3mdev=l3mdev is not None and l3mdev[0] != 0,
        unclear=tos != 0 or bool(attrs.keys() & _OTHER_SELECTORS),
        protocol=wire.number(attrs.get(FRA_IP_PROTO)),
        ports=(0, 0xFFFF) if ports is None else struct.unpack("=HH", ports[:4]),
    )


def table_dump(family: Family, seq: int, table: int) -> bytes:
    """All routes of one table (the kernel filters: NETLINK_GET_STRICT_CHK)."""
    body = wire.RTMSG.pack(family.af, 0, 0, 0, 0, 0, 0, 0, 0) + wire.attr(wire.RTA_TABLE, struct.pack("=L", table))
    return wire.dump_request(wire.RTM_GETROUTE, seq, body)


def parse_any_route(body: memoryview) -> AnyRoute:
    """A route of any type."""
    attrs = wire.attributes(body, wire.RTMSG.size)
    table = wire.number(attrs.get(wire.RTA_TABLE)) if wire.RTA_TABLE in attrs else body[4]
    base, oif, via = (attrs.get(kind) for kind in (wire.RTA_DST, wire.RTA_OIF, wire.RTA_GATEWAY))
    return AnyRoute(wire.address_of(base), body[1], table, body[7], wire.number(oif), wire.address_of(via))


def _name(value: memoryview | None) -> str:
    return bytes(value).rstrip(b"\0").decode("utf-8", "replace") if value is not None else ""
