"""What differs between wanted and found is made one, in order, and what is refused is tried again."""

import errno
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.control.schedule import retry_delay_s
from overlay.kernel.route.entries import (
    PROTOCOL,
    TUNNEL,
    UNDERLAY,
    FdbValue,
    NeighbourValue,
    RouteKey,
    RouteValue,
)
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.peers.difference import Device, Difference
from overlay.peers.reconcile import RETRY_LAST_S, SLICE
from overlay.peers.wanted import NothingWanted
from tests.support.model_kernel import IFINDEX, one, peer, settle, world


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
            rec.forget(rec.wanted)
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
        rec.wished.of[n] = peer(n)
    rec.forget(rec.wanted)
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


@pytest.mark.parametrize(("role", "other"), [(TUNNEL, UNDERLAY), (UNDERLAY, TUNNEL)])
def test_a_refused_entry_is_put_when_the_device_of_what_stood_in_its_place_goes(role, other):
    """It was to replace an entry of the same key on another device."""
    kernel, clock, rec = world()
    key = RouteKey(10 << 24, 24, 2)
    rec.devices[UNDERLAY] = Device(2, True)
    rec.join(1, [(ROUTES, key, RouteValue(other, 5, False, PROTOCOL))])
    rec.find(ROUTES, key, RouteValue(role, 7, True, PROTOCOL))
    kernel.refuse[ROUTES, key] = errno.ENETUNREACH
    rec.apply()
    assert rec.failures
    rec.device_lost(role, deleted=False)
    kernel.refuse.clear()
    settle(rec, clock)
    assert rec.differing() == 0


def test_an_entry_that_stands_is_not_missing_when_the_device_of_a_second_one_goes():
    """A resync saw the same key twice: ours, and another on the underlay."""
    kernel, clock, rec = world()
    rec.devices[UNDERLAY] = Device(2, True)
    rec.join(1, peer(1))
    settle(rec, clock)
    (_, key, _) = peer(1)[ROUTES]
    rec.find_second(ROUTES, key, RouteValue(UNDERLAY, 5, False, PROTOCOL))
    sent = len(kernel.log)
    rec.device_lost(UNDERLAY, deleted=False)
    settle(rec, clock)
    assert (rec.differing(), len(kernel.log)) == (0, sent)


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
    delays = [retry_delay_s(n, RETRY_LAST_S) for n in range(1, 14)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == 30.0


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


@given(st.dictionaries(st.integers(1, 6), st.integers(1, 7)), st.dictionaries(st.integers(1, 6), st.integers(1, 7)), st.lists(st.integers(1, 6)))  # fmt: skip
def test_whether_some_are_missing(pending, waiting, peers):
    made = Difference((), NothingWanted())
    made.pending, made.backing_off = pending, waiting
    for table in range(3):
        assert made.some_missing(table, peers) == any(made.is_missing(peer, table) for peer in peers)
