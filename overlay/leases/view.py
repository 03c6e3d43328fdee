"""Leases as an operator sees them, and what is wrong among them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from lease.config import NetworkConfig, Pool
from lease.model import WIDTH, Endpoint, Lease, Prefix, Refused, ip_text, key_text, mac_text
from lease.records.subnets import SubnetIndex
from lease.tenure.claim import Identity

_T = TypeVar("_T")
SOON_S = 3600.0
"""A lease that ends so soon is not renewed: flannel renews an hour before the end, our agents each hour."""
FULL = 0.9


class Held(NamedTuple):
    """A lease. left_s: None where it never ends (a reservation); node: "" where its record does not say."""

    lease: Lease
    left_s: float | None
    node: str

    @property
    def reserved(self) -> bool:
        """It never ends, and no node has come for it, as far as the record says."""
        return self.left_s is None and not self.lease.node


class Fault(NamedTuple):
    """Something wrong. serious: pods of somebody do not reach others by it."""

    key: str
    text: str
    serious: bool


def node_of(lease: Lease) -> str:
    """The node of a record, by what our agents write."""
    return Identity.read(lease.node).name if lease.node else ""


def as_values(held: Held) -> dict[str, Any]:
    """As JSON values."""
    end = held.lease.first
    return {
        "key": held.lease.key,
        "subnet": str(end.subnet),
        "node": held.node,
        "public_ip": ip_text(end.subnet.family, end.public_ip),
        "vtep_mac": None if end.mac is None else mac_text(end.mac),
        "public_key": end.vtep if end.key else None,
        "vni": end.vni,
        "backend": held.lease.backend,
        "left_s": None if held.left_s is None else round(held.left_s),
        "reserved": held.reserved,
        "created_revision": held.lease.created,
        "modified_revision": held.lease.modified,
    }


def find(leases: Iterable[Lease], word: str, holds: Callable[[Lease, str], bool] | None = None) -> list[Lease]:
    """Those that a word names: a key, a subnet, a public IP, a node, or an address of a pod."""
    return [lease for lease in leases if (holds or _named)(lease, word)]


def _named(lease: Lease, word: str) -> bool:
    end = lease.first
    if word in (lease.key, str(end.subnet), ip_text(end.subnet.family, end.public_ip), node_of(lease)):
        return True
    parts = word.split(".")
    if len(parts) == 4 and all(part.isascii() and part.isdigit() and int(part) < 256 for part in parts):
        return end.subnet.family == 4 and end.subnet.holds(int.from_bytes(bytes(map(int, parts)), "big"))
    return False


def faults(config: NetworkConfig | None, held: Iterable[Held], refused: Iterable[Refused]) -> Iterator[Fault]:
    """What is wrong among all of them."""
    leases = list(held)
    for each in refused:
        yield Fault(each.key, f"it cannot be read: {each.reason}", True)
    pool = config.pool(4) if config is not None else None
    for one in leases:
        end = one.lease.first
        if pool is not None and end.subnet.family == 4 and not pool.network.covers(end.subnet):
            yield Fault(one.lease.key, f"it is outside of Network {pool.network}", True)
        if config is not None and one.lease.backend != config.backend.type:
            yield Fault(
                one.lease.key,
                f"its backend is {one.lease.backend or 'missing'}, the network's {config.backend.type}",
                True,
            )
        if one.left_s is not None and one.left_s < SOON_S:
            yield Fault(
                one.lease.key,
                f"it ends in {one.left_s / 60:.0f} min, and nobody has renewed it: is its node gone?",
                False,
            )
    yield from _overlaps(leases)
    yield from _twice(leases, "MAC", lambda end: end.mac, mac_text, True)
    yield from _twice(leases, "public key", lambda end: end.key or None, key_text, True)
    yield from _twice(leases, "public IP", lambda end: end.public_ip, lambda value: ip_text(4, value), False)


def _overlaps(leases: list[Held]) -> Iterator[Fault]:
    by_key = {each.lease.key: each for each in leases}
    index = SubnetIndex.of(
        4, ((each.lease.first.subnet, each.lease.key) for each in leases if each.lease.v4 is not None)
    )
    for each in leases:
        others = (
            [key for key in index.overlapping(each.lease.first.subnet) if key != each.lease.key]
            if each.lease.v4
            else []
        )
        older = [key for key in others if by_key[key].lease.created < each.lease.created]
        if older:
            yield Fault(
                each.lease.key, f"it overlaps {', '.join(sorted(older)[:3])}, which is older: that one counts", True
            )


def _twice(
    leases: list[Held], what: str, of: Callable[[Endpoint], _T | None], text: Callable[[_T], str], serious: bool
) -> Iterator[Fault]:
    first: dict[_T, str] = {}
    for each in sorted(leases, key=lambda one: one.lease.created):
        value = of(each.lease.first)
        if value is None:
            continue
        if value in first and first[value] != each.lease.key:
            yield Fault(each.lease.key, f"it has the {what} {text(value)} of {first[value]}, which is older", serious)
        first.setdefault(value, each.lease.key)


class Use(NamedTuple):
    """Of the range. taken: subnets of its length of which a lease has a part; reserved: leases without a node."""

    pool: Pool
    taken: int
    reserved: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.taken / self.pool.size if self.pool.size else 1.0


def use(config: NetworkConfig, held: Iterable[Held]) -> Use | None:
    """How much of the IPv4 range is taken."""
    pool = config.pool(4)
    if pool is None:
        return None
    within = [each for each in held if each.lease.v4 is not None and pool.network.covers(each.lease.v4.subnet)]
    step, touched = WIDTH[4] - pool.length, set[int]()
    for each in within:
        there = each.lease.first.subnet
        touched.update(
            range(max(pool.first, there.base) >> step, (min(pool.subnet(pool.size - 1).last, there.last) >> step) + 1)
        )
    return Use(pool, len(touched), sum(each.reserved for each in within))


def reservation_fault(config: NetworkConfig | None, subnet: Prefix, leases: Iterable[Lease]) -> str:
    """Why a subnet cannot be reserved, "" where it can."""
    pool = config.pool(subnet.family) if config is not None else None
    if pool is None:
        return "there is no network config of that family: nobody would ask for it"
    if not pool.allows(subnet):
        other = (
            "" if subnet.length == pool.length else "; one of another length a node asks for itself: overlayd --subnet"
        )
        return f"{subnet} is no subnet of the range {pool}{other}"
    index = SubnetIndex.of(4, ((lease.first.subnet, lease.key) for lease in leases if lease.v4 is not None))
    taken = next(index.overlapping(subnet), None)
    return f"{taken} is taken already" if taken is not None else ""
