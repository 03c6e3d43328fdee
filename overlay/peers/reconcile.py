"""Makes wanted and found one: what differs is applied in batches, in an order in which traffic never meets a gap; an entry
that the kernel refuses is retried with back-off of its own and never holds up another.
"""

from __future__ import annotations

import errno
import heapq
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from overlay.control.schedule import retry_delay_s
from overlay.kernel.netlink import Refusal
from overlay.kernel.route import wire
from overlay.kernel.route.entries import TUNNEL
from overlay.kernel.table import Table
from overlay.peers.difference import Difference, Failure, WantedEntries
from overlay.process.log import log

SLICE = 512
"""Messages in one batch, some 4 ms of the kernel's time."""
RETRY_LAST_S = 30.0
"""Of an entry: longer than of a controller, since there may be thousands."""


class Requests(Protocol):
    """The part of RequestSocket used here."""

    def take_seqs(self, count: int) -> int: ...
    def execute(self, messages: list[bytes], first: int, count: int) -> dict[int, Refusal]: ...


class Refused(NamedTuple):
    """For the log: an entry was refused, for the n-th time."""

    table: int
    key: Hashable
    failure: Failure


class Reconciler(Difference):
    """Neighbours, FDB, routes... of all peers, by the list of tables alone. Owned by one thread."""

    def __init__(
        self,
        tables: Sequence[Table],
        wanted: WantedEntries,
        requests: Requests,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        super().__init__(tables, wanted)
        self._requests, self._clock, self._rng = requests, clock, rng
        self.writes: Counter[str] = Counter()
        """Messages the kernel accepted, by `put_route`, `remove_fdb`..."""
        self.in_doubt = False
        """The kernel contradicted what we believed: only a dump shows what is true."""
        self.device_gone = False
        """The kernel does not know the tunnel's device: the news of that is on its way to us, or was lost. Until then
        nothing is sent."""
        self.observe: Callable[[str, int, Any, int], None] = lambda *_: None
        """Given each entry that is sent, at debug: put or remove, table, key, peer (0: of a removal, nobody's)."""
        self.main = TUNNEL
        """The role of the device without which nothing is done."""
        self._needs_up = sum(1 << number for number, table in enumerate(tables) if table.needs_up)
        self._retries: list[tuple[float, int, int, Hashable]] = []
        self._tokens = 0

    def forget(self, wanted: WantedEntries) -> None:
        """As Difference; nothing waits any more."""
        super().forget(wanted)
        self._retries = []

    def differing(self) -> int:
        """How many entries are not as they should be."""
        return self._missing + sum(map(len, (*self._removals, *self._unremovable)))

    def settled(self) -> bool:
        """Whether nothing is to be done but what the kernel refuses, and is tried again."""
        return not self.pending and not any(self._removals)

    def next_retry(self) -> float | None:
        """When a refused entry is due again."""
        return self._retries[0][0] if self._retries else None

    def retry_now(self, table: int) -> None:
        """What stood in the way of refused entries of a table may be gone: do not wait for their time."""
        for failed_table, key in list(self.failures):
            if failed_table == table:
                self._retry(table, key)

    def apply(self) -> tuple[bool, list[Refused]]:
        """One batch of what differs. Whether more can be done at once, and what was refused."""
        now = self._clock()
        while self._retries and self._retries[0][0] <= now:
            _, token, table, key = heapq.heappop(self._retries)
            failure = self.failures.get((table, key))
            if failure is not None and failure.token == token:
                self._retry(table, key)
        if self.device_gone:
            return False, []
        if self.pending and (batch := self._puts()).peers:
            return True, self._send_puts(batch)
        removals = self._next_removals()
        return (True, self._send_removals(removals)) if removals else (False, [])

    # --- putting

    class _Puts(NamedTuple):
        """A batch: messages (those of a peer in one), and the bits of each peer. Of the n-th peer, they are numbered from
        `first` + n times the number of tables, by table."""

        first: int
        messages: list[bytes]
        peers: list[tuple[int, int]]

    def _puts(self) -> _Puts:
        oifs = {role: device.ifindex for role, device in self.devices.items() if device.up}
        ready = self.main in oifs
        if self.main not in self.devices and self.wanted.uniform():
            return self._Puts(0, [], [])
        stride = len(self.tables)
        first = seq = self._requests.take_seqs(SLICE + stride)
        messages: list[bytes] = []
        peers: list[tuple[int, int]] = []
        replaces = any(self.extra)
        for peer, bits in self.pending.items():
            if seq - first >= SLICE:
                break
            if not ready and not bits & ~self._needs_up and not bits & ~self.wanted.bits_on(peer, self.main):
                continue  # skipped cheaply: all 20,000 may wait for the device
            whole = None if replaces else self.wanted.messages(peer, bits, seq, oifs)
            sent = bits
            if whole is None:
                whole, sent = self._one_by_one(peer, bits, seq)
            if sent:
                messages.append(whole)
                peers.append((peer, sent))
                seq += stride
        return self._Puts(first, messages, peers)

    def _one_by_one(self, peer: int, bits: int, seq: int) -> tuple[bytes, int]:
        """The messages of a peer's entries that can be put now, and the bits of these."""
        messages, sent = b"", 0
        for number, key, value in self.wanted.entries(peer):
            table = self.tables[number]
            device = self.devices.get(table.role(value))
            if bits & 1 << number and device is not None and (device.up or not table.needs_up):
                messages += table.put(seq + number, key, value, device.ifindex, key in self.extra[number])
                sent |= 1 << number
        return messages, sent

    def _send_puts(self, batch: _Puts) -> list[Refused]:
        if log.debugging:
            self._observe_puts(batch)
        refused = self._requests.execute(batch.messages, batch.first, len(batch.peers) * len(self.tables))
        plain = not refused and not self.failures and not any(self.extra)
        said: list[Refused] = []
        sent: Counter[int] = Counter()
        for place, (peer, bits) in enumerate(batch.peers):
            if plain:  # the usual end: nothing was in the way of any entry
                self._keep(self.pending, peer, self.pending[peer] & ~bits)
                sent[bits] += 1
            else:
                said += self._answered(peer, bits, place * len(self.tables), refused)
        for bits, count in sent.items():
            self._missing -= bits.bit_count() * count
            for number, table in enumerate(self.tables):
                if bits >> number & 1:
                    self.writes[f"put_{table.name}"] += count
        if plain and self.touched is not None:
            for number, touched in enumerate(self.touched.peers):
                touched.update(peer for peer, bits in batch.peers if bits >> number & 1)
        return said

    def _observe_puts(self, batch: _Puts) -> None:
        for peer, bits in batch.peers:
            for table, key, _ in self.wanted.entries(peer):
                if bits >> table & 1:
                    self.observe("put", table, key, peer)

    def _answered(self, peer: int, bits: int, place: int, refused: dict[int, Refusal]) -> list[Refused]:
        """What the kernel said to each of a peer's messages."""
        said: list[Refused] = []
        for table, key, value in self.wanted.entries(peer):
            if not bits & 1 << table:
                continue
            refusal = refused.get(place + table)
            on_tunnel = self.tables[table].role(value) == TUNNEL
            if refusal is not None and refusal.errno == errno.ENODEV and on_tunnel:
                self.device_gone = True
            elif refusal is None:
                self._take_bit(peer, 1 << table)
                self.touch(table, key, peer)
                self.extra[table].pop(key, None)
                self.failures.pop((table, key), None)
                self.writes[f"put_{self.tables[table].name}"] += 1
            else:
                self._keep(self.pending, peer, self.pending[peer] & ~(1 << table))
                self.backing_off[peer] = self.backing_off.get(peer, 0) | 1 << table
                said.append(self._failed(True, table, key, refusal))
        return said

    # --- removing

    def _next_removals(self) -> list[tuple[int, Any]]:
        """What leads traffic first (routes), then what it used."""
        if self.main not in self.devices:
            return []
        others = []
        for number, table in enumerate(self.tables):
            if not table.takes_over:
                others.append(number)
                continue
            # an entry of flannel's goes only after ours of the same peer stands
            found = islice((key for key in self._removals[number] if not self._coming(number, key)), SLICE)
            if leading := [(number, key) for key in found]:
                return leading
        most = SLICE // max(1, len(others))
        return [(number, key) for number in others for key in islice(self._removals[number], most)]

    def _coming(self, table: int, key: Any) -> bool:
        """Whether ours of the same peer, by another key, does not stand yet."""
        if self.wanted.value(table, key) is not None:
            return False
        peer = self.wanted.successor(table, key)
        return bool(peer) and self.is_missing(peer, table)

    def _send_removals(self, removals: list[tuple[int, Any]]) -> list[Refused]:
        if log.debugging:
            for table, key in removals:
                self.observe("remove", table, key, 0)
        first = self._requests.take_seqs(len(removals))
        messages = [self._removal(first + place, *item) for place, item in enumerate(removals)]
        refused = self._requests.execute(messages, first, len(messages))
        said: list[Refused] = []
        for place, (table, key) in enumerate(removals):
            refusal = refused.get(place)
            if refusal is None or refusal.errno in wire.ABSENT:
                self.touch(table, key)
                self.extra[table].pop(key, None)
                self._sort(table, key, None)
                self.failures.pop((table, key), None)
                self.writes[f"remove_{self.tables[table].name}"] += 1
            elif refusal.errno == errno.ENODEV:
                self.device_gone = True
            else:
                del self._removals[table][key]
                self._unremovable[table].add(key)
                said.append(self._failed(False, table, key, refusal))
        return said

    def _removal(self, seq: int, number: int, key: Any) -> bytes:
        table, value = self.tables[number], self.extra[number][key]
        device = self.devices.get(table.role(value))
        return table.remove(seq, key, value, device.ifindex if device is not None else 0)

    def _failed(self, put: bool, table: int, key: Any, refusal: Refusal) -> Refused:
        """After any refusal what we believe is in doubt: read again, and retry this key alone, later."""
        now = self._clock()
        failure = self.failures.setdefault((table, key), Failure(refusal, now))
        failure.count += 1
        failure.refusal = refusal
        self.in_doubt = self.in_doubt or failure.count == 1 or (put and refusal.errno == errno.EEXIST)
        self._tokens += 1
        failure.token = self._tokens
        # the spread keeps 1,000 entries from being retried as one
        due = now + retry_delay_s(failure.count, RETRY_LAST_S) * self._rng.uniform(0.8, 1.2)
        heapq.heappush(self._retries, (due, self._tokens, table, key))
        return Refused(table, key, failure)
