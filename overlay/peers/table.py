"""Which records are peers: each record's own faults, and the disputes between records, settled for any order. Pure.

A dispute is about a MAC (one MAC behind two addresses: the FDB keeps one), and then about a subnet (overlapping ones). A
subnet is the record's that was created earlier. A MAC is the address's that had it first, as far as we saw: what came, or
took another MAC in place, since the first list comes after all that was there; among these the record created earlier has
it. (A store cannot say: flannel renews a record by writing it again, and a Node's annotations have no date.) The loser waits
as refused and moves up when the winner goes. A record that itself lost takes nobody's subnet. Work per change depends on the
peers that come and go by it, not on how many there are, nor on how many are in dispute with it: one that is written again
with its subnet and age concerns no loser, and a loser is asked first whether the one that it lost to is still there.

`modified` is kept here as the moment since which a record has its MAC: its revision, or one more than the latest that we
know where that says more.

Peers are kept packed (lease/records/packed.py), by the number of their subnet: no two have one. Refused records are few,
and kept as they are.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lease.families import Family
from lease.model import WIDTH, Endpoint, Lease, Prefix, mac_text, mask
from lease.records.codec import key_subnet
from lease.records.packed import FORM, MODIFIED, NODE, PLACES, Leases, number, pack, quick_number, unpack
from lease.records.subnets import SubnetIndex

Judge = Callable[[Lease], str | None]
QuickJudge = Callable[[bytes], bool]
"""Whether a packed record surely passes the judge."""
PeerChanges = dict[str, tuple[Lease | None, Lease | None]]
"""What a change did to the peers, by key: the peer before and the peer now; None: not a peer."""


class _Claimants:
    """Those without fault that have one MAC, while one of them waits; who of them has it."""

    __slots__ = ("ages", "by_ip", "family", "owner", "waiting")

    def __init__(self, family: int) -> None:
        self.family = family
        self.ages: list[tuple[int, int, str, int]] = []
        """Since when each has it, its own age, its key and public IP; in order."""
        self.by_ip: dict[int, set[str]] = {}
        self.waiting: set[str] = set()
        self.owner: int | None = None
        """The public IP by which it was settled last."""

    def enter(self, since: int, lease: Lease) -> None:
        """One more; once, however often."""
        age, place, there = self._place(since, lease)
        if not there:
            self.ages.insert(place, age)
            self.by_ip.setdefault(age[-1], set()).add(lease.key)

    def leave(self, since: int, lease: Lease) -> None:
        """One less."""
        age, place, there = self._place(since, lease)
        if there:
            del self.ages[place]
            left = self.by_ip[age[-1]]
            left.discard(lease.key)
            if not left:
                del self.by_ip[age[-1]]

    def _place(self, since: int, lease: Lease) -> tuple[tuple[int, int, str, int], int, bool]:
        """Its age, where that stands or would stand, and whether it does."""
        end = lease.endpoint(self.family)
        assert end is not None, "a record without the family's part is refused by the judge"
        age = (since, *_age(lease), end.public_ip)
        place = bisect.bisect_left(self.ages, age)
        return age, place, self.ages[place : place + 1] == [age]

    def of(self, public_ip: int | None) -> set[str]:
        """The keys of those with a public IP."""
        return self.by_ip.get(public_ip, set()) if public_ip is not None else set()


class _Reasons(Mapping[str, str]):
    """Why records are refused, by key."""

    def __init__(self, table: PeerTable) -> None:
        self._table = table

    def __getitem__(self, key: str) -> str:
        return self._table.reason(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.reasons)

    def __len__(self) -> int:
        return len(self._table.reasons)


class PeerTable:
    """Records by key; those accepted, and the reason of each of the others."""

    def __init__(
        self,
        family: Family,
        judge: Judge,
        quick: QuickJudge = lambda _packed: False,
        listed: int | None = None,
    ) -> None:
        """family: of the peers; a record without that part is refused by the judge. listed: the latest revision of the
        first list, where that is not the first that is loaded here."""
        self._family, self._judge, self._quick, self.listed = family.number, judge, quick, listed
        self.packed: dict[int, bytes] = {}
        """The peers, by subnet number."""
        self.by_mac: dict[int, int | set[int]] = {}
        """Subnet numbers of peers, by MAC: several where a node holds two subnets."""
        self.lengths: Counter[int] = Counter()
        """Lengths of the peers' subnets."""
        self.reasons: dict[str, str] = {}
        """Why records are refused; what depends on others' disputes is said by `reason`."""
        self._waiting: dict[str, Lease] = {}
        """The refused records."""
        self._faulty: set[str] = set()
        """Refused for what they are, whatever the others say; these take no part in disputes."""
        self._outdone: set[str] = set()
        """Refused since another address had their MAC first; these take no part in disputes about subnets."""
        self._numbers: dict[str, int] = {}
        """Of peers whose key does not say it (Nodes)."""
        self._losers = SubnetIndex(self._family)
        self._lost_to: dict[str, int] = {}
        """The subnet number of a peer to whom a record lost its subnet last; it may have gone since."""
        self._claimants: dict[int, _Claimants] = {}
        self._latest = listed or 0
        """The latest revision that a record had."""

    def __len__(self) -> int:
        return len(self.packed) + len(self._waiting)

    @property
    def refused(self) -> Mapping[str, str]:
        """Why records are refused, by key, as it is when it is asked."""
        return _Reasons(self)

    def accepted(self) -> Iterator[Lease]:
        """All peers."""
        return map(unpack, self.packed.values())

    def peer(self, subnet_number: int) -> Lease:
        """The peer of a subnet number."""
        return unpack(self.packed[subnet_number])

    def waiting(self) -> Iterator[Lease]:
        """The refused records."""
        return iter(self._waiting.values())

    def record(self, key: str) -> Lease | None:
        """The record of a key, accepted or not; None: there is none."""
        return self._waiting.get(key) or self._peer(key)

    def reason(self, key: str) -> str:
        """Why a record is refused. Raises KeyError: it is not."""
        if key in self._outdone:
            mac = self._mac(self._waiting[key])
            oldest = self._claimants[mac].ages[0][2]
            what = f"VtepMAC {mac_text(mac)}" if mac < 1 << 48 else "PublicKey"
            return f"{what} is already used by {oldest}, which had it first"
        return self.reasons[key]

    def covering(self, prefix: Prefix) -> Iterator[Lease]:
        """The peers in whose subnet a prefix lies."""
        for there in self._overlapping(prefix):
            lease = self.peer(there)
            if self._subnet(lease).covers(prefix):
                yield lease

    def with_mac(self, mac: int) -> tuple[int, ...]:
        """The subnet numbers of the peers of a MAC."""
        found = self.by_mac.get(mac, ())
        return (found,) if isinstance(found, int) else tuple(found)

    # --- changes -----------------------------------------------------------------------------------------------------

    def put(self, lease: Lease) -> PeerChanges:
        """Enter or replace a record."""
        there = self._accepted(lease.key)
        if there is not None:
            was = self.peer(there)
            if (
                was.same_claim(lease) and was.created == lease.created
            ):  # written again as it was: a renewal of flannel's
                self.packed[there] = pack(lease._replace(modified=was.modified))
                return {}
        return self._change({lease.key: lease})

    def change(self, records: Mapping[str, Lease | None]) -> PeerChanges:
        """Many at once: enter or replace them, None: take it out."""
        return self._change({key: lease for key, lease in records.items() if lease is None or not self._has(lease)})

    def _has(self, lease: Lease) -> bool:
        """Whether it stands as it says already."""
        was = self.record(lease.key)
        return was is not None and was.created == lease.created and was.same_claim(lease)

    def drop(self, key: str) -> PeerChanges:
        """Take a record out."""
        return self._change({key: None})

    def replace(self, leases: Leases, without: str = "") -> PeerChanges:
        """Make these the records, by value, all but one."""
        change: dict[str, Lease | None] = {}
        for key, packed in leases.packed.items():
            if key == without:
                continue
            there = quick_number(packed, self._family)
            if there is None or self.packed.get(there) != packed:
                lease = unpack(packed)
                if not self._has(lease):
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
        disputed: dict[str, Lease] = {}
        latest, of_bytes = self._latest, int.from_bytes
        forms, where, at_length, _, at_mac = PLACES[self._family]
        peers, by_mac, quick = self.packed, self.by_mac, self._quick
        lengths = dict(self.lengths)  # a Counter is slower, and this is done for twenty thousand at the start
        for key, packed in leases.packed.items():
            if key == without:
                continue
            latest = max(latest, of_bytes(packed[MODIFIED], "big"))
            form, length = packed[FORM], packed[at_length] if packed[FORM] in forms else 0
            if form in forms and (not lengths or length in lengths) and quick(packed):
                there, mac = of_bytes(packed[where], "big"), of_bytes(packed[at_mac], "big")
                if there not in peers and mac not in by_mac:
                    peers[there], by_mac[mac] = packed, there
                    lengths[length] = lengths.get(length, 0) + 1
                    if form == NODE:
                        self._numbers[key] = there
                    continue
            disputed[key] = unpack(packed)
        self.lengths = Counter(lengths)
        self._latest = max(latest, *(lease.modified for lease in disputed.values()), 0)
        if self.listed is None:
            self.listed = self._latest
        self._change(disputed, listed=True)

    def _change(self, change: Mapping[str, Lease | None], listed: bool = False) -> PeerChanges:
        """listed: these are the first list."""
        before: dict[str, Lease | None] = {}
        left: list[Lease] = []
        entered: dict[int, list[str]] = {}
        for key, lease in change.items():
            before[key] = old = self._peer(key)
            was = old or self._waiting.get(key)
            if was is not None:
                entered.setdefault(self._mac(was), [])
            if old is not None:
                self._remove(old)
                self._leave(old)
                left.append(old)
            elif was is not None:
                self._no_more_waiting(key)
                self._leave(was)
            if lease is None:
                self._lost_to.pop(key, None)
                continue
            if not listed:
                lease = self._dated(lease, was)  # noqa: PLW2901
            reason = self._judge(lease)
            self._wait(lease, reason or "not judged yet", reason is not None)
            if reason is None:
                entered.setdefault(self._mac(lease), []).append(key)
        pending: set[tuple[int, str]] = set()
        for mac, keys in entered.items():
            pending |= self._settle_mac(mac, keys, before)
        self._settle(pending, before)
        # who has the same subnet again by the same age keeps it from the same others
        pending = {age for old in left if not self._stands_again(old) for age in self._losers_after(old)}
        self._settle(pending, before)
        return {key: (was, now) for key, was in before.items() if (now := self._peer(key)) != was}

    def _stands_again(self, old: Lease) -> bool:
        """Whether the record of a peer that was taken out is a peer again, with its subnet and age."""
        now = self._peer(old.key)
        return now is not None and _age(now) == _age(old) and self._subnet(now) == self._subnet(old)

    def _dated(self, lease: Lease, was: Lease | None) -> Lease:
        """A record with the moment since which it has its MAC."""
        same = was is not None and was.created == lease.created and self._mac(was) == self._mac(lease)
        since = was.modified if was is not None and same else max(lease.modified, self._latest + 1)
        self._latest = max(self._latest, since)
        return lease if since == lease.modified else lease._replace(modified=since)

    def _since(self, lease: Lease) -> int:
        """The same, 0 for all that the first list had."""
        return lease.modified if lease.modified > (self.listed or 0) else 0

    def _settle_mac(self, mac: int, entered: list[str], before: dict[str, Lease | None]) -> set[tuple[int, str]]:
        """Who has a MAC, after these entered and others left. Those of other addresses are out; the ages of those that may
        have a subnet now."""
        found = self._claimants.get(mac)
        if found is None:
            return set()
        owner = found.ages[0][-1]
        keys = {*entered} if owner == found.owner else {*entered, *found.of(found.owner), *found.of(owner)}
        found.owner = owner
        pending: set[tuple[int, str]] = set()
        for key in keys:
            peer = self._peer(key)
            lease = peer or self._waiting[key]
            if self._public_ip(lease) == owner:
                if peer is None:
                    self._outdone.discard(key)
                    self._losers.add(self._subnet(lease), key)
                    pending.add(_age(lease))
                continue
            if peer is not None:
                before.setdefault(key, peer)
                self._remove(peer)
                self._wait(peer, "", faulty=False)
                pending |= self._losers_after(peer)
            self._outdone.add(key)
            self._losers.remove(self._subnet(lease), key)
        return pending

    def _settle(self, pending: set[tuple[int, str]], before: dict[str, Lease | None]) -> None:
        """Decide about those that wait, in the order of age. No two peers are ever in dispute."""
        heap = sorted(pending)
        queued = set(heap)
        while heap:
            item = heapq.heappop(heap)
            queued.discard(item)
            lease = self._waiting.get(item[1])
            if lease is None or lease.key in self._faulty or lease.key in self._outdone:
                continue
            older = self._older_rival(lease)
            if older is not None:
                self._lost_to[lease.key] = number(self._subnet(older))
                self.reasons[lease.key] = self._overlap(lease, older)
                continue
            before.setdefault(lease.key, None)
            rivals = [self.peer(there) for there in self._overlapping(self._subnet(lease))]
            for rival in rivals:  # younger: they lose their places, and those who lost to them may get one
                before.setdefault(rival.key, rival)
                self._remove(rival)
                self._lost_to[rival.key] = number(self._subnet(lease))
                self._wait(rival, self._overlap(rival, lease), faulty=False)
                for next_one in self._losers_after(rival) - queued:
                    heapq.heappush(heap, next_one)
                    queued.add(next_one)
            self._no_more_waiting(lease.key)
            self._insert(lease)

    def _older_rival(self, lease: Lease) -> Lease | None:
        """A peer that is older and whose subnet overlaps a record's, None: there is none. The last one first, since among
        thousands that overlap it may be the only older one."""
        subnet, age = self._subnet(lease), _age(lease)
        last = self._lost_to.get(lease.key)
        if last in self.packed:
            rival = self.peer(last)
            if _age(rival) < age and self._subnet(rival).overlaps(subnet):
                return rival
        rivals = map(self.peer, self._overlapping(subnet))
        return next((rival for rival in rivals if _age(rival) < age), None)

    def _losers_after(self, lease: Lease) -> set[tuple[int, str]]:
        """The records that lost their subnet, maybe to this one, and are younger."""
        keys = self._losers.overlapping(self._subnet(lease))
        return {age for key in keys if (age := _age(self._waiting[key])) > _age(lease)}

    def _overlapping(self, subnet: Prefix) -> Iterator[int]:
        """The numbers of the peers that share an address with a subnet: one look-up for each length that occurs. The peers
        must stay as they are until it is done."""
        for length in list(self.lengths):
            if length <= subnet.length:
                there = (subnet.base & mask(self._family, length)) << 8 | length
                if there in self.packed:
                    yield there
            elif 1 << (length - subnet.length) < len(self.packed):
                step = WIDTH[self._family] - length
                for place in range(1 << (length - subnet.length)):
                    there = (subnet.base + (place << step)) << 8 | length
                    if there in self.packed:
                        yield there
            else:
                yield from (there for there in self.packed if there & 255 == length and subnet.holds(there >> 8))

    # --- the two kinds of places ---------------------------------------------------------------------------------------

    def _insert(self, lease: Lease) -> None:
        there, mac = number(self._subnet(lease)), self._mac(lease)
        self._lost_to.pop(lease.key, None)
        self.packed[there] = pack(lease)
        self.lengths[self._subnet(lease).length] += 1
        found = self.by_mac.setdefault(mac, there)
        if isinstance(found, set):
            found.add(there)
        elif found != there:
            self.by_mac[mac] = {found, there}
        if key_subnet(lease.key, self._family) != self._subnet(lease):
            self._numbers[lease.key] = there

    def _remove(self, lease: Lease) -> None:
        there, length, mac = number(self._subnet(lease)), self._subnet(lease).length, self._mac(lease)
        del self.packed[there]
        self._numbers.pop(lease.key, None)
        self.lengths[length] -= 1
        if not self.lengths[length]:
            del self.lengths[length]
        found = self.by_mac[mac]
        if isinstance(found, set):
            found.discard(there)
            if len(found) == 1:
                self.by_mac[mac] = found.pop()
        else:
            del self.by_mac[mac]

    def _wait(self, lease: Lease, reason: str, faulty: bool) -> None:
        key, mac = lease.key, self._mac(lease)
        self._waiting[key], self.reasons[key] = lease, reason
        if faulty:
            self._faulty.add(key)
            return
        self._losers.add(self._subnet(lease), key)
        found = self._claimants.get(mac)
        if found is None:
            found = self._claimants[mac] = _Claimants(self._family)
            for peer in map(self.peer, self.with_mac(mac)):
                found.enter(self._since(peer), peer)
                found.owner = self._public_ip(peer)  # all peers of a MAC have one
        found.enter(self._since(lease), lease)
        found.waiting.add(key)

    def _no_more_waiting(self, key: str) -> None:
        """A record becomes a peer, or goes."""
        lease = self._waiting.pop(key, None)
        self.reasons.pop(key, None)
        if lease is None or key in self._faulty:
            self._faulty.discard(key)
            return
        self._outdone.discard(key)
        self._losers.remove(self._subnet(lease), key)
        found = self._claimants[self._mac(lease)]
        found.waiting.discard(key)
        if not found.waiting:
            del self._claimants[self._mac(lease)]

    def _leave(self, lease: Lease) -> None:
        """A record goes, or is another one now: it does not claim its MAC any more."""
        found = self._claimants.get(self._mac(lease))
        if found is not None:
            found.leave(self._since(lease), lease)

    def _end(self, lease: Lease) -> Endpoint:
        end = lease.endpoint(self._family)
        assert end is not None, "a record without the family's part is refused by the judge"
        return end

    def _subnet(self, lease: Lease) -> Prefix:
        return self._end(lease).subnet

    def _public_ip(self, lease: Lease) -> int:
        return self._end(lease).public_ip

    def _mac(self, lease: Lease) -> int:
        """What it has alone (Endpoint.identity); 0 of one without the family's part."""
        end = lease.endpoint(self._family)
        return end.identity if end is not None else 0

    def _overlap(self, lease: Lease, winner: Lease) -> str:
        return f"subnet {self._subnet(lease)} overlaps {winner.key}, which is older"

    def _accepted(self, key: str) -> int | None:
        """The number of the peer of a key, None where it has none."""
        there = self._numbers.get(key)
        if there is None:
            subnet = key_subnet(key, self._family)
            if subnet is None:
                return None
            there = number(subnet)
        return there if there in self.packed and self.peer(there).key == key else None

    def _peer(self, key: str) -> Lease | None:
        there = self._accepted(key)
        return None if there is None else self.peer(there)


def _age(lease: Lease) -> tuple[int, str]:
    return lease.created, lease.key
