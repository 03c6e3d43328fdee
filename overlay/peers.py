"""Which records are peers: each record's own faults, and the disputes between records, settled for any order. Pure.

A dispute is about a subnet (overlapping ones) or about a MAC (one MAC behind two addresses: the FDB keeps one). The
record created earlier wins; the loser waits as refused and moves up when the winner goes. A record that itself lost
takes nobody's place. Work per change depends on the records in dispute with it, not on how many there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from lease.model import Lease, Prefix, mac_text
from lease.subnets import SubnetIndex

Judge = Callable[[Lease], str | None]
Turned = dict[str, tuple[Lease | None, Lease | None]]
"""What a change did to the peers, by key: the peer before and the peer now; None: not a peer."""


class PeerTable:
    """Records by key; those accepted, and the reason of each of the others."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.records: dict[str, Lease] = {}
        self.refused: dict[str, str] = {}
        self._faulty: set[str] = set()
        """Refused for what they are, whatever the others say; these take no part in disputes."""
        self._subnets = SubnetIndex(4)
        self._by_mac: dict[int, tuple[str, ...]] = {}

    def accepted(self) -> Iterator[Lease]:
        """All peers."""
        return (lease for key, lease in self.records.items() if key not in self.refused)

    def sharing_mac(self, mac: int) -> Iterator[Lease]:
        """The accepted records of one MAC: a node may hold two subnets."""
        return (self.records[key] for key in self._by_mac.get(mac, ()) if key not in self.refused)

    def covering(self, prefix: Prefix) -> Iterator[Lease]:
        """The peers in whose subnet a prefix lies."""
        for key in self._subnets.overlapping(prefix):
            lease = self.records[key]
            if key not in self.refused and lease.v4 is not None and lease.v4.subnet.covers(prefix):
                yield lease

    def put(self, lease: Lease) -> Turned:
        """Enter or replace a record."""
        return self._change({lease.key: lease})

    def drop(self, key: str) -> Turned:
        """Take a record out."""
        return self._change({key: None})

    def replace(self, leases: Mapping[str, Lease]) -> Turned:
        """Make these the records, by value."""
        change: dict[str, Lease | None] = {key: None for key in self.records if key not in leases}
        change.update((key, lease) for key, lease in leases.items() if self.records.get(key) != lease)
        return self._change(change)

    def judge_again(self, judge: Judge) -> None:
        """Every record under a new judge (config, underlay or own lease changed); the caller looks at `accepted`."""
        records, self.records, self.refused, self._faulty = self.records, {}, {}, set()
        self._subnets, self._by_mac, self._judge = SubnetIndex(4), {}, judge
        self._change(dict(records))

    def _change(self, change: Mapping[str, Lease | None]) -> Turned:
        before: dict[str, Lease | None] = {}
        pending: set[tuple[int, str]] = set()
        for key, lease in change.items():
            before[key] = self._peer(key)
            old = self.records.pop(key, None)
            self.refused.pop(key, None)
            if old is not None and key not in self._faulty:
                pending |= self._rivals_after(old)
                self._leave(old)
            self._faulty.discard(key)
            if lease is not None:
                self.records[key] = lease
                if (reason := self._judge(lease)) is not None:
                    self.refused[key] = reason
                    self._faulty.add(key)
                else:
                    self._enter(lease)
                    pending.add((lease.created, key))
                    pending |= self._rivals_after(lease)
        self._settle(pending, before)
        return {key: (was, now) for key, was in before.items() if (now := self._peer(key)) != was}

    def _settle(self, pending: set[tuple[int, str]], before: dict[str, Lease | None]) -> None:
        """Decide in the order of age; a decision that changes asks those after it again."""
        heap = sorted(pending)
        queued = set(heap)
        while heap:
            item = heapq.heappop(heap)
            queued.discard(item)
            lease = self.records.get(item[1])
            if lease is None or lease.key in self._faulty:
                continue
            before.setdefault(lease.key, self._peer(lease.key))
            was_refused = lease.key in self.refused
            reason = self._dispute(lease)
            if reason is None:
                self.refused.pop(lease.key, None)
            else:
                self.refused[lease.key] = reason
            if was_refused != (reason is not None):
                for rival in self._rivals_after(lease) - queued:
                    heapq.heappush(heap, rival)
                    queued.add(rival)

    def _dispute(self, lease: Lease) -> str | None:
        """The earlier peer that stands in the way of a record, as a reason."""
        assert lease.v4 is not None
        for key in self._rivals(lease):
            other = self.records[key]
            if key in self.refused or (other.created, key) > (lease.created, lease.key):
                continue
            assert other.v4 is not None
            if other.v4.subnet.overlaps(lease.v4.subnet):
                return f"subnet {lease.v4.subnet} overlaps {key}, which is older"
            assert lease.v4.mac is not None
            return f"VtepMAC {mac_text(lease.v4.mac)} is already used by {key}, which is older"
        return None

    def _rivals(self, lease: Lease) -> Iterator[str]:
        assert lease.v4 is not None
        for key in self._subnets.overlapping(lease.v4.subnet):
            if key != lease.key:
                yield key
        for key in self._by_mac.get(lease.v4.mac or 0, ()):
            other = self.records[key].v4 if key != lease.key else None
            if other is not None and other.public_ip != lease.v4.public_ip:
                yield key

    def _rivals_after(self, lease: Lease) -> set[tuple[int, str]]:
        me = (lease.created, lease.key)
        rivals = {(self.records[key].created, key) for key in self._rivals(lease)}
        return {rival for rival in rivals if rival > me}

    def _enter(self, lease: Lease) -> None:
        assert lease.v4 is not None
        self._subnets.add(lease.v4.subnet, lease.key)
        mac = lease.v4.mac or 0
        self._by_mac[mac] = (*self._by_mac.get(mac, ()), lease.key)

    def _leave(self, lease: Lease) -> None:
        assert lease.v4 is not None
        self._subnets.remove(lease.v4.subnet, lease.key)
        mac = lease.v4.mac or 0
        left = tuple(key for key in self._by_mac.get(mac, ()) if key != lease.key)
        if left:
            self._by_mac[mac] = left
        else:
            self._by_mac.pop(mac, None)

    def _peer(self, key: str) -> Lease | None:
        return None if key in self.refused else self.records.get(key)
