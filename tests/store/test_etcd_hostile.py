"""An etcd that is none, or was taken over: whatever it says, down to the frame, no thread dies or hangs, memory stays small, it
is told in one line, and an honest server is followed again."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import hpack
import pytest

from lease.etcd import client as etcd_client
from lease.etcd.client import rpc
from lease.store import LeaseExpired, Snapshot, StoreDown, StoreUnavailable
from tests.support.feed import ROOT, Follower, decoded
from tests.support.hostile_etcd import (
    DONE,
    LAST,
    RANGE,
    REVISION,
    WATCH,
    HostileEtcd,
    Wire,
    frame,
    framed,
    page,
    record,
    told,
)
from tests.support.wait import until

Answer = Callable[[Wire, int], None]
MOST = 1 << 26
"""Bytes that may be held for it: twice the largest answer."""


@pytest.fixture
def hostile() -> Iterator[HostileEtcd]:
    made = HostileEtcd()
    yield made
    made.close()


@pytest.fixture
def no_crash(monkeypatch) -> Iterator[None]:
    """No thread ends by an exception: the agent would end with it."""
    crashed: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: crashed.append(repr(args.exc_value)))
    yield
    assert crashed == []


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Deadlines of a second."""
    for name in ("CALL_S", "LIST_S", "PROBE_AFTER_S", "PROBE_ANSWER_S", "FIRST_ANSWER_S", "ASKED_S"):
        monkeypatch.setattr(etcd_client, name, 1.0)


def only(method: str, answer: Answer) -> Callable[[Wire, str, int], bool]:
    """Say that to calls of one method, be honest to others."""

    def say(wire: Wire, called: str, stream: int) -> bool:
        if called == method:
            answer(wire, stream)
        return called == method

    return say


def messages(*said: Any, first: Any = None) -> Answer:
    """An answer of these messages, that does not end."""

    def answer(wire: Wire, stream: int) -> None:
        wire.begin(stream)
        wire.say(stream, *([] if first is None else [first]), *said)

    return answer


def body(data: bytes) -> Answer:
    """An answer of these bytes, and its end."""

    def answer(wire: Wire, stream: int) -> None:
        wire.begin(stream)
        wire.raw(frame(0, stream, data))
        wire.http.send_headers(stream, DONE, end_stream=True)
        wire.flush()

    return answer


def one(message: Any) -> Answer:
    return lambda wire, stream: wire.answer(stream, message)


def flood(data: Callable[[int], bytes], begin: bool = True) -> Answer:
    """The same without end. data: for a stream."""

    def answer(wire: Wire, stream: int) -> None:
        if begin:
            wire.begin(stream)
        wire.flood(data(stream))

    return answer


def hpack_bomb(wire: Wire, stream: int) -> None:
    """A header of 4 kB, named four thousand times by a byte each."""
    first = hpack.Encoder().encode([(":status", "200"), ("x", "a" * 3900)])
    wire.raw(frame(1, stream, first + b"\xbe" * 4000, LAST))


WATCHED = told(revision=REVISION, created=True)


def settled(follower: Follower, hostile: HostileEtcd, number: int) -> None:
    """The server is honest from now on, and has one record more."""
    hostile.add(record(number))
    hostile.behave()
    until("it is followed again", lambda: f"10.244.{number}.0-24" in follower.view, 40)


@pytest.mark.parametrize(
    "say",
    [
        pytest.param(flood(lambda _stream: random.Random(1).randbytes(1 << 16), begin=False), id="random bytes"),
        pytest.param(body(framed(random.Random(1).randbytes(5000))), id="a random message"),
        pytest.param(body(b"\0\xff\xff\xff\xff"), id="a message of 4 GiB"),
        pytest.param(body(b"\0\0\0\xff\xffabc"), id="a message that is cut"),
        pytest.param(
            body(b"\0\0\0\0\2" + page(record(1)).SerializeToString()), id="a message that is longer than said"
        ),
        pytest.param(lambda wire, stream: wire.raw(frame(1, stream) + 100 * frame(9, stream)), id="continuations"),
        pytest.param(hpack_bomb, id="an HPACK bomb"),
        pytest.param(lambda wire, _stream: wire.raw(frame(7, 0, b"\x7f\xff\xff\xff\0\0\0\0")), id="GOAWAY"),
        pytest.param(lambda wire, _stream: wire.raw(frame(4, 0, b"\0\4\0\0\0\0")), id="a window that never opens"),
        pytest.param(one(page(record(1), more=True, count=10**6)), id="the same page again and again"),
        pytest.param(one(page(record(1, key=b"/zzz"), more=True, count=10**6)), id="pages of others"),
        pytest.param(one(page(record(1), revision=(1 << 63) - 1)), id="the last revision"),
        pytest.param(one(page(record(1), revision=-1)), id="a negative revision"),
        pytest.param(one(page(record(1), count=-(1 << 63), more=True)), id="a negative count"),
    ],
)
def test_a_list_that_is_none(hostile, follow, no_crash, hasty, say):
    hostile.say = only(RANGE, say)
    follower = follow(hostile.endpoint)
    until("it is told", lambda: follower.count(StoreDown))
    began = hostile.connections + len(hostile.asked)
    until("it is told again", lambda: follower.count(StoreDown) > 2)
    assert hostile.connections + len(hostile.asked) - began < 100, "it tries without a pause"
    said = next(event.reason for event in follower.events if isinstance(event, StoreDown))
    assert hostile.endpoint in said and "\n" not in said and len(said) < 300
    assert follower.view == {}
    settled(follower, hostile, 9)


@pytest.mark.parametrize(
    ("what", "begin"),
    [
        pytest.param(lambda stream: frame(0, stream, framed(b"\x0a\xff")) * 900, True, id="answers that are none"),
        pytest.param(lambda stream: frame(0, stream) * 900, True, id="empty DATA"),
        pytest.param(lambda stream: frame(0, stream, b"\xff" + bytes(255), 8) * 90, True, id="padding"),
        pytest.param(
            lambda stream: frame(1, stream, hpack.Encoder().encode([(":status", "103")]), LAST) * 900, False,
            id="status 103",
        ),
        pytest.param(lambda _stream: frame(4, 0, b"\0\4\0\0\xff\xff") * 900, False, id="SETTINGS"),
        pytest.param(lambda _stream: frame(6, 0, b"12345678") * 900, False, id="PING"),
        pytest.param(lambda stream: frame(3, stream, b"\0\0\0\x08") * 900, False, id="RST_STREAM"),
        pytest.param(lambda _stream: frame(8, 0, b"\0\0\0\1") * 900, False, id="WINDOW_UPDATE"),
        pytest.param(lambda _stream: frame(0xBB, 0, b"12345678") * 900, False, id="unknown frames"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [RANGE, WATCH])
def test_a_flood_does_not_outlast_the_deadline_nor_keep_others_from_the_connection(
    hostile, follow, no_crash, hasty, what, begin, method
):
    """Each read finds something: the deadline counts all the same, and the store can be closed meanwhile."""
    hostile.say = only(method, flood(what, begin))
    tracemalloc.start()
    try:
        follower = follow(hostile.endpoint)
        until("it is told", lambda: follower.count(StoreDown), 30)
        until("it is flooded again", lambda: hostile.connections > 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST
    settled(follower, hostile, 9)


@pytest.mark.parametrize(
    "say",
    [
        pytest.param(messages(told(canceled=True, cancel_reason="no\n" * 100_000), first=WATCHED), id="cancelled"),
        pytest.param(messages(told(compact_revision=500)), id="compacted"),
        pytest.param(body(b""), id="closed"),
        pytest.param(body(framed(random.Random(1).randbytes(5000))), id="a random message"),
        pytest.param(lambda wire, stream: wire.raw(frame(3, stream, b"\0\0\0\2")), id="reset"),
        pytest.param(lambda wire, _stream: wire.raw(frame(7, 0, b"\x7f\xff\xff\xff\0\0\0\0")), id="GOAWAY"),
    ],
)
def test_a_watch_that_ends_for_ever(hostile, follow, no_crash, say):
    hostile.say = only(WATCH, say)
    follower = follow(hostile.endpoint)
    until("it is told, and again", lambda: follower.count(StoreDown) > 3)
    said = next(event.reason for event in follower.events if isinstance(event, StoreDown))
    assert hostile.endpoint in said and "\n" not in said and len(said) < 300
    assert hostile.asked.count(WATCH) < 20, "it tries without a pause"
    assert follower.view.keys() == {"10.244.1.0-24"}, "what was listed is kept"
    settled(follower, hostile, 9)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([told(record(8, key=b"/other"), record(8, key=b""), record(2))], id="keys of others"),
        pytest.param([told(record(2), revision=revision) for revision in (9, 8, -5, 2)], id="revisions go backwards"),
        pytest.param([told(record(2, create_revision=-1, mod_revision=-9, lease=-3))], id="negative revisions"),
        pytest.param([told(record(2), revision=(1 << 63) - 1)], id="the last revision"),
        pytest.param([rpc.WatchResponse(), told(record(2))], id="nothing"),
    ],
)
def test_a_watch_of_odd_events_goes_on(hostile, follow, no_crash, said):
    hostile.say = only(WATCH, messages(*said, first=WATCHED))
    follower = follow(hostile.endpoint)
    until("what is ours is taken", lambda: follower.view.keys() == {"10.244.1.0-24", "10.244.2.0-24"})
    assert follower.count(StoreDown) == 0


def test_records_with_numbers_that_no_etcd_has_cost_themselves_alone(hostile, follow, no_crash):
    hostile.kvs = [record(1, create_revision=-1), record(2, mod_revision=-5, lease=-7), record(3)]
    follower = follow(hostile.endpoint)
    until("the list is in", lambda: "10.244.3.0-24" in follower.view)
    assert follower.count(Snapshot) == 1


def test_a_watch_that_floods_is_read_no_further_than_it_is_taken(hostile, open_store, no_crash):
    """Its reader is slow, while another call of ours waits for an answer, and reads for both."""
    one_event = framed(told(record(2)).SerializeToString())
    hostile.say = only(WATCH, flood(lambda stream: frame(0, stream, one_event) * 90))
    store = open_store(hostile.endpoint, prefix=ROOT)
    changes = store.watch(REVISION)
    assert next(changes).changes
    tracemalloc.start()
    try:
        with pytest.raises(StoreUnavailable):
            store.lifetime(decoded(1)._replace(handle=7))  # nobody answers that
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST


@pytest.mark.parametrize(
    ("ttl", "lease", "expected"),
    [
        pytest.param(0, 7, LeaseExpired, id="gone"),
        pytest.param(-(1 << 63), 7, LeaseExpired, id="negative"),
        pytest.param(60, 8, StoreUnavailable, id="another's"),
    ],
)
def test_a_keep_alive_that_keeps_nothing(hostile, open_store, ttl, lease, expected):
    answer = rpc.LeaseKeepAliveResponse(ID=lease, TTL=ttl)
    hostile.say = only("LeaseKeepAlive", messages(answer))
    store = open_store(hostile.endpoint)
    with pytest.raises(expected):
        store.keep_alive(decoded(1)._replace(handle=7))


@pytest.mark.parametrize("number", [0, -5])
def test_an_etcd_lease_that_is_none_gets_no_record(hostile, open_store, number):
    hostile.say = only("LeaseGrant", one(rpc.LeaseGrantResponse(ID=number, TTL=60)))
    with pytest.raises(StoreUnavailable, match="not etcd"):
        open_store(hostile.endpoint).create(decoded(9), 60)


def test_a_list_that_never_ends_has_a_deadline(hostile, open_store, monkeypatch):
    """It says that it has very many, and each page has new ones."""
    monkeypatch.setattr(etcd_client, "WHOLE_LIST_S", 1.0)
    count = iter(range(1 << 30))

    def say(wire: Wire, stream: int) -> None:
        wire.answer(stream, page(record(1, key=b"%s/x%09d" % (ROOT.encode(), next(count))), count=1 << 40, more=True))

    hostile.say = only(RANGE, say)
    with pytest.raises(StoreUnavailable, match="more than 1 s"):
        open_store(hostile.endpoint).read()
