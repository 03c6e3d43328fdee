"""The quick ways against the plain ones of wire.py."""

from __future__ import annotations

import struct
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lease.backend_config import VxlanConfig
from lease.families import V4, V6
from lease.model import Endpoint, Lease, Prefix
from lease.records.codec import encode_key
from lease.records.packed import number, pack
from overlay.backends.base import View
from overlay.backends.choose import backend_of
from overlay.backends.vxlan import Vxlan
from overlay.kernel.route import fast, wire
from overlay.kernel.route.entries import TUNNEL, UNDERLAY
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.table import Where

NETWORK = Prefix(4, 10 << 24, 8)
NETWORK6 = Prefix(6, 0xFD00 << 112, 48)
OIF, UNDERLAY_OIF = 7, 3
VIEW = View(V4, NETWORK, (Prefix(4, 192 << 24, 25),))
"""Peers 1 to 127 are on the link."""
PLAIN, DIRECT = Vxlan(VxlanConfig(), V4), backend_of(VxlanConfig(direct_routing=True), V4)
OIFS = {TUNNEL: OIF, UNDERLAY: UNDERLAY_OIF}


def peer(n: int, length: int = 24, public_ip: int = 0, mac: int = 0) -> Lease:
    subnet = Prefix(4, (10 << 24) + (n << (32 - length)), length)
    end = Endpoint(subnet, public_ip or (192 << 24) + n, 1, mac or (0x0A << 40) + n)
    return Lease(encode_key(subnet), "vxlan", end, None, "", 0, 0, 0)


PEERS = st.builds(
    peer, st.integers(1, 200), st.integers(16, 28), st.integers(1, (1 << 32) - 1), st.integers(1, (1 << 40) - 1)
)


@given(PEERS, st.integers(1, 1 << 30), st.sampled_from([PLAIN, DIRECT]), st.integers(1, 7))
def test_the_messages_of_a_peer_are_those_of_its_entries(lease, seq, backend, bits):
    """The backend's fast way against its plain one, for tunnel and direct routes."""
    entries = backend.entries(VIEW, lease.v4)
    asked = bits & sum(1 << table for table, _, _ in entries)
    plain = [
        backend.tables[table].put(seq + table, key, value, OIFS[backend.tables[table].role(value)], False)
        for table, key, value in entries
        if asked >> table & 1
    ]
    quick = backend.bulk(VIEW).messages(number(lease.v4.subnet), pack(lease), asked, seq, OIFS)
    # of the fields that mean something: wire.py pads in another place
    assert [normal(m) for m in wire.split(quick or b"")] == [normal(m) for m in wire.split(b"".join(plain))]


PEERS6 = st.builds(
    lambda n, length, public_ip, mac: Endpoint(
        Prefix(6, NETWORK6.base + (n << 128 - length), length), public_ip, 1, mac
    ),
    st.integers(1, 200), st.integers(56, 120), st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 48) - 1),
)  # fmt: skip


@given(PEERS, PEERS6, st.integers(1, 1 << 30), st.integers(1, 7))
def test_the_messages_of_a_peer_of_ipv6_are_those_of_its_entries(lease, end, seq, bits):
    backend, there = Vxlan(VxlanConfig(), V6), View(V6, NETWORK6, ())
    plain = [
        backend.tables[table].put(seq + table, key, value, OIF, False)
        for table, key, value in backend.entries(there, end)
        if bits >> table & 1
    ]
    both = lease._replace(key=encode_key(lease.v4.subnet, end.subnet), v6=end)
    quick = backend.bulk(there).messages(number(end.subnet), pack(both), bits, seq, OIFS)
    assert [normal(m) for m in wire.split(quick or b"")] == [normal(m) for m in wire.split(b"".join(plain))]
    # a form that does not say it, and a device that is not up: the plain way
    assert (
        backend.bulk(there).messages(number(end.subnet), pack(lease._replace(v4=None, v6=end)), bits, seq, OIFS) is None
    )
    assert backend.bulk(there).messages(number(end.subnet), pack(both), bits, seq, {}) is None


@given(PEERS)
def test_a_device_that_is_not_up_leaves_it_to_the_plain_way(lease):
    for backend in (PLAIN, DIRECT):
        assert backend.bulk(VIEW).messages(number(lease.v4.subnet), pack(lease), 7, 1, {}) is None


def normal(message: wire.Message):
    attrs = {kind: bytes(value) for kind, value in wire.attributes(message.body, 12).items()}
    return message.kind, message.flags, message.seq, bytes(message.body[:12]), attrs


def dumped(lease: Lease, *, oif: int = OIF, via: int | None = None, metric: int = 0, protocol: int = 111, flags: int = 4,
           mac: int | None = None, dst: int | None = None, state: int = 0x80, order: bool = False) -> tuple[bytes, bytes, bytes]:  # fmt: skip
    """A peer's three entries as this kernel dumps them."""
    end = lease.v4
    base = end.subnet.base.to_bytes(4, "big")
    metric = metric or 1 + ((end.subnet.base - NETWORK.base) >> (32 - end.subnet.length))
    via_bytes = (end.subnet.base if via is None else via).to_bytes(4, "big")
    mac_bytes = (end.mac if mac is None else mac).to_bytes(6, "big")
    dst_bytes = (end.public_ip if dst is None else dst).to_bytes(4, "big")

    def attr(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def message(kind: int, body: bytes) -> bytes:
        return struct.pack("=LHHLL", 16 + len(body), kind, 2, 5, 9) + body

    table, oif_attr = attr(15, struct.pack("=L", 254)), attr(4, struct.pack("=L", oif))
    route = [table, attr(1, base), attr(6, struct.pack("=L", metric)), attr(5, via_bytes), oif_attr]
    if order:
        route.reverse()
    rtm = struct.pack("=BBBBBBBBL", 2, end.subnet.length, 0, 0, 254, protocol, 0, 1, flags)
    ndm = struct.pack("=lHBB", oif, state, 0, 1)
    cache = attr(3, bytes(16))
    return (
        message(wire.RTM_NEWROUTE, rtm + b"".join(route)),
        message(
            wire.RTM_NEWNEIGH, b"\x02\0\0\0" + ndm + attr(1, base) + attr(2, mac_bytes) + attr(4, bytes(4)) + cache
        ),
        message(
            wire.RTM_NEWNEIGH,
            b"\x07\0\0\0" + struct.pack("=lHBB", oif, state, 2, 1) + attr(2, mac_bytes) + attr(1, dst_bytes) + cache,
        ),
    )


def matcher(*leases: Lease) -> fast.DumpMatcher:
    packed = {number(lease.v4.subnet): pack(lease) for lease in leases}
    by_mac = {lease.v4.mac: number(lease.v4.subnet) for lease in leases}
    return fast.DumpMatcher(packed, by_mac, tuple({lease.v4.subnet.length for lease in leases}), NETWORK.base, OIF)


ODD = [
    {"oif": 8}, {"via": 5}, {"metric": 77}, {"protocol": 3}, {"flags": 0}, {"flags": 20}, {"mac": 6}, {"dst": 9}, {"state": 2},
    {"order": True},
]  # fmt: skip


@given(st.lists(st.tuples(PEERS, st.sampled_from([{}, {}, *ODD])), max_size=12), st.sets(st.integers(0, 11)))
def test_a_dump_is_matched_as_the_plain_way_says(entries, unknown):
    """Every message is either an entry that is exactly as it should be, or is handed on."""
    known = {}
    for place, (lease, _) in enumerate(entries):
        clash = any(
            other.v4.subnet.base == lease.v4.subnet.base or other.v4.mac == lease.v4.mac for other in known.values()
        )
        if place not in unknown and not clash:
            known[number(lease.v4.subnet)] = lease
    it = matcher(*known.values()) if known else fast.DumpMatcher({}, {}, (), NETWORK.base, OIF)
    for kind, sift in enumerate((it.routes, it.neighbours, it.fdb)):
        data = b"".join(dumped(lease, **odd)[kind] for lease, odd in entries)
        agreed, rest = sift(data)
        plain_agreed, plain_rest = [], []
        for message in wire.split(data):
            found = right(kind, message, known)
            (plain_agreed if found else plain_rest).append(found or bytes(message.body))
        assert Counter(agreed) <= Counter(plain_agreed), "never more than is true"
        assert len(agreed) + len(rest) == len(entries), "and nothing is lost"
        usual = [odd for _, odd in entries if odd == {"order": True}]
        if not usual:
            assert sorted(agreed) == sorted(plain_agreed)
            assert [bytes(message[16:]) for message in rest] == plain_rest


def right(kind: int, message: wire.Message, known: dict[int, Lease], backend=PLAIN) -> int:
    """The number of the peer whose entry this exactly is, by the table and the plan. kind: of `dumped`."""
    number_of_table = {0: ROUTES, 1: NEIGHBOURS, 2: FDB}[kind]
    table = backend.tables[number_of_table]
    found = table.parse(message.body)
    where = Where({OIF: TUNNEL, UNDERLAY_OIF: UNDERLAY}, (NETWORK.base, NETWORK.last), lambda _key: False)
    entry = None if found is None else table.ours(found, where)
    as_we_set_it = found is None or (found.flags == 4 if number_of_table == ROUTES else found.state == 0x80)
    for n, lease in known.items():
        if entry is not None and as_we_set_it and (number_of_table, *entry) in backend.entries(VIEW, lease.v4):
            return n
    return 0


def test_cut_off_and_absurd_lengths_end_it():
    it = matcher(peer(1))
    whole = dumped(peer(1))[0]
    for data in (b"", whole[:10], whole[:40], bytes(64), whole + b"\xff" * 20):
        agreed, rest = it.routes(data)
        assert len(agreed) <= 1
        assert rest == []


EVENTS = st.lists(st.tuples(PEERS, st.sampled_from([{}, {}, *ODD]), st.booleans(), st.booleans()), max_size=12)


@given(EVENTS)
def test_notifications_are_told_as_the_plain_way_tells_them(events):
    """What the matcher says of one is what wire.py and the plan say; where it says 0, wire.py is asked."""
    known = {}
    for lease, _, _, is_known in events:
        taken = any(
            other.v4.subnet.base == lease.v4.subnet.base or other.v4.mac == lease.v4.mac for other in known.values()
        )
        if is_known and not taken:
            known[number(lease.v4.subnet)] = lease
    it = matcher(*known.values()) if known else fast.DumpMatcher({}, {}, (), NETWORK.base, OIF)
    for lease, odd, gone, _ in events:
        for table, place in ((NEIGHBOURS, 1), (FDB, 2)):
            data = dumped(lease, **odd)[place]
            if gone:
                data = data[:4] + struct.pack("=H", wire.RTM_DELNEIGH) + data[6:]
            told = it.event(data)
            assert it.put_by_us([data]) == ([told[2]] if told and told[:2] == (FDB, False) and told[2] else [])
            body = next(wire.split(data)).body
            found = PLAIN.tables[table].parse(body)
            key = found.mac if table == FDB else found.address
            if found.oif != OIF:
                assert told is None
                continue
            assert told[:2] == (table, gone)
            if not gone:
                assert told[2] == right(place, next(wire.split(data)), known)
            elif told[2]:
                assert PLAIN.entries(VIEW, known[told[2]].v4)[table][1] == key
            else:
                assert not [other for other in known.values() if PLAIN.entries(VIEW, other.v4)[table][1] == key]


def test_a_short_notification_is_left_to_wire():
    assert matcher(peer(1)).event(b"\0" * 30)[2] == 0
