"""A look through the kernel: routes, neighbours and FDB entries read whole, in slices, and told to the reconciler.

A dump of a changing kernel leaves out live entries and repeats others, without a word. So a key that an event or our own
write touched since the dump began keeps what those said, and an absence counts only if a second look agrees.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator
from typing import Any

from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    RTNH_F_ONLINK,
    FdbValue,
    FoundFdb,
    FoundNeighbour,
    FoundRoute,
    Kind,
    NeighbourValue,
    RouteValue,
    fdb_is_ours,
    neighbour_is_ours,
)
from overlay.kernel.route.fast import Sifted
from overlay.peers.reconcile import Reconciler, Touched
from overlay.peers.wanted import Wanted

AT_ONCE, LOST_AT_ONCE = 2000, 200
"""Peers gone through in one slice, where nothing is amiss and where something is."""


class Look:
    """One look. Between its slices the loop does whatever has come."""

    def __init__(self, rec: Reconciler, tunnel: int, role: Callable[[FoundRoute], int | None]) -> None:
        """tunnel: the device's number; role: of the device that a route of ours goes by, None for one that is not ours."""
        self._rec, self._tunnel, self._role = rec, tunnel, role
        self.foreign: list[FoundRoute] = []
        """Routes that are not ours."""
        self._seen: set[int] = set()
        """Peers whose entry of this kind was seen as it is wanted."""
        self._others: set[Any] = set()
        """The keys of all other entries of ours, of this kind."""

    def run(self) -> Generator[None]:
        """All of it, with a pause after each buffer of a dump. Raises KernelError."""
        requests, rec = RequestSocket(), self._rec
        try:
            for kind in (Kind.ROUTE, Kind.NEIGHBOUR, Kind.FDB):
                rec.touched = Touched()
                self._seen, self._others = set(), set()
                yield from self._dump(requests, kind)
                absent = yield from self._unseen(kind)
                left = [
                    key for key in rec.extra[kind] if key not in self._others and (kind, key) not in rec.touched.keys
                ]
                if absent or left:
                    foreign = len(self.foreign)
                    yield from self._dump(requests, kind)
                    del self.foreign[foreign:]
                    yield from self._lose(kind, absent, left, rec.touched)
        finally:
            rec.touched = None
            requests.close()

    def _dump(self, requests: RequestSocket, kind: Kind) -> Iterator[None]:
        wanted, index = self._rec.wanted, self._tunnel
        assert isinstance(wanted, Wanted)
        sieve = wanted.sieve(index)
        sift, request = {
            Kind.ROUTE: (sieve.routes, wire.route_dump),
            Kind.NEIGHBOUR: (sieve.neighbours, lambda seq: wire.neighbour_dump(seq, index)),
            Kind.FDB: (sieve.fdb, lambda seq: wire.fdb_dump(seq, index)),
        }[kind]
        for agreed, rest in _of_a_table(requests.sifted(request, sift), kind):
            self._seen.update(agreed)
            touched = self._rec.touched.peers[kind] if self._rec.touched is not None else set()
            self._rec.agree(kind, [peer for peer in agreed if peer not in touched] if touched else agreed)
            for view in rest:
                self._take(kind, next(wire.split(view)).body)
            yield

    def _unseen(self, kind: Kind) -> Generator[None, None, list[int]]:
        """The peers whose entry of a kind we believe to be as it should be, though the dump did not show it, and nothing
        spoke of it meanwhile."""
        assert self._rec.touched is not None
        known = self._rec.touched.peers[kind]
        if self._seen.issuperset(self._rec.wanted.peers()):
            return []
        absent: list[int] = []
        peers = list(self._rec.wanted.peers())
        for first in range(0, len(peers), AT_ONCE):
            some = [peer for peer in peers[first : first + AT_ONCE] if peer not in self._seen and peer not in known]
            absent += self._rec.believed(kind, some)
            yield
        return absent

    def _take(self, kind: Kind, body: memoryview) -> None:
        """An entry that is not simply as it should be."""
        found = self._entry(kind, body)
        if found is None:
            return
        key, value = found
        rec = self._rec
        self._others.add(key)
        owners = rec.wanted.owners(kind, key)
        right = value == rec.wanted.value(kind, key)
        second = kind is Kind.ROUTE and not right and not self._seen.isdisjoint(owners)
        if right:
            self._seen.update(owners)
        if rec.touched is not None and rec.touched.knows(kind, key, owners):
            return
        if second:
            rec.find_second(key, value)
        else:
            rec.find(kind, key, value, touch=False)

    def _entry(self, kind: Kind, body: memoryview) -> tuple[Any, Any] | None:
        """Key and value of an entry of ours; None for all that is not."""
        if kind is Kind.ROUTE:
            route = wire.parse_route(body)
            if route is None:
                return None
            role = self._role(route)
            if role is None:
                self.foreign.append(route)
                return None
            return route.key, route_value(route, role)
        found = wire.parse_neighbour(body)
        if kind is Kind.FDB and isinstance(found, FoundFdb) and fdb_is_ours(found, self._tunnel):
            return found.mac, fdb_value(found)
        if kind is Kind.NEIGHBOUR and isinstance(found, FoundNeighbour) and neighbour_is_ours(found, self._tunnel):
            return found.address, neighbour_value(found)
        return None

    def _lose(self, kind: Kind, absent: list[int], left: list[Any], touched: Touched) -> Iterator[None]:
        """What neither of two dumps showed, and nothing spoke of meanwhile."""
        rec = self._rec
        peers = rec.wanted.peers()
        for count, peer in enumerate(absent):
            if count % LOST_AT_ONCE == LOST_AT_ONCE - 1:
                yield
            if peer in self._seen or peer in touched.peers[kind]:
                continue
            if peer in peers and not rec.is_missing(peer, kind):  # it may have left meanwhile
                for its, key, _ in rec.wanted.entries(peer):
                    if its is kind and key not in self._others and (kind, key) not in touched.keys:
                        rec.lose(kind, key)
        for key in left:
            if key not in self._others and (kind, key) not in touched.keys and key in rec.extra[kind]:
                rec.lose(kind, key)


def route_value(route: FoundRoute, role: int) -> RouteValue:
    """A found route as we compare it."""
    return RouteValue(role, route.via, bool(route.flags & RTNH_F_ONLINK), route.protocol, route.odd)


def neighbour_value(found: FoundNeighbour) -> NeighbourValue:
    """A found neighbour as we compare it."""
    return NeighbourValue(found.mac or 0, found.odd)


def fdb_value(entry: FoundFdb) -> FdbValue:
    """A found FDB entry as we compare it."""
    return FdbValue(entry.dst or 0, entry.odd)


def _of_a_table(dump: Iterator[Sifted], kind: Kind) -> Iterator[Sifted]:
    """A namespace that never had a route has no main table yet: that is an empty one."""
    try:
        yield from dump
    except KernelError as error:
        if kind is not Kind.ROUTE or error.errno != errno.ENOENT:
            raise
