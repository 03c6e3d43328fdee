"""What follows from this node's links and addresses alone. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lease.config import Pool
from lease.model import Prefix, around
from overlay.control.inputs import AddressKey, Underlay
from overlay.kernel.route.entries import Address, Link


def interfaces_within(network: Prefix, addresses: Iterable[Address], underlay: Underlay | None) -> frozenset[int]:
    """The interfaces of the pod network, by number: the tunnel, and bridges or veths of pods, also those of a subnet that
    this node lost. Where the underlay is inside the network its interfaces are none."""
    outside = underlay.on_link if underlay is not None else ()
    return frozenset(
        a.oif
        for a in addresses
        if network.holds(a.address)
        and (underlay is None or a.oif != underlay.ifindex)
        and not any(prefix.holds(a.address) for prefix in outside)
    )


RT_SCOPE_LINK = 253
"""include/uapi/linux/rtnetlink.h."""
_OF_PODS = ("veth", "netkit")
"""Kinds of interfaces by which pods are attached without a bridge, also by other programs than ours (Calico)."""


def pod_veths(links: Mapping[int, Link], addresses: Iterable[Address], underlay: Underlay | None) -> frozenset[int]:
    """Interfaces, by number, by which another program (Calico) may have attached pods: on no bridge, and without an address,
    which one that carries this node's own traffic has."""
    lower = underlay.ifindex if underlay is not None else 0
    with_address = {each.oif for each in addresses}
    return frozenset(
        index
        for index, link in links.items()
        if link.kind in _OF_PODS and not link.master and index != lower and index not in with_address
    )


def interfaces_elsewhere(
    links: Mapping[int, Link], inside: frozenset[int], bridges: frozenset[str], underlay: Underlay | None, tunnel: str
) -> frozenset[int]:
    """The interfaces behind which no pod of this node is, by number: the underlay, other hardware, VPNs, others' bridges.
    inside: those that pods are or may be behind."""
    lower = underlay.ifindex if underlay is not None else 0
    return frozenset(
        index
        for index, link in links.items()
        if index == lower
        or not (
            index in inside
            or link.loopback
            or link.name in bridges
            or link.name == tunnel
            or (link.kind in _OF_PODS and link.master)  # packets come by its bridge
        )
    )


def addresses_of(addresses: Iterable[Address], ifindex: int) -> frozenset[int]:
    """All addresses of an interface."""
    return frozenset(a.address for a in addresses if a.oif == ifindex)


def subnets_of(addresses: Iterable[Address]) -> dict[int, tuple[Prefix, ...]]:
    """The prefixes of the addresses of each interface, by number."""
    found: dict[int, list[Prefix]] = {}
    for each in addresses:
        found.setdefault(each.oif, []).append(around(each.family, each.address, each.length))
    return {index: tuple(sorted(prefixes)) for index, prefixes in found.items()}


def gateways_on(bridges: Iterable[str], links: Mapping[int, Link], addresses: Iterable[Address]) -> tuple[Prefix, ...]:
    """The subnets whose gateway a bridge of these names has; none of the link itself."""
    numbers = {link.ifindex for link in links.values() if link.name in bridges}
    there = ((each, around(each.family, each.address, each.length)) for each in addresses if each.oif in numbers)
    found = {subnet for each, subnet in there if each.address == subnet.base + 1 and each.scope < RT_SCOPE_LINK}
    return tuple(sorted(found))


def addresses_by_name(links: Mapping[int, Link], addresses: Mapping[AddressKey, Address]) -> dict[str, frozenset[int]]:
    """Each interface's addresses, by its name; none that IPv6 gives to every interface."""
    lasting = [each for each in addresses.values() if each.family == 4 or each.scope < RT_SCOPE_LINK]
    return {link.name: addresses_of(lasting, link.ifindex) for link in links.values()}


def ports_of(links: Mapping[int, Link], bridge: int) -> int:
    """How many ports a bridge has."""
    return sum(link.master == bridge for link in links.values())


def gateway_holders(subnet: Prefix, addresses: Iterable[Address]) -> frozenset[int]:
    """The interfaces that have the gateway of a subnet, by number: behind them are its pods."""
    return frozenset(a.oif for a in addresses if a.address == subnet.base + 1)


def bridges_with_gateway(
    subnet: Prefix, links: Mapping[int, Link], addresses: Mapping[AddressKey, Address]
) -> frozenset[str]:
    """The bridges whose pods have a subnet: those that have its gateway, whoever made them (docker0 by mk-docker-opts)."""
    holders = gateway_holders(subnet, addresses.values())
    return frozenset(link.name for link in links.values() if link.ifindex in holders and link.kind == "bridge")


def without_bridge(
    network: Prefix,
    links: Mapping[int, Link],
    addresses: Mapping[AddressKey, Address],
    underlay: Underlay | None,
    bridges: frozenset[str],
    tunnel: str,
) -> tuple[str, ...]:
    """Interfaces by which pods of the network are attached without a bridge (the ptp plugin): they are known as such by an
    address of it."""
    inside = interfaces_within(network, addresses.values(), underlay)
    found = (links[index].name for index in inside if index in links)
    return tuple(sorted(name for name in found if name not in bridges and name != tunnel))


def lost_subnets(
    pool: Pool,
    own: Prefix,
    any_place: bool,
    links: Mapping[int, Link],
    addresses: Mapping[AddressKey, Address],
    underlay: Underlay | None,
    before: Collection[Prefix] = (),
) -> dict[str, list[Prefix]]:
    """Other subnets of the pod network whose gateway is a bridge for pods, by the bridge's name: this node held them
    before, and pods may run there yet. A bridge that has any other address is somebody else's.

    any_place: subnets come from the cluster (Kubernetes), wherever in the network; else the pool says which can be ours, or
    (before) that this node had it, or asked for it: of whatever length.
    """
    found: dict[str, list[Prefix]] = {}
    inside = interfaces_within(pool.network, addresses.values(), underlay)
    for link in links.values():
        if link.kind != "bridge" or link.ifindex not in inside:
            continue
        mine = [a for a in addresses.values() if a.oif == link.ifindex and (a.family == 4 or a.scope < RT_SCOPE_LINK)]
        subnets = [around(a.family, a.address, a.length) for a in mine]
        gateways = all(a.address == subnet.base + 1 for a, subnet in zip(mine, subnets, strict=True))
        held = all(
            pool.network.covers(subnet) and subnet.length == own.length
            if any_place
            else pool.allows(subnet) or (subnet in before and pool.network.covers(subnet))
            for subnet in subnets
        )
        if gateways and held and own not in subnets:
            found[link.name] = subnets
    return found
