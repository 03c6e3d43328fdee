"""A subnet that the operator asked for (--subnet): of another length than the config's, too. Pure."""

from __future__ import annotations

import random

from lease.config import NetworkConfig
from lease.model import WIDTH, Prefix
from lease.tenure.allocate import RangeFull, choose_subnet
from lease.tenure.claim import Claim, Occupied


def choose(claim: Claim, taken: Occupied, preferred: Prefix | None, rng: random.Random) -> Prefix:
    """A subnet for a node that has none: the one that was asked for, else as allocate.choose_subnet. Raises RangeFull."""
    if claim.asked is None:
        return choose_subnet(claim.pool, taken, preferred, rng)
    if any(claim.asked.overlaps(there) for there in claim.avoid):
        raise RangeFull(f"--subnet {claim.asked} touches this node's own underlay: ask for another")
    if (holder := next(taken.overlapping(claim.asked), None)) is not None:
        raise RangeFull(f"--subnet {claim.asked} is not free: {holder} has it, or a part of it; this node waits")
    return claim.asked


def asked_fault(config: NetworkConfig, asked: Prefix) -> str:
    """Why no node can have a subnet that was asked for, "" where one can."""
    pool = config.pool(asked.family)
    if pool is None:
        return f"--subnet {asked}: the network has no IPv{asked.family}"
    end = pool.subnet(pool.size - 1).last
    if not pool.network.covers(asked) or asked.base < pool.first or asked.last > end:
        return f"--subnet {asked} is outside of the range {pool}"
    if asked.length < pool.network.length + 2 or asked.length > WIDTH[asked.family] - 2:
        return f"--subnet {asked}: a node can have a quarter of Network {pool.network} at most, and four addresses at least"
    return ""
