"""Keeps what is ours: acquire, keep alive, lost, taken again.

What may be ours is decided by evidence, strongest first (`find_own`):
- the record holds our public IP and the MAC of the VTEP device that this kernel has: this is us, no question asked;
- it holds our public IP: a doubt, settled by asking the underlay who answers for that address;
- it holds another public IP, but our identity or our device's MAC: ours only if nobody answers for that address.
Identity alone proves nothing: cloned VMs and namespaces share machine-id and hostname.
"""

from __future__ import annotations

import enum
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lease.allocate import RangeFull, choose_mac, choose_subnet
from lease.codec import encode_key
from lease.config import NetworkConfig, Pool
from lease.model import Endpoint, Lease, Prefix, ip_number, ip_text, mac_text, mask
from lease.store import (
    LeaseExpired,
    RecordChanged,
    Snapshot,
    Store,
    StoreUnavailable,
    SubnetTaken,
    backoff_s,
)
from lease.subnets import SubnetIndex

_BASE = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3})-", re.ASCII)
RACES = 40
"""Lost races in a row before we pause: twenty nodes over twenty subnets need fewer."""
LOOK_GAP_S = 1.0
"""Our own record is put right at most so often: somebody may write against us without end."""
RENEW_AT_LEAST_S = 3600.0
"""We renew every hour, or three times in a life where that is shorter: long before flannel's 23rd hour."""


class Identity(NamedTuple):
    """Who a node says it is. machine: hash of its machine-id; name: --node-name; link: MAC of its underlay interface.

    Written into the record as one string. It raises or calms a doubt, and never decides one (see above).
    """

    machine: str
    name: str
    link: str

    def __str__(self) -> str:
        return "/".join(self) if any(self) else ""

    @classmethod
    def read(cls, text: str) -> Identity:
        """Of a record; of one that says nothing, all parts are empty."""
        parts = text.split("/")
        return cls(*parts) if len(parts) == 3 else cls("", text, "")

    def same_node(self, other: Identity) -> bool:
        """Whether both name the same machine and the same node name (a clone does too)."""
        return bool(self.machine or self.name) and self[:2] == other[:2]

    def moved_from(self, other: Identity) -> bool:
        """Whether a record of `other` behind another address may be ours. The machine alone says nothing (clones share
        it): the operator's name for the node must agree too, or the interface's MAC."""
        return self.same_node(other) and (bool(self.name) or self.same_link(other))

    def same_link(self, other: Identity) -> bool:
        """Whether both have the same underlay interface."""
        return bool(self.link) and self.link == other.link

    def called(self) -> str:
        """For a message."""
        return self.name or (f"machine {self.machine}" if self.machine else "a node that left no identity (flannel?)")


class Answer(NamedTuple):
    """What the underlay says about an address. by: the MAC that answered, None where nobody did."""

    can_tell: bool
    by: int | None


Probe = Callable[[int], Answer]
"""Asks the underlay who answers for an IPv4 address (ARP, about a second where nobody does)."""


class Claim(NamedTuple):
    """What this node wants to hold. device_mac: of the VTEP device in this kernel, None where there is none.

    previous: the subnet of the old subnet.env. avoid: what a subnet must not touch, the underlay's own prefixes.
    take_over: the operator said that the record of our address is ours; it counts for the first lease only.
    """

    config: NetworkConfig
    public_ip: int
    device_mac: int | None
    identity: Identity
    previous: Prefix | None
    take_over: bool = False
    avoid: tuple[Prefix, ...] = ()

    @property
    def pool(self) -> Pool:
        """The IPv4 subnets; a config without them never becomes a claim."""
        assert self.config.v4 is not None
        return self.config.v4

    def allows(self, subnet: Prefix) -> bool:
        """Whether this node may hold a subnet."""
        return self.pool.allows(subnet) and not any(subnet.overlaps(there) for there in self.avoid)


class Held(NamedTuple):
    """The lease is ours; `how` says by which way, `loud` whether an operator should look."""

    lease: Lease
    how: str
    loud: bool = False


class Lost(NamedTuple):
    """The subnet is not ours any more. The datapath of running pods stays; another is taken for new pods."""

    lease: Lease
    reason: str


class Denied(NamedTuple):
    """No lease for now, and why. conflict: another node claims our public IP."""

    reason: str
    conflict: bool = False


class Renewed(NamedTuple):
    """The etcd lease was kept alive; None: it never expires."""

    left_s: float | None


TenureEvent = Held | Lost | Denied | Renewed


Clock = Callable[[], float]


def boottime() -> float:
    """Seconds that also pass while the machine sleeps: a lease runs on in the store meanwhile (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Kind(enum.Enum):
    """How sure we are that a record is ours."""

    SURE = 1
    ADDRESS = 2
    """It holds our public IP."""
    MOVED = 3
    """It holds our identity or MAC behind another public IP."""


def find_own(leases: Mapping[str, Lease], claim: Claim) -> list[tuple[Kind, Lease]]:
    """The records that may be ours, the likeliest first. Pure."""
    found: list[tuple[Kind, Lease]] = []
    for lease in leases.values():
        end = lease.v4
        if end is None:
            continue
        same_mac = claim.device_mac is not None and end.mac == claim.device_mac
        if end.public_ip == claim.public_ip:
            found.append((Kind.SURE if same_mac else Kind.ADDRESS, lease))
        elif same_mac or claim.identity.moved_from(Identity.read(lease.node)):
            found.append((Kind.MOVED, lease))

    def likely(item: tuple[Kind, Lease]) -> tuple[object, ...]:
        kind, lease = item
        same = claim.identity.same_node(Identity.read(lease.node))
        previous = lease.v4 is not None and lease.v4.subnet == claim.previous
        return kind.value, not same, not previous, lease.created, lease.key

    return sorted(found, key=likely)


def occupied(snapshot: Snapshot, claim: Claim, without: str | None = None) -> SubnetIndex:
    """The subnets that records claim, and those that a create would be refused for.

    A record that nobody can use (outside Network, a large part of it, unreadable) takes no subnet but the one of its
    own base: the transaction that creates a record demands that no key of that base stands.
    """
    pool = claim.pool
    index = SubnetIndex(4)

    def base_only(base: int, key: str) -> None:
        index.add(Prefix(4, base & mask(4, pool.length), pool.length), key)

    for key, lease in snapshot.leases.items():
        if lease.v4 is None or key == without:
            continue
        subnet = lease.v4.subnet
        if _usable(claim, subnet):
            index.add(subnet, key)
        else:
            base_only(subnet.base, key)
    for key in snapshot.refused:
        found = _BASE.match(key)
        if found and key != without:
            try:
                base_only(ip_number(found[1], 4), key)
            except ValueError:
                continue
    return index


def earlier_overlap(snapshot: Snapshot, claim: Claim, own: Lease) -> Lease | None:
    """A record that overlaps ours and was there before it: then the subnet is not ours."""
    assert own.v4 is not None
    for key in occupied(snapshot, claim, own.key).overlapping(own.v4.subnet):
        other = snapshot.leases.get(key)
        if other is None or other.v4 is None or other.created >= own.created:
            continue
        if _usable(claim, other.v4.subnet) and other.v4.subnet.overlaps(own.v4.subnet):
            return other
    return None


def _usable(claim: Claim, subnet: Prefix) -> bool:
    """Whether a record of that subnet can be anybody's: inside Network, and no large part of it."""
    network = claim.pool.network
    return network.covers(subnet) and subnet.length >= network.length + 2


class Tenure:
    """The decisions and store calls that make a Claim a lease. No thread; `TenureThread` turns it."""

    def __init__(self, store: Store, probe: Probe, ttl_s: int, rng: random.Random) -> None:
        self._store, self._probe, self._ttl_s, self._rng = store, probe, ttl_s, rng
        self.held: Lease | None = None
        self.owed: list[TenureEvent] = []
        """What happened in a settling that the store then broke off: to be told all the same."""
        self._mac_in_use: int | None = None
        """Of a lease we held: the device keeps it when the subnet is lost."""
        self._to_remove: Lease | None = None
        """Our old record, which the new one replaced."""

    def settle(self, claim: Claim, snapshot: Snapshot | None = None) -> list[TenureEvent]:
        """Make store and claim agree; what happened, [] when nothing had to be done.

        Raises StoreUnavailable: try again; what happened until then stands in `owed`.
        """
        events, self.owed = self.owed, []
        if self._mac_in_use is not None:
            claim = claim._replace(device_mac=self._mac_in_use, take_over=False)
        for _ in range(RACES):
            try:
                if snapshot is None or (self.held is not None and snapshot.revision < self.held.modified):
                    snapshot = self._store.read()
                events += self._keep(claim, snapshot) if self.held is not None else self._acquire(claim, snapshot)
                if self.held is not None and self.held.v4 is not None:
                    self._mac_in_use = self.held.v4.mac
                return events
            except (SubnetTaken, RecordChanged):
                snapshot = None  # a lost race: look again
            except _SubnetLost as lost:
                assert self.held is not None
                events.append(Lost(self.held, str(lost)))
                self.held = None
            except StoreUnavailable:
                self.owed = events
                raise
        return [*events, Denied(f"{RACES} races for a subnet were lost in a row; trying again after a pause")]

    def renew(self) -> Renewed:
        """Keep the etcd lease alive. Raises LeaseExpired, StoreUnavailable."""
        assert self.held is not None
        return Renewed(self._store.keep_alive(self.held).left_s)

    # --- holding one -------------------------------------------------------------------------------------------------

    def _keep(self, claim: Claim, snapshot: Snapshot) -> list[TenureEvent]:
        held = self.held
        assert held is not None
        assert held.v4 is not None
        there = snapshot.leases.get(held.key)
        if there is None:
            return self._restore(claim, snapshot, held)
        assert there.v4 is not None
        theirs = Identity.read(there.node)
        foreign = bool(theirs.link) and not claim.identity.same_link(theirs)
        if there.v4.public_ip not in (held.v4.public_ip, claim.public_ip) and (there.v4.mac != held.v4.mac or foreign):
            raise _SubnetLost(f"{there.key} now belongs to {_owner(there)}")
        if there.v4.mac != held.v4.mac and there.node != held.node:
            raise _SubnetLost(f"{_owner(there)} took {there.key} over with our own public IP")
        if (earlier := earlier_overlap(snapshot, claim, there)) is not None:
            raise _SubnetLost(f"{earlier.key} of {_owner(earlier)} overlaps it and is older")
        self._remove_old(snapshot)
        mac = self._mac(claim._replace(device_mac=held.v4.mac), snapshot, there)
        wanted = self._lease(claim, there.v4.subnet, mac, there.key)
        if there.same_claim(wanted):
            self.held = there
            return [] if there.same_claim(held) else [Held(there, "as it stood")]
        self.held = self._store.change(there, wanted)
        return [Held(self.held, "changed with this node" if there.same_claim(held) else "written again as it was")]

    def _restore(self, claim: Claim, snapshot: Snapshot, held: Lease) -> list[TenureEvent]:
        """Our record vanished, or was overwritten with what nobody can read."""
        assert held.v4 is not None
        subnet, mac = held.v4.subnet, held.v4.mac
        assert mac is not None
        wanted = self._lease(claim, subnet, mac, held.key)
        if (broken := snapshot.refused.get(held.key)) is not None:
            try:
                self._store.keep_alive(held)
                handle = held.handle
            except LeaseExpired:
                handle = 0
            self.held = self._store.change(held._replace(modified=broken.modified, handle=handle), wanted)
            return [Held(self.held, f"written again: it held what nobody can read ({broken.reason})", loud=True)]
        if taken := next(occupied(snapshot, claim).overlapping(subnet), None):
            other = snapshot.leases.get(taken)
            raise _SubnetLost(f"it vanished, and {taken} of {_owner(other) if other else 'somebody'} took its place")
        self.held = self._store.create(wanted, self._ttl_s)
        return [Held(self.held, "taken again: the record had vanished (expired or deleted)", loud=True)]

    # --- getting one -------------------------------------------------------------------------------------------------

    def _acquire(self, claim: Claim, snapshot: Snapshot) -> list[TenureEvent]:
        own, how, loud = self._own(claim, snapshot)
        if isinstance(how, Denied):
            return [how]
        if own is not None:
            assert own.v4 is not None
            if claim.allows(own.v4.subnet) and earlier_overlap(snapshot, claim, own) is None:
                wanted = self._lease(claim, own.v4.subnet, self._mac(claim, snapshot, own), own.key)
                self.held = own if own.same_claim(wanted) else self._store.change(own, wanted)
                return [Held(self.held, how, loud)]
        taken = occupied(snapshot, claim)
        for there_already in claim.avoid:
            taken.add(there_already, "our underlay")
        try:
            subnet = choose_subnet(claim.pool, taken, claim.previous, self._rng)
        except RangeFull as full:
            return [Denied(str(full))]
        new = self._lease(claim, subnet, self._mac(claim, snapshot, own), encode_key(subnet))
        self.held = self._store.create(new, self._ttl_s)
        if own is None:
            return [Held(self.held, "as in subnet.env" if subnet == claim.previous else "allocated", loud)]
        self._to_remove = own
        self._remove_old(snapshot)
        return [Held(self.held, f"allocated, since our old {own.key} does not fit the config any more", loud=True)]

    def _remove_old(self, snapshot: Snapshot) -> None:
        """Take away the record that our lease replaced; later, where the store does not do it now."""
        old = self._to_remove
        if old is None:
            return
        there = snapshot.leases.get(old.key)
        if there is not None and there.same_claim(old):
            try:
                self._store.remove(there)
            except (StoreUnavailable, RecordChanged):
                return
        self._to_remove = None

    def _own(self, claim: Claim, snapshot: Snapshot) -> tuple[Lease | None, str | Denied, bool]:
        """Our own record, how we know, and whether that is worth a warning; a Denied instead of how: a conflict."""
        for kind, lease in find_own(snapshot.leases, claim):
            assert lease.v4 is not None
            theirs = Identity.read(lease.node)
            if kind is Kind.SURE:
                return lease, "kept: our public IP and our device's MAC", False
            if claim.take_over and kind is Kind.ADDRESS:
                return lease, f"taken over from {_owner(lease)}, as the flag says", True
            answer = self._probe(lease.v4.public_ip)
            if kind is Kind.MOVED:
                surely = lease.v4.mac == claim.device_mac and claim.identity.same_link(theirs)
                if answer.by is None and (answer.can_tell or surely):
                    old = ip_text(4, lease.v4.public_ip)
                    return lease, f"kept: ours from {old}, which nobody answers for any more", True
                continue
            same = claim.identity.same_node(theirs)
            if answer.by is not None or (not answer.can_tell and self._in_use(claim, lease, theirs)):
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
            return True  # flannel renews once in 23 h: while the record stands, nobody can tell
        return left > granted - 2 * renew_every_s(granted)

    def _mac(self, claim: Claim, snapshot: Snapshot, own: Lease | None) -> int:
        """The device's MAC, else our record's, else a new one: never one that another record had before us.

        A record that another interface wrote lends us its subnet, never its MAC: its owner may live after all, and then
        neither it nor the peers could tell the two apart.
        """
        used = {
            end.mac
            for lease in snapshot.leases.values()
            if own is None or (lease.key != own.key and lease.created < own.created)
            for end in (lease.v4, lease.v6)
            if end is not None and end.mac is not None
        }
        recorded = None
        if own is not None and own.v4 is not None and claim.identity.same_link(Identity.read(own.node)):
            recorded = own.v4.mac
        for mac in (claim.device_mac, recorded):
            if mac is not None and mac not in used:
                return mac
        return choose_mac(used, self._rng)

    def _lease(self, claim: Claim, subnet: Prefix, mac: int, key: str) -> Lease:
        end = Endpoint(subnet, claim.public_ip, claim.config.backend.vni, mac)
        return Lease(key, "vxlan", end, None, str(claim.identity), 0, 0, 0)


class _SubnetLost(Exception):
    """The held subnet has another owner now."""


def renew_every_s(granted_s: float) -> float:
    """How often a lease of that life is kept alive."""
    return min(RENEW_AT_LEAST_S, granted_s / 3)


def _owner(lease: Lease) -> str:
    assert lease.v4 is not None
    end = lease.v4
    mac = f", VTEP {mac_text(end.mac)}" if end.mac is not None else ""
    return f"{Identity.read(lease.node).called()} at {ip_text(4, end.public_ip)}{mac}"


def _conflict(claim: Claim, lease: Lease, answer: Answer) -> str:
    address = ip_text(4, claim.public_ip)
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


class TenureThread(threading.Thread):
    """Turns a Tenure: settles when the claim changes or somebody says look, renews in time, retries with backoff."""

    def __init__(
        self,
        tenure: Tenure,
        post: Callable[[TenureEvent], None],
        renew_within_s: float | None = None,
        clock: Clock = boottime,
    ) -> None:
        """renew_within_s: renew at least so often (flannel's renew margin), None for our own rhythm."""
        super().__init__(name="tenure", daemon=True)
        self._tenure, self._post, self._clock = tenure, post, clock
        self._renew_within_s = renew_within_s or RENEW_AT_LEAST_S
        self._wake = threading.Condition()
        self._claim: Claim | None = None
        self._snapshot: Snapshot | None = None
        self._dirty = self._ending = False
        self._due = 0.0
        self._last = -LOOK_GAP_S
        self._failures = 0
        self._rng = random.Random()  # noqa: S311 (spreads load, guards nothing)

    def claim(self, claim: Claim, snapshot: Snapshot | None = None) -> None:
        """What this node wants from now on. snapshot: a list read before anything was held, which saves another."""
        with self._wake:
            if claim != self._claim:
                self._claim, self._snapshot = claim, snapshot
                self._failures = 0
                self._look_now()

    def look(self) -> None:
        """Our record may not be what it was."""
        with self._wake:
            self._snapshot = None
            self._look_now(self._last + LOOK_GAP_S)

    def stop(self) -> None:
        """End the thread; the lease stays."""
        with self._wake:
            self._ending = True
            self._wake.notify()

    def _look_now(self, not_before: float = 0.0) -> None:
        self._dirty, self._due = True, min(self._due, not_before)
        self._wake.notify()

    def run(self) -> None:
        while True:
            with self._wake:
                while not self._ending and (self._claim is None or self._clock() < self._due):
                    # in pieces, since a wait does not count the time that the machine slept
                    self._wake.wait(None if self._claim is None else min(30.0, self._due - self._clock()))
                if self._ending:
                    return
                claim, snapshot, dirty = self._claim, self._snapshot, self._dirty
                self._dirty, self._snapshot, self._due = False, None, float("inf")
            assert claim is not None
            wait_s = self._step(claim, snapshot, dirty)
            with self._wake:  # a claim or look that came meanwhile has put it earlier
                if dirty:
                    self._last = self._clock()
                self._due = min(self._due, self._clock() + wait_s)

    def _step(self, claim: Claim, snapshot: Snapshot | None, dirty: bool) -> float:
        """One settling and renewing; seconds until the next."""
        tenure = self._tenure
        try:
            if dirty or tenure.held is None:
                for event in tenure.settle(claim, snapshot):
                    self._post(event)
            if tenure.held is None:
                return self._again()
            renewed = tenure.renew()
        except LeaseExpired:
            return self._again()
        except StoreUnavailable as error:
            owed, tenure.owed = tenure.owed, []
            for event in owed:
                self._post(event)
            if tenure.held is None:
                self._post(Denied(str(error)))
            return self._again()
        self._failures = 0
        self._post(renewed)
        return (
            self._renew_within_s if renewed.left_s is None else min(self._renew_within_s, renew_every_s(renewed.left_s))
        )

    def _again(self) -> float:
        """Something is open: settle again after a while."""
        with self._wake:
            self._dirty = True
        self._failures += 1
        return backoff_s(self._failures, self._rng.uniform(0.5, 1.0))
