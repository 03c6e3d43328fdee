"""Resync: the kernel's entries read whole, table by table, in slices, and passed to the reconciler.

A dump of a changing kernel leaves out live entries and repeats others, without a word. So a key that an event or our own
write touched since the dump began keeps what those said, and an absence counts only if a second dump agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route import wire
from overlay.kernel.route.entries import TUNNEL
from overlay.kernel.route.fast import Matched, match_nothing
from overlay.kernel.table import Where
from overlay.peers.difference import Touched
from overlay.peers.reconcile import Reconciler
from overlay.peers.wanted import Wanted

AT_ONCE, LOST_AT_ONCE = 2000, 200
"""Peers gone through in one slice, where nothing is amiss and where something is."""


class Resync:
    """One reading of the kernel. Between its slices the loop does whatever has come."""

    def __init__(self, rec: Reconciler, where: Callable[[int], Where]) -> None:
        """where: how entries of a table are recognised as ours."""
        self._rec, self._where = rec, where
        self.foreign: list[Any] = []
        """Entries of watched tables that are not ours."""
        self._seen: set[int] = set()
        """Peers whose entry of this table was seen as it is wanted."""
        self._others: set[Any] = set()
        """The keys of all other entries of ours, of this table."""

    def run(self) -> Generator[None]:
        """All of it, with a pause after each buffer of a dump; what leads traffic first. Raises KernelError."""
        requests, rec = RequestSocket(), self._rec
        order = sorted(range(len(rec.tables)), key=lambda number: not rec.tables[number].takes_over)
        assert isinstance(rec.wanted, Wanted)
        order = [number for number in order if rec.wanted.full >> number & 1]
        try:
            for table in order:
                rec.touched = Touched(len(rec.tables))
                self._seen, self._others = set(), set()
                yield from self._dump(requests, table)
                absent = yield from self._unseen(table)
                left = [
                    key for key in rec.extra[table] if key not in self._others and (table, key) not in rec.touched.keys
                ]
                if absent or left:
                    foreign = len(self.foreign)
                    yield from self._dump(requests, table)
                    del self.foreign[foreign:]
                    yield from self._lose(table, absent, left, rec.touched)
        finally:
            rec.touched = None
            requests.close()

    def _dump(self, requests: RequestSocket, number: int) -> Iterator[None]:
        rec, table = self._rec, self._rec.tables[number]
        wanted, oif = rec.wanted, rec.devices[TUNNEL if TUNNEL in rec.devices else rec.main].ifindex
        assert isinstance(wanted, Wanted)
        matcher = wanted.matcher({role: device.ifindex for role, device in rec.devices.items()})
        match = match_nothing if matcher is None else matcher.of(number)
        dump = requests.matched(lambda seq: table.dump(seq, oif), match)
        for agreed, rest in _unless_empty(dump, table.empty):
            self._seen.update(agreed)
            touched = rec.touched.peers[number] if rec.touched is not None else set()
            rec.agree(number, [peer for peer in agreed if peer not in touched] if touched else agreed)
            for view in rest:
                self._take(number, next(wire.split(view)).body)
            yield

    def _unseen(self, table: int) -> Generator[None, None, list[int]]:
        """The peers whose entry of a table we believe to be as it should be, though the dump did not show it, and nothing
        spoke of it meanwhile."""
        assert self._rec.touched is not None
        known = self._rec.touched.peers[table]
        if self._seen.issuperset(self._rec.wanted.peers()):
            return []
        absent: list[int] = []
        peers = list(self._rec.wanted.peers())
        for first in range(0, len(peers), AT_ONCE):
            some = [peer for peer in peers[first : first + AT_ONCE] if peer not in self._seen and peer not in known]
            absent += self._rec.believed(table, some)
            yield
        return absent

    def _take(self, number: int, body: memoryview) -> None:
        """An entry that is not simply as it should be."""
        rec, table = self._rec, self._rec.tables[number]
        found = table.parse(body)
        if found is None:
            return
        entry = table.ours(found, self._where(number))
        if entry is None:
            if table.watched:
                self.foreign.append(found)
            return
        key, value = entry
        self._others.add(key)
        owners = rec.wanted.owners(number, key)
        right = value == rec.wanted.value(number, key)
        second = table.takes_over and not right and not self._seen.isdisjoint(owners)
        if right:
            self._seen.update(owners)
        if rec.touched is not None and rec.touched.knows(number, key, owners):
            return
        if second:
            rec.find_second(number, key, value)
        else:
            rec.find(number, key, value, touch=False)

    def _lose(self, table: int, absent: list[int], left: list[Any], touched: Touched) -> Iterator[None]:
        """What neither of two dumps showed, and nothing spoke of meanwhile."""
        rec = self._rec
        peers = rec.wanted.peers()
        for count, peer in enumerate(absent):
            if count % LOST_AT_ONCE == LOST_AT_ONCE - 1:
                yield
            if peer in self._seen or peer in touched.peers[table]:
                continue
            if peer in peers and not rec.is_missing(peer, table):  # it may have left meanwhile
                for its_table, key, _ in rec.wanted.entries(peer):
                    if its_table == table and key not in self._others and (table, key) not in touched.keys:
                        rec.lose(table, key)
        for key in left:
            if key not in self._others and (table, key) not in touched.keys and key in rec.extra[table]:
                rec.lose(table, key)


def _unless_empty(dump: Iterator[Matched], empty: tuple[int, ...]) -> Iterator[Matched]:
    """A dump; what the kernel says where there is nothing at all is an empty one."""
    try:
        yield from dump
    except KernelError as error:
        if error.errno not in empty:
            raise
