"""The vxlan backend: what one peer looks like in the kernel, and what the device must be. Pure.

Source: flannel pkg/backend/vxlan (the entries), drivers/net/vxlan/vxlan_core.c (what can be changed live).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lease.config import VxlanConfig
from lease.families import V4, V6, Family
from lease.model import Endpoint, Prefix, ip_text, mac_text
from overlay.backends.base import Backend, Bulk, Entry, Outer, PackedPeers, View
from overlay.backends.direct import Direct
from overlay.kernel.route import fast
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, FdbValue, NeighbourValue, RouteKey, RouteValue
from overlay.kernel.route.tables import TABLES
from overlay.kernel.table import Table

UDP = 17
"""IP protocol number (RFC 768)."""
BACKEND = "vxlan"


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
        lowered = underlay_mtu - V4.overhead
        return lowered, (
            f"MTU {config.mtu} of the network config is above the underlay's {underlay_mtu}; lowered to that"
            f" (device and pods: {lowered})"
        )
    return (config.mtu or underlay_mtu) - V4.overhead, ""


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


class Vxlan(NamedTuple):
    """Every peer by the tunnel: a neighbour, an FDB entry, a route. family: of pods and underlay."""

    config: VxlanConfig
    family: Family

    @property
    def type(self) -> str:
        """As flannel names it."""
        return BACKEND

    @property
    def tables(self) -> tuple[Table, ...]:
        """Neighbours, FDB, routes: the neighbour and the MAC are known before traffic is led there."""
        return TABLES[self.family.number]

    @property
    def full(self) -> int:
        """One in each."""
        return 0b111

    @property
    def reaches_directly(self) -> bool:
        """Never: Direct does."""
        return False

    def fault(self, own: Endpoint, peer: Endpoint) -> str | None:
        """MAC and VNI."""
        if peer.mac is None:
            return "BackendData has no VtepMAC"
        if peer.mac == own.mac:
            return f"VtepMAC {mac_text(peer.mac)} is our own"
        if peer.vni != self.config.vni:
            return f"VNI {peer.vni} is not this network's {self.config.vni}"
        return None

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """All three. Source: flannel pkg/backend/vxlan/vxlan_network.go."""
        assert peer.mac is not None, "a vxlan record without a MAC is refused when it is read"
        base = peer.subnet.base
        return [
            (0, base, NeighbourValue(peer.mac)),
            (1, peer.mac, FdbValue(peer.public_ip)),
            (2, self.route_key(view, peer.subnet), RouteValue(TUNNEL, base, True, PROTOCOL)),
        ]

    def route_key(self, view: View, subnet: Prefix) -> RouteKey:
        """With a metric of its own for each subnet of IPv4 (1 + its place in the network): the kernel looks routes of one
        metric up in a list, which makes N of them cost N^2 (docs/decisions.md). IPv6 has no such list, and 2048 stands
        behind flannel's 1024, as ours of IPv4 stand behind its 0."""
        if self.family is V6:
            return RouteKey(subnet.base, subnet.length, 2048)
        place = (subnet.base - view.network.base) >> (self.family.bits - subnet.length)
        return RouteKey(subnet.base, subnet.length, 1 + place)

    def outer(self) -> Outer:
        """RFC 7348."""
        return Outer(UDP, self.config.port, self.config.vni)

    def bulk(self, view: View) -> Bulk | None:
        """Of IPv4."""
        return _VxlanBulk(self, view) if self.family is V4 else None


class _VxlanBulk:
    def __init__(self, backend: Vxlan, view: View) -> None:
        self._backend, self._view = backend, view

    def usable(self, own: Endpoint) -> Callable[[int, bytes], bool]:
        """Our VNI, another MAC."""
        ours, of_network = (own.mac or 0).to_bytes(6, "big"), self._backend.config.vni
        return lambda vni, mac: vni == of_network and mac != ours

    def direct(self, packed: bytes) -> bool:
        """Never."""
        del packed
        return False

    def messages(self, number: int, packed: bytes, bits: int, seq: int, oifs: Mapping[int, int]) -> bytes | None:
        """Those of fast.peer_messages."""
        oif = oifs.get(TUNNEL)
        if oif is None:
            return None
        metric = 1 + (((number >> 8) - self._view.network.base) >> (32 - (number & 255)))
        made = fast.peer_messages(seq, packed[:4], number & 255, packed[fast.MAC], packed[fast.PUBLIC_IP], metric, oif)
        return made if bits == self._backend.full else fast.some_of(made, bits)

    def matcher(self, peers: PackedPeers, oifs: Mapping[int, int]) -> fast.DumpMatcher:
        """Of the tunnel."""
        network, oif = self._view.network.base, oifs.get(TUNNEL, -1)
        return fast.DumpMatcher(peers.packed, peers.by_mac, tuple(peers.lengths), network, oif)


def backend_of(config: VxlanConfig, family: Family) -> Backend:
    """The backend that the network config names."""
    made = Vxlan(config, family)
    return Direct(made) if config.direct_routing else made
