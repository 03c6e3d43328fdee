"""Reading a dump of IPv6 by the quick way against the plain one."""

from __future__ import annotations

import struct
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from lease.backend_config import VxlanConfig
from lease.families import V6
from lease.model import Endpoint, Lease, Prefix, link_local
from lease.records.codec import encode_key
from lease.records.packed import DUAL, FORM, PLACES, number, pack
from overlay.backends.base import View
from overlay.backends.routes import METRIC6
from overlay.backends.vxlan import Vxlan
from overlay.kernel.route import fast6, wire
from overlay.kernel.route.entries import TUNNEL
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.table import Where

NETWORK = Prefix(6, 0xFD00 << 112, 48)
OIF = 7
BACKEND, VIEW = Vxlan(VxlanConfig(), V6), View(V6, NETWORK, ())


def peer(n: int, public_ip: int = 9, mac: int = 0, length: int = 64) -> Lease:
    v4 = Endpoint(Prefix(4, (10 << 24) + (n << 8), 24), 900 + n, 1, 0x0C0000000000 + n)
    v6 = Endpoint(Prefix(6, NETWORK.base + (n << 128 - length), length), public_ip, 1, mac or 0x0A0000000000 + n)
    return Lease(encode_key(v4.subnet, v6.subnet), "vxlan", v4, v6, "", 0, 0, 0)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=LHHLL", 16 + len(body), kind, 2, 5, 9) + body


def dumped(
    lease: Lease, *, oif: int = OIF, via: int = 0, metric: int = METRIC6, protocol: int = 111, flags: int = 4, mac: int = 0,
    dst: int = 0, state: int = 0x80, key: int = 0,
) -> tuple[bytes, bytes, bytes]:  # fmt: skip
    """A peer's three entries as Linux 6.18 dumps them: neighbour, FDB, route."""
    end = lease.v6
    hardware = (mac or end.mac).to_bytes(6, "big")
    gateway = link_local(end.mac).to_bytes(16, "big")
    neighbour_key = key.to_bytes(16, "big") if key else gateway
    ndm = struct.pack("=lHBB", oif, state, 0, 1)
    fdb_ndm = struct.pack("=lHBB", oif, state, 2, 1)
    cache = attribute(3, bytes(16))
    to = attribute(1, (dst or end.public_ip).to_bytes(16, "big"))
    rtm = struct.pack("=BBBBBBBBL", 10, end.subnet.length, 0, 0, 254, protocol, 0, 1, flags)
    route = (
        attribute(15, struct.pack("=L", 254)) + attribute(1, end.subnet.base.to_bytes(16, "big"))
        + attribute(6, struct.pack("=L", metric)) + attribute(5, via.to_bytes(16, "big") if via else gateway)
        + attribute(4, struct.pack("=L", oif)) + attribute(12, bytes(32)) + attribute(20, b"\0")
    )  # fmt: skip
    first = attribute(1, neighbour_key) + attribute(2, hardware) + attribute(4, bytes(4)) + cache
    return (
        message(wire.RTM_NEWNEIGH, b"\x0a\0\0\0" + ndm + first),
        message(wire.RTM_NEWNEIGH, b"\x07\0\0\0" + fdb_ndm + attribute(2, hardware) + to + cache),
        message(wire.RTM_NEWROUTE, rtm + route),
    )


def matcher(*leases: Lease) -> fast6.DumpMatcher6:
    packed = {number(lease.v6.subnet): pack(lease) for lease in leases}
    by_mac = {lease.v6.mac: number(lease.v6.subnet) for lease in leases}
    made = fast6.DumpMatcher6(packed, by_mac, tuple({lease.v6.subnet.length for lease in leases}), NETWORK.base, OIF)
    made.metric = METRIC6
    return made


def right(table: int, data: bytes, known: list[Lease]) -> int:
    """The number of the peer whose entry this exactly is, by wire.py and the plan."""
    parsed = BACKEND.tables[table].parse(next(wire.split(data)).body)
    where = Where({OIF: TUNNEL}, (NETWORK.base, NETWORK.last), lambda _key: False)
    entry = None if parsed is None else BACKEND.tables[table].ours(parsed, where)
    if entry is None or not (parsed.flags == 4 if table == ROUTES else parsed.state == 0x80):
        return 0
    for lease in known:
        if (table, *entry) in BACKEND.entries(VIEW, lease.v6):
            return number(lease.v6.subnet)
    return 0


ODD = st.sampled_from([
    {}, {}, {"oif": 8}, {"via": 5}, {"via": link_local(6)}, {"metric": 1024}, {"protocol": 3}, {"flags": 0}, {"flags": 20},
    {"mac": 6}, {"dst": 7}, {"state": 2}, {"key": 5}, {"key": link_local(6)},
])  # fmt: skip
SEEN = st.lists(st.tuples(st.builds(peer, st.integers(1, 5), st.sampled_from([9, 10])), ODD), max_size=8)
KNOWN = st.lists(
    st.builds(peer, st.integers(1, 5), st.sampled_from([9, 10])), max_size=5, unique_by=lambda it: it.v6.mac
)


@given(SEEN, KNOWN)
def test_a_dump_is_matched_as_the_plain_way_says(seen, known):
    it = matcher(*known)
    for table in (NEIGHBOURS, FDB, ROUTES):
        parts = [dumped(lease, **odd)[table] for lease, odd in seen]
        agreed, rest = it.of(table)(b"".join(parts))
        expected = [right(table, part, known) for part in parts]
        assert agreed == [found for found in expected if found]
        assert [bytes(part) for part in rest] == [
            part for part, found in zip(parts, expected, strict=True) if not found
        ]


@given(SEEN, KNOWN, st.booleans())
def test_notifications_are_told_as_the_plain_way_tells_them(seen, known, gone):
    it = matcher(*known)
    for lease, odd in seen:
        for table in (NEIGHBOURS, FDB):
            data = dumped(lease, **odd)[table]
            if gone:
                data = data[:4] + struct.pack("=H", wire.RTM_DELNEIGH) + data[6:]
            whose = it.put_by_us([data])
            assert it.put_by_us([data, data]) == whose * 2
            assert it.put_by_us([data, bytes(80)]) == []
            assert whose == (
                [right(table, data, known)] if table == FDB and not gone and right(table, data, known) else []
            )
            told, parsed = it.event(data), BACKEND.tables[table].parse(next(wire.split(data)).body)
            if parsed.oif != OIF:
                assert told is None
            elif not gone:
                assert told == (table, False, right(table, data, known))
            else:
                key = parsed.mac if table == FDB else parsed.address
                whose = [number(it_.v6.subnet) for it_ in known if BACKEND.entries(VIEW, it_.v6)[table][1] == key]
                assert told == (table, True, whose[0] if whose else 0)


def asked(it: fast6.DumpMatcher6, lease: Lease) -> list[list[int]]:
    return [it.of(table)(dumped(lease)[table])[0] for table in (FDB, ROUTES)]


def test_a_record_of_another_form_says_nothing_by_the_quick_way():
    """Its bytes at those places are others; hostile text there must prove nothing."""
    lease = peer(3)
    alone = lease._replace(v4=None)
    it = matcher(lease)
    there = number(lease.v6.subnet)
    assert asked(it, lease) == [[there], [there]]
    made: Callable[[bytes], bytes] = lambda packed: packed[:FORM] + b"\x02" + packed[FORM + 1 :]  # noqa: E731
    it._packed[there] = made(it._packed[there])
    assert asked(it, lease) == [[], []]
    it._packed[there] = pack(alone)
    assert asked(it, lease) == [[], []]


def test_the_places_are_those_of_the_records():
    assert (PLACES[6].public_ip, PLACES[6].mac, FORM, DUAL) == (fast6.PUBLIC_IP, fast6.MAC, fast6.FORM, fast6.DUAL)
    assert fast6.gateway_of((0x0A0000000009).to_bytes(6, "big")) == link_local(0x0A0000000009).to_bytes(16, "big")
