"""Wanted beside found, and what makes them one: entries agreed, wanted but not found, found but not wanted.

An agreed value is stored once. Each key that differs is applied in batches, in an order in which traffic never meets a
gap; a refused one is retried with backoff of its own and never holds up another.
"""

from __future__ import annotations

import errno
import heapq
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from overlay.kernel import wire
from overlay.kernel.entries import TUNNEL, FdbValue, NeighbourValue, RouteKey, RouteValue
from overlay.kernel.netlink import Refusal

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SLICE = 512
"""Messages in one batch; some 8 ms."""
RETRY_FIRST_S, RETRY_LAST_S = 0.1, 30.0


class Tracker(Generic[K, V]):
    """Wanted and found of one kind of entry."""

    def __init__(self) -> None:
        self.agreed: dict[K, V] = {}
        self.missing: dict[K, V] = {}
        """Wanted, but not found so; what is found instead stands in `extra`."""
        self.extra: dict[K, V] = {}
        """Found, but not wanted so."""

    def want(self, key: K, value: V) -> None:
        """It shall be there with that value."""
        if key in self.agreed:
            if self.agreed[key] == value:
                return
            self.extra[key] = self.agreed.pop(key)
        if self.extra.get(key) == value:
            self.agreed[key] = value
            del self.extra[key]
            self.missing.pop(key, None)
        else:
            self.missing[key] = value

    def unwant(self, key: K) -> None:
        """It shall not be there."""
        self.missing.pop(key, None)
        if key in self.agreed:
            self.extra[key] = self.agreed.pop(key)

    def find(self, key: K, value: V) -> None:
        """The kernel has it with that value."""
        if key in self.agreed:
            if self.agreed[key] == value:
                return
            self.missing[key] = self.agreed.pop(key)
        if self.missing.get(key) == value:
            self.agreed[key] = value
            del self.missing[key]
            self.extra.pop(key, None)
        else:
            self.extra[key] = value

    def lose(self, key: K) -> None:
        """The kernel does not have it."""
        self.extra.pop(key, None)
        if key in self.agreed:
            self.missing[key] = self.agreed.pop(key)

    def wanted(self) -> dict[K, V]:
        """All that shall be there."""
        return self.agreed | self.missing

    def found(self) -> dict[K, V]:
        """All that is there, as far as we know."""
        return self.agreed | self.extra

    def is_wanted(self, key: K) -> bool:
        return key in self.agreed or key in self.missing

    def is_found(self, key: K) -> bool:
        return key in self.agreed or key in self.extra

    def differing(self) -> int:
        """How many keys differ."""
        return len(self.missing.keys() | self.extra.keys())


class Kind(IntEnum):
    """The kinds of entries, in the order in which they are put in place."""

    NEIGHBOUR = 0
    FDB = 1
    ROUTE = 2


@dataclass(slots=True)
class Failure:
    """One entry the kernel refuses."""

    count: int
    refusal: Refusal
    since: float


class Requests(Protocol):
    """The part of RequestSocket used here."""

    def take_seqs(self, count: int) -> int: ...
    def execute(self, messages: list[bytes], first: int) -> dict[int, Refusal]: ...


class Refused(NamedTuple):
    """For the log: an entry was refused, for the n-th time."""

    kind: Kind
    key: Hashable
    failure: Failure


class Device(NamedTuple):
    """A device as the reconciler needs it: its number now, and whether routes can be set on it."""

    ifindex: int
    up: bool


class Reconciler:
    """Neighbours, FDB and routes of all peers. Owned by one thread."""

    def __init__(self, requests: Requests, clock: Callable[[], float], rng: random.Random) -> None:
        self._requests, self._clock, self._rng = requests, clock, rng
        self.neighbours: Tracker[int, NeighbourValue] = Tracker()
        self.fdb: Tracker[int, FdbValue] = Tracker()
        self.routes: Tracker[RouteKey, RouteValue] = Tracker()
        self._trackers: tuple[Tracker[Any, Any], ...] = (self.neighbours, self.fdb, self.routes)
        self.devices: dict[int, Device] = {}
        """By role; a role that is missing has no device now."""
        self.failures: dict[tuple[Kind, Hashable], Failure] = {}
        self.writes: Counter[str] = Counter()
        """Messages the kernel accepted, by `add_route`, `remove_fdb`..."""
        self.mended: Counter[str] = Counter()
        """Entries that somebody else changed or removed, by kind."""
        self.look_again = False
        """The kernel contradicted what we believed: only a dump tells."""
        self._puts: tuple[dict[Any, None], ...] = ({}, {}, {})
        self._drops: tuple[dict[Any, None], ...] = ({}, {}, {})
        self._retries: list[tuple[float, int, Kind, Hashable]] = []
        self._retry_number = 0

    def tracker(self, kind: Kind) -> Tracker[Any, Any]:
        """The tracker of a kind."""
        return self._trackers[kind]

    # --- what is wanted ------------------------------------------------------------------------------------------

    def want(self, kind: Kind, key: Hashable, value: object) -> None:
        """An entry shall be there."""
        self.tracker(kind).want(key, value)
        self._mark(kind, key)

    def unwant(self, kind: Kind, key: Hashable) -> None:
        """An entry shall not be there."""
        self.tracker(kind).unwant(key)
        self._mark(kind, key)

    def want_exactly(self, kind: Kind, wanted: Mapping[Any, object]) -> None:
        """These shall be there, and no other."""
        tracker = self.tracker(kind)
        for key in [key for key in (*tracker.agreed, *tracker.missing) if key not in wanted]:
            self.unwant(kind, key)
        for key, value in wanted.items():
            self.want(kind, key, value)

    # --- what is found -------------------------------------------------------------------------------------------

    def find(self, kind: Kind, key: Hashable, value: object) -> None:
        """The kernel says it has an entry."""
        tracker = self.tracker(kind)
        was = key in tracker.agreed
        tracker.find(key, value)
        self._seen(kind, key, was)

    def lose(self, kind: Kind, key: Hashable) -> None:
        """The kernel says an entry is gone."""
        tracker = self.tracker(kind)
        was = key in tracker.agreed
        tracker.lose(key)
        self._seen(kind, key, was)

    def _seen(self, kind: Kind, key: Hashable, was_agreed: bool) -> None:
        if was_agreed and key not in self.tracker(kind).agreed:
            self.mended[kind.name.lower()] += 1
        self._mark(kind, key)

    def merge_dump(self, kind: Kind, found: Mapping[Any, object], again: Callable[[], Iterable[Hashable]]) -> None:
        """Take a dump over. An absence counts only if a second look (`again`) agrees: a dump of a changing kernel
        leaves out live entries."""
        tracker = self.tracker(kind)
        absent = [key for key in (*tracker.agreed, *tracker.extra) if key not in found]
        for key, value in found.items():
            self.find(kind, key, value)
        if absent:
            still = set(again())
            for key in absent:
                if key not in still:
                    self.lose(kind, key)

    def device_lost(self, role: int, fdb_too: bool) -> None:
        """A device went down (routes and neighbours went with it, silently) or away (its FDB as well)."""
        routes = self.routes
        for key, value in [*routes.agreed.items(), *routes.extra.items()]:
            if value.role == role:
                self.lose(Kind.ROUTE, key)
        if role == TUNNEL:
            for kind in (Kind.NEIGHBOUR, *((Kind.FDB,) if fdb_too else ())):
                for key in list(self.tracker(kind).found()):
                    self.lose(kind, key)

    # --- making them one -------------------------------------------------------------------------------------------

    def differing(self) -> int:
        """How many entries are not as they should be."""
        return sum(tracker.differing() for tracker in self._trackers)

    def next_retry(self) -> float | None:
        """When a refused entry is due again."""
        return self._retries[0][0] if self._retries else None

    def retry_now(self, kind: Kind) -> None:
        """What stood in the way of refused entries of a kind may be gone: do not wait for their time."""
        for failed_kind, key in list(self.failures):
            if failed_kind is kind:
                self._mark(kind, key)

    def apply(self) -> tuple[bool, list[Refused]]:
        """One batch of what differs. Whether more can be done at once, and what was refused."""
        now = self._clock()
        while self._retries and self._retries[0][0] <= now:
            _, _, kind, key = heapq.heappop(self._retries)
            if (kind, key) in self.failures:
                self._mark(kind, key, retry=True)
        work = self._next_slice()
        if not work:
            return False, []
        first = self._requests.take_seqs(len(work))
        messages = [self._message(first + place, *item) for place, item in enumerate(work)]
        refused = self._requests.execute(messages, first)
        said = []
        for place, (put, kind, key) in enumerate(work):
            refusal = refused.get(place)
            if refusal is None or (not put and refusal.errno in _ABSENT):
                self._done(put, kind, key)
            else:
                said.append(self._failed(put, kind, key, refusal))
        return True, said

    def _next_slice(self) -> list[tuple[bool, Kind, Hashable]]:
        """Neighbours and FDB before the routes that need them, the reverse when they go."""
        tunnel = self.devices.get(TUNNEL)
        work: list[tuple[bool, Kind, Hashable]] = []
        if tunnel is not None:
            for kind in (Kind.NEIGHBOUR, Kind.FDB):
                work += [(True, kind, key) for key in islice(self._puts[kind], SLICE - len(work))]
        routes = self.routes
        for key in self._puts[Kind.ROUTE]:
            if len(work) >= SLICE:
                return work
            device = self.devices.get(routes.missing[key].role)
            if device is not None and device.up:
                work.append((True, Kind.ROUTE, key))
        if work or tunnel is None:
            return work
        if self._drops[Kind.ROUTE]:
            # A route of flannel's goes only after ours of the same subnet stands.
            coming = {key[:2] for key in routes.missing}
            for key in self._drops[Kind.ROUTE]:
                if len(work) >= SLICE:
                    return work
                if key[:2] not in coming:
                    work.append((False, Kind.ROUTE, key))
        if work:
            return work
        for kind in (Kind.NEIGHBOUR, Kind.FDB):
            work += [(False, kind, key) for key in islice(self._drops[kind], SLICE - len(work))]
        return work

    def _message(self, seq: int, put: bool, kind: Kind, key: Any) -> bytes:
        tracker = self.tracker(kind)
        value = tracker.missing[key] if put else tracker.extra[key]
        if kind is Kind.ROUTE:
            # A route elsewhere is deleted by its key alone: 0 matches any device.
            index = self.devices[value.role].ifindex if value.role in self.devices else 0
            if put:
                return wire.route_add(seq, key, value, index, replace=key in tracker.extra)
            return wire.route_delete(seq, key, value, index)
        index = self.devices[TUNNEL].ifindex
        return _MESSAGES[put, kind](seq, key, value, index)

    def _done(self, put: bool, kind: Kind, key: Hashable) -> None:
        tracker = self.tracker(kind)
        self.writes[f"{'put' if put else 'remove'}_{kind.name.lower()}"] += 1
        if put:
            tracker.find(key, tracker.missing[key])
        else:
            tracker.lose(key)
        self.failures.pop((kind, key), None)
        self._mark(kind, key)

    def _failed(self, put: bool, kind: Kind, key: Hashable, refusal: Refusal) -> Refused:
        """After any refusal what we believe is in doubt: look again, and retry this key alone, later."""
        self._puts[kind].pop(key, None)
        self._drops[kind].pop(key, None)
        now = self._clock()
        failure = self.failures.setdefault((kind, key), Failure(0, refusal, now))
        failure.count += 1
        failure.refusal = refusal
        self.look_again = self.look_again or failure.count == 1 or (put and refusal.errno == errno.EEXIST)
        self._retry_number += 1
        due = now + retry_delay_s(failure.count, self._rng.uniform(0.8, 1.2))
        heapq.heappush(self._retries, (due, self._retry_number, kind, key))
        return Refused(kind, key, failure)

    def _mark(self, kind: Kind, key: Hashable, retry: bool = False) -> None:
        """Put a key into the work that its state asks for. A refused key waits for its time, unless it changed."""
        tracker = self.tracker(kind)
        self._puts[kind].pop(key, None)
        self._drops[kind].pop(key, None)
        if key in tracker.missing:
            self._puts[kind][key] = None
        elif key in tracker.extra:
            self._drops[kind][key] = None
        elif not retry:
            self.failures.pop((kind, key), None)


_ABSENT = (errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL)
"""What the kernel says when it is asked to delete what is not there."""
_MESSAGES: dict[tuple[bool, Kind], Callable[..., bytes]] = {
    (True, Kind.NEIGHBOUR): wire.neighbour_add,
    (False, Kind.NEIGHBOUR): wire.neighbour_delete,
    (True, Kind.FDB): wire.fdb_add,
    (False, Kind.FDB): wire.fdb_delete,
}


def retry_delay_s(failures: int, spread: float) -> float:
    """0.1, 0.2, 0.4 ... 30 s; `spread` in 0.8..1.2 keeps 1,000 entries from being retried as one."""
    return min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 9)) * spread
