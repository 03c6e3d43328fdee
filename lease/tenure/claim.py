"""Which records may be ours, and what stands in the way of others. Pure: records and a claim in, evidence out.

Evidence, strongest first (`find_own`):
- the record holds our public IP and the MAC of the VTEP device that this kernel has: this is us, no question asked;
- it holds our public IP: a doubt, settled by asking the underlay who answers for that address;
- it holds another public IP, but our identity or our device's MAC: ours only if nobody answers for that address.
Identity alone proves nothing: cloned VMs and namespaces share machine-id and hostname.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lease.config import NetworkConfig, Pool
from lease.model import Endpoint, Lease, Prefix, around, ip_number
from lease.records.codec import encode_key
from lease.records.packed import Leases
from lease.records.subnets import SubnetIndex
from lease.store import Snapshot

_BASE = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3})-", re.ASCII)


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
    local: the address that our frames leave by, 0 where it is the public IP.
    """

    config: NetworkConfig
    public_ip: int
    device_mac: int | None
    identity: Identity
    previous: Prefix | None
    take_over: bool = False
    avoid: tuple[Prefix, ...] = ()
    local: int = 0

    def endpoint(self, subnet: Prefix, public_ip: int, mac: int) -> Endpoint:
        """What peers are told of a subnet of ours."""
        source = 0 if self.local == public_ip else self.local
        return Endpoint(subnet, public_ip, self.config.backend.vni, mac, source)

    @property
    def pool(self) -> Pool:
        """The IPv4 subnets; a config without them never becomes a claim."""
        assert self.config.v4 is not None
        return self.config.v4

    def allows(self, subnet: Prefix) -> bool:
        """Whether this node may hold a subnet."""
        return self.pool.allows(subnet) and not any(subnet.overlaps(there) for there in self.avoid)


class Kind(enum.Enum):
    """How sure we are that a record is ours."""

    SURE = 1
    ADDRESS = 2
    """It holds our public IP."""
    MOVED = 3
    """It holds our identity or MAC behind another public IP."""


def find_own(leases: Leases, claim: Claim) -> list[tuple[Kind, Lease]]:
    """The records that may be ours, the likeliest first. Pure."""
    found: list[tuple[Kind, Lease]] = []
    texts = (f"{claim.identity.machine}/{claim.identity.name}/", claim.identity.name)
    # looked at before it is read: of many thousand records nearly none is ours
    for lease in leases.having(claim.public_ip, claim.device_mac, tuple(text for text in texts if text.strip("/"))):
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


class Occupied:
    """The subnets that records claim, and those that a create would be refused for.

    A record that nobody can use (outside Network, a large part of it, unreadable) takes no subnet but the one of its
    own base: the transaction that creates a record demands that no key of that base stands.

    Nearly all records have the config's own length and a key that says no more than their subnet: these are found by their
    key, and only the others are put into an index. So 60,000 leases cost one quick look each, and a question two look-ups.
    """

    def __init__(self, snapshot: Snapshot, claim: Claim, without: str | None = None) -> None:
        self._leases, self._without, self._length = snapshot.leases, without, claim.pool.length
        self._others = SubnetIndex(4)
        for lease in snapshot.leases.unusual(claim.pool.length):
            if lease.v4 is not None and lease.key != without:
                if usable(claim, lease.v4.subnet):
                    self._others.add(lease.v4.subnet, lease.key)
                else:
                    self._block(lease.v4.subnet.base, lease.key)
        for key in snapshot.refused:
            found = _BASE.match(key)
            if found and key != without:
                try:
                    self._block(ip_number(found[1], 4), key)
                except ValueError:
                    continue

    def _block(self, base: int, key: str) -> None:
        self._others.add(around(base, self._length), key)

    def add(self, subnet: Prefix, why: str) -> None:
        """One more that cannot be had."""
        self._others.add(subnet, why)

    def overlapping(self, subnet: Prefix) -> Iterator[str]:
        """The keys of all claims that share an address with a subnet."""
        yield from self._others.overlapping(subnet)
        if subnet.length == self._length:
            key = encode_key(subnet)
            if key in self._leases and key != self._without:
                yield key
            return
        for key, lease in self._leases.items():  # a subnet of an earlier config
            plain = lease.v4 is not None and lease.v4.subnet.length == self._length and "&" not in key
            if plain and key != self._without and lease.v4 is not None and lease.v4.subnet.overlaps(subnet):
                yield key

    def free(self, subnet: Prefix) -> bool:
        """Whether nobody claims an address of it."""
        return next(self.overlapping(subnet), None) is None


def earlier_overlap(snapshot: Snapshot, claim: Claim, own: Lease) -> Lease | None:
    """A record that overlaps ours and was there before it: then the subnet is not ours."""
    assert own.v4 is not None
    for key in Occupied(snapshot, claim, own.key).overlapping(own.v4.subnet):
        other = snapshot.leases.get(key)
        if other is None or other.v4 is None or other.created >= own.created:
            continue
        if usable(claim, other.v4.subnet) and other.v4.subnet.overlaps(own.v4.subnet):
            return other
    return None


def usable(claim: Claim, subnet: Prefix) -> bool:
    """Whether a record of that subnet can be anybody's: inside Network, and no large part of it."""
    network = claim.pool.network
    return network.covers(subnet) and subnet.length >= network.length + 2
