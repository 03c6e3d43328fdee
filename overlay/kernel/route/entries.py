"""What the kernel holds for a peer, as values: each kind has a key (what the kernel keys on) and a value. Pure.

Devices are named by their role, not by their number: when a device is made again its number changes and what we want
on it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PROTOCOL = 111
"""Our route protocol number (rtm_protocol); free in include/uapi/linux/rtnetlink.h and in iproute2's rt_protos."""
RTPROT_KERNEL, RTPROT_BOOT = 2, 3
RT_TABLE_MAIN = 254
RTNH_F_ONLINK = 4
NUD_INCOMPLETE, NUD_NOARP, NUD_PERMANENT = 0x01, 0x40, 0x80

TUNNEL, UNDERLAY, ELSEWHERE = 0, 1, 2
"""Roles of devices: the vxlan device, the interface that carries it, and any other (an earlier underlay)."""


class RouteKey(NamedTuple):
    """What the kernel keys an IPv4 route of the main table on (TOS 0): destination, and metric."""

    base: int
    length: int
    metric: int


class RouteValue(NamedTuple):
    """Where a route leads. via: gateway, 0 for none. unexpected: what we never set (source, MTU lock, scope, type...)."""

    role: int
    via: int
    onlink: bool
    protocol: int
    unexpected: tuple[object, ...] = ()


class NeighbourValue(NamedTuple):
    """The MAC behind an address. unexpected: flags we never set."""

    mac: int
    unexpected: tuple[object, ...] = ()


class FdbValue(NamedTuple):
    """The underlay address behind a MAC. unexpected: a port, VNI or interface of its own, which we never set."""

    dst: int
    unexpected: tuple[object, ...] = ()


class FoundRoute(NamedTuple):
    """A route of the main table as a dump or an event shows it. oif: 0 where it has none or several."""

    key: RouteKey
    oif: int
    via: int
    flags: int
    protocol: int
    unexpected: tuple[object, ...]


class FoundNeighbour(NamedTuple):
    """A neighbour. mac: None where it has none yet."""

    oif: int
    address: int
    mac: int | None
    state: int
    unexpected: tuple[object, ...]


class FoundFdb(NamedTuple):
    """An entry of a vxlan device's own forwarding table. dst: None where it has none."""

    oif: int
    mac: int
    dst: int | None
    state: int
    unexpected: tuple[object, ...]


class Link(NamedTuple):
    """A network interface. kind: `vxlan`, `veth`, ... or "" for hardware. arp: whether it resolves by ARP. master: the
    number of the bridge it is a port of, 0 where of none. peer, netnsid: of a veth whose other end is in another network
    namespace the number of that end there, and our number of that namespace; else 0 and -1. port: of a vxlan device its UDP
    port, else 0; over: the family of its underlay, 0: of both, or it is no vxlan."""

    ifindex: int
    name: str
    up: bool
    mtu: int
    mac: int
    kind: str
    arp: bool
    carrier: bool
    loopback: bool = False
    master: int = 0
    peer: int = 0
    netnsid: int = -1
    port: int = 0
    over: int = 0


class PodEnd(NamedTuple):
    """The other end of a veth: its MAC, its addresses, without their lengths, and whether it is up."""

    mac: int
    addresses: Mapping[int, frozenset[int]]
    """By family."""
    up: bool = True


class Address(NamedTuple):
    """An address of an interface. family: 4 or 6; scope: rtnetlink's number, 0 global, 253 link, 254 host."""

    family: int
    oif: int
    address: int
    length: int
    scope: int
    secondary: bool
    deprecated: bool
    permanent: bool


def route_role(route: FoundRoute, roles: Mapping[int, int], network: tuple[int, int]) -> int | None:
    """The role of the device of a route that is ours; None for a route that is not: invariant 3 of docs/architecture.md.

    Ours are the routes of our protocol number on the tunnel device, and elsewhere those into our network (first and
    last address): another agent, of another network, may share the underlay. And flannel's own form on the tunnel
    device (protocol boot, gateway is the subnet's base, onlink), so that a node that moves from flannel leaves nothing
    behind.
    """
    role = roles.get(route.oif)
    if route.protocol == PROTOCOL:
        if role != TUNNEL and not network[0] <= route.key.base <= network[1]:
            return None
        return ELSEWHERE if role is None else role
    flannel_form = route.protocol == RTPROT_BOOT and route.via == route.key.base and bool(route.flags & RTNH_F_ONLINK)
    return role if role == TUNNEL and flannel_form and not route.unexpected else None


def neighbour_is_ours(neighbour: FoundNeighbour, tunnel: int) -> bool:
    """Permanent entries on the tunnel device; never what traffic made (INCOMPLETE...) nor the kernel's own (NOARP)."""
    return neighbour.oif == tunnel and neighbour.state & NUD_PERMANENT != 0 and neighbour.mac is not None


def fdb_is_ours(entry: FoundFdb, tunnel: int) -> bool:
    """Lasting unicast entries on the tunnel device; never learned ones. The all-zero MAC (default destination) is
    nobody's peer, but it floods unknown traffic of this device to somebody: it is ours to remove."""
    return entry.oif == tunnel and not entry.mac >> 40 & 1 and entry.state & (NUD_PERMANENT | NUD_NOARP) != 0
