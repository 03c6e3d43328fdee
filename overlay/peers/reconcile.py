"""Wanted beside found, and what makes them one. Only what differs is remembered: a peer's entries that are not there, as
bits, and entries that are there and not wanted so. All else agrees, and stands nowhere but in the table of peers.

What differs is applied in batches, in an order in which traffic never meets a gap; an entry that the kernel refuses is
retried with backoff of its own and never holds up another.
"""

from __future__ import annotations

import errno
import heapq
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from itertools import islice
from typing import Any, NamedTuple, Protocol

from overlay.kernel.netlink import Refusal
from overlay.kernel.route import wire
from overlay.kernel.route.entries import TUNNEL, Kind, RouteKey, RouteValue
from overlay.kernel.route.fast import MESSAGES

SLICE = 512
"""Messages in one batch, some 4 ms of the kernel's time."""
RETRY_FIRST_S, RETRY_LAST_S = 0.1, 30.0
ROUTE_ALONE = 1 << Kind.ROUTE
ALL = 1 << Kind.NEIGHBOUR | 1 << Kind.FDB | ROUTE_ALONE
KINDS = tuple(Kind)
Entry = tuple[Kind, Any, Any]
"""Kind, key and value."""


class WantedEntries(Protocol):
    """What shall be in the kernel (wanted.Wanted). A peer is a number."""

    def peers(self) -> Collection[int]:
        """All peers."""

    def bits(self, peer: int) -> int:
        """The kinds of entries that a peer has, as bits."""

    def entries(self, peer: int) -> list[Entry]:
        """A peer's entries, in the order in which they are put in place."""

    def owners(self, kind: Kind, key: Any) -> tuple[int, ...]:
        """The peers that want an entry of a key."""

    def value(self, kind: Kind, key: Any) -> Any:
        """What the entry of a key shall be, None where none is wanted."""

    def serves(self, key: Any) -> int:
        """The peer of exactly the subnet that a route leads to, 0 where there is none."""

    def alike(self) -> bool:
        """Whether all peers surely have all three entries, by the tunnel."""

    def messages(self, peer: int, bits: int, seq: int, oif: int) -> bytes | None:
        """Messages that put a peer's entries of these kinds, numbered `seq` + kind, at once; None: ask `entries`."""


class Requests(Protocol):
    """The part of RequestSocket used here."""

    def take_seqs(self, count: int) -> int: ...
    def execute(self, messages: list[bytes], first: int, count: int) -> dict[int, Refusal]: ...


class Failure:
    """One entry the kernel refuses: how often, why, since when. token: of its last place in the queue of retries."""

    __slots__ = ("count", "refusal", "since", "token")

    def __init__(self, refusal: Refusal, since: float) -> None:
        self.count, self.refusal, self.since, self.token = 0, refusal, since, 0


class Refused(NamedTuple):
    """For the log: an entry was refused, for the n-th time."""

    kind: Kind
    key: Hashable
    failure: Failure


class Device(NamedTuple):
    """A device as the reconciler needs it: its number now, and whether routes can be set on it."""

    ifindex: int
    up: bool


class Touched:
    """What changed since a dump began: keys of entries, and peers (by kind) whose entries these are."""

    def __init__(self) -> None:
        self.keys: set[tuple[Kind, Any]] = set()
        self.peers: tuple[set[int], ...] = (set(), set(), set())

    def knows(self, kind: Kind, key: Any, owners: tuple[int, ...]) -> bool:
        """Whether it is of one of these; owners: the peers that want that key."""
        return (kind, key) in self.keys or any(owner in self.peers[kind] for owner in owners)


class Reconciler:
    """Neighbours, FDB and routes of all peers. Owned by one thread.

    Entries of a peer that are missing stand as bits in `todo`, or in `held` while a refused one waits for its time. What is
    found and not wanted so stands in `extra`: where a peer wants another value there, its bit is set as well.
    """

    def __init__(
        self, wanted: WantedEntries, requests: Requests, clock: Callable[[], float], rng: random.Random
    ) -> None:
        self.wanted = wanted
        self._requests, self._clock, self._rng = requests, clock, rng
        self.devices: dict[int, Device] = {}
        """By role; a role that is missing has no device now."""
        self.todo: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.extra: tuple[dict[Any, Any], ...] = ({}, {}, {})
        self._drops: tuple[dict[Any, None], ...] = ({}, {}, {})
        """Of `extra`: what nobody wants, to be removed; and below, what the kernel refused to remove, until its time."""
        self._kept: tuple[set[Any], ...] = (set(), set(), set())
        self._missing = 0
        self.failures: dict[tuple[Kind, Hashable], Failure] = {}
        self.writes: Counter[str] = Counter()
        """Messages the kernel accepted, by `put_route`, `remove_fdb`..."""
        self.mended: Counter[str] = Counter()
        """Entries that somebody else changed or removed, by kind."""
        self.look_again = False
        """The kernel contradicted what we believed: only a dump tells."""
        self.device_gone = False
        """The kernel does not know the tunnel's device: the news of that is on its way to us, or was lost. Until then
        nothing is sent."""
        self.touched: Touched | None = None
        """While a dump is taken: what events or our own writes know better."""
        self._retries: list[tuple[float, int, Kind, Hashable]] = []
        self._tokens = 0

    # --- what is wanted ------------------------------------------------------------------------------------------

    def know_nothing(self, wanted: WantedEntries) -> None:
        """Everything of these peers is missing, and nothing is found, until a dump says otherwise."""
        self.wanted = wanted
        self.todo = {peer: wanted.bits(peer) for peer in wanted.peers()}
        self._missing = sum(map(int.bit_count, self.todo.values()))
        self.held, self._retries = {}, []
        self.extra, self._drops, self._kept = ({}, {}, {}), ({}, {}, {}), (set(), set(), set())
        self.failures.clear()

    def left(self, peer: int, entries: Iterable[Entry]) -> None:
        """These entries of a peer are not wanted any more; the table is without it already."""
        for kind, key, value in entries:
            was_missing = self._take_bit(peer, 1 << kind)
            wanted = self.wanted.value(kind, key)
            if not was_missing:  # else a look may tell us that it is there
                self.touch(kind, key, peer)
                if wanted != value:
                    self.extra[kind][key] = value
            self.failures.pop((kind, key), None)
            self._retry(kind, key)

    def joined(self, peer: int, entries: Iterable[Entry]) -> None:
        """These entries of a peer are wanted from now on; the table has it already."""
        for kind, key, value in entries:
            if self.extra[kind].get(key) == value:
                del self.extra[kind][key]
            else:
                self._set(peer, kind)
            self.touch(kind, key, peer)
            self.failures.pop((kind, key), None)
            self._retry(kind, key)

    # --- what is found -------------------------------------------------------------------------------------------

    def find(self, kind: Kind, key: Any, value: Any, touch: bool = True) -> None:
        """The kernel says it has an entry. touch: an event says so, and not a dump."""
        if touch:
            self.touch(kind, key)
        wanted = self.wanted.value(kind, key)
        if value == wanted:
            self.extra[kind].pop(key, None)
            for peer in self.wanted.owners(kind, key):
                self._take_bit(peer, 1 << kind)
            self.failures.pop((kind, key), None)
        else:
            self.extra[kind][key] = value
            self._not_so(kind, key)
        self._sort(kind, key, wanted)

    def find_second(self, key: RouteKey, value: RouteValue) -> None:
        """A dump shows a route behind, or before, another of its key that is as it should be: it is to go."""
        self.extra[Kind.ROUTE][key] = value
        self._kept[Kind.ROUTE].discard(key)
        self._drops[Kind.ROUTE][key] = None

    def lose(self, kind: Kind, key: Any) -> None:
        """The kernel says an entry is gone."""
        self.touch(kind, key)
        self.extra[kind].pop(key, None)
        self._not_so(kind, key)
        wanted = self.wanted.value(kind, key)
        if wanted is None:
            self.failures.pop((kind, key), None)
        self._sort(kind, key, wanted)

    def lose_of(self, peer: int, kind: Kind) -> None:
        """The kernel says that a peer's entry is gone which was as it should be, and of whose key nothing else is found."""
        self.touch_peers(kind, (peer,))
        if self._set(peer, kind):
            self.mended[kind.name.lower()] += 1

    def agree(self, kind: Kind, peers: Iterable[int]) -> None:
        """A dump shows these peers' entries as they should be."""
        bit, todo, held = 1 << kind, self.todo, self.held
        if not todo and not held:
            return
        for peer in peers:
            if todo.get(peer, 0) & bit or held.get(peer, 0) & bit:
                for its_kind, key, _ in self.wanted.entries(peer) if self.failures or self.extra[kind] else ():
                    if its_kind is kind:
                        self.failures.pop((kind, key), None)
                        self.extra[kind].pop(key, None)
                self._take_bit(peer, bit)

    def is_found(self, kind: Kind, key: Any) -> bool:
        """Whether we believe that the kernel has an entry of that key."""
        if key in self.extra[kind]:
            return True
        return any(not self.is_missing(peer, kind) for peer in self.wanted.owners(kind, key))

    def is_missing(self, peer: int, kind: Kind) -> bool:
        """Whether a peer's entry is not as it should be."""
        return bool((self.todo.get(peer, 0) | self.held.get(peer, 0)) & 1 << kind)

    def believed(self, kind: Kind, peers: Iterable[int]) -> list[int]:
        """Of these peers (some may have left) those whose entry of a kind we believe to be as it should be."""
        bit, there = 1 << kind, self.wanted.peers()
        return [
            peer for peer in peers if peer in there and self.wanted.bits(peer) & bit and not self.is_missing(peer, kind)
        ]

    def device_lost(self, role: int, fdb_too: bool) -> None:
        """A device went down (routes and neighbours went with it, silently) or away (its FDB as well)."""
        routes = self.extra[Kind.ROUTE]
        for key in [key for key, value in routes.items() if value.role == role]:
            self.failures.pop((Kind.ROUTE, key), None)
            self.lose(Kind.ROUTE, key)
        lost = 1 << Kind.ROUTE
        if role == TUNNEL:
            gone = (Kind.NEIGHBOUR, *((Kind.FDB,) if fdb_too else ()))
            for kind in gone:
                lost |= 1 << kind
                for key in self.extra[kind]:
                    self.failures.pop((kind, key), None)
                for table in (self.extra[kind], self._drops[kind], self._kept[kind]):
                    table.clear()
        for kind in KINDS:
            if lost >> kind & 1:  # what a dump under way has read of them is from before
                self.touch_peers(kind, self.wanted.peers())
        if self.wanted.alike():
            if role == TUNNEL:
                self._lose_of_all(lost)
            return
        for peer in self.wanted.peers():
            bits = self.wanted.bits(peer)
            through = TUNNEL if bits == ALL else self._role(peer)
            if through == role:
                self._lose_bits(peer, bits & lost)

    def _role(self, peer: int) -> int:
        """The role of the device that a peer's route goes by."""
        return int(next(value.role for kind, _, value in self.wanted.entries(peer) if kind is Kind.ROUTE))

    def _lose_of_all(self, bits: int) -> None:
        peers, todo, held = self.wanted.peers(), self.todo, self.held
        missing = Counter(todo.values()) + Counter(held.values())
        self.todo = dict.fromkeys(peers, bits)
        if bits != ALL:
            for table in (todo, held):
                for peer, others in table.items():
                    self.todo[peer] |= others
        self.held = {}
        for kind in KINDS:
            if bits >> kind & 1:
                lost = len(self.todo) - sum(count for there, count in missing.items() if there >> kind & 1)
                self.mended[kind.name.lower()] += lost
                self._missing += lost

    def _lose_bits(self, peer: int, bits: int) -> None:
        there = self.todo.get(peer, 0) | self.held.get(peer, 0)
        for kind in KINDS:
            if bits & ~there & 1 << kind:
                self.mended[kind.name.lower()] += 1
        self.todo[peer] = self.todo.get(peer, 0) | bits
        if held := self.held.pop(peer, 0):
            self.todo[peer] |= held
        self._missing += (bits & ~there).bit_count()

    def _not_so(self, kind: Kind, key: Any) -> None:
        """The entry of a key is not as some peer wants it. News of a refused one ends its waiting."""
        new = False
        for peer in self.wanted.owners(kind, key):
            new |= self._set(peer, kind)
        self.mended[kind.name.lower()] += new

    def _set(self, peer: int, kind: Kind) -> bool:
        """A peer's entry is missing, and to be put at once; whether that is new."""
        bit = 1 << kind
        new = not self.is_missing(peer, kind)
        self._missing += new
        self.todo[peer] = self.todo.get(peer, 0) | bit
        if self.held and (held := self.held.get(peer, 0)) & bit:
            self._keep(self.held, peer, held & ~bit)
        return new

    def _take_bit(self, peer: int, bit: int) -> bool:
        """A peer's entry is not missing (any more); whether it was."""
        was = False
        for table in (self.todo, self.held):
            if (bits := table.get(peer, 0)) & bit:
                self._keep(table, peer, bits & ~bit)
                was = True
        self._missing -= was
        return was

    @staticmethod
    def _keep(table: dict[int, int], peer: int, bits: int) -> None:
        if bits:
            table[peer] = bits
        else:
            del table[peer]

    def _sort(self, kind: Kind, key: Any, wanted: Any) -> None:
        """Whether a found entry is to be removed: where another is wanted of that key, putting that replaces it."""
        self._kept[kind].discard(key)
        if wanted is None and key in self.extra[kind]:
            self._drops[kind][key] = None
        else:
            self._drops[kind].pop(key, None)

    def touch(self, kind: Kind, key: Any, peer: int = 0) -> None:
        """An event, or our own write, spoke of an entry. peer: whose it is, where that is known."""
        if self.touched is not None:
            self.touched.keys.add((kind, key))
            self.touched.peers[kind].update((peer,) if peer else self.wanted.owners(kind, key))

    def touch_peers(self, kind: Kind, peers: Iterable[int]) -> None:
        """Events say that these peers' entries are as we believe them to be."""
        if self.touched is not None:
            self.touched.peers[kind].update(peers)

    # --- making them one -------------------------------------------------------------------------------------------

    def differing(self) -> int:
        """How many entries are not as they should be."""
        return self._missing + sum(map(len, (*self._drops, *self._kept)))

    def settled(self) -> bool:
        """Whether nothing is to be done but what the kernel refuses, and is tried again."""
        return not self.todo and not any(self._drops)

    def next_retry(self) -> float | None:
        """When a refused entry is due again."""
        return self._retries[0][0] if self._retries else None

    def retry_now(self, kind: Kind) -> None:
        """What stood in the way of refused entries of a kind may be gone: do not wait for their time."""
        for failed_kind, key in list(self.failures):
            if failed_kind is kind:
                self._retry(kind, key)

    def _retry(self, kind: Kind, key: Any) -> None:
        for peer in self.wanted.owners(kind, key) if self.held else ():
            if self.held.get(peer, 0) & 1 << kind:
                self._set(peer, kind)
        self._sort(kind, key, self.wanted.value(kind, key))

    def apply(self) -> tuple[bool, list[Refused]]:
        """One batch of what differs. Whether more can be done at once, and what was refused."""
        now = self._clock()
        while self._retries and self._retries[0][0] <= now:
            _, token, kind, key = heapq.heappop(self._retries)
            failure = self.failures.get((kind, key))
            if failure is not None and failure.token == token:
                self._retry(kind, key)
        if self.device_gone:
            return False, []
        if self.todo and (batch := self._puts()).peers:
            return True, self._send_puts(batch)
        drops = self._next_drops()
        return (True, self._send_drops(drops)) if drops else (False, [])

    # --- putting

    class _Puts(NamedTuple):
        """A batch: messages (those of a peer in one), and the bits of each peer. Of the n-th peer, they are numbered from
        `first` + 3n, by kind."""

        first: int
        messages: list[bytes]
        peers: list[tuple[int, int]]

    def _puts(self) -> _Puts:
        tunnel = self.devices.get(TUNNEL)
        ready = tunnel is not None and tunnel.up
        if tunnel is None and self.wanted.alike():
            return self._Puts(0, [], [])
        first = seq = self._requests.take_seqs(SLICE + MESSAGES)
        messages: list[bytes] = []
        peers: list[tuple[int, int]] = []
        replaces = any(self.extra)
        for peer, bits in self.todo.items():
            if seq - first >= SLICE:
                break
            if not ready and bits == ROUTE_ALONE and self.wanted.bits(peer) == ALL:
                continue  # looked at without a thought: all 20,000 may wait for the device
            whole, sent = None, bits
            if ready and not replaces:
                assert tunnel is not None
                whole = self.wanted.messages(peer, bits, seq, tunnel.ifindex)
            if whole is None:
                whole, sent = self._one_by_one(peer, bits, seq)
            if sent:
                messages.append(whole)
                peers.append((peer, sent))
                seq += MESSAGES
        return self._Puts(first, messages, peers)

    def _one_by_one(self, peer: int, bits: int, seq: int) -> tuple[bytes, int]:
        """The messages of a peer's entries that can be put now, and the bits of these."""
        messages, sent = b"", 0
        for kind, key, value in self.wanted.entries(peer):
            if bits & 1 << kind and (message := self._put(seq + kind, kind, key, value)) is not None:
                messages += message
                sent |= 1 << kind
        return messages, sent

    def _put(self, seq: int, kind: Kind, key: Any, value: Any) -> bytes | None:
        """The message that puts an entry, None while its device is not ready for it."""
        if kind is Kind.ROUTE:
            device = self.devices.get(value.role)
            if device is None or not device.up:
                return None
            return wire.route_add(seq, key, value, device.ifindex, replace=key in self.extra[kind])
        tunnel = self.devices.get(TUNNEL)
        if tunnel is None:
            return None
        return (wire.neighbour_add if kind is Kind.NEIGHBOUR else wire.fdb_add)(seq, key, value, tunnel.ifindex)

    def _send_puts(self, batch: _Puts) -> list[Refused]:
        refused = self._requests.execute(batch.messages, batch.first, len(batch.peers) * MESSAGES)
        plain = not refused and not self.failures and not any(self.extra)
        said: list[Refused] = []
        sent: Counter[int] = Counter()
        for place, (peer, bits) in enumerate(batch.peers):
            if plain:  # the usual end: nothing was in the way of any entry
                self._keep(self.todo, peer, self.todo[peer] & ~bits)
                sent[bits] += 1
            else:
                said += self._answered(peer, bits, place * MESSAGES, refused)
        for bits, count in sent.items():
            self._missing -= bits.bit_count() * count
            for kind in KINDS:
                self.writes[_PUT[kind]] += count * (bits >> kind & 1)
        if plain and self.touched is not None:
            for kind in KINDS:
                self.touched.peers[kind].update(peer for peer, bits in batch.peers if bits >> kind & 1)
        return said

    def _answered(self, peer: int, bits: int, place: int, refused: dict[int, Refusal]) -> list[Refused]:
        """What the kernel said to each of a peer's messages."""
        said: list[Refused] = []
        for kind, key, value in self.wanted.entries(peer):
            if not bits & 1 << kind:
                continue
            refusal = refused.get(place + kind)
            if (
                refusal is not None
                and refusal.errno == errno.ENODEV
                and (kind is not Kind.ROUTE or value.role == TUNNEL)
            ):
                self.device_gone = True
            elif refusal is None:
                self._take_bit(peer, 1 << kind)
                self.touch(kind, key, peer)
                self.extra[kind].pop(key, None)
                self.failures.pop((kind, key), None)
                self.writes[_PUT[kind]] += 1
            else:
                self._keep(self.todo, peer, self.todo[peer] & ~(1 << kind))
                self.held[peer] = self.held.get(peer, 0) | 1 << kind
                said.append(self._failed(True, kind, key, refusal))
        return said

    # --- removing

    def _next_drops(self) -> list[tuple[Kind, Any]]:
        """Routes first, then the neighbours and FDB entries they used."""
        if self.devices.get(TUNNEL) is None:
            return []
        if self._drops[Kind.ROUTE]:
            # A route of flannel's goes only after ours of the same subnet stands.
            found = islice((key for key in self._drops[Kind.ROUTE] if not self._coming(key)), SLICE)
            if routes := [(Kind.ROUTE, key) for key in found]:
                return routes
        kinds = (Kind.NEIGHBOUR, Kind.FDB)
        return [(kind, key) for kind in kinds for key in islice(self._drops[kind], SLICE // 2)]

    def _coming(self, key: Any) -> bool:
        """Whether ours of the same subnet, by another key, does not stand yet."""
        if self.wanted.value(Kind.ROUTE, key) is not None:
            return False
        peer = self.wanted.serves(key)
        return bool(peer) and self.is_missing(peer, Kind.ROUTE)

    def _send_drops(self, drops: list[tuple[Kind, Any]]) -> list[Refused]:
        first = self._requests.take_seqs(len(drops))
        messages = [self._drop(first + place, *item) for place, item in enumerate(drops)]
        refused = self._requests.execute(messages, first, len(messages))
        said: list[Refused] = []
        for place, (kind, key) in enumerate(drops):
            refusal = refused.get(place)
            if refusal is None or refusal.errno in wire.ABSENT:
                self.touch(kind, key)
                self.extra[kind].pop(key, None)
                self._sort(kind, key, None)
                self.failures.pop((kind, key), None)
                self.writes[f"remove_{kind.name.lower()}"] += 1
            elif refusal.errno == errno.ENODEV:
                self.device_gone = True
            else:
                del self._drops[kind][key]
                self._kept[kind].add(key)
                said.append(self._failed(False, kind, key, refusal))
        return said

    def _drop(self, seq: int, kind: Kind, key: Any) -> bytes:
        value = self.extra[kind][key]
        if kind is Kind.ROUTE:
            # A route elsewhere is deleted by its key alone: 0 matches any device.
            index = self.devices[value.role].ifindex if value.role in self.devices else 0
            return wire.route_delete(seq, key, value, index)
        delete = wire.neighbour_delete if kind is Kind.NEIGHBOUR else wire.fdb_delete
        return delete(seq, key, value, self.devices[TUNNEL].ifindex)

    def _failed(self, put: bool, kind: Kind, key: Any, refusal: Refusal) -> Refused:
        """After any refusal what we believe is in doubt: look again, and retry this key alone, later."""
        now = self._clock()
        failure = self.failures.setdefault((kind, key), Failure(refusal, now))
        failure.count += 1
        failure.refusal = refusal
        self.look_again = self.look_again or failure.count == 1 or (put and refusal.errno == errno.EEXIST)
        self._tokens += 1
        failure.token = self._tokens
        due = now + retry_delay_s(failure.count, self._rng.uniform(0.8, 1.2))
        heapq.heappush(self._retries, (due, self._tokens, kind, key))
        return Refused(kind, key, failure)


_PUT = ("put_neighbour", "put_fdb", "put_route")


def retry_delay_s(failures: int, spread: float) -> float:
    """0.1, 0.2, 0.4 ... 30 s; `spread` in 0.8..1.2 keeps 1,000 entries from being retried as one."""
    return min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 9)) * spread
