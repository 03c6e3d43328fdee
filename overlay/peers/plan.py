"""Wanted entries for one peer, and whether a peer's record can be used at all. Pure; asks the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lease.config import NetworkConfig
from lease.families import FAMILIES, V6, Family
from lease.model import NO_NODE, Endpoint, Lease, Prefix, ip_text
from lease.records.packed import HEAD, PLACES, SECOND
from overlay.backends.base import Backend, Bulk, Entry, View
from overlay.backends.choose import backend_of
from overlay.control.inputs import Underlay
from overlay.kernel.route.entries import UNDERLAY, RouteKey

OTHER_BACKEND = "BackendType is"
"""What the refusal of a node of another backend begins with."""


class Node(NamedTuple):
    """What plan needs to know of this node.

    own: its lease. on_link: the prefixes of the underlay interface; neighbours: those whose hosts are ARP neighbours.
    addresses: all its own addresses.
    retained: subnets that it does not hold any more, but on which its pods still run.
    """

    network: Prefix
    backend: Backend
    own: Lease
    on_link: tuple[Prefix, ...]
    addresses: frozenset[int]
    retained: tuple[Prefix, ...] = ()
    allowed: tuple[Prefix, ...] = ()
    """Where a peer's public IP must lie (--underlay-cidr); empty: anywhere."""
    widest: int = 2
    """A subnet is longer than Network by so many bits at least: a record cannot take half the cluster's traffic. On
    Kubernetes the cluster gave the subnets, and only all of Network is too much."""
    neighbours: tuple[Prefix, ...] = ()

    @property
    def family(self) -> Family:
        """Of the network."""
        return FAMILIES[self.network.family]

    @property
    def end(self) -> Endpoint:
        """Our own endpoint of that family."""
        end = self.own.endpoint(self.network.family)
        assert end is not None, "a plan is made of a lease that has the family"
        return end

    @property
    def underlay_inside(self) -> bool:
        """Whether nodes have addresses of Network: it is larger than what pods use of it."""
        return any(map(self.network.holds, (self.end.public_ip, *self.addresses)))

    @property
    def kept(self) -> tuple[Prefix, ...]:
        """The parts of Network that the operator says are the underlay's."""
        return underlay_within(self.network, self.allowed)


def underlay_within(network: Prefix, cidrs: tuple[Prefix, ...]) -> tuple[Prefix, ...]:
    """What --underlay-cidr takes from Network: no pod can have a node's address."""
    return tuple(there for there in cidrs if there != network and network.covers(there))


def nodes_within(network: Prefix, under: Underlay | None, cidrs: tuple[Prefix, ...]) -> tuple[Prefix, ...]:
    """The prefixes inside Network that are the nodes', not pods': the underlay's own, and --underlay-cidr's; in order."""
    on_link = under.on_link if under is not None else ()
    return tuple(sorted(set(underlay_within(network, (*on_link, *cidrs)))))


def node_of(
    config: NetworkConfig,
    family: Family,
    own: Lease,
    on_link: tuple[Prefix, ...],
    addresses: frozenset[int],
    retained: tuple[Prefix, ...] = (),
    allowed: tuple[Prefix, ...] = (),
    widest: int = 2,
    neighbours: tuple[Prefix, ...] = (),
) -> Node:
    """The Node of a config that has the family."""
    pool = config.pool(family.number)
    assert pool is not None
    backend = backend_of(config.backend, family)
    return Node(pool.network, backend, own, on_link, addresses, retained, allowed, widest, neighbours)


def view(node: Node) -> View:
    """What the backend needs to know of it."""
    return View(node.family, node.network, node.neighbours)


def refusal(node: Node, lease: Lease) -> str | None:
    """Why a record cannot be a peer, whatever the other records say; None where it can."""
    if lease.backend != node.backend.type:
        return f"{OTHER_BACKEND} {lease.backend or 'missing (udp?)'!a}; this network's is {node.backend.type!a}"
    end = lease.endpoint(node.network.family)
    if end is None:
        return f"it has no {node.family.text} part"
    return (
        _subnet_fault(node, end.subnet, end.public_ip)
        or _outer_fault(node, end)
        or node.backend.fault(view(node), node.end, end)
    )


def quick(node: Node) -> Callable[[bytes], bool]:
    """Whether a packed record of a usual form surely passes `refusal`; one that does not is asked there."""
    bulk = node.backend.bulk(view(node))
    if bulk is None:
        return lambda _packed: False
    if node.family is V6:
        return _quick6(node, bulk)
    forms = PLACES[node.network.family].forms
    own, network, shortest = node.end, node.network, node.network.length + node.widest
    usable = bulk.usable(own)
    pods = [(there.base, there.last) for there in (own.subnet, *node.retained)]
    closed = [(there.base, there.last) for there in (*node.on_link, *node.kept)] + pods
    ends = [address for there in node.on_link if there.length < 31 for address in (there.base, there.last)]
    bad = node.addresses | {own.public_ip, *ends}
    low, high = network.base, network.last
    allowed = [(there.base, there.last) for there in node.allowed]
    reserved = {octet for there in NO_NODE[4] for octet in range(there.base >> 24, (there.last >> 24) + 1)}

    def passes(packed: bytes) -> bool:
        base, length, public_ip, mac, vni, _, _, _, form = HEAD.unpack_from(packed)
        last = base | ((1 << (32 - length)) - 1)
        if form not in forms or not usable(vni, mac) or length < shortest or base < low or last > high:
            return False
        if public_ip in bad or base <= public_ip <= last or public_ip >> 24 in reserved:
            return False
        if low <= public_ip <= high:  # the rare underlay inside Network is checked with more care
            return False
        for first, end in pods:  # outside Network, too: that of before
            if first <= public_ip <= end:
                return False
        if allowed and not any(first <= public_ip <= end for first, end in allowed):
            return False
        for first, end in closed:  # noqa: SIM110 (all() of a generator takes three times as long)
            if first <= last and base <= end:
                return False
        return True

    return passes


def _quick6(node: Node, bulk: Bulk) -> Callable[[bytes], bool]:
    """The same of IPv6; a node's address inside Network, which may be right, is left to `refusal`."""
    own, network, forms, usable = node.end, node.network, PLACES[6].forms, bulk.usable(node.end)
    shortest = network.length + node.widest
    retained = [kept for kept in node.retained if kept.family == V6.number]
    closed = [(there.base, there.last) for there in (*node.on_link, *node.kept, own.subnet, *retained)]
    nowhere = [(there.base, there.last) for there in (network, own.subnet, *retained, *NO_NODE[6])]
    allowed = [(there.base, there.last) for there in node.allowed]
    bad, low, high = node.addresses | {own.public_ip}, network.base, network.last
    read, of_bytes = SECOND.unpack_from, int.from_bytes

    def passes(packed: bytes) -> bool:
        _, _, _, _, vni, _, _, _, form = HEAD.unpack_from(packed)
        if form not in forms:
            return False
        raw, length, raw_ip, mac = read(packed, HEAD.size)
        base, public_ip = of_bytes(raw, "big"), of_bytes(raw_ip, "big")
        last = base | (1 << 128 - length) - 1
        if not usable(vni, mac) or length < shortest or base < low or last > high or public_ip in bad:
            return False
        for first, end in nowhere:
            if first <= public_ip <= end:
                return False
        if allowed and not any(first <= public_ip <= end for first, end in allowed):
            return False
        for first, end in closed:  # noqa: SIM110 (as above)
            if first <= last and base <= end:
                return False
        return True

    return passes


def _subnet_fault(node: Node, subnet: Prefix, public_ip: int) -> str | None:
    network = node.network
    if not network.covers(subnet):
        return f"subnet {subnet} is outside Network {network}"
    if subnet.length < network.length + node.widest:
        return f"subnet {subnet} is too large a part of Network {network}"
    for there in node.on_link:
        if subnet.overlaps(there):
            return f"subnet {subnet} overlaps our underlay {there}"
    for there in node.kept:
        if subnet.overlaps(there):
            return f"subnet {subnet} overlaps the underlay's {there} (--underlay-cidr)"
    if subnet.holds(public_ip):
        return f"PublicIP {ip_text(network.family, public_ip)} lies in its own subnet {subnet}"
    if subnet.overlaps(node.end.subnet):
        return f"subnet {subnet} overlaps our own {node.end.subnet}"
    for kept in node.retained:
        if subnet.overlaps(kept):
            return f"subnet {subnet} overlaps {kept}, which we lost but on which pods of this node still run"
    return None


def _outer_fault(node: Node, end: Endpoint) -> str | None:
    own, family = node.end, node.network.family
    for name, outer in zip(("PublicIP", "OverlaySource"), end.outer_sources(), strict=False):
        text = f"{name} {ip_text(family, outer)}"
        if any(bad.holds(outer) for bad in NO_NODE[family]):
            return f"{text} cannot be a node's address"
        known = any(there.holds(outer) for there in (*node.kept, *node.on_link))
        if node.network.holds(outer) and not node.underlay_inside and not known:
            return f"{text} is an address of Network {node.network}, which is the pods'"
        if any(there.holds(outer) for there in (own.subnet, *node.retained)):
            return f"{text} is an address of a subnet of ours"
        if node.allowed and not any(there.holds(outer) for there in node.allowed):
            return f"{text} is outside --underlay-cidr {', '.join(map(str, node.allowed))}"
    address = ip_text(family, end.public_ip)
    for there in node.on_link:
        short = there.length < node.family.bits - 1
        if (
            node.family.has_broadcast
            and short
            and there.holds(end.public_ip)
            and end.public_ip in (there.base, there.last)
        ):
            return f"PublicIP {address} is the network or broadcast address of {there}"
    if end.public_ip == own.public_ip or end.public_ip in node.addresses:
        return f"PublicIP {address} is our own"
    return None


def entries(node: Node, lease: Lease) -> list[Entry]:
    """The kernel entries of a record that `refusal` lets pass."""
    end = lease.endpoint(node.network.family)
    assert end is not None
    return node.backend.entries(view(node), end)


def is_direct(entries: list[Entry]) -> bool:
    """Whether a peer of these entries is reached without a tunnel: by its route, the last one."""
    return bool(entries[-1][2].role == UNDERLAY)


def route_key(node: Node, subnet: Prefix) -> RouteKey:
    """The key of the route that a subnet would get."""
    return node.backend.route_key(view(node), subnet)
