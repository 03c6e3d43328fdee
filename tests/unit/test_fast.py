"""The quick ways against the plain ones of wire.py."""

from __future__ import annotations

import struct
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lease.model import Endpoint, Lease, Prefix
from lease.records.codec import encode_key
from lease.records.packed import number, pack
from overlay.backends.vxlan import peer_entries
from overlay.kernel.route import fast, wire
from overlay.kernel.route.entries import FoundFdb, FoundNeighbour, Kind

NETWORK = Prefix(4, 10 << 24, 8)
OIF = 7


def peer(n: int, length: int = 24, public_ip: int = 0, mac: int = 0) -> Lease:
    subnet = Prefix(4, (10 << 24) + (n << (32 - length)), length)
    end = Endpoint(subnet, public_ip or (192 << 24) + n, 1, mac or (0x0A << 40) + n)
    return Lease(encode_key(subnet), "vxlan", end, None, "", 0, 0, 0)


PEERS = st.builds(
    peer, st.integers(1, 200), st.integers(16, 28), st.integers(1, (1 << 32) - 1), st.integers(1, (1 << 40) - 1)
)


@given(PEERS, st.integers(1, 1 << 30), st.integers(1, 1 << 20))
def test_the_three_messages_of_a_peer(lease, seq, oif):
    end = lease.v4
    wanted = peer_entries(NETWORK, end, False)
    plain = [
        wire.neighbour_add(seq, *wanted.neighbour, oif),
        wire.fdb_add(seq + 1, *wanted.fdb, oif),
        wire.route_add(seq + 2, *wanted.route, oif, replace=False),
    ]
    packed = pack(lease)
    quick = fast.peer_messages(
        seq, packed[:4], end.subnet.length, packed[9:15], packed[5:9], wanted.route[0].metric, oif
    )
    # of the fields that mean something: wire.py pads in another place
    assert [normal(m) for m in wire.split(quick)] == [normal(m) for m in wire.split(b"".join(plain))]


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


def sieve(*leases: Lease) -> fast.Sieve:
    packed = {number(lease.v4.subnet): pack(lease) for lease in leases}
    by_mac = {lease.v4.mac: number(lease.v4.subnet) for lease in leases}
    return fast.Sieve(packed, by_mac, tuple({lease.v4.subnet.length for lease in leases}), NETWORK.base, OIF)


ODD = [
    {"oif": 8}, {"via": 5}, {"metric": 77}, {"protocol": 3}, {"flags": 0}, {"flags": 20}, {"mac": 6}, {"dst": 9}, {"state": 2},
    {"order": True},
]  # fmt: skip


@given(st.lists(st.tuples(PEERS, st.sampled_from([{}, {}, *ODD])), max_size=12), st.sets(st.integers(0, 11)))
def test_a_dump_is_sifted_as_the_plain_way_says(entries, strangers):
    """Every message is either an entry that is exactly as it should be, or is handed on."""
    known = {}
    for place, (lease, _) in enumerate(entries):
        clash = any(
            other.v4.subnet.base == lease.v4.subnet.base or other.v4.mac == lease.v4.mac for other in known.values()
        )
        if place not in strangers and not clash:
            known[number(lease.v4.subnet)] = lease
    it = sieve(*known.values()) if known else fast.Sieve({}, {}, (), NETWORK.base, OIF)
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


def right(kind: int, message: wire.Message, known: dict[int, Lease]) -> int:
    """The number of the peer whose entry this exactly is, by wire.py and the plan."""
    for n, lease in known.items():
        wanted = peer_entries(NETWORK, lease.v4, False)
        if kind == 0:
            route = wire.parse_route(message.body)
            key, value = wanted.route
            if (route.key, route.oif, route.via, route.flags, route.protocol, route.odd) == (
                key,
                OIF,
                value.via,
                4,
                111,
                (),
            ):
                return n
            continue
        found = wire.parse_neighbour(message.body)
        if found.oif != OIF or found.state != 0x80:
            continue
        if isinstance(found, FoundNeighbour) and (found.address, found.mac) == (
            wanted.neighbour[0],
            wanted.neighbour[1].mac,
        ):
            return n
        if isinstance(found, FoundFdb) and (found.mac, found.dst) == (wanted.fdb[0], wanted.fdb[1].dst):
            return n
    return 0


def test_cut_off_and_absurd_lengths_end_it():
    it = sieve(peer(1))
    whole = dumped(peer(1))[0]
    for data in (b"", whole[:10], whole[:40], bytes(64), whole + b"\xff" * 20):
        agreed, rest = it.routes(data)
        assert len(agreed) <= 1
        assert rest == []


EVENTS = st.lists(st.tuples(PEERS, st.sampled_from([{}, {}, *ODD]), st.booleans(), st.booleans()), max_size=12)


@given(EVENTS)
def test_notifications_are_told_as_the_plain_way_tells_them(events):
    """What the sieve says of one is what wire.py and the plan say; where it says 0, wire.py is asked."""
    known = {}
    for lease, _, _, is_known in events:
        taken = any(
            other.v4.subnet.base == lease.v4.subnet.base or other.v4.mac == lease.v4.mac for other in known.values()
        )
        if is_known and not taken:
            known[number(lease.v4.subnet)] = lease
    it = sieve(*known.values()) if known else fast.Sieve({}, {}, (), NETWORK.base, OIF)
    for lease, odd, gone, _ in events:
        for kind in (Kind.NEIGHBOUR, Kind.FDB):
            data = dumped(lease, **odd)[{Kind.NEIGHBOUR: 1, Kind.FDB: 2}[kind]]
            if gone:
                data = data[:4] + struct.pack("=H", wire.RTM_DELNEIGH) + data[6:]
            told = it.event(data)
            found = wire.parse_neighbour(next(wire.split(data)).body)
            if found.oif != OIF:
                assert told is None
                continue
            assert told[:2] == (kind, gone)
            if not gone:
                assert told[2] == right(int(kind) + 1, next(wire.split(data)), known)
            elif told[2]:
                entry = peer_entries(NETWORK, known[told[2]].v4, False)
                assert (found.mac if kind is Kind.FDB else found.address) == entry[2 if kind is Kind.FDB else 1][0]
            else:
                owners = [
                    other
                    for other in known.values()
                    if (other.v4.mac == found.mac if kind is Kind.FDB else other.v4.subnet.base == found.address)
                ]
                assert not owners


def test_a_short_notification_is_left_to_wire():
    assert sieve(peer(1)).event(b"\0" * 30)[2] == 0
