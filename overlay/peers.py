"""Which records are peers: each record's own faults, and the disputes between records, settled for any order. Pure.

A dispute is about a subnet (overlapping ones) or about a MAC (one MAC behind two addresses: the FDB keeps one). The
record created earlier wins; the loser waits as refused and moves up when the winner goes. A record that itself lost
takes nobody's place. Work per change depends on the records in dispute with it, not on how many there are.

Peers are kept packed (lease/packed.py), by the number of their subnet: no two have one. Refused records are few, and kept
as they are.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lease.codec import BadRecord, decode_key, encode_key
from lease.model import WIDTH, Lease, Prefix, mac_text, mask
from lease.packed import FORM, LENGTH, MAC, NODE, PLAIN, PUBLIC_IP, Leases, number, pack, unpack
from lease.subnets import SubnetIndex

Judge = Callable[[Lease], str | None]
QuickJudge = Callable[[bytes], bool]
"""Whether a packed record surely passes the judge."""
Turned = dict[str, tuple[Lease | None, Lease | None]]
"""What a change did to the peers, by key: the peer before and the peer now; None: not a peer."""


class PeerTable:
    """Records by key; those accepted, and the reason of each of the others."""

    def __init__(self, judge: Judge, quick: QuickJudge = lambda _packed: False) -> None:
        self._judge, self._quick = judge, quick
        self.packed: dict[int, bytes] = {}
        """The peers, by subnet number."""
        self.by_mac: dict[int, int | tuple[int, ...]] = {}
        """Subnet numbers of peers, by MAC: several where a node holds two subnets."""
        self.lengths: Counter[int] = Counter()
        """Lengths of the peers' subnets."""
        self.refused: dict[str, str] = {}
        self._waiting: dict[str, Lease] = {}
        """The refused records."""
        self._faulty: set[str] = set()
        """Refused for what they are, whatever the others say; these take no part in disputes."""
        self._numbers: dict[str, int] = {}
        """Of peers whose key does not say it (Nodes, dual-stack records)."""
        self._losers = SubnetIndex(4)
        self._losers_by_mac: dict[int, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.packed) + len(self._waiting)

    def accepted(self) -> Iterator[Lease]:
        """All peers."""
        return map(unpack, self.packed.values())

    def peer(self, subnet_number: int) -> Lease:
        """The peer of a subnet number."""
        return unpack(self.packed[subnet_number])

    def waiting(self) -> Iterator[Lease]:
        """The refused records."""
        return iter(self._waiting.values())

    def covering(self, prefix: Prefix) -> Iterator[Lease]:
        """The peers in whose subnet a prefix lies."""
        for there in self._overlapping(prefix):
            lease = self.peer(there)
            if lease.v4 is not None and lease.v4.subnet.covers(prefix):
                yield lease

    def with_mac(self, mac: int) -> tuple[int, ...]:
        """The subnet numbers of the peers of a MAC."""
        found = self.by_mac.get(mac, ())
        return (found,) if isinstance(found, int) else found

    # --- changes -----------------------------------------------------------------------------------------------------

    def put(self, lease: Lease) -> Turned:
        """Enter or replace a record."""
        there = self._accepted(lease.key)
        if there is not None:
            was = self.peer(there)
            if (
                was.same_claim(lease) and was.created == lease.created
            ):  # written again as it was: a renewal of flannel's
                self.packed[there] = pack(lease)
                return {}
        return self._change({lease.key: lease})

    def drop(self, key: str) -> Turned:
        """Take a record out."""
        return self._change({key: None})

    def replace(self, leases: Leases, without: str = "") -> Turned:
        """Make these the records, by value, all but one."""
        change: dict[str, Lease | None] = {}
        for key, packed in leases.packed.items():
            if key != without and self.packed.get(int.from_bytes(packed[:5], "big")) != packed:
                lease = unpack(packed)
                if self._waiting.get(key) != lease:
                    change[key] = lease
        for lease in self.accepted():
            if lease.key not in leases or lease.key == without:
                change[lease.key] = None
        change |= {key: None for key in self._waiting if key not in leases or key == without}
        return self._change(change)

    def records(self) -> Leases:
        """All records, accepted or not."""
        packed = {unpack(each).key: each for each in self.packed.values()}
        packed |= {key: pack(lease) for key, lease in self._waiting.items()}
        return Leases(packed)

    def load(self, leases: Leases, without: str = "") -> None:
        """These records into an empty table, all but one."""
        disputed: dict[str, Lease | None] = {}
        for key, packed in leases.packed.items():
            if key == without:
                continue
            there, mac = int.from_bytes(packed[:5], "big"), int.from_bytes(packed[MAC], "big")
            quick = packed[FORM] <= NODE and (not self.lengths or packed[LENGTH] in self.lengths)
            if quick and there not in self.packed and mac not in self.by_mac and self._quick(packed):
                self.packed[there] = packed
                self.by_mac[mac] = there
                self.lengths[packed[LENGTH]] += 1
                if packed[FORM] != PLAIN:
                    self._numbers[key] = there
            else:
                disputed[key] = unpack(packed)
        self._change(disputed)

    def _change(self, change: Mapping[str, Lease | None]) -> Turned:
        before: dict[str, Lease | None] = {}
        pending: set[tuple[int, str]] = set()
        for key, lease in change.items():
            before[key] = old = self._peer(key)
            if old is not None:
                self._remove(old)
                pending |= self._losers_after(old)
            else:
                self._no_more_waiting(key)
            if lease is None:
                continue
            reason = self._judge(lease)
            self._wait(lease, reason or "not judged yet", reason is not None)
            if reason is None:
                pending.add((lease.created, key))
        self._settle(pending, before)
        return {key: (was, now) for key, was in before.items() if (now := self._peer(key)) != was}

    def _settle(self, pending: set[tuple[int, str]], before: dict[str, Lease | None]) -> None:
        """Decide about those that wait, in the order of age. No two peers are ever in dispute."""
        heap = sorted(pending)
        queued = set(heap)
        while heap:
            item = heapq.heappop(heap)
            queued.discard(item)
            lease = self._waiting.get(item[1])
            if lease is None or lease.key in self._faulty:
                continue
            rivals = self._rivals(lease)
            older = min((rival for rival in rivals if _age(rival) < _age(lease)), key=_age, default=None)
            if older is not None:
                self.refused[lease.key] = _reason(lease, older)
                continue
            before.setdefault(lease.key, None)
            for rival in rivals:  # younger: they lose their places, and those who lost to them may get one
                before.setdefault(rival.key, rival)
                self._remove(rival)
                self._wait(rival, _reason(rival, lease), faulty=False)
                for next_one in self._losers_after(rival) - queued:
                    heapq.heappush(heap, next_one)
                    queued.add(next_one)
            self._no_more_waiting(lease.key)
            self._insert(lease)

    def _rivals(self, lease: Lease) -> list[Lease]:
        """The peers in dispute with a record."""
        assert lease.v4 is not None
        found = {there: self.peer(there) for there in self._overlapping(lease.v4.subnet)}
        of_its_mac = self.with_mac(lease.v4.mac or 0)  # peers: these are of one public IP, however many
        if of_its_mac and int.from_bytes(self.packed[of_its_mac[0]][PUBLIC_IP], "big") != lease.v4.public_ip:
            found |= {there: self.peer(there) for there in of_its_mac}
        return [other for other in found.values() if other.key != lease.key]

    def _losers_after(self, lease: Lease) -> set[tuple[int, str]]:
        """The records that lost, maybe to this one, and are younger."""
        assert lease.v4 is not None
        keys = {*self._losers.overlapping(lease.v4.subnet), *self._losers_by_mac.get(lease.v4.mac or 0, ())}
        return {age for key in keys if (age := _age(self._waiting[key])) > _age(lease)}

    def _overlapping(self, subnet: Prefix) -> Iterator[int]:
        """The numbers of the peers that share an address with a subnet: one look-up for each length that occurs."""
        for length in list(self.lengths):
            if length <= subnet.length:
                there = (subnet.base & mask(4, length)) << 8 | length
                if there in self.packed:
                    yield there
            elif 1 << (length - subnet.length) < len(self.packed):
                step = WIDTH[4] - length
                for place in range(1 << (length - subnet.length)):
                    there = (subnet.base + (place << step)) << 8 | length
                    if there in self.packed:
                        yield there
            else:
                yield from [there for there in self.packed if there & 255 == length and subnet.holds(there >> 8)]

    # --- the two kinds of places ---------------------------------------------------------------------------------------

    def _insert(self, lease: Lease) -> None:
        assert lease.v4 is not None
        there, mac = number(lease.v4.subnet), lease.v4.mac or 0
        self.packed[there] = pack(lease)
        self.lengths[lease.v4.subnet.length] += 1
        others = self.with_mac(mac)
        self.by_mac[mac] = (*others, there) if others else there
        if lease.key != encode_key(lease.v4.subnet):
            self._numbers[lease.key] = there

    def _remove(self, lease: Lease) -> None:
        assert lease.v4 is not None
        there, length, mac = number(lease.v4.subnet), lease.v4.subnet.length, lease.v4.mac or 0
        del self.packed[there]
        self._numbers.pop(lease.key, None)
        self.lengths[length] -= 1
        if not self.lengths[length]:
            del self.lengths[length]
        left = tuple(other for other in self.with_mac(mac) if other != there)
        if left:
            self.by_mac[mac] = left if len(left) > 1 else left[0]
        else:
            del self.by_mac[mac]

    def _wait(self, lease: Lease, reason: str, faulty: bool) -> None:
        self._waiting[lease.key], self.refused[lease.key] = lease, reason
        if faulty:
            self._faulty.add(lease.key)
            return
        assert lease.v4 is not None
        self._losers.add(lease.v4.subnet, lease.key)
        mac = lease.v4.mac or 0
        self._losers_by_mac[mac] = (*self._losers_by_mac.get(mac, ()), lease.key)

    def _no_more_waiting(self, key: str) -> None:
        lease = self._waiting.pop(key, None)
        self.refused.pop(key, None)
        if lease is None or key in self._faulty:
            self._faulty.discard(key)
            return
        assert lease.v4 is not None
        self._losers.remove(lease.v4.subnet, key)
        mac = lease.v4.mac or 0
        left = tuple(other for other in self._losers_by_mac[mac] if other != key)
        if left:
            self._losers_by_mac[mac] = left
        else:
            del self._losers_by_mac[mac]

    def _accepted(self, key: str) -> int | None:
        """The number of the peer of a key, None where it has none."""
        there = self._numbers.get(key)
        if there is None:
            try:
                subnet, _ = decode_key(key)
            except BadRecord:
                return None
            there = number(subnet)
        return there if there in self.packed and self.peer(there).key == key else None

    def _peer(self, key: str) -> Lease | None:
        there = self._accepted(key)
        return None if there is None else self.peer(there)


def _age(lease: Lease) -> tuple[int, str]:
    return lease.created, lease.key


def _reason(lease: Lease, winner: Lease) -> str:
    assert lease.v4 is not None
    assert winner.v4 is not None
    if winner.v4.subnet.overlaps(lease.v4.subnet):
        return f"subnet {lease.v4.subnet} overlaps {winner.key}, which is older"
    return f"VtepMAC {mac_text(lease.v4.mac or 0)} is already used by {winner.key}, which is older"
