"""Which subnet a node takes. Pure: config, what is taken, preference and randomness in; a choice out."""

from __future__ import annotations

import random
from typing import Protocol

from lease.config import Pool
from lease.model import Prefix, mac_fault

TRIES = 48
"""Random tries before the range is walked from a random place: even at 90 % full all miss once in 150 starts."""


class Taken(Protocol):
    """What is taken already (subnets.SubnetIndex, claim.Occupied)."""

    def free(self, subnet: Prefix) -> bool:
        """Whether nobody claims an address of it."""


class RangeFull(Exception):
    """Every subnet of the range is taken."""


def choose_subnet(pool: Pool, taken: Taken, preferred: Prefix | None, rng: random.Random) -> Prefix:
    """A free subnet: the preferred one if the config allows it, else one drawn evenly from all that are free.

    Nodes that start together on one list then collide with a chance of 1 in all free ones, not in flannel's first 100.

    Raises:
        RangeFull: there is none.
    """
    if preferred is not None and pool.allows(preferred) and taken.free(preferred):
        return preferred
    for _ in range(TRIES):
        subnet = pool.subnet(rng.randrange(pool.size))
        if taken.free(subnet):
            return subnet
    if pool.size > 1 << 24:  # an IPv6 range: never walked, never near full
        raise RangeFull(f"no free subnet found in {pool}")
    start = rng.randrange(pool.size)
    for step in range(pool.size):
        subnet = pool.subnet((start + step) % pool.size)
        if taken.free(subnet):
            return subnet
    raise RangeFull(
        f"all {pool.size} subnets of {pool} are taken; widen SubnetMin..SubnetMax or release leases of nodes gone"
    )


MOST_MACS, MACS_S = 3, 600.0
"""So many MACs are taken within so long, one after the other, since a record has the one before. A record that follows us is
left with it then: agents that run saw us with it first."""


class Used(Protocol):
    """MACs that others have: a set, or something that can be asked."""

    def __contains__(self, mac: int, /) -> bool: ...


def choose_mac(used: Used, rng: random.Random) -> int:
    """A random unicast, locally administered MAC that no record has (RFC 7042; flannel pkg/mac/mac.go)."""
    while True:
        mac = (rng.getrandbits(48) & ~(1 << 40)) | (1 << 41)
        if mac not in used and mac_fault(mac) is None:
            return mac
