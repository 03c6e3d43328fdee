"""The two things done for every peer at once: its three messages, and reading a dump. Pure.

wire.py says the same in plain words and is what everything else uses; tests compare the two. Whatever is not exactly as we
set it, or as this kernel lays it out, is left to wire.py: another layout costs time, never truth.

Source: include/uapi/linux/{netlink,rtnetlink,neighbour}.h; the order of attributes in a dump: net/ipv4/fib_semantics.c
fib_dump_info, net/core/neighbour.c neigh_fill_info, drivers/net/vxlan/vxlan_core.c vxlan_fdb_info.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping

from overlay.kernel.route import wire
from overlay.kernel.route.entries import NUD_PERMANENT, PROTOCOL, RT_TABLE_MAIN, RTNH_F_ONLINK

_PEER = struct.Struct(
    "=LHHLLBBHlHBBHH4sHH6s2xLHHLLBBHlHBBHH6s2xHH4sLHHLLBBBBBBBBLHH4sHHLHHLHH4s"
)  # fmt: skip
"""A neighbour, an FDB entry and a route by its gateway, one behind the other."""
PUBLIC_IP, MAC = slice(5, 9), slice(9, 15)
"""In a packed lease (lease/records/packed.py)."""
_DIRECT = struct.Struct("=LHHLLBBBBBBBBLHH4sHHLHHLHH4s")
"""A route by a gateway."""
_NEIGHBOUR_SIZE, _FDB_SIZE, _ROUTE_SIZE = 48, 48, 60
PARTS = (
    slice(0, _NEIGHBOUR_SIZE),
    slice(_NEIGHBOUR_SIZE, _NEIGHBOUR_SIZE + _FDB_SIZE),
    slice(_NEIGHBOUR_SIZE + _FDB_SIZE, None),
)
_ADD = wire.NLM_F_REQUEST | wire.NLM_F_CREATE
_REPLACE, _NEW = _ADD | wire.NLM_F_REPLACE, _ADD | wire.NLM_F_EXCL

NEIGHBOURS, FDB, ROUTES = 0, 1, 2
"""The places of the tables (kernel/route/tables.py)."""

# In a dump: nlmsghdr without its length, then rtmsg or ndmsg, then attributes in the kernel's order.
_SIZE = struct.Struct("=L")
_ROUTE_SEEN, _ROUTE_SEEN_SIZE = struct.Struct("=4xH10x1s1s10s8s4s4s4sL4s4s4sL"), 68
_NEIGHBOUR_SEEN, _NEIGHBOUR_SEEN_SIZE = struct.Struct("=4xH10x12s4s4s4s6s"), 76
_FDB_SEEN, _FDB_SEEN_SIZE = struct.Struct("=4xH10x12s4s6s2x4s4s"), 68
_EVENT = struct.Struct("=4xH10xB3xl4x4s6s")
_INET = bytes([wire.AF_INET])
_ROUTE_FORM, _DIRECT_FORM = (
    struct.pack("=BBBBBBL", 0, 0, RT_TABLE_MAIN, PROTOCOL, wire.RT_SCOPE_UNIVERSE, wire.RTN_UNICAST, flags)
    for flags in (RTNH_F_ONLINK, 0)
)
_MAIN_TABLE = struct.pack("=HHL", 8, wire.RTA_TABLE, RT_TABLE_MAIN)
_ROUTE_MARKS = tuple(
    struct.pack("=HH", 8, kind) for kind in (wire.RTA_DST, wire.RTA_PRIORITY, wire.RTA_GATEWAY, wire.RTA_OIF)
)
_MAC_MARK, _DST_MARK = struct.pack("=HH", 10, wire.NDA_LLADDR), struct.pack("=HH", 8, wire.NDA_DST)


def peer_messages(seq: int, base: bytes, length: int, mac: bytes, public_ip: bytes, metric: int, oif: int) -> bytes:
    """The three messages that put a peer reached by tunnel in place, numbered from `seq`: wire.neighbour_add, fdb_add and
    route_add (which must not be there yet). base, public_ip: four bytes in network order; mac: six."""
    return _PEER.pack(
        _NEIGHBOUR_SIZE, wire.RTM_NEWNEIGH, _REPLACE, seq, 0,
        wire.AF_INET, 0, 0, oif, NUD_PERMANENT, 0, wire.RTN_UNICAST, 8, wire.NDA_DST, base, 10, wire.NDA_LLADDR, mac,
        _FDB_SIZE, wire.RTM_NEWNEIGH, _REPLACE, seq + 1, 0,
        wire.AF_BRIDGE, 0, 0, oif, NUD_PERMANENT, wire.NTF_SELF, 0, 10, wire.NDA_LLADDR, mac, 8, wire.NDA_DST, public_ip,
        _ROUTE_SIZE, wire.RTM_NEWROUTE, _NEW, seq + 2, 0,
        wire.AF_INET, length, 0, 0, RT_TABLE_MAIN, PROTOCOL, wire.RT_SCOPE_UNIVERSE, wire.RTN_UNICAST, RTNH_F_ONLINK,
        8, wire.RTA_DST, base, 8, wire.RTA_OIF, oif, 8, wire.RTA_PRIORITY, metric, 8, wire.RTA_GATEWAY, base,
    )  # fmt: skip


def direct_message(seq: int, base: bytes, length: int, public_ip: bytes, metric: int, oif: int) -> bytes:
    """The message that puts the route of a peer on the underlay's own link: wire.route_add (which must not be there yet)."""
    return _DIRECT.pack(
        _ROUTE_SIZE, wire.RTM_NEWROUTE, _NEW, seq, 0,
        wire.AF_INET, length, 0, 0, RT_TABLE_MAIN, PROTOCOL, wire.RT_SCOPE_UNIVERSE, wire.RTN_UNICAST, 0,
        8, wire.RTA_DST, base, 8, wire.RTA_OIF, oif, 8, wire.RTA_PRIORITY, metric, 8, wire.RTA_GATEWAY, public_ip,
    )  # fmt: skip


def some_of(messages: bytes, bits: int, parts: tuple[slice, ...] = PARTS) -> bytes:
    """Of a peer's three messages those of the kinds whose bits are set. parts: where each is, in the order of the tables."""
    return b"".join(messages[part] for kind, part in enumerate(parts) if bits >> kind & 1)


Matched = tuple[list[int], list[memoryview]]
"""Of one buffer of a dump: the numbers of peers whose entry is as it should be, and all other messages."""


class DumpMatcher:
    """Peers, reached by the tunnel `oif` where `set_direct` says nothing else, as reading a dump needs them.

    packed: leases by number, as lease/records/packed.py packs them: public IP at 5, MAC at 9; a number is a subnet's
    base << 8 | length. by_mac: the number of a MAC's peer, a set where it has several. lengths: of all subnets.
    network: the base.
    """

    _sizes = (_NEIGHBOUR_SEEN_SIZE, _FDB_SEEN_SIZE, _ROUTE_SEEN_SIZE)
    _event, _dst_mark, _family = _EVENT, _DST_MARK, wire.AF_INET
    """Of IPv4, as the kernel lays them out; fast6.py has those of IPv6."""

    def __init__(
        self,
        packed: Mapping[int, bytes],
        by_mac: Mapping[int, int | set[int]],
        lengths: tuple[int, ...],
        network: int,
        oif: int,
    ) -> None:
        self._packed, self._by_mac, self._lengths, self._network, self._oif = packed, by_mac, lengths, network, oif
        self._direct: Callable[[bytes], bool] | None = None
        self._underlay = -1
        pack = struct.Struct("=BBHlHBB").pack
        self._neighbour_form = pack(self._family, 0, 0, oif, NUD_PERMANENT, 0, wire.RTN_UNICAST)
        self._fdb_form = pack(wire.AF_BRIDGE, 0, 0, oif, NUD_PERMANENT, wire.NTF_SELF, wire.RTN_UNICAST)

    def set_direct(self, direct: Callable[[bytes], bool], underlay: int) -> None:
        """Some peers are reached without the tunnel, by plain routes on the interface `underlay`: `direct` says which."""
        self._direct, self._underlay = direct, underlay

    def routes(self, data: bytes) -> Matched:
        """A buffer of a route dump."""
        return _match_all(data, self._sizes[ROUTES], self._route)

    def neighbours(self, data: bytes) -> Matched:
        """A buffer of a neighbour dump."""
        return _match_all(data, self._sizes[NEIGHBOURS], self._neighbour)

    def fdb(self, data: bytes) -> Matched:
        """A buffer of an FDB dump."""
        return _match_all(data, self._sizes[FDB], self._fdb)

    def of(self, table: int) -> Callable[[bytes], Matched]:
        """The one of these three that is a table's: neighbours, FDB, routes."""
        return (self.neighbours, self.fdb, self.routes)[table]

    def event(self, data: bytes) -> tuple[int, bool, int] | None:
        """A notification of a neighbour or FDB entry (one message): its table, whether the entry is gone, and the number of
        the peer whose entry is as it should be, or was of that key; 0: ask wire.py. None: of another device."""
        if len(data) < self._event.size:
            return NEIGHBOURS, False, 0
        message, family, oif, mark, key = self._event.unpack_from(data)
        if oif != self._oif:
            return None
        table = FDB if family == wire.AF_BRIDGE else NEIGHBOURS
        if message == wire.RTM_DELNEIGH:
            if table == FDB:
                ours = mark == _MAC_MARK and len(data) == self._sizes[FDB]  # shorter: rtnetlink's own (wire.parse_fdb)
                number = self._by_mac.get(int.from_bytes(key[:6], "big"), 0) if ours else 0
                return table, True, self._by_tunnel(number if isinstance(number, int) else 0)
            return table, True, self._by_tunnel(self._with_address(key) if mark == self._dst_mark else 0)
        if table == FDB:
            return table, False, self._fdb(data, 0) if len(data) == self._sizes[FDB] else 0
        return table, False, self._neighbour(data, 0) if len(data) == self._sizes[NEIGHBOURS] else 0

    def put_by_us(self, data: Iterable[bytes]) -> list[int]:
        """Notifications of FDB entries: whose entries are as they should be, where each says that of one; else nothing: they
        are to be looked at one by one."""
        size, match = self._sizes[FDB], self._fdb
        numbers = [match(each, 0) if len(each) == size else 0 for each in data]
        return numbers if all(numbers) else []

    def _by_tunnel(self, number: int) -> int:
        """A peer, 0 for one that is reached without the tunnel."""
        direct = number and self._direct is not None and self._direct(self._packed[number])
        return 0 if direct else number

    def _with_address(self, address: bytes) -> int:
        """The one peer whose neighbour entry has that address (its first four bytes), 0 where there is none, or several."""
        base = int.from_bytes(address[:4], "big") << 8
        found = [base | length for length in self._lengths if base | length in self._packed]
        return found[0] if len(found) == 1 else 0

    def _route(self, data: bytes, at: int) -> int:
        kind, family, length, form, table, mark, dst, mark2, metric, mark3, via, mark4, oif = _ROUTE_SEEN.unpack_from(
            data, at
        )
        if (
            table != _MAIN_TABLE
            or kind != wire.RTM_NEWROUTE
            or family != _INET
            or (mark, mark2, mark3, mark4) != _ROUTE_MARKS
        ):
            return 0
        number = int.from_bytes(dst + length, "big")
        record = self._packed.get(number)
        if record is None or metric != 1 + (((number >> 8) - self._network) >> (32 - (number & 255))):
            return 0
        if self._direct is not None and self._direct(record):
            return number if via == record[PUBLIC_IP] and oif == self._underlay and form == _DIRECT_FORM else 0
        return number if via == dst and oif == self._oif and form == _ROUTE_FORM else 0

    def _neighbour(self, data: bytes, at: int) -> int:
        kind, form, mark, dst, mark2, mac = _NEIGHBOUR_SEEN.unpack_from(data, at)
        if form != self._neighbour_form or kind != wire.RTM_NEWNEIGH or mark != _DST_MARK or mark2 != _MAC_MARK:
            return 0
        base = int.from_bytes(dst, "big") << 8
        for length in self._lengths:
            record = self._packed.get(base | length)
            if record is not None and record[MAC] == mac:
                return 0 if self._direct is not None and self._direct(record) else base | length
        return 0

    def _fdb(self, data: bytes, at: int) -> int:
        kind, form, mark, mac, mark2, dst = _FDB_SEEN.unpack_from(data, at)
        if form != self._fdb_form or kind != wire.RTM_NEWNEIGH or mark != _MAC_MARK or mark2 != _DST_MARK:
            return 0
        number = self._by_mac.get(int.from_bytes(mac, "big"))
        if not isinstance(number, int):
            return 0
        record = self._packed.get(number)
        if record is None or record[PUBLIC_IP] != dst:
            return 0
        return 0 if self._direct is not None and self._direct(record) else number


def match_nothing(data: bytes) -> Matched:
    """For tables of which nothing is known at once."""
    return _match_all(data, 0, lambda _data, _at: 0)


def _match_all(data: bytes, usual: int, match: Callable[[bytes, int], int]) -> Matched:
    agreed: list[int] = []
    rest: list[memoryview] = []
    at, end, size_of = 0, len(data), _SIZE.unpack_from
    while at + 16 <= end:
        (size,) = size_of(data, at)
        if size < 16 or at + size > end:
            break
        if size == usual and (number := match(data, at)):
            agreed.append(number)
        else:
            rest.append(memoryview(data)[at : at + size])
        at += (size + 3) & ~3
    return agreed, rest
