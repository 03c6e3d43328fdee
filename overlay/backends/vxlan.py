"""The vxlan backend: what one peer looks like in the kernel, and what the device must be. Pure.

Source: flannel pkg/backend/vxlan (the entries), drivers/net/vxlan/vxlan_core.c (what can be changed live).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lease.config import OVERHEAD, VxlanConfig
from lease.model import Endpoint, Prefix, ip_text, mac_text
from overlay.kernel.route.entries import (
    PROTOCOL,
    TUNNEL,
    UNDERLAY,
    FdbValue,
    NeighbourValue,
    RouteKey,
    RouteValue,
)

BACKEND = "vxlan"


class Entries(NamedTuple):
    """The kernel entries of one peer; a peer reached directly has only a route."""

    route: tuple[RouteKey, RouteValue]
    neighbour: tuple[int, NeighbourValue] | None = None
    fdb: tuple[int, FdbValue] | None = None


class DeviceSpec(NamedTuple):
    """What the vxlan device of this node must be. local: underlay address; lower: number of the underlay interface."""

    name: str
    vni: int
    port: int
    local: int
    lower: int
    mtu: int
    mac: int
    gbp: bool
    learning: bool


class DeviceFound(NamedTuple):
    """A device of that name, as it is. spec.vni is -1 where it is no vxlan; checksums: it has udpcsum and no zero
    checksum over IPv6; special: group, external or a port range of its own."""

    ifindex: int
    up: bool
    kind: str
    spec: DeviceSpec
    checksums: bool
    special: str


def device_name(config: VxlanConfig) -> str:
    """flannel's name of it."""
    return f"flannel.{config.vni}"


def vni_of(name: str) -> int | None:
    """The VNI of a device by its name, None where that is not flannel's."""
    found = re.fullmatch(r"flannel\.(\d{1,8})", name, re.ASCII)
    return int(found[1]) if found else None


def device_mtu(config: VxlanConfig, underlay_mtu: int) -> tuple[int, str]:
    """The device's MTU, and why it is not the configured one ("" when it is)."""
    if config.mtu > underlay_mtu:
        lowered = underlay_mtu - OVERHEAD[4]
        return lowered, (
            f"MTU {config.mtu} of the network config is above the underlay's {underlay_mtu}; lowered to that"
            f" (device and pods: {lowered})"
        )
    return (config.mtu or underlay_mtu) - OVERHEAD[4], ""


def metric(network: Prefix, subnet: Prefix) -> int:
    """The metric of a subnet's route, one of its own: 1 + the subnet's place in the network.

    The kernel looks routes of one metric up in a list, which makes N of them cost N^2 (docs/decisions.md).
    """
    return 1 + ((subnet.base - network.base) >> (32 - subnet.length))


def route_key(network: Prefix, subnet: Prefix) -> RouteKey:
    """The key of a subnet's route."""
    return RouteKey(subnet.base, subnet.length, metric(network, subnet))


def peer_entries(network: Prefix, peer: Endpoint, direct: bool) -> Entries:
    """The entries of a peer."""
    subnet = peer.subnet
    key = route_key(network, subnet)
    if direct:
        return Entries((key, RouteValue(UNDERLAY, peer.public_ip, False, PROTOCOL)))
    assert peer.mac is not None, "a vxlan record without a MAC is refused when it is read"
    return Entries(
        (key, RouteValue(TUNNEL, subnet.base, True, PROTOCOL)),
        (subnet.base, NeighbourValue(peer.mac)),
        (peer.mac, FdbValue(peer.public_ip)),
    )


def replace_reason(wanted: DeviceSpec, found: DeviceFound) -> str | None:
    """Why the device cannot be changed into the wanted one and must be made again; None where it can."""
    if found.kind != "vxlan":
        return f"{wanted.name} is a {found.kind or 'device of another kind'}, not a vxlan"
    for what, want, have in (
        ("VNI", wanted.vni, found.spec.vni),
        ("port", wanted.port, found.spec.port),
        ("GBP", wanted.gbp, found.spec.gbp),
    ):
        if want != have:
            return f"{what} is {have}, wanted {want}, and the kernel cannot change it"
    if not found.checksums:
        return "its UDP checksum flags are not the default, and the kernel cannot change them"
    if found.special:
        return f"it has {found.special}, which the kernel cannot take away"
    return None


def live_changes(wanted: DeviceSpec, found: DeviceFound) -> dict[str, str]:
    """What to change on a device that stays: attribute -> "old -> new" for people. Nothing is lost by any of these
    but the MAC's, which takes the neighbours with it (and the kernel says so, for each)."""
    have = found.spec
    pairs = {
        "local": (ip_text(4, have.local), ip_text(4, wanted.local)),
        "lower": (str(have.lower), str(wanted.lower)),
        "learning": (str(have.learning), str(wanted.learning)),
        "mtu": (str(have.mtu), str(wanted.mtu)),
        "mac": (mac_text(have.mac), mac_text(wanted.mac)),
        "up": ("down" if not found.up else "up", "up"),
    }
    return {name: f"{old} -> {new}" for name, (old, new) in pairs.items() if old != new}
