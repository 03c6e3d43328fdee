"""Any kernel state, any order of events and refusals, ends in the wanted state: a model kernel behind the reconciler."""

import errno
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overlay.kernel import wire
from overlay.kernel.entries import (
    PROTOCOL,
    TUNNEL,
    FdbValue,
    FoundFdb,
    FoundNeighbour,
    NeighbourValue,
    RouteKey,
    RouteValue,
)
from overlay.kernel.netlink import Refusal
from overlay.reconcile import SLICE, Device, Kind, Reconciler, Tracker, retry_delay_s

IFINDEX = 7


class ModelKernel:
    """Takes our real messages apart and keeps what a kernel would keep, with the refusals a kernel has."""

    def __init__(self) -> None:
        self.tables: tuple[dict, dict, dict] = ({}, {}, {})
        self.foreign: set[RouteKey] = set()
        self.refuse: dict[tuple[Kind, object], int] = {}
        self.log: list[tuple[str, Kind, object]] = []
        self._seq = 0

    def take_seqs(self, count: int) -> int:
        first, self._seq = self._seq + 1, self._seq + count
        return first

    def execute(self, messages: list[bytes], first: int) -> dict[int, Refusal]:
        refused = {}
        for place, message in enumerate(wire.split(b"".join(messages))):
            assert message.seq == first + place
            code = self._do(message)
            if code:
                refused[place] = Refusal(code, "")
        return refused

    def _do(self, message: wire.Message) -> int:
        add = message.kind in (wire.RTM_NEWROUTE, wire.RTM_NEWNEIGH)
        kind, key, value = parse(message)
        self.log.append(("put" if add else "drop", kind, key))
        if (kind, key) in self.refuse:
            return self.refuse[kind, key]
        table = self.tables[kind]
        if not add:
            if key not in table:
                return errno.ESRCH if kind is Kind.ROUTE else errno.ENOENT
            del table[key]
            return 0
        if kind is Kind.ROUTE and message.flags & wire.NLM_F_EXCL and (key in table or key in self.foreign):
            return errno.EEXIST
        assert kind is not Kind.ROUTE or key not in self.foreign, "a foreign route was replaced"
        table[key] = value
        return 0


def parse(message: wire.Message):
    if message.kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
        route = wire.parse_route(message.body)
        assert route is not None
        return Kind.ROUTE, route.key, RouteValue(TUNNEL, route.via, bool(route.flags & 4), route.protocol, route.odd)
    found = wire.parse_neighbour(message.body)
    if isinstance(found, FoundFdb):
        return Kind.FDB, found.mac, FdbValue(found.dst or 0)
    assert isinstance(found, FoundNeighbour)
    return Kind.NEIGHBOUR, found.address, NeighbourValue(found.mac or 0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def world():
    kernel, clock = ModelKernel(), Clock()
    rec = Reconciler(kernel, clock, random.Random(3))
    rec.devices[TUNNEL] = Device(IFINDEX, True)
    return kernel, clock, rec


def peer(n: int, mac: int | None = None):
    base = (10 << 24) | (244 << 16) | (n << 8)
    mac = mac if mac is not None else (0x0A << 40) | n
    return [
        (Kind.NEIGHBOUR, base, NeighbourValue(mac)),
        (Kind.FDB, mac, FdbValue((192 << 24) | n)),
        (Kind.ROUTE, RouteKey(base, 24, n + 1), RouteValue(TUNNEL, base, True, PROTOCOL)),
    ]


def settle(rec: Reconciler, clock: Clock, rounds: int = 60) -> None:
    for _ in range(rounds):
        while rec.apply()[0]:
            pass
        if not rec.differing():
            return
        clock.now += 40


@pytest.mark.parametrize(
    ("wanted", "found", "missing", "extra"),
    [
        pytest.param({1: "a"}, {}, {1: "a"}, {}, id="a peer joins"),
        pytest.param({1: "b"}, {1: "a"}, {1: "b"}, {1: "a"}, id="a peer moves: replaced in place"),
        pytest.param({}, {1: "a"}, {}, {1: "a"}, id="it left while we were down"),
        pytest.param({1: "a"}, {1: "a"}, {}, {}, id="in step: no operation"),
    ],
)
@pytest.mark.parametrize("order", ["wanted first", "found first"])
def test_tracker(wanted, found, missing, extra, order):
    it: Tracker[int, str] = Tracker()
    steps = [lambda: [it.want(k, v) for k, v in wanted.items()], lambda: [it.find(k, v) for k, v in found.items()]]
    for step in steps if order == "wanted first" else reversed(steps):
        step()
    assert (it.missing, it.extra) == (missing, extra)
    assert (it.wanted(), it.found()) == (wanted, found)


operations = st.lists(
    st.tuples(st.sampled_from(["want", "unwant", "find", "lose"]), st.integers(0, 3), st.integers(0, 2)), max_size=30
)


@given(operations)
def test_tracker_against_two_dicts(steps):
    it: Tracker[int, int] = Tracker()
    wanted: dict[int, int] = {}
    found: dict[int, int] = {}
    for what, key, value in steps:
        if what == "want":
            it.want(key, value)
            wanted[key] = value
        elif what == "unwant":
            it.unwant(key)
            wanted.pop(key, None)
        elif what == "find":
            it.find(key, value)
            found[key] = value
        else:
            it.lose(key)
            found.pop(key, None)
        assert it.wanted() == wanted
        assert it.found() == found
        assert it.agreed == {k: v for k, v in wanted.items() if found.get(k) == v}
        assert it.differing() == sum(wanted.get(k) != found.get(k) for k in wanted.keys() | found.keys())


def test_neighbour_and_fdb_stand_before_the_route_and_go_after_it():
    kernel, clock, rec = world()
    for entry in peer(1):
        rec.want(*entry)
    settle(rec, clock)
    assert [kind for _, kind, _ in kernel.log] == [Kind.NEIGHBOUR, Kind.FDB, Kind.ROUTE]
    kernel.log.clear()
    for kind, key, _ in peer(1):
        rec.unwant(kind, key)
    settle(rec, clock)
    assert [kind for _, kind, _ in kernel.log] == [Kind.ROUTE, Kind.NEIGHBOUR, Kind.FDB]
    assert kernel.tables == ({}, {}, {})


def test_in_step_means_no_message():
    kernel, _, rec = world()
    for kind, key, value in peer(1):
        rec.want(kind, key, value)
        rec.find(kind, key, value)
    assert rec.apply() == (False, [])
    assert kernel.log == []


def test_a_route_of_flannels_goes_only_after_ours_stands():
    kernel, clock, rec = world()
    *_, (kind, ours, value) = peer(1)
    theirs = ours._replace(metric=0)
    kernel.tables[Kind.ROUTE][theirs] = value._replace(protocol=3)
    rec.find(kind, theirs, value._replace(protocol=3))
    rec.want(kind, ours, value)
    kernel.refuse[kind, ours] = errno.ENOBUFS
    for _ in range(5):
        while rec.apply()[0]:
            pass
        clock.now += 1
    assert theirs in kernel.tables[Kind.ROUTE], "while ours is refused, theirs is all there is"
    kernel.refuse.clear()
    settle(rec, clock)
    assert set(kernel.tables[Kind.ROUTE]) == {ours}


def test_one_bad_peer_does_not_hold_up_the_rest():
    kernel, clock, rec = world()
    bad = peer(1)[2]
    kernel.refuse[bad[0], bad[1]] = errno.EINVAL
    for n in range(1, 2000):
        for entry in peer(n):
            rec.want(*entry)
    while rec.apply()[0]:
        pass
    assert rec.differing() == 1
    assert len(kernel.tables[Kind.ROUTE]) == 1998
    assert rec.failures[bad[0], bad[1]].refusal.errno == errno.EINVAL
    kernel.refuse.clear()
    settle(rec, clock)
    assert rec.differing() == 0
    assert rec.failures == {}


def test_a_foreign_route_is_never_replaced_and_comes_back_when_it_goes():
    kernel, clock, rec = world()
    *_, (kind, key, value) = peer(1)
    kernel.foreign.add(key)
    rec.want(kind, key, value)
    for _ in range(5):
        while rec.apply()[0]:
            pass
        clock.now += 31
    assert rec.failures[kind, key].refusal.errno == errno.EEXIST
    assert rec.look_again
    kernel.foreign.clear()
    rec.retry_now(kind)
    rec.apply()
    assert rec.differing() == 0


def test_work_per_event_does_not_grow_with_the_peers():
    """One join costs three messages, and one slice looks at no more keys than it sends, with 5,000 peers there."""
    kernel, clock, rec = world()
    for n in range(5000):
        for kind, key, value in peer(n):
            rec.find(kind, key, value)
            rec.want(kind, key, value)
    kernel.log.clear()
    for entry in peer(6000):
        rec.want(*entry)
    settle(rec, clock)
    assert len(kernel.log) == 3


def test_a_slice_is_bounded():
    kernel, _, rec = world()
    for n in range(3000):
        rec.want(*peer(n)[0])
    rec.apply()
    assert len(kernel.log) == SLICE


def test_no_route_is_tried_while_the_device_is_down():
    kernel, clock, rec = world()
    rec.devices[TUNNEL] = Device(IFINDEX, False)
    for entry in peer(1):
        rec.want(*entry)
    while rec.apply()[0]:
        pass
    assert [kind for _, kind, _ in kernel.log] == [Kind.NEIGHBOUR, Kind.FDB]
    del rec.devices[TUNNEL]
    rec.want(*peer(2)[0])
    assert rec.apply() == (False, [])


def test_an_absence_in_a_dump_counts_only_if_a_second_look_agrees():
    _, _, rec = world()
    kind, key, value = peer(1)[0]
    rec.want(kind, key, value)
    rec.find(kind, key, value)
    rec.merge_dump(kind, {}, lambda: [key])
    assert rec.differing() == 0
    rec.merge_dump(kind, {}, list)
    assert rec.differing() == 1
    assert rec.mended["neighbour"] == 1


def test_backoff_grows_to_half_a_minute():
    delays = [retry_delay_s(n, 1.0) for n in range(1, 14)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == 30.0


class Interleaved(RuleBasedStateMachine):
    """Wanted changes, others meddle (seen or unseen), the kernel refuses, devices fall: the end is always wanted."""

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
        if n in self.wanted:
            for kind, key, _ in peer(n, self.wanted[n]):
                self.rec.unwant(kind, key)
        self.wanted[n] = mac
        for entry in peer(n, mac):
            self.rec.want(*entry)

    @rule(n=st.integers(0, 5))
    def leave(self, n: int) -> None:
        if n in self.wanted:
            for kind, key, _ in peer(n, self.wanted.pop(n)):
                self.rec.unwant(kind, key)

    @rule(n=st.integers(0, 7), which=st.sampled_from(list(Kind)), seen=st.booleans())
    def somebody_deletes(self, n: int, which: Kind, seen: bool) -> None:
        for kind, key, _ in peer(n):
            if kind is which and self.kernel.tables[kind].pop(key, None) is not None and seen:
                self.rec.lose(kind, key)

    @rule(n=st.integers(0, 7), which=st.sampled_from(list(Kind)), seen=st.booleans())
    def somebody_adds_or_alters(self, n: int, which: Kind, seen: bool) -> None:
        for kind, key, value in peer(n):
            if kind is which:
                odd = value._replace(odd=("altered",))
                self.kernel.tables[kind][key] = odd
                if seen:
                    self.rec.find(kind, key, odd)

    @rule(
        n=st.integers(0, 5),
        which=st.sampled_from(list(Kind)),
        code=st.sampled_from([errno.ENOBUFS, errno.EPERM, errno.EINVAL]),
    )
    def kernel_refuses(self, n: int, which: Kind, code: int) -> None:
        for kind, key, _ in peer(n):
            if kind is which:
                self.kernel.refuse[kind, key] = code

    @rule()
    def kernel_relents(self) -> None:
        self.kernel.refuse.clear()

    @rule(gone=st.booleans())
    def device_falls(self, gone: bool) -> None:
        self.kernel.tables[Kind.ROUTE].clear()
        self.kernel.tables[Kind.NEIGHBOUR].clear()
        if gone:
            self.kernel.tables[Kind.FDB].clear()
        self.rec.device_lost(TUNNEL, fdb_too=gone)

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.rec.apply()

    @rule()
    def full_check(self) -> None:
        for kind in Kind:
            self.rec.merge_dump(kind, dict(self.kernel.tables[kind]), lambda kind=kind: list(self.kernel.tables[kind]))

    @invariant()
    def wanted_is_known(self) -> None:
        for kind, table in zip(Kind, self._entries(), strict=True):
            assert self.rec.tracker(kind).wanted() == table

    def teardown(self) -> None:
        if not hasattr(self, "kernel"):
            return
        self.kernel.refuse.clear()
        self.full_check()
        settle(self.rec, self.clock)
        assert self.kernel.tables == self._entries()
        assert self.rec.differing() == 0


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
