"""The part of a lease on etcd that is of the other family (dual stack). Pure but for the random choice.

The subnet of the first family is fenced by its key; this one is not (flannel's keys begin with the other). So: the subnet of
the same place in its pool where that is free, and who finds that an earlier record has it takes another.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from lease.config import Pool
from lease.model import Endpoint, Lease, Prefix
from lease.records.packed import by_flannel
from lease.store import Snapshot
from lease.tenure.allocate import RangeFull, Used, choose_mac
from lease.tenure.asked import choose
from lease.tenure.claim import Claim, Identity, Occupied, earlier_overlap


class Second(NamedTuple):
    """The part, None: there is none for now, and (why) for what reason; "": it is not wanted, or all is well."""

    end: Endpoint | None
    why: str = ""


def second_of(
    claim: Claim,
    snapshot: Snapshot,
    own: Lease | None,
    first: Prefix,
    used: Used,
    rng: random.Random,
    held: bool,
) -> Second:
    """What our record says of the other family. own: our record as it is; held: it is ours surely, and its MAC the device's;
    first: its subnet of the first family; used: MACs that others had before us."""
    other = 6 if claim.family.number == 4 else 4
    before = own.endpoint(other) if own is not None else None
    if not claim.wants_family(other):
        return Second(None)
    view = claim.of_second()
    if view is None:  # our own address of it is gone: what peers know of us holds, until there is another
        text = f"this node has no IPv{other} address of its own"
        return Second(before, text if before is None else "")
    if before is None and (alone := one_family_flannel(snapshot)) is not None:
        return Second(
            None,
            f"{alone} is of a flannel that runs without IPv{other}, which hangs for good at the first record of both:"
            f" IPv{other} waits until those flannels are restarted with the network config of now, or gone",
        )
    taken = Occupied(snapshot, view, own.key if own is not None else None)
    stays = before is not None and own is not None and _may_stay(view, snapshot, own, before.subnet)
    if before is not None and stays and (held or not view.moves_from(before.subnet, taken)):
        subnet = before.subnet
    else:
        for there in view.avoid:
            taken.add(there, "our underlay")
        try:
            subnet = choose(view, taken, _preferred(claim.pool, view, taken, first), rng)
        except RangeFull as full:
            return Second(None, str(full))
    if not claim.wants_mac:
        return Second(view.endpoint(subnet, view.public_ip, None))
    ours = own is not None and (held or claim.identity.same_link(Identity.read(own.node)))
    recorded = before.mac if before is not None and ours else None
    macs = (recorded, view.device_mac) if held else (view.device_mac, recorded)
    mac = next((mac for mac in macs if mac is not None and mac not in used), None)
    return Second(view.endpoint(subnet, view.public_ip, choose_mac(used, rng) if mac is None else mac))


def _may_stay(view: Claim, snapshot: Snapshot, own: Lease, subnet: Prefix) -> bool:
    return view.allows(subnet) and earlier_overlap(snapshot, view, own) is None


def _preferred(first_pool: Pool, view: Claim, taken: Occupied, first: Prefix) -> Prefix | None:
    """The subnet of an old subnet.env where it is free, else that of the same place as the one of the first family."""
    if view.previous is not None and view.allows(view.previous) and taken.free(view.previous):
        return view.previous
    place = first_pool.place(first)
    return view.pool.subnet(place) if place is not None and place < view.pool.size else None


def one_family_flannel(snapshot: Snapshot) -> str | None:
    """The key of a record that a flannel of IPv4 alone wrote, None: there is none."""
    return next((key for key, packed in snapshot.leases.packed.items() if "&" not in key and by_flannel(packed)), None)


def lost_to_an_earlier(claim: Claim, snapshot: Snapshot, held: Lease) -> bool:
    """Whether the subnet of the other family is an earlier record's. snapshot: of what was written since we looked."""
    view = claim.of_second()
    if view is None or view.end(held) is None:
        return False
    return earlier_overlap(snapshot, view, held) is not None
