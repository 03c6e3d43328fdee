"""Any kernel state, any order of events and refusals, ends in the wanted state: a model kernel behind the reconciler."""

import errno
import random
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lease.families import V4
from overlay.kernel.netlink import Refusal
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    PROTOCOL,
    TUNNEL,
    FdbValue,
    FoundNeighbour,
    NeighbourValue,
    RouteKey,
    RouteValue,
)
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.route.tables import TABLES
from overlay.peers.difference import Device
from overlay.peers.reconcile import SLICE, Reconciler, retry_delay_s
from tests.support.clock import Clock

IFINDEX = 7


class Killed(Exception):
    """In the middle of what it did."""


class ModelKernel:
    """Takes our real messages apart and keeps what a kernel would keep, with the refusals a kernel has."""

    def __init__(self) -> None:
        self.tables: tuple[dict, dict, dict] = ({}, {}, {})
        self.foreign: set[RouteKey] = set()
        self.refuse: dict[tuple[int, object], int] = {}
        self.gone, self.refuse_drops = False, errno.ESRCH
        """Its device, and what is said to removals then."""
        self.log: list[tuple[str, int, object]] = []
        self.left: int | None = None
        """So many messages more until whoever sends them is killed."""
        self._seq = 0

    def take_seqs(self, count: int) -> int:
        first, self._seq = self._seq + 1, self._seq + count
        return first

    def execute(self, messages: list[bytes], first: int, count: int) -> dict[int, Refusal]:
        refused = {}
        before = first - 1
        for message in wire.split(b"".join(messages)):
            assert before < message.seq < first + count, "numbered in order, from `first`"
            before = message.seq
            if self.left is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
            code = self._do(message)
            if code:
                refused[message.seq - first] = Refusal(code, "")
        return refused

    def _do(self, message: wire.Message) -> int:
        add = message.kind in (wire.RTM_NEWROUTE, wire.RTM_NEWNEIGH)
        kind, key, value = parse(message)
        self.log.append(("put" if add else "drop", kind, key))
        if self.gone:
            return errno.ENODEV if add else self.refuse_drops
        if (kind, key) in self.refuse:
            return self.refuse[kind, key]
        table = self.tables[kind]
        if not add:
            if key not in table:
                return errno.ESRCH if kind == ROUTES else errno.ENOENT
            del table[key]
            return 0
        if kind == ROUTES and message.flags & wire.NLM_F_EXCL and (key in table or key in self.foreign):
            return errno.EEXIST
        assert kind != ROUTES or key not in self.foreign, "a foreign route was replaced"
        table[key] = value
        return 0


def parse(message: wire.Message):
    if message.kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
        route = wire.parse_route(V4, message.body)
        assert route is not None
        return ROUTES, route.key, RouteValue(TUNNEL, route.via, bool(route.flags & 4), route.protocol, route.unexpected)
    entry = wire.parse_fdb(V4, message.body)
    if entry is not None:
        return FDB, entry.mac, FdbValue(entry.dst or 0)
    found = wire.parse_neighbour(V4, message.body)
    assert isinstance(found, FoundNeighbour)
    return NEIGHBOURS, found.address, NeighbourValue(found.mac or 0)


class Wished:
    """What is wanted, as plainly as can be: entries by peer."""

    def __init__(self) -> None:
        self.of: dict[int, list] = {}

    def peers(self):
        return self.of

    def bits(self, peer: int) -> int:
        return sum(1 << kind for kind, _, _ in self.of[peer])

    def entries(self, peer: int):
        return self.of[peer]

    def owners(self, kind, key):
        return tuple(n for n, entries in self.of.items() if any(e[:2] == (kind, key) for e in entries))

    def value(self, kind, key):
        return next((e[2] for entries in self.of.values() for e in entries if e[:2] == (kind, key)), None)

    def successor(self, table, key):
        return next(
            (n for n, entries in self.of.items() if any(e[0] == table and e[1][:2] == key[:2] for e in entries)), 0
        )

    def uniform(self):
        return 0b111 if all(len(entries) == 3 for entries in self.of.values()) else 0

    def bits_on(self, peer: int, role: int) -> int:
        return sum(1 << table for table, _, value in self.of[peer] if TABLES[4][table].role(value) == role)

    def messages(self, peer, bits, seq, oifs):
        """As the quick way does, where all peers have all three."""
        if not self.uniform() or TUNNEL not in oifs:
            return None
        neighbour, fdb, route = self.of[peer]
        oif = oifs[TUNNEL]
        made = (
            wire.neighbour_add(V4, seq, *neighbour[1:], oif), wire.fdb_add(V4, seq + 1, *fdb[1:], oif),
            wire.route_add(V4, seq + 2, *route[1:], oif, replace=False),
        )  # fmt: skip
        return b"".join(message for kind, message in enumerate(made) if bits >> kind & 1)


class It(Reconciler):
    """The reconciler with its table beside it, changed as the datapath does."""

    def __init__(self, kernel: ModelKernel, clock: Clock) -> None:
        super().__init__(TABLES[4], Wished(), kernel, clock, random.Random(3))
        self.devices[TUNNEL] = Device(IFINDEX, True)

    def join(self, n: int, entries: list) -> None:
        self.leave(n)
        self.wanted.of[n] = entries
        self.want(n, entries)

    def leave(self, n: int) -> None:
        if (was := self.wanted.of.pop(n, None)) is not None:
            self.unwant(n, was)

    def dump(self, kind: int, found: dict, again: dict | None = None) -> None:
        """A look through the kernel; an absence counts only if the second look agrees."""
        for key, value in found.items():
            self.find(kind, key, value)
        again = found if again is None else again
        for n in self.believed(kind, self.wanted.of):
            for its, key, _ in self.wanted.entries(n):
                if its is kind and key not in found and key not in again:
                    self.lose(kind, key)
        for key in [key for key in self.extra[kind] if key not in found and key not in again]:
            self.lose(kind, key)

    def found(self, kind: int) -> dict:
        """What it believes that the kernel has."""
        right = {
            e[1]: e[2] for n in self.believed(kind, self.wanted.of) for e in self.wanted.entries(n) if e[0] is kind
        }
        return right | self.extra[kind]


def world():
    kernel, clock = ModelKernel(), Clock()
    return kernel, clock, It(kernel, clock)


def peer(n: int, mac: int | None = None):
    base = (10 << 24) | (244 << 16) | (n << 8)
    mac = mac if mac is not None else (0x0A << 40) | n
    return [
        (NEIGHBOURS, base, NeighbourValue(mac)),
        (FDB, mac, FdbValue((192 << 24) | n)),
        (ROUTES, RouteKey(base, 24, n + 1), RouteValue(TUNNEL, base, True, PROTOCOL)),
    ]


def settle(rec: Reconciler, clock: Clock, rounds: int = 60) -> None:
    for _ in range(rounds):
        while rec.apply()[0]:
            pass
        if not rec.differing():
            return
        clock.now += 40


def one(kind: int, key: int, value: int):
    """An entry of the simplest kind."""
    return (kind, key, NeighbourValue(value))


@pytest.mark.parametrize(
    ("wanted", "found", "differing", "extra"),
    [
        pytest.param({1: 7}, {}, 1, {}, id="a peer joins"),
        pytest.param({1: 8}, {1: 7}, 1, {1: 7}, id="a peer moves: replaced in place"),
        pytest.param({}, {1: 7}, 1, {1: 7}, id="it left while we were down"),
        pytest.param({1: 7}, {1: 7}, 0, {}, id="in step: no operation"),
    ],
)
@pytest.mark.parametrize("order", ["wanted first", "found first"])
def test_what_differs(wanted, found, differing, extra, order):
    _, _, rec = world()
    steps = [
        lambda: [rec.join(n, [one(NEIGHBOURS, n, value)]) for n, value in wanted.items()],
        lambda: [rec.find(NEIGHBOURS, key, NeighbourValue(value)) for key, value in found.items()],
    ]
    for step in steps if order == "wanted first" else reversed(steps):
        step()
    assert rec.differing() == differing
    assert rec.extra[NEIGHBOURS] == {key: NeighbourValue(value) for key, value in extra.items()}
    assert rec.found(NEIGHBOURS) == {key: NeighbourValue(value) for key, value in found.items()}


operations = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "find", "lose", "know nothing"]), st.integers(0, 3), st.integers(0, 2)),
    max_size=30,
)


@given(operations)
def test_against_two_dicts(steps):
    """Whatever happens, it knows what is wanted and what is found, though it stores neither."""
    _, _, rec = world()
    wanted: dict[int, NeighbourValue] = {}
    found: dict[int, NeighbourValue] = {}
    for what, key, number in steps:
        value = NeighbourValue(number + 1)
        if what == "join":
            rec.join(key, [(NEIGHBOURS, key, value)])
            wanted[key] = value
        elif what == "leave":
            rec.leave(key)
            wanted.pop(key, None)
        elif what == "find":
            rec.find(NEIGHBOURS, key, value)
            found[key] = value
        elif what == "lose":
            rec.lose(NEIGHBOURS, key)
            found.pop(key, None)
        else:
            rec.know_nothing(rec.wanted)
            found.clear()
        assert rec.found(NEIGHBOURS) == found
        assert rec.differing() == sum(wanted.get(k) != found.get(k) for k in wanted.keys() | found.keys())
        for k in range(4):
            assert rec.is_found(NEIGHBOURS, k) == (k in found)


def test_two_peers_of_one_mac_share_an_fdb_entry():
    """A node that holds two subnets: the entry stays while one of them does."""
    kernel, clock, rec = world()
    mac, dst = 0x0A0000000077, FdbValue(5)
    for n in (1, 2):
        entries = [e for e in peer(n, mac) if e[0] != FDB] + [(FDB, mac, dst)]
        rec.join(n, sorted(entries, key=lambda e: e[0]))
    settle(rec, clock)
    assert kernel.tables[FDB] == {mac: dst}
    rec.leave(1)
    settle(rec, clock)
    assert kernel.tables[FDB] == {mac: dst}
    assert len(kernel.tables[ROUTES]) == 1
    kernel.tables[FDB].clear()
    rec.lose(FDB, mac)
    settle(rec, clock)
    assert kernel.tables[FDB] == {mac: dst}
    rec.leave(2)
    settle(rec, clock)
    assert kernel.tables == ({}, {}, {})


def test_neighbour_and_fdb_stand_before_the_route_and_go_after_it():
    kernel, clock, rec = world()
    rec.join(1, peer(1))
    settle(rec, clock)
    assert [kind for _, kind, _ in kernel.log] == [NEIGHBOURS, FDB, ROUTES]
    kernel.log.clear()
    rec.leave(1)
    settle(rec, clock)
    assert [kind for _, kind, _ in kernel.log] == [ROUTES, NEIGHBOURS, FDB]
    assert kernel.tables == ({}, {}, {})


def test_in_step_means_no_message():
    kernel, _, rec = world()
    rec.join(1, peer(1))
    for entry in peer(1):
        rec.find(*entry)
    assert rec.apply() == (False, [])
    assert kernel.log == []


def test_a_route_of_flannels_goes_only_after_ours_stands():
    kernel, clock, rec = world()
    *_, (kind, ours, value) = peer(1)
    theirs = ours._replace(metric=0)
    kernel.tables[ROUTES][theirs] = value._replace(protocol=3)
    rec.find(kind, theirs, value._replace(protocol=3))
    rec.join(1, peer(1))
    kernel.refuse[kind, ours] = errno.ENOBUFS
    for _ in range(5):
        while rec.apply()[0]:
            pass
        clock.now += 1
    assert theirs in kernel.tables[ROUTES], "while ours is refused, theirs is all there is"
    kernel.refuse.clear()
    settle(rec, clock)
    assert set(kernel.tables[ROUTES]) == {ours}


def test_one_bad_peer_does_not_hold_up_the_rest():
    kernel, clock, rec = world()
    bad = peer(1)[2]
    kernel.refuse[bad[0], bad[1]] = errno.EINVAL
    for n in range(1, 2000):
        rec.join(n, peer(n))
    while rec.apply()[0]:
        pass
    assert rec.differing() == 1
    assert len(kernel.tables[ROUTES]) == 1998
    assert rec.failures[bad[0], bad[1]].refusal.errno == errno.EINVAL
    kernel.refuse.clear()
    settle(rec, clock)
    assert rec.differing() == 0
    assert rec.failures == {}


def test_a_foreign_route_is_never_replaced_and_comes_back_when_it_goes():
    kernel, clock, rec = world()
    *_, (kind, key, value) = peer(1)
    kernel.foreign.add(key)
    rec.join(1, peer(1))
    for _ in range(5):
        while rec.apply()[0]:
            pass
        clock.now += 31
    assert rec.failures[kind, key].refusal.errno == errno.EEXIST
    assert rec.in_doubt
    kernel.foreign.clear()
    rec.retry_now(kind)
    rec.apply()
    assert rec.differing() == 0


def test_work_per_event_does_not_grow_with_the_peers():
    """One join costs three messages, and one slice looks at no more keys than it sends, with 5,000 peers there."""
    kernel, clock, rec = world()
    for n in range(5000):
        rec.wanted.of[n] = peer(n)
    rec.know_nothing(rec.wanted)
    for kind in range(3):
        rec.agree(kind, range(5000))
    assert rec.differing() == 0
    kernel.log.clear()
    asked = Counter()
    for name in ("entries", "bits"):
        real = getattr(rec.wanted, name)
        setattr(rec.wanted, name, lambda peer, name=name, real=real: asked.update([name]) or real(peer))
    rec.wanted.value = lambda *_: asked.update(["value"])
    rec.join(6000, peer(6000))
    settle(rec, clock)
    assert len(kernel.log) == 3
    assert sum(asked.values()) < 20, asked


def test_a_slice_is_bounded():
    kernel, _, rec = world()
    for n in range(3000):
        rec.join(n, peer(n))
    rec.apply()
    assert SLICE <= len(kernel.log) < SLICE + 3
    kernel, _, rec = world()
    for n in range(1000):
        rec.join(n, peer(n))
    rec.apply()
    assert SLICE <= len(kernel.log) < SLICE + 3


def test_no_route_is_tried_while_the_device_is_down():
    kernel, clock, rec = world()
    rec.devices[TUNNEL] = Device(IFINDEX, False)
    rec.join(1, peer(1))
    while rec.apply()[0]:
        pass
    assert [kind for _, kind, _ in kernel.log] == [NEIGHBOURS, FDB]
    del rec.devices[TUNNEL]
    rec.join(2, peer(2)[:1])
    assert rec.apply() == (False, [])


def test_a_device_that_is_gone_and_not_yet_told_of_refuses_nobody():
    kernel, clock, rec = world()
    for n in range(1000):
        rec.join(n, peer(n))
    kernel.gone = True
    while rec.apply()[0]:
        pass
    assert rec.device_gone
    assert len(kernel.log) < SLICE + 3, "one slice is sent into the void"
    assert not rec.failures
    assert rec.next_retry() is None
    kernel.gone = rec.device_gone = False
    rec.device_lost(TUNNEL, deleted=True)
    settle(rec, clock)
    assert [len(table) for table in kernel.tables] == [1000] * 3


def test_a_device_that_falls_loses_of_all_what_it_loses_of_each():
    """The quick way for all peers at once counts as the way by peer does."""
    ends = []
    for uniform in (0b111, 0):
        kernel, clock, rec = world()
        for n in range(8):
            rec.join(n, peer(n))
        if not uniform:
            rec.wanted.uniform = lambda: 0
        settle(rec, clock)
        rec.lose_of(1, ROUTES)
        rec.lose_of(2, FDB)
        kernel.refuse[NEIGHBOURS, peer(3)[0][1]] = errno.EPERM
        rec.lose_of(3, NEIGHBOURS)
        rec.apply()
        rec.lose_of(4, FDB)
        rec.device_lost(TUNNEL, deleted=False)
        rec.lose_of(5, FDB)
        rec.device_lost(TUNNEL, deleted=True)
        ends.append((rec.pending, rec.backing_off, rec.mended, rec.differing()))
    assert ends[0] == ends[1]
    assert ends[0][3] == 24


def test_an_absence_in_a_dump_counts_only_if_a_second_look_agrees():
    _, _, rec = world()
    kind, key, value = peer(1)[0]
    rec.join(1, [(kind, key, value)])
    rec.find(kind, key, value)
    rec.dump(kind, {}, {key: value})
    assert rec.differing() == 0
    rec.dump(kind, {})
    assert rec.differing() == 1
    assert rec.mended["neighbour"] == 1


def test_backoff_grows_to_half_a_minute():
    delays = [retry_delay_s(n, 1.0) for n in range(1, 14)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == 30.0


class Interleaved(RuleBasedStateMachine):
    """Wanted changes, others meddle (seen or unseen), the kernel refuses, devices fall, the agent is killed within it all and
    started again: the end is always wanted."""

    @initialize()
    def start(self) -> None:
        self.kernel, self.clock, self.rec = world()
        self.wanted: dict[int, int] = {}

    def _entries(self) -> tuple[dict, dict, dict]:
        tables: tuple[dict, dict, dict] = ({}, {}, {})
        for n, mac in self.wanted.items():
            for kind, key, value in peer(n, mac):
                tables[kind][key] = value
        return tables

    @rule(n=st.integers(0, 5), salt=st.integers(0, 1))
    def join_or_change(self, n: int, salt: int) -> None:
        mac = (0x0A << 40) | (salt << 20) | n
        self.wanted[n] = mac
        self.rec.join(n, peer(n, mac))

    @rule(n=st.integers(0, 5))
    def leave(self, n: int) -> None:
        self.wanted.pop(n, None)
        self.rec.leave(n)

    @rule(n=st.integers(0, 7), which=st.sampled_from(range(3)), seen=st.booleans())
    def somebody_deletes(self, n: int, which: int, seen: bool) -> None:
        for kind, key, _ in peer(n):
            if kind == which and self.kernel.tables[kind].pop(key, None) is not None and seen:
                if n in self.wanted and self.wanted[n] == peer(n)[1][1] and not self.rec.extra[kind]:
                    self.rec.lose_of(n, kind)
                else:
                    self.rec.lose(kind, key)

    @rule(n=st.integers(0, 7), which=st.sampled_from(range(3)), seen=st.booleans())
    def somebody_adds_or_alters(self, n: int, which: int, seen: bool) -> None:
        for kind, key, value in peer(n):
            if kind == which:
                odd = value._replace(unexpected=("altered",))
                self.kernel.tables[kind][key] = odd
                if seen:
                    self.rec.find(kind, key, odd)

    @rule(
        n=st.integers(0, 5),
        which=st.sampled_from(range(3)),
        code=st.sampled_from([errno.ENOBUFS, errno.EPERM, errno.EINVAL]),
    )
    def kernel_refuses(self, n: int, which: int, code: int) -> None:
        for kind, key, _ in peer(n):
            if kind == which:
                self.kernel.refuse[kind, key] = code

    @rule()
    def kernel_relents(self) -> None:
        self.kernel.refuse.clear()

    @rule(gone=st.booleans())
    def device_falls(self, gone: bool) -> None:
        self.kernel.tables[ROUTES].clear()
        self.kernel.tables[NEIGHBOURS].clear()
        if gone:
            self.kernel.tables[FDB].clear()
        self.rec.device_lost(TUNNEL, deleted=gone)

    @rule()
    def device_goes_and_nobody_has_told_yet(self) -> None:
        for table in self.kernel.tables:
            table.clear()
        self.kernel.gone = True
        self.rec.apply()

    @rule()
    def it_is_told(self) -> None:
        if self.kernel.gone:
            self.rec.device_lost(TUNNEL, deleted=True)
            self.kernel.gone = self.rec.device_gone = False

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.rec.apply()

    @rule()
    def full_check(self) -> None:
        for kind in range(3):
            self.rec.dump(kind, dict(self.kernel.tables[kind]))

    @rule()
    def planned_anew(self) -> None:
        self.rec.know_nothing(self.rec.wanted)
        self.full_check()

    @rule(after=st.integers(0, 6))
    def killed_and_started_again(self, after: int) -> None:
        """Within a batch, or between two: nothing is left of what it believed; the kernel is as it left it."""
        self.kernel.left = after
        with suppress(Killed):
            self.rec.apply()
        self.kernel.left, self.kernel.gone = None, False  # the new one makes a device that is not there
        self.rec = It(self.kernel, self.clock)
        self.rec.wanted.of.update({n: peer(n, mac) for n, mac in self.wanted.items()})
        self.planned_anew()

    @invariant()
    def what_differs_is_counted(self) -> None:
        differing = 0
        for kind, table in zip(range(3), self._entries(), strict=True):
            found = self.rec.found(kind)
            differing += sum(table.get(key) != found.get(key) for key in table.keys() | found.keys())
        assert self.rec.differing() == differing
        assert all(self.rec.pending.values())
        assert all(self.rec.backing_off.values())

    def teardown(self) -> None:
        if not hasattr(self, "kernel"):
            return
        self.kernel.refuse.clear()
        self.it_is_told()
        self.full_check()
        settle(self.rec, self.clock)
        assert self.kernel.tables == self._entries()
        assert self.rec.differing() == 0


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_a_refused_entry_of_two_peers_is_tried_again_when_one_leaves():
    """Two subnets of one node: one FDB entry."""
    kernel, clock, rec = world()
    one, two = peer(1, mac=7), [(peer(2)[0][0], peer(2)[0][1], NeighbourValue(7)), peer(1, mac=7)[1], peer(2)[2]]
    kernel.refuse[FDB, 7] = errno.ENOSPC
    rec.join(1, one)
    rec.join(2, two)
    while rec.apply()[0]:
        pass
    assert rec.settled(), "what differs is refused"
    kernel.refuse.clear()
    rec.leave(2)
    settle(rec, clock)
    assert 7 in kernel.tables[FDB]
    assert rec.next_retry() is None or not rec.failures


def test_a_removal_that_finds_no_device_leaves_no_failure_behind():
    kernel, clock, rec = world()
    rec.join(1, peer(1))
    settle(rec, clock)
    rec.find(FDB, 99, FdbValue(5))
    rec.find(NEIGHBOURS, 98, NeighbourValue(5))
    kernel.gone, kernel.refuse_drops = True, errno.ENODEV
    while rec.apply()[0]:
        pass
    assert rec.device_gone
    for table in kernel.tables:
        table.clear()
    kernel.gone = rec.device_gone = False
    rec.device_lost(TUNNEL, deleted=True)
    settle(rec, clock)
    assert not rec.failures
    assert rec.differing() == 0


def test_a_refused_removal_is_forgotten_with_its_device():
    kernel, clock, rec = world()
    rec.find(FDB, 99, FdbValue(5))
    kernel.refuse[FDB, 99] = errno.EPERM
    rec.apply()
    assert rec.failures
    rec.device_lost(TUNNEL, deleted=True)
    assert not rec.failures
    assert rec.differing() == 0
