"""Keeps what is ours: acquire, keep alive, lost, taken again. What may be ours is claim.py's to say."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from lease.families import V4
from lease.model import Endpoint, Lease, Prefix, ip_text, mac_text
from lease.records.codec import key_of
from lease.records.packed import Leases
from lease.store import LeaseExpired, RecordChanged, Snapshot, Store, StoreUnavailable, SubnetTaken
from lease.tenure.allocate import MACS_S, MOST_MACS, RangeFull, choose_mac
from lease.tenure.asked import choose
from lease.tenure.claim import Answer, Claim, Identity, Kind, Occupied, Probe, earlier_overlap, find_own
from lease.tenure.events import Denied, Disputed, Held, Lost, Partial, Renewed, TenureEvent
from lease.tenure.recent import Recent
from lease.tenure.second import lost_to_an_earlier, second_of

RACES = 40
"""Lost races in a row before we pause: twenty nodes over twenty subnets need fewer."""
MOST_REMOVALS = 20
"""So often an old record that the store does not remove is tried again by itself; each time all are read."""
MOST_REWRITES, REWRITES_S = 10, 60.0
"""So often within so long we write over what a copy of this node wrote over ours; then one of the two must give up. What
another node writes there is written over without end, and told."""
RENEW_AT_LEAST_S = 3600.0
"""We renew every hour, or three times in a life where that is shorter: long before flannel's 23rd hour."""


class Tenure:
    """The decisions and store calls that make a Claim a lease. No thread; `TenureThread` turns it."""

    def __init__(
        self,
        store: Store,
        probe: Probe,
        ttl_s: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._probe, self._ttl_s, self._rng, self._clock = store, probe, ttl_s, rng, clock
        self.held: Lease | None = None
        self.unreported: list[TenureEvent] = []
        """What happened in a settling that the store then broke off: to be reported all the same."""
        self._mac_in_use: int | None = None
        """Of a lease we held: the device keeps it when the subnet is lost."""
        self._to_remove: Lease | None = None
        """Our old record, which the new one replaced."""
        self._removals = 0
        """How often the store did not remove it."""
        self._against_others = Recent(MOST_REWRITES, REWRITES_S)
        self._against_copies = Recent(MOST_REWRITES, REWRITES_S)
        """When we last wrote over what another node, or a copy of ours, had written over our record in place."""
        self._macs_left = Recent(MOST_MACS, MACS_S)
        """When we last took another MAC, since a record had ours."""
        self._family = V4.number
        """By whose part records are compared: that of the last claim."""
        self._partial = self._told_partial = ""
        """Why the lease lacks a family, as it was told last."""
        self._raced = False
        """All races of the last settling were lost."""
        self._had_one = False
        """A lease was held."""
        self._given_up: set[str] = set()
        """Keys that a copy of this node writes over and over."""

    def settle(self, claim: Claim, snapshot: Snapshot | None = None) -> list[TenureEvent]:
        """Make store and claim agree; what happened, [] when nothing had to be done.

        Raises StoreUnavailable: try again; what happened until then stands in `unreported`.
        """
        events, self.unreported, raced, self._raced = self.unreported, [], self._raced, False
        self._family = claim.family.number
        if self._had_one:
            claim = claim._replace(take_over=False)
        if self._mac_in_use is not None:
            claim = claim._replace(device_mac=self._mac_in_use)
        for _ in range(RACES):
            try:
                if snapshot is None or (self.held is not None and snapshot.revision < self.held.modified):
                    snapshot = self._store.read()
                events += self._keep(claim, snapshot) if self.held is not None else self._acquire(claim, snapshot)
                if self.held is not None:
                    self._had_one, mac = True, self._end(self.held).mac
                    if None not in (self._mac_in_use, mac) and mac != self._mac_in_use:
                        self._macs_left.add(self._clock())
                    self._mac_in_use = mac or self._mac_in_use
                    if self._second_lost(claim, self.held, snapshot):
                        snapshot = None
                        continue
                if raced and self.held is not None and not any(isinstance(event, Held) for event in events):
                    events.append(Held(self.held, "unchanged"))  # the races that were lost are over
                return [*events, *self._partly()]
            except (SubnetTaken, RecordChanged):
                snapshot = None  # a lost race: read again
            except _SubnetLost as lost:
                assert self.held is not None
                events.append(Lost(self.held, str(lost)))
                self.held = None
            except StoreUnavailable:
                self.unreported = events
                raise
        self._raced = True
        return [
            *events,
            *self._partly(),
            Denied(f"{RACES} races for a subnet were lost in a row; trying again after a pause"),
        ]

    @property
    def unfinished(self) -> bool:
        """Whether it is to be settled again though a lease is held."""
        return self._raced or (self._to_remove is not None and self._removals < MOST_REMOVALS)

    def _partly(self) -> list[TenureEvent]:
        """What is not told yet of the family that the lease lacks: whatever was raised since it was found."""
        if self._partial == self._told_partial:
            return []
        self._told_partial = self._partial
        return [Partial(self._partial)]

    def renew(self) -> Renewed:
        """Keep the etcd lease alive. Raises LeaseExpired, StoreUnavailable."""
        assert self.held is not None
        return Renewed(self._store.keep_alive(self.held).left_s)

    def _end(self, lease: Lease) -> Endpoint:
        """The part by which a record is compared."""
        return lease.endpoint(self._family) or lease.first

    def _second_lost(self, claim: Claim, held: Lease, snapshot: Snapshot) -> bool:
        """Two nodes may take one subnet of the other family at the same moment: no key keeps them apart."""
        if claim.second is None or held.created <= snapshot.revision:
            return False
        return lost_to_an_earlier(claim, Snapshot(0, None, self._store.later_than(snapshot.revision), {}), held)

    def _second(self, claim: Claim, snapshot: Snapshot, own: Lease | None, first: Prefix) -> Endpoint | None:
        """Our part of the other family, None: there is none for now."""
        used, held = _MacsBefore(snapshot.leases, own), self.held is not None
        end, why = second_of(claim, snapshot, own, first, used, self._rng, held)
        before = own.endpoint(end.subnet.family) if own is not None and end is not None else None
        if end is not None and before is not None and None not in (before.mac, end.mac) and before.mac != end.mac:
            if self._macs_left.often(self._clock()):
                end = end._replace(mac=before.mac)  # a record follows us to each that we take
            else:
                self._macs_left.add(self._clock())
        self._partial = why
        return end

    # --- holding one -------------------------------------------------------------------------------------------------

    def _keep(self, claim: Claim, snapshot: Snapshot) -> list[TenureEvent]:
        held = self.held
        assert held is not None
        there = snapshot.leases.get(held.key)
        if there is None:
            return self._restore(claim, snapshot, held)
        theirs = Identity.read(there.node)
        foreign = bool(theirs.link) and not claim.identity.same_link(theirs)
        elsewhere = self._end(there).public_ip not in (self._end(held).public_ip, claim.public_ip)
        other_vtep = self._end(there).identity != self._end(held).identity
        if elsewhere and (other_vtep or foreign):
            if there.created != held.created:
                raise _SubnetLost(f"{there.key} now belongs to {_owner(there)}")
            return self._write_over(claim, snapshot, held, there)
        if elsewhere and self._against_copies.often(self._clock()) and self._may_live(self._end(there).public_ip):
            self._given_up.add(there.key)
            raise _SubnetLost(
                f"{_owner(there)} has our MAC and interface and writes over {there.key} again and again: one of the two is a"
                " copy of the other's machine. Give it a machine-id and MACs of its own"
            )
        if other_vtep and there.node != held.node:
            if there.created != held.created or self._may_live(self._end(there).public_ip):
                raise _SubnetLost(f"{_owner(there)} took {there.key} over with our own public IP")
            return self._write_over(claim, snapshot, held, there)  # no other machine has that address
        if (earlier := earlier_overlap(snapshot, claim, there)) is not None:
            raise _SubnetLost(f"{earlier.key} of {_owner(earlier)} overlaps it and is older")
        snapshot = self._remove_old(snapshot)
        unused = self._mac(claim._replace(device_mac=self._end(held).mac), snapshot, there)
        mac = self._mac_left(held, unused)
        disputed: list[TenureEvent] = (
            [Disputed(f"{self._rival(snapshot, held)}, and follows us where we take another")] if mac != unused else []
        )
        wanted = self._lease(
            claim, self._end(there).subnet, mac, self._second(claim, snapshot, there, self._end(there).subnet)
        )
        if wanted.key != there.key:
            return [*self._moved(claim, held, there, wanted), *disputed]
        if there.same_claim(wanted):
            if held.handle not in (0, there.handle):
                # under none it would stay for ever when this node is gone, under somebody's it goes when he likes
                self.held = self._put_right(held, there.modified, wanted)
                under = "that of somebody else" if there.handle else "none"
                return [Held(self.held, f"written again: its etcd lease was {under}", warn=True)]
            self.held = there
            return [*([] if there.same_claim(held) else [Held(there, "unchanged")]), *disputed]
        if there.same_claim(held):
            self.held = self._store.change(there, wanted)
        else:  # somebody wrote it
            self.held = self._put_right(held, there.modified, wanted)
        if elsewhere:
            self._against_copies.add(self._clock())
        method = "written with what changed on this node" if there.same_claim(held) else "written again as it was"
        ours = self._end(held).mac
        robbed = None not in (mac, ours) and mac != ours and self._end(there).mac == ours
        if robbed:
            method = f"with another MAC, since {self._rival(snapshot, held)}"
        return [Held(self.held, method, robbed), *disputed]

    def _moved(self, claim: Claim, held: Lease, there: Lease, wanted: Lease) -> list[TenureEvent]:
        """Our record under another key: a family came or went, or its subnet is another."""
        if not there.same_claim(held):  # somebody wrote it: first as it was
            before = self._lease(claim, self._end(held).subnet, self._end(held).mac, self._other(held))
            there = self._put_right(held, there.modified, before)
        self.held = self._store.move(there, wanted)
        return [
            Held(self.held, f"moved from {there.key}: the families of this network, or of this node, are others now")
        ]

    def _other(self, lease: Lease) -> Endpoint | None:
        """The part of a record that is not the one by which it is compared."""
        end = self._end(lease)
        return next((each for each in lease.ends if each is not end), None)

    def _mac_left(self, held: Lease, unused: int | None) -> int | None:
        """The MAC to have: ours, where it is unused; also where a record has followed us to each that we took lately."""
        ours = self._end(held).mac
        if ours is None or unused in (None, ours):
            return unused
        return ours if self._macs_left.often(self._clock()) else unused

    def _write_over(self, claim: Claim, snapshot: Snapshot, held: Lease, there: Lease) -> list[TenureEvent]:
        """Nobody gives a subnet away in place: it would have been deleted, and created by a transaction."""
        mac = self._mac_left_to_us(claim, snapshot, held)
        wanted = self._lease(claim, self._end(held).subnet, mac, self._other(held))
        self.held = self._put_right(held, there.modified, wanted)
        self._against_others.add(self._clock())
        events: list[TenureEvent] = [Held(self.held, f"written again: {_owner(there)} had overwritten it", warn=True)]
        if self._against_others.often(self._clock()):
            events.append(
                Disputed(f"{_owner(there)} writes over our {held.key} again and again: check who may write there")
            )
        return events

    def _put_right(self, held: Lease, modified: int, wanted: Lease) -> Lease:
        """Our record as it should be, over what somebody wrote there: under our etcd lease, since theirs is not ours to
        keep, and with none the record would stay for ever when this node is gone."""
        ttl_s = 0
        try:
            self._store.keep_alive(held)
        except LeaseExpired:
            ttl_s = self._ttl_s
        return self._store.change(held._replace(modified=modified), wanted, ttl_s)

    def _may_live(self, public_ip: int) -> bool:
        """Whether another machine may have an address."""
        answer = self._probe(public_ip)
        return answer.by is not None or not answer.conclusive

    def _restore(self, claim: Claim, snapshot: Snapshot, held: Lease) -> list[TenureEvent]:
        """Our record vanished, or was overwritten with what nobody can read."""
        subnet, mac = self._end(held).subnet, self._mac_left_to_us(claim, snapshot, held)
        wanted = self._lease(claim, subnet, mac, self._other(held))
        if (broken := snapshot.refused.get(held.key)) is not None:
            self.held = self._put_right(held, broken.modified, wanted)
            return [Held(self.held, f"written again: it held what nobody can read ({broken.reason})", warn=True)]
        if taken := next(Occupied(snapshot, claim).overlapping(subnet), None):
            other = snapshot.leases.get(taken)
            raise _SubnetLost(f"it vanished, and {taken} of {_owner(other) if other else 'somebody'} took its place")
        latest = held._replace(created=snapshot.revision + 1)  # who has our other subnet meanwhile has it first
        wanted = self._lease(claim, subnet, mac, self._second(claim, snapshot, latest, subnet))
        self.held = self._store.create(wanted, self._ttl_s)
        return [Held(self.held, "taken again: the record had vanished (expired or deleted)", warn=True)]

    # --- getting one -------------------------------------------------------------------------------------------------

    def _acquire(self, claim: Claim, snapshot: Snapshot) -> list[TenureEvent]:
        own, method, warn = self._own(claim, snapshot)
        if isinstance(method, Denied):
            return [method]
        if own is not None and (kept := self._kept(claim, snapshot, own, method, warn)) is not None:
            return [kept]
        taken = Occupied(snapshot, claim)
        for there_already in claim.avoid:
            taken.add(there_already, "our underlay")
        try:
            subnet = choose(claim, taken, claim.previous, self._rng)
        except RangeFull as full:
            return [Denied((_because_of_underlay(claim) if claim.asked is None else "") or str(full))]
        second = self._second(claim, snapshot, None, subnet)
        new = self._lease(claim, subnet, self._mac(claim, snapshot, own), second)
        self.held = self._store.create(new, self._ttl_s)
        if own is None:
            if (first := self._first_with_our_address(claim, snapshot)) is not None:
                return [first]
            hows = {claim.previous: "as in subnet.env", claim.asked: "as asked for"}
            return [Held(self.held, hows.get(subnet, "allocated"), warn)]
        self._to_remove, self._removals = own, 0
        self._remove_old(snapshot)
        method = f"allocated, since our old {own.key} does not fit the config any more"
        return [Held(self.held, method, warn=True)]

    def _kept(self, claim: Claim, snapshot: Snapshot, own: Lease, method: str, warn: bool) -> Held | None:
        """Our record, where it fits, or moved to the subnet that was asked for; None: another one is needed."""
        subnet = self._end(own).subnet
        if claim.moves_from(subnet, Occupied(snapshot, claim, own.key)):
            assert claim.asked is not None
            subnet, warn = claim.asked, True
            method = f"as asked for, in place of our old {own.key}: pods made before are to be made again"
        elif not claim.allows(subnet) or earlier_overlap(snapshot, claim, own) is not None:
            return None
        second = self._second(claim, snapshot, own, subnet)
        wanted = self._lease(claim, subnet, self._mac(claim, snapshot, own), second)
        put = self._store.change if wanted.key == own.key else self._store.move
        self.held = own if own.same_claim(wanted) else put(own, wanted)
        return Held(self.held, method, warn)

    def _first_with_our_address(self, claim: Claim, snapshot: Snapshot) -> Denied | None:
        """Two nodes with one address may start at the same moment, and neither find a record of it: the one whose record
        came later checks once more, and gives it back where the first lives."""
        held = self.held
        assert held is not None
        earlier = Leases.of(
            lease
            for lease in self._store.later_than(snapshot.revision).values()
            if claim.same_address(lease) and lease.created < held.created
        )
        _, method, _ = self._own(claim, snapshot._replace(leases=earlier)) if earlier else (None, "", False)
        if not isinstance(method, Denied):
            return None
        self._store.remove(held)
        self.held = None
        return method

    def _remove_old(self, snapshot: Snapshot) -> Snapshot:
        """Take away the record that our lease replaced; later, where the store does not do it now. The list without it: ours
        is nobody who has our MAC."""
        old = self._to_remove
        if old is None:
            return snapshot
        if self.held is not None and old.key == self.held.key:  # it is the one that we have, again
            self._to_remove = None
            return snapshot
        without = snapshot._replace(leases=Leases({k: v for k, v in snapshot.leases.packed.items() if k != old.key}))
        there = snapshot.leases.get(old.key)
        if there is not None and there.same_claim(old):
            try:
                self._store.remove(there)
            except (StoreUnavailable, RecordChanged):
                self._removals += 1
                return without
        self._to_remove = None
        return without

    def _own(self, claim: Claim, snapshot: Snapshot) -> tuple[Lease | None, str | Denied, bool]:
        """Our own record, how we know, and whether that is worth a warning; a Denied instead of that: a conflict."""
        for kind, lease, end in find_own(snapshot.leases, claim):
            theirs = Identity.read(lease.node)
            if lease.key in self._given_up and end.public_ip != claim.public_ip:
                continue
            if kind is Kind.SURE:
                return lease, "kept: our public IP and our device's MAC", False
            if claim.take_over and kind is Kind.ADDRESS:
                return lease, f"taken over from {_owner(lease)}, as the flag says", True
            answer = self._probe(end.public_ip)
            if kind is Kind.MOVED:
                surely = claim.has_identity(end) and claim.identity.same_link(theirs)
                if answer.by is None and (answer.conclusive or surely):
                    old = ip_text(end.subnet.family, end.public_ip)
                    return lease, f"kept: ours from {old}, which nobody answers for any more", True
                continue
            same = claim.identity.same_node(theirs)
            if answer.by is not None or (not answer.conclusive and self._in_use(claim, lease, theirs)):
                return None, Denied(_conflict(claim, lease, answer), conflict=True), True
            if same:
                return lease, "kept: our public IP and identity", False
            return lease, f"taken over from {_owner(lease)}, which does not answer for our public IP", True
        return None, "", False

    def _in_use(self, claim: Claim, lease: Lease, theirs: Identity) -> bool:
        """Where nobody can be asked: whether the record may belong to a node that lives."""
        if claim.identity.same_link(theirs):
            return False
        try:
            left, granted = self._store.lifetime(lease)
        except LeaseExpired:
            return False
        if left is None or granted is None:
            return bool(lease.node)  # a reservation nobody came for yet is there to be taken
        if not lease.node:
            return True  # flannel renews once in 23 h: while the record exists, it is not known
        return left > granted - 2 * renew_every_s(granted)

    def _mac(self, claim: Claim, snapshot: Snapshot, own: Lease | None) -> int | None:
        """The device's MAC, else our record's, else a new one: never one that another record had before us. None where the
        backend has none.

        A record that another interface wrote lends us its subnet, never its MAC: its owner may live after all, and then
        neither it nor the peers could distinguish the two.
        """
        if not claim.wants_mac:
            return None
        used = _MacsBefore(snapshot.leases, own)
        recorded = None
        if own is not None and claim.identity.same_link(Identity.read(own.node)):
            recorded = self._end(own).mac
        for mac in (claim.device_mac, recorded):
            if mac is not None and mac not in used:
                return mac
        return choose_mac(used, self._rng)

    def _mac_left_to_us(self, claim: Claim, snapshot: Snapshot, held: Lease) -> int | None:
        """The MAC for a record of ours that was gone or another's for a moment: ours, unless somebody else claims it, who is
        the first to have it now. None where the backend has none."""
        if not claim.wants_mac:
            return None
        mac = self._end(held).mac
        others = _MacsBefore(snapshot.leases, None)
        if mac is not None and mac not in others:
            return mac
        return self._mac_left(held, choose_mac(others, self._rng))

    def _lease(self, claim: Claim, subnet: Prefix, mac: int | None, second: Endpoint | None) -> Lease:
        ends = [claim.endpoint(subnet, claim.public_ip, mac), *([second] if second is not None else [])]
        return claim.lease(key_of(ends), ends, str(claim.identity))

    def _rival(self, snapshot: Snapshot, held: Lease) -> str:
        """Which record has our MAC, too."""
        mac = self._end(held).mac or 0
        rivals = (lease.key for lease in snapshot.leases.with_mac(mac) if lease.key != held.key)
        return f"{next(rivals, 'another record')} has our MAC {mac_text(mac)}, too"


class _MacsBefore:
    """The MACs that records had before ours was created, or written last: peers that saw it change may take the other for
    the first. Asked for the one or two that are tried, not gathered."""

    def __init__(self, leases: Leases, own: Lease | None) -> None:
        self._leases, self._own = leases, own

    def __contains__(self, mac: int) -> bool:
        own = self._own
        return any(
            own is None or (lease.key != own.key and (lease.created < own.created or lease.modified < own.modified))
            for lease in self._leases.with_mac(mac)
        )


class _SubnetLost(Exception):
    """The held subnet has another owner now."""


def renew_every_s(granted_s: float) -> float:
    """How often a lease of that life is kept alive."""
    return min(RENEW_AT_LEAST_S, granted_s / 3)


def _because_of_underlay(claim: Claim) -> str:
    """What no subnet may touch is not taken by anybody: it is this node's own underlay."""
    touched = {there: claim.pool.touched_by(there) for there in claim.avoid}
    where, count = max(touched.items(), key=lambda item: item[1], default=(None, 0))
    if not count:
        return ""
    interface = f" ({claim.interface})" if claim.interface else ""
    return (
        f"none of the {claim.pool.size} subnets of {claim.pool} is free: {count} of them touch this node's underlay"
        f" {where}{interface}: choose a Network outside of it, or SubnetMin and SubnetMax"
    )


def _owner(lease: Lease) -> str:
    end = lease.first
    mac = f", VTEP {mac_text(end.mac)}" if end.mac is not None else ""
    return f"{Identity.read(lease.node).called()} at {ip_text(end.subnet.family, end.public_ip)}{mac}"


def _conflict(claim: Claim, lease: Lease, answer: Answer) -> str:
    address = ip_text(claim.family.number, claim.public_ip)
    why = (
        f"{mac_text(answer.by)} answers for that address"
        if answer.by is not None
        else "it is fresh, and the address is off-link, so nobody can be asked"
    )
    return (
        f"public IP {address} belongs to {_owner(lease)}, which holds {lease.key}: {why}."
        " Give this node an address of its own (--iface, --public-ip); if that node is gone for good,"
        " start once with --take-over"
    )
