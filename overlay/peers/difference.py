"""What of the peers' entries is not as it should be, kept by what differs alone: entries that are missing, as bits by peer,
and entries that are there and not wanted so. All else agrees, and stands nowhere but in the table of peers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from overlay.backends.base import Entry
from overlay.kernel.netlink import Refusal
from overlay.kernel.route.entries import TUNNEL
from overlay.kernel.table import Table

NAMED = 5
"""So many peers are named in one log line, and the others counted: of more entries put back no name is remembered."""


class WantedEntries(Protocol):
    """What shall be in the kernel (wanted.Wanted). A peer is a number, a table its place in the list of tables."""

    def peers(self) -> Collection[int]:
        """All peers."""

    def bits(self, peer: int) -> int:
        """The tables in which a peer has an entry, as bits."""

    def bits_on(self, peer: int, role: int) -> int:
        """The same, of entries on the device of a role."""

    def entries(self, peer: int) -> list[Entry]:
        """A peer's entries, in the order in which they are put in place."""

    def owners(self, table: int, key: Any) -> tuple[int, ...]:
        """The peers that want an entry of a key."""

    def value(self, table: int, key: Any) -> Any:
        """What the entry of a key shall be, None where none is wanted."""

    def successor(self, table: int, key: Any) -> int:
        """The peer whose own entry, of another key, does what one of this key did; 0 where there is none."""

    def uniform(self) -> int:
        """The bits that all peers surely have, all of them on the tunnel's device; 0: ask for each."""

    def messages(self, peer: int, bits: int, seq: int, oifs: Mapping[int, int]) -> bytes | None:
        """Messages that put a peer's entries of these tables, numbered `seq` + table, at once; oifs: interfaces that are
        up, by role. None: ask `entries`."""


class Failure:
    """One entry the kernel refuses: how often, why, since when. token: of its last place in the queue of retries."""

    __slots__ = ("count", "refusal", "since", "token")

    def __init__(self, refusal: Refusal, since: float) -> None:
        self.count, self.refusal, self.since, self.token = 0, refusal, since, 0


class Device(NamedTuple):
    """A device as the reconciler needs it: its number now, and whether routes can be set on it."""

    ifindex: int
    up: bool


class Touched:
    """What changed since a dump began: keys of entries, and peers (by table) whose entries these are."""

    def __init__(self, tables: int) -> None:
        self.keys: set[tuple[int, Any]] = set()
        self.peers: tuple[set[int], ...] = tuple(set() for _ in range(tables))

    def knows(self, table: int, key: Any, owners: tuple[int, ...]) -> bool:
        """Whether it is of one of these; owners: the peers that want that key."""
        return (table, key) in self.keys or any(owner in self.peers[table] for owner in owners)


class Difference:
    """Wanted beside found. Owned by one thread.

    Entries of a peer that are missing stand as bits in `pending`, or in `backing_off` while a refused one waits for its
    time. What is found and not wanted so stands in `extra`: where a peer wants another value there, its bit is set as well.
    """

    def __init__(self, tables: Sequence[Table], wanted: WantedEntries) -> None:
        self.tables, self.wanted = tuple(tables), wanted
        self.devices: dict[int, Device] = {}
        """By role; a role that is missing has no device now."""
        self.pending: dict[int, int] = {}
        self.backing_off: dict[int, int] = {}
        self.failures: dict[tuple[int, Hashable], Failure] = {}
        self.mended: Counter[str] = Counter()
        """Entries that somebody else changed or removed, by table."""
        self._mended_last: list[tuple[int, int]] = []
        """Table and peer of some of those, since they were taken last."""
        self.touched: Touched | None = None
        """While a dump is taken: what events or our own writes know better."""
        self._clear()

    def _clear(self) -> None:
        self.extra: tuple[dict[Any, Any], ...] = tuple({} for _ in self.tables)
        self._removals: tuple[dict[Any, None], ...] = tuple({} for _ in self.tables)
        """Of `extra`: what nobody wants, to be removed; and below, what the kernel refused to remove, until its time."""
        self._unremovable: tuple[set[Any], ...] = tuple(set() for _ in self.tables)
        self._missing = 0

    def _retry(self, table: int, key: Any) -> None:
        for peer in self.wanted.owners(table, key) if self.backing_off else ():
            if self.backing_off.get(peer, 0) & 1 << table:
                self._set(peer, table)
        self._sort(table, key, self.wanted.value(table, key))

    # --- what is wanted ------------------------------------------------------------------------------------------

    def forget(self, wanted: WantedEntries) -> None:
        """Everything of these peers is missing, and nothing is found, until a dump says otherwise."""
        self.wanted = wanted
        self._clear()
        self.pending = {peer: wanted.bits(peer) for peer in wanted.peers()}
        self._missing = sum(map(int.bit_count, self.pending.values()))
        self.backing_off = {}
        self.failures.clear()

    def unwant(self, peer: int, entries: Iterable[Entry]) -> None:
        """These entries of a peer are not wanted any more; the table is without it already."""
        for table, key, value in entries:
            was_missing = self._take_bit(peer, 1 << table)
            wanted = self.wanted.value(table, key)
            if not was_missing:  # else a resync may show that it is there
                self.touch(table, key, peer)
                if wanted != value:
                    self.extra[table][key] = value
            self.failures.pop((table, key), None)
            self._retry(table, key)

    def want(self, peer: int, entries: Iterable[Entry]) -> None:
        """These entries of a peer are wanted from now on; the table has it already."""
        for table, key, value in entries:
            if self.extra[table].get(key) == value:
                del self.extra[table][key]
            else:
                self._set(peer, table)
            self.touch(table, key, peer)
            self.failures.pop((table, key), None)
            self._retry(table, key)

    # --- what is found -------------------------------------------------------------------------------------------

    def find(self, table: int, key: Any, value: Any, touch: bool = True) -> None:
        """The kernel says it has an entry. touch: an event says so, and not a dump."""
        if touch:
            self.touch(table, key)
        wanted = self.wanted.value(table, key)
        if value == wanted:
            self.extra[table].pop(key, None)
            for peer in self.wanted.owners(table, key):
                self._take_bit(peer, 1 << table)
            self.failures.pop((table, key), None)
        else:
            self.extra[table][key] = value
            self._not_so(table, key)
        self._sort(table, key, wanted)

    def find_second(self, table: int, key: Any, value: Any) -> None:
        """A dump shows an entry behind, or before, another of its key that is as it should be: it is to go."""
        self.extra[table][key] = value
        self._unremovable[table].discard(key)
        self._removals[table][key] = None

    def lose(self, table: int, key: Any) -> None:
        """The kernel says an entry is gone."""
        self.touch(table, key)
        self.extra[table].pop(key, None)
        self._not_so(table, key)
        wanted = self.wanted.value(table, key)
        if wanted is None:
            self.failures.pop((table, key), None)
        self._sort(table, key, wanted)

    def lose_of(self, peer: int, table: int) -> None:
        """The kernel says that a peer's entry is gone which was as it should be, and of whose key nothing else is found."""
        self.touch_peers(table, (peer,))
        if self._set(peer, table):
            self._count_mended(table, peer)

    def take_mended(self) -> list[tuple[int, int]]:
        """Table and peer of some entries that somebody else changed or removed, since the last call."""
        taken, self._mended_last = self._mended_last, []
        return taken

    def _count_mended(self, table: int, peer: int) -> None:
        self.mended[self.tables[table].name] += 1
        if len(self._mended_last) < NAMED:
            self._mended_last.append((table, peer))

    def agree(self, table: int, peers: Iterable[int]) -> None:
        """A dump shows these peers' entries as they should be."""
        bit, pending, waiting = 1 << table, self.pending, self.backing_off
        if not pending and not waiting:
            return
        for peer in peers:
            if pending.get(peer, 0) & bit or waiting.get(peer, 0) & bit:
                for its_table, key, _ in self.wanted.entries(peer) if self.failures or self.extra[table] else ():
                    if its_table == table:
                        self.failures.pop((table, key), None)
                        self.extra[table].pop(key, None)
                self._take_bit(peer, bit)

    def is_found(self, table: int, key: Any) -> bool:
        """Whether we believe that the kernel has an entry of that key."""
        if key in self.extra[table]:
            return True
        return any(not self.is_missing(peer, table) for peer in self.wanted.owners(table, key))

    def is_missing(self, peer: int, table: int) -> bool:
        """Whether a peer's entry is not as it should be."""
        return bool((self.pending.get(peer, 0) | self.backing_off.get(peer, 0)) & 1 << table)

    def some_missing(self, table: int, peers: Sequence[int]) -> bool:
        """Whether the entry of one of these peers is not as it should be."""
        others = (self.pending, self.backing_off)
        return any(not each.keys().isdisjoint(peers) for each in others) and any(
            self.is_missing(peer, table) for peer in peers
        )

    def believed(self, table: int, peers: Iterable[int]) -> list[int]:
        """Of these peers (some may have left) those whose entry of a table we believe to be as it should be."""
        bit, there = 1 << table, self.wanted.peers()
        return [
            peer
            for peer in peers
            if peer in there and self.wanted.bits(peer) & bit and not self.is_missing(peer, table)
        ]

    def device_lost(self, role: int, deleted: bool) -> None:
        """The device of a role went down, and what goes with that, silently; deleted: all that was on it."""
        lost = 0
        for number, table in enumerate(self.tables):
            if role not in table.stands_on or not (deleted or table.lost_when_down):
                continue
            lost |= 1 << number
            extra = self.extra[number]
            for key in [key for key, value in extra.items() if table.role(value) == role]:
                self.failures.pop((number, key), None)
                del extra[key]
                self._removals[number].pop(key, None)
                self._unremovable[number].discard(key)
                self.touch(number, key)
                for peer in self.wanted.owners(number, key):
                    if self.is_missing(peer, number):  # refused, maybe since this was in its way
                        self._set(peer, number)
            self.touch_peers(number, self.wanted.peers())  # what a dump under way has read of them is from before
        if self.wanted.uniform():
            if role == TUNNEL:
                self._lose_of_all(lost & self.wanted.uniform())
            return
        for peer in self.wanted.peers():
            if bits := self.wanted.bits_on(peer, role) & lost:
                self._lose_bits(peer, bits)

    def _lose_of_all(self, bits: int) -> None:
        before = (self.pending, self.backing_off)
        missing = Counter(before[0].values()) + Counter(before[1].values())
        self.pending, self.backing_off = dict.fromkeys(self.wanted.peers(), bits), {}
        if bits != self.wanted.uniform():
            for peers in before:
                for peer, others in peers.items():
                    self.pending[peer] |= others
        for number, table in enumerate(self.tables):
            if bits >> number & 1:
                lost = len(self.pending) - sum(count for there, count in missing.items() if there >> number & 1)
                self.mended[table.name] += lost
                self._missing += lost

    def _lose_bits(self, peer: int, bits: int) -> None:
        there = self.pending.get(peer, 0) | self.backing_off.get(peer, 0)
        for number in range(len(self.tables)):
            if bits & ~there & 1 << number:
                self._count_mended(number, peer)
        self.pending[peer] = self.pending.get(peer, 0) | bits
        if waiting := self.backing_off.pop(peer, 0):
            self.pending[peer] |= waiting
        self._missing += (bits & ~there).bit_count()

    def _not_so(self, table: int, key: Any) -> None:
        """The entry of a key is not as some peer wants it. News of a refused one ends its waiting."""
        new = [peer for peer in self.wanted.owners(table, key) if self._set(peer, table)]
        if new:
            self._count_mended(table, new[0])

    def _set(self, peer: int, table: int) -> bool:
        """A peer's entry is missing, and to be put at once; whether that is new."""
        bit = 1 << table
        new = not self.is_missing(peer, table)
        self._missing += new
        self.pending[peer] = self.pending.get(peer, 0) | bit
        if self.backing_off and (waiting := self.backing_off.get(peer, 0)) & bit:
            self._keep(self.backing_off, peer, waiting & ~bit)
        return new

    def _take_bit(self, peer: int, bit: int) -> bool:
        """A peer's entry is not missing (any more); whether it was."""
        was = False
        for peers in (self.pending, self.backing_off):
            if (bits := peers.get(peer, 0)) & bit:
                self._keep(peers, peer, bits & ~bit)
                was = True
        self._missing -= was
        return was

    @staticmethod
    def _keep(peers: dict[int, int], peer: int, bits: int) -> None:
        if bits:
            peers[peer] = bits
        else:
            del peers[peer]
            if not peers:
                peers.clear()  # a dict that was emptied one by one keeps its memory

    def _sort(self, table: int, key: Any, wanted: Any) -> None:
        """Whether a found entry is to be removed: where another is wanted of that key, putting that replaces it."""
        self._unremovable[table].discard(key)
        if wanted is None and key in self.extra[table]:
            self._removals[table][key] = None
        else:
            self._removals[table].pop(key, None)

    def touch(self, table: int, key: Any, peer: int = 0) -> None:
        """An event, or our own write, spoke of an entry. peer: whose it is, where that is known."""
        if self.touched is not None:
            self.touched.keys.add((table, key))
            self.touched.peers[table].update((peer,) if peer else self.wanted.owners(table, key))

    def touch_peers(self, table: int, peers: Iterable[int]) -> None:
        """Events say that these peers' entries are as we believe them to be."""
        if self.touched is not None:
            self.touched.peers[table].update(peers)
