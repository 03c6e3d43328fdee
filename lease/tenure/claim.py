"""Which records may be ours, and what stands in the way of others. Pure: records and a claim in, evidence out.

Evidence, strongest first (`find_own`):
- the record holds our public IP and the MAC of the VTEP device that this kernel has: this is us, no question asked;
- it holds our public IP: a doubt, settled by asking the underlay who answers for that address;
- it holds another public IP, but our identity or our device's MAC: ours only if nobody answers for that address.
Identity alone proves nothing: cloned VMs and namespaces share machine-id and hostname.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lease.backend_config import VxlanConfig
from lease.config import NetworkConfig, Pool
from lease.families import V4, Family
from lease.model import Endpoint, Lease, Prefix, around
from lease.records.codec import encode_key, key_base
from lease.records.packed import HEAD_FAMILY, Leases
from lease.records.subnets import SubnetIndex
from lease.store import Snapshot


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

    conclusive: bool
    by: int | None


Probe = Callable[[int], Answer]
"""Asks the underlay who answers for an address (ARP, about a second where nobody does)."""


class PublicKey(NamedTuple):
    """What a node of a wireguard network publishes beside its address: public key, and the UDP port it listens on."""

    key: bytes
    port: int


class Part(NamedTuple):
    """The other family that a node wants a subnet of, beside the one by which its record is found; fields as Claim's."""

    family: Family
    public_ip: int
    device_mac: int | None
    previous: Prefix | None
    avoid: tuple[Prefix, ...] = ()
    local: int = 0
    interface: str = ""
    public_key: PublicKey | None = None
    asked: Prefix | None = None


class Claim(NamedTuple):
    """What this node wants to hold. device_mac: of the VTEP device in this kernel, None where there is none; public_key:
    where the backend is wireguard.

    previous: the subnet of the old subnet.env. avoid: what a subnet must not touch, the underlay's own prefixes.
    take_over: the operator said that the record of our address is ours; it counts for the first lease only.
    local: the address that our frames leave by, 0 where it is the public IP. family: of all of these; by its part a record
    is found to be ours. interface: of the underlay, for messages.
    """

    config: NetworkConfig
    public_ip: int
    device_mac: int | None
    identity: Identity
    previous: Prefix | None
    take_over: bool = False
    avoid: tuple[Prefix, ...] = ()
    local: int = 0
    family: Family = V4
    interface: str = ""
    public_key: PublicKey | None = None
    second: Part | None = None
    """Of the other family; None: it is not enabled, or this node has no address of it just now."""
    asked: Prefix | None = None
    """The subnet that the operator wants for this node; its length may be another than the config's."""

    def of_second(self) -> Claim | None:
        """What is claimed of the other family, as a claim of its own."""
        return self._replace(**self.second._asdict(), second=None) if self.second is not None else None

    def wants_family(self, family: int) -> bool:
        """Whether nodes of this network have subnets of a family."""
        return self.config.pool(family) is not None

    def end(self, lease: Lease) -> Endpoint | None:
        """The part of a record that is compared with this."""
        return lease.endpoint(self.family.number)

    def same_address(self, lease: Lease) -> bool:
        """Whether a record has our public IP."""
        end = self.end(lease)
        return end is not None and end.public_ip == self.public_ip

    @property
    def wants_mac(self) -> bool:
        """Whether nodes of this network have VTEPs with MACs."""
        return isinstance(self.config.backend, VxlanConfig)

    def has_identity(self, end: Endpoint) -> bool:
        """Whether a record says our device's MAC, or our public key."""
        if self.public_key is not None:
            return end.key == self.public_key.key
        return self.device_mac is not None and end.mac == self.device_mac

    def endpoint(self, subnet: Prefix, public_ip: int, mac: int | None) -> Endpoint:
        """What peers read about a subnet of ours. mac: None where the backend has none."""
        backend, source = self.config.backend, 0 if self.local == public_ip else self.local
        if isinstance(backend, VxlanConfig):
            return Endpoint(subnet, public_ip, backend.vni, mac, source)
        if self.public_key is not None:
            return Endpoint(subnet, public_ip, None, None, 0, *self.public_key)
        return Endpoint(subnet, public_ip, None, None, source if backend.type == "ipip" else 0)

    def lease(self, key: str, ends: Iterable[Endpoint], node: str, created: int = 0, uid: int = 0) -> Lease:
        """Our record, as it shall stand in the store."""
        return Lease.of(key, self.config.backend.type, ends, node, created, uid)

    @property
    def pool(self) -> Pool:
        """The subnets; a config that has none of the family never becomes a claim."""
        pool = self.config.pool(self.family.number)
        assert pool is not None
        return pool

    def allows(self, subnet: Prefix) -> bool:
        """Whether this node may hold a subnet."""
        ours = self.pool.allows(subnet) or subnet == self.asked
        return ours and not any(subnet.overlaps(there) for there in self.avoid)

    def moves_from(self, subnet: Prefix, taken: Occupied) -> bool:
        """Whether another subnet was asked for than the one that is held, and is free. taken: but for ours."""
        asked = self.asked
        return asked is not None and asked != subnet and self.allows(asked) and taken.free(asked)


class Kind(enum.Enum):
    """How sure we are that a record is ours."""

    SURE = 1
    ADDRESS = 2
    """It holds our public IP."""
    MOVED = 3
    """It holds our identity or MAC behind another public IP."""


def find_own(leases: Leases, claim: Claim) -> list[tuple[Kind, Lease, Endpoint]]:
    """The records that may be ours with their part of the claim's family, the likeliest first. Pure."""
    found: list[tuple[Kind, Lease, Endpoint]] = []
    texts = (f"{claim.identity.machine}/{claim.identity.name}/", claim.identity.name)
    # checked before it is decoded: of many thousand records nearly none is ours
    nodes = tuple(text for text in texts if text.strip("/"))
    key = claim.public_key.key if claim.public_key is not None else b""
    for lease in leases.having(claim.family, claim.public_ip, claim.device_mac, nodes, key):
        end = claim.end(lease)
        if end is None:
            continue
        same = claim.has_identity(end)
        if end.public_ip == claim.public_ip:
            found.append((Kind.SURE if same else Kind.ADDRESS, lease, end))
        elif same or claim.identity.moved_from(Identity.read(lease.node)):
            found.append((Kind.MOVED, lease, end))

    def likely(item: tuple[Kind, Lease, Endpoint]) -> tuple[object, ...]:
        kind, lease, end = item
        same = claim.identity.same_node(Identity.read(lease.node))
        return kind.value, not same, end.subnet != claim.previous, lease.created, lease.key

    return sorted(found, key=likely)


class Occupied:
    """The subnets that records claim, and those that a create would be refused for.

    A record that nobody can use (outside Network, a large part of it, unreadable) takes no subnet but the one of its
    own base: the transaction that creates a record demands that no key of that base stands.

    Nearly all records have the config's own length and a key that says no more than their subnet: these are found by their
    key, and only the others are put into an index. So 60,000 leases cost one quick check each, and a question two look-ups.
    """

    def __init__(self, snapshot: Snapshot, claim: Claim, without: str | None = None) -> None:
        self._leases, self._without, self._claim = snapshot.leases, without, claim
        self._family, self._length = claim.family.number, claim.pool.length
        bases, others = snapshot.leases.unusual(self._family, self._length, without)
        # each of these takes the subnet of its base, usable or not
        self._others = SubnetIndex(self._family, self._length, bases)
        for key, subnet in others:
            if usable(claim, subnet):
                self._others.add(subnet, key)
            else:
                self._block(subnet.base, key)
        for key in snapshot.refused:
            base = key_base(key, self._family)
            if base is not None and key != without:
                self._block(base, key)

    def _block(self, base: int, key: str) -> None:
        self._others.add(around(self._family, base, self._length), key)

    def add(self, subnet: Prefix, why: str) -> None:
        """One more that is not available."""
        self._others.add(subnet, why)

    def overlapping(self, subnet: Prefix) -> Iterator[str]:
        """The keys of all claims that share an address with a subnet."""
        yield from self._others.overlapping(subnet)
        if self._family != HEAD_FAMILY:
            return  # all of them are there
        if subnet.length == self._length:
            key = encode_key(subnet)
            if key in self._leases and key != self._without:
                yield key
            return
        for lease in self._leases.overlapping(subnet):  # ours is of an earlier config
            end = self._claim.end(lease)
            plain = end is not None and end.subnet.length == self._length and lease.key == encode_key(end.subnet)
            if plain and lease.key != self._without:
                yield lease.key

    def free(self, subnet: Prefix) -> bool:
        """Whether nobody claims an address of it."""
        return next(self.overlapping(subnet), None) is None


def earlier_overlap(snapshot: Snapshot, claim: Claim, own: Lease) -> Lease | None:
    """A record that overlaps ours and was there before it: then the subnet is not ours."""
    ours = claim.end(own)
    assert ours is not None
    for key in Occupied(snapshot, claim, own.key).overlapping(ours.subnet):
        other = snapshot.leases.get(key)
        theirs = claim.end(other) if other is not None else None
        if other is None or theirs is None or other.created >= own.created:
            continue
        if usable(claim, theirs.subnet) and theirs.subnet.overlaps(ours.subnet):
            return other
    return None


def usable(claim: Claim, subnet: Prefix) -> bool:
    """Whether a record of that subnet can be anybody's: inside Network, and no large part of it."""
    network = claim.pool.network
    return network.covers(subnet) and subnet.length >= network.length + 2
