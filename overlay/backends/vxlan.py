"""The vxlan backend: what one peer looks like in the kernel, and what the device must be. Pure.

Source: flannel pkg/backend/vxlan (the entries), drivers/net/vxlan/vxlan_core.c (what can be changed live).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lease.backend_config import VxlanConfig
from lease.families import V4, Family
from lease.model import Endpoint, ip_text, link_local, mac_text
from lease.records.packed import FORM, PLACES
from overlay.backends.base import IPPROTO_UDP, Bulk, DeviceSpec, Entry, Lower, Outer, PackedPeers, View
from overlay.backends.devices import changed, inner_mtu
from overlay.backends.routes import METRIC6, Common
from overlay.kernel.route import fast, fast6
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, FdbValue, NeighbourValue, RouteValue
from overlay.kernel.route.link_wire import DeviceAttributes, VxlanDevice
from overlay.kernel.route.tables import TABLES
from overlay.kernel.table import Table

KIND = "vxlan"
_LEADS = {4: "flannel.", 6: "flannel-v6."}


def device_name(vni: int, family: Family) -> str:
    """flannel's name of the device."""
    return f"{_LEADS[family.number]}{vni}"


def network_of(device: str) -> int | None:
    """The network (VNI) of a device by its name, None where that is not flannel's."""
    found = re.fullmatch(r"flannel(?:-v6)?\.(\d{1,8})", device, re.ASCII)
    return int(found[1]) if found else None


class VxlanTunnel(NamedTuple):
    """The device. family: of the underlay."""

    config: VxlanConfig
    family: Family

    @property
    def kinds(self) -> tuple[str, ...]:
        """A vxlan."""
        return (KIND,)

    @property
    def name(self) -> str:
        """flannel's name of it."""
        return device_name(self.config.vni, self.family)

    @property
    def shared(self) -> bool:
        """Whether one device carries both families."""
        return False

    def mtu(self, underlay_mtu: int) -> tuple[int, str]:
        """That of the underlay without the headers."""
        return inner_mtu(self.config.mtu, underlay_mtu, self.family.overhead)

    def device(self, lower: Lower, own: Endpoint) -> VxlanDevice:
        """A vxlan with the MAC that we publish."""
        assert own.mac is not None, "a vxlan lease has a MAC"
        config = self.config
        return VxlanDevice(
            self.name, config.vni, config.port, lower.address, lower.ifindex, self.mtu(lower.mtu)[0], own.mac,
            config.gbp, config.learning,
        )  # fmt: skip

    def replace_reason(self, wanted: DeviceSpec, found: DeviceAttributes) -> str | None:
        """By what the kernel cannot change (drivers/net/vxlan/vxlan_core.c vxlan_changelink)."""
        assert isinstance(wanted, VxlanDevice)
        if found.kind != KIND:
            return f"{wanted.name} is a {found.kind or 'device of another kind'}, not a {KIND}"
        for what, want, have in (
            ("VNI", wanted.vni, found.vni),
            ("port", wanted.port, found.port),
            ("GBP", wanted.gbp, found.gbp),
        ):
            if want != have:
                return f"{what} is {have}, wanted {want}, and the kernel cannot change it"
        if not found.checksums:
            return "its UDP checksum flags are not the default, and the kernel cannot change them"
        if found.special:
            return f"it has {found.special}, which the kernel cannot take away"
        return None

    def conflict(self, wanted: DeviceSpec, name: str, other: DeviceAttributes) -> str | None:
        """Two devices on one port must agree in how they use it, and no two may have one VNI there: EADDRINUSE, EEXIST
        (drivers/net/vxlan/vxlan_core.c vxlan_find_sock, vxlan_vni_in_use)."""
        assert isinstance(wanted, VxlanDevice)
        if other.kind != KIND or other.port != wanted.port:
            return None
        if other.special or other.gbp != wanted.gbp:
            how = other.special or ("GBP" if other.gbp else "no GBP")
            return (
                f"{name} has port {other.port} with {how}, which {wanted.name} cannot share: remove it (ip link del {name}),"
                " or give this network another Backend.Port"
            )
        if other.vni == wanted.vni:
            return (
                f"{name} has VNI {other.vni} on port {other.port} already: remove it (ip link del {name}), or give this"
                " network another Backend.VNI or Port"
            )
        return None

    def live_changes(self, wanted: DeviceSpec, found: DeviceAttributes) -> dict[str, str]:
        """Nothing is lost by any of these but the MAC's, which takes the neighbours with it (and the kernel says so, for
        each)."""
        assert isinstance(wanted, VxlanDevice)
        family = self.family.number
        pairs = {
            "local": (ip_text(family, found.local), ip_text(family, wanted.local)),
            "lower": (str(found.lower), str(wanted.lower)),
            "learning": (str(found.learning), str(wanted.learning)),
            "mtu": (str(found.mtu), str(wanted.mtu)),
            "mac": (mac_text(found.mac), mac_text(wanted.mac)),
        }
        return changed(pairs, found.up)


class _Fields(NamedTuple):
    config: VxlanConfig
    family: Family


class Vxlan(Common, _Fields):
    """Every peer by the tunnel: a neighbour, an FDB entry, a route. family: of pods and underlay."""

    __slots__ = ()

    @property
    def type(self) -> str:
        """As flannel names it."""
        return self.config.type

    @property
    def network(self) -> int:
        """The VNI."""
        return self.config.vni

    @property
    def tunnel(self) -> VxlanTunnel:
        """Of the same config."""
        return VxlanTunnel(self.config, self.family)

    @property
    def tables(self) -> tuple[Table, ...]:
        """Neighbours, FDB, routes: the neighbour and the MAC are known before traffic is led there."""
        return TABLES[self.family.number]

    @property
    def full(self) -> int:
        """One in each."""
        return 0b111

    @property
    def overhead(self) -> int:
        """Outer headers."""
        return self.family.overhead

    def fault(self, view: View, own: Endpoint, peer: Endpoint) -> str | None:
        """MAC and VNI."""
        del view
        if peer.mac is None:
            return "BackendData has no VtepMAC"
        if peer.mac == own.mac:
            return f"VtepMAC {mac_text(peer.mac)} is our own"
        if peer.vni is not None and peer.vni != self.config.vni:
            return f"VNI {peer.vni} is not this network's {self.config.vni}"
        return None

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """All three. Source: flannel pkg/backend/vxlan/vxlan_network.go. Of IPv6 the gateway is the link-local address of
        the peer's MAC: one in the subnet is refused (EINVAL) where any other route covers it, and keeps a peer from moving
        between tunnel and direct route at once."""
        assert peer.mac is not None, "a vxlan record without a MAC is refused when it is read"
        gateway = peer.subnet.base if self.family is V4 else link_local(peer.mac)
        return [
            (0, gateway, NeighbourValue(peer.mac)),
            (1, peer.mac, FdbValue(peer.public_ip)),
            (2, self.route_key(view, peer.subnet), RouteValue(TUNNEL, gateway, True, PROTOCOL)),
        ]

    def outer(self) -> Outer:
        """RFC 7348."""
        return Outer(IPPROTO_UDP, self.config.port, self.config.vni)

    def bulk(self, view: View) -> Bulk | None:
        """Of either family."""
        return _VxlanBulk(self, view) if self.family is V4 else _VxlanBulk6(self, view)


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


class _VxlanBulk6(_VxlanBulk):
    def messages(self, number: int, packed: bytes, bits: int, seq: int, oifs: Mapping[int, int]) -> bytes | None:
        """Those of fast6.peer_messages; of a record whose form does not say it all, None."""
        oif, place = oifs.get(TUNNEL), PLACES[6]
        if oif is None or packed[FORM] not in place.forms:
            return None
        base, length, mac = packed[place.number][:16], number & 255, packed[place.mac]
        made = fast6.peer_messages(seq, base, length, mac, packed[place.public_ip], METRIC6, oif)
        return made if bits == self._backend.full else fast.some_of(made, bits, fast6.PARTS)

    def matcher(self, peers: PackedPeers, oifs: Mapping[int, int]) -> fast6.DumpMatcher6:
        """Of the tunnel."""
        network, oif = self._view.network.base, oifs.get(TUNNEL, -1)
        made = fast6.DumpMatcher6(peers.packed, peers.by_mac, tuple(peers.lengths), network, oif)
        made.metric = METRIC6
        return made
