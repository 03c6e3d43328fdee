"""fast.py of IPv6: a peer's three messages at once, and reading a dump. Pure; wire.py says the same in plain words, and
tests compare the two.

Source: include/uapi/linux/{netlink,rtnetlink,neighbour}.h; the order of attributes in a dump: net/ipv6/route.c
rt6_fill_node, net/core/neighbour.c neigh_fill_info, drivers/net/vxlan/vxlan_core.c vxlan_fdb_info.
"""

from __future__ import annotations

import struct

from overlay.kernel.route import wire
from overlay.kernel.route.entries import NUD_PERMANENT, PROTOCOL, RT_TABLE_MAIN, RTNH_F_ONLINK
from overlay.kernel.route.fast import DumpMatcher

_NEIGHBOUR = struct.Struct("=LHHLLBBHlHBBHH16sHH6s2x")
_FDB = struct.Struct("=LHHLLBBHlHBBHH6s2xHH16s")
_ROUTE = struct.Struct("=LHHLLBBBBBBBBLHH16sHHLHHLHH16s")
_ADD = wire.NLM_F_REQUEST | wire.NLM_F_CREATE
_REPLACE, _NEW = _ADD | wire.NLM_F_REPLACE, _ADD | wire.NLM_F_EXCL
PUBLIC_IP, MAC, FORM = slice(61, 77), slice(77, 83), 43
"""In a packed lease of both families (lease/records/packed.py)."""
DUAL = 4
"""The form of such a one; the others say nothing there."""
_LINK_LOCAL = bytes.fromhex("fe80000000000000")
PARTS = (
    slice(0, _NEIGHBOUR.size),
    slice(_NEIGHBOUR.size, _NEIGHBOUR.size + _FDB.size),
    slice(_NEIGHBOUR.size + _FDB.size, None),
)

_ROUTE_SEEN, _ROUTE_SEEN_SIZE = struct.Struct("=4xH10x1s1s10s8s4s16s4sL4s16s4sL"), 136
_NEIGHBOUR_SEEN, _NEIGHBOUR_SEEN_SIZE = struct.Struct("=4xH10x12s4s16s4s6s"), 88
_FDB_SEEN, _FDB_SEEN_SIZE = struct.Struct("=4xH10x12s4s6s2x4s16s"), 80
_EVENT = struct.Struct("=4xH10xB3xl4x4s16s")
_INET6 = bytes([wire.AF_INET6])
_ROUTE_FORM = struct.pack(
    "=BBBBBBL", 0, 0, RT_TABLE_MAIN, PROTOCOL, wire.RT_SCOPE_UNIVERSE, wire.RTN_UNICAST, RTNH_F_ONLINK
)
_MAIN_TABLE = struct.pack("=HHL", 8, wire.RTA_TABLE, RT_TABLE_MAIN)
_ROUTE_MARKS = tuple(
    struct.pack("=HH", size, kind)
    for size, kind in ((20, wire.RTA_DST), (8, wire.RTA_PRIORITY), (20, wire.RTA_GATEWAY), (8, wire.RTA_OIF))
)
_MAC_MARK, _DST_MARK = struct.pack("=HH", 10, wire.NDA_LLADDR), struct.pack("=HH", 20, wire.NDA_DST)


def gateway_of(mac: bytes) -> bytes:
    """The link-local address of a MAC of six bytes (lease.model.link_local), as sixteen bytes."""
    return _LINK_LOCAL + bytes((mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE)) + mac[3:]


def peer_messages(seq: int, base: bytes, length: int, mac: bytes, public_ip: bytes, metric: int, oif: int) -> bytes:
    """The three messages that put a peer reached by tunnel in place, numbered from `seq`: wire.neighbour_add, fdb_add and
    route_add (which must not be there yet). base, public_ip: sixteen bytes in network order; mac: six. The gateway is the
    link-local address of the MAC."""
    gateway = gateway_of(mac)
    return (
        _NEIGHBOUR.pack(
            _NEIGHBOUR.size, wire.RTM_NEWNEIGH, _REPLACE, seq, 0,
            wire.AF_INET6, 0, 0, oif, NUD_PERMANENT, 0, wire.RTN_UNICAST,
            20, wire.NDA_DST, gateway, 10, wire.NDA_LLADDR, mac,
        )
        + _FDB.pack(
            _FDB.size, wire.RTM_NEWNEIGH, _REPLACE, seq + 1, 0,
            wire.AF_BRIDGE, 0, 0, oif, NUD_PERMANENT, wire.NTF_SELF, 0,
            10, wire.NDA_LLADDR, mac, 20, wire.NDA_DST, public_ip,
        )
        + _ROUTE.pack(
            _ROUTE.size, wire.RTM_NEWROUTE, _NEW, seq + 2, 0,
            wire.AF_INET6, length, 0, 0, RT_TABLE_MAIN, PROTOCOL, wire.RT_SCOPE_UNIVERSE, wire.RTN_UNICAST, RTNH_F_ONLINK,
            20, wire.RTA_DST, base, 8, wire.RTA_OIF, oif, 8, wire.RTA_PRIORITY, metric, 20, wire.RTA_GATEWAY, gateway,
        )
    )  # fmt: skip


class DumpMatcher6(DumpMatcher):
    """The same of IPv6, for peers reached by tunnel. metric: of every route."""

    _sizes = (_NEIGHBOUR_SEEN_SIZE, _FDB_SEEN_SIZE, _ROUTE_SEEN_SIZE)
    _event, _dst_mark, _family = _EVENT, _DST_MARK, wire.AF_INET6
    metric = 0

    def _with_address(self, address: bytes) -> int:
        number = self._by_mac.get(int.from_bytes(mac, "big"), 0) if (mac := _mac_of(address)) else 0
        return number if isinstance(number, int) else 0

    def _route(self, data: bytes, at: int) -> int:
        kind, family, length, form, table, mark, dst, mark2, metric, mark3, via, mark4, oif = _ROUTE_SEEN.unpack_from(
            data, at
        )
        if (
            table != _MAIN_TABLE
            or kind != wire.RTM_NEWROUTE
            or family != _INET6
            or (mark, mark2, mark3, mark4) != _ROUTE_MARKS
            or (metric, form, oif) != (self.metric, _ROUTE_FORM, self._oif)
        ):
            return 0
        number = int.from_bytes(dst + length, "big")
        record = self._packed.get(number)
        if record is None or record[FORM] != DUAL:
            return 0
        return number if via == gateway_of(record[MAC]) else 0

    def _neighbour(self, data: bytes, at: int) -> int:
        kind, form, mark, dst, mark2, mac = _NEIGHBOUR_SEEN.unpack_from(data, at)
        if form != self._neighbour_form or kind != wire.RTM_NEWNEIGH or mark != _DST_MARK or mark2 != _MAC_MARK:
            return 0
        number = self._by_mac.get(int.from_bytes(mac, "big"))
        return number if isinstance(number, int) and dst == gateway_of(mac) else 0

    def _fdb(self, data: bytes, at: int) -> int:
        kind, form, mark, mac, mark2, dst = _FDB_SEEN.unpack_from(data, at)
        if form != self._fdb_form or kind != wire.RTM_NEWNEIGH or mark != _MAC_MARK or mark2 != _DST_MARK:
            return 0
        number = self._by_mac.get(int.from_bytes(mac, "big"))
        record = self._packed.get(number) if isinstance(number, int) else None
        if not isinstance(number, int) or record is None or record[FORM] != DUAL:
            return 0
        return number if record[PUBLIC_IP] == dst else 0


def _mac_of(address: bytes) -> bytes | None:
    """The MAC whose link-local address this is."""
    if address[:8] != _LINK_LOCAL or address[11:13] != b"\xff\xfe":
        return None
    return bytes((address[8] ^ 2, address[9], address[10])) + address[13:16]
