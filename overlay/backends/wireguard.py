"""The wireguard backend: peers by WireGuard's own table of keys, and a route each. Pure.

Source: flannel pkg/backend/wireguard: devices `flannel-wg` and `flannel-wg-v6`, MTU less 80. flannel routes all of Network
to the device; a route for each peer says which subnets have a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lease.backend_config import WireguardConfig
from lease.families import V4, Family
from lease.model import Endpoint, ip_text
from overlay.backends.base import IPPROTO_UDP, DeviceSpec, Entry, Lower, Outer, View
from overlay.backends.devices import changed, inner_mtu
from overlay.backends.routes import ROUTE, RouteAlone
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, RouteValue
from overlay.kernel.route.link_wire import DeviceAttributes, WireguardDevice
from overlay.kernel.route.tables import TABLES
from overlay.kernel.table import Table

KIND, USERSPACE = "wireguard", "tun"
"""USERSPACE: of a device that a program keeps (wireguard-go)."""
NAME, NAME6 = "flannel-wg", "flannel-wg-v6"
NETWORK = 10_000_002
"""Its number among the networks of one node: above those of VNIs."""
OVERHEAD = 80
"""flannel's, for either family: outer header 40 at most, UDP 8, WireGuard 32."""


def device_name(mode: str, family: Family) -> str:
    """flannel's: with mode separate each family has its own."""
    return NAME6 if mode == "separate" and family is not V4 else NAME


def listen_port(config: WireguardConfig, family: Family) -> int:
    """The UDP port of the device of a family."""
    return config.port6 if device_name(config.mode, family) == NAME6 else config.port


def endpoint_of(mode: str, ends: Iterable[Endpoint], able: Iterable[int]) -> Endpoint | None:
    """The end of a peer to whose public IP packets of a device go, in the modes that have one device for both families: of
    auto IPv4 where both nodes have it. able: families of which this node has an underlay. None: none of them serves."""
    wanted = {"ipv4": (4,), "ipv6": (6,)}.get(mode, (4, 6))
    usable = {end.subnet.family: end for end in ends if end.subnet.family in able}
    return next((usable[family] for family in wanted if family in usable), None)


class WireguardTunnel(NamedTuple):
    """The device. family: of the pods."""

    config: WireguardConfig
    family: Family

    @property
    def name(self) -> str:
        """flannel's name of it."""
        return device_name(self.config.mode, self.family)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kernel's, or a program's."""
        return KIND, USERSPACE

    @property
    def shared(self) -> bool:
        """Whether one device carries both families."""
        return self.config.mode != "separate"

    def mtu(self, underlay_mtu: int) -> tuple[int, str]:
        """That of the underlay without the headers."""
        return inner_mtu(self.config.mtu, underlay_mtu, OVERHEAD)

    def device(self, lower: Lower, own: Endpoint) -> DeviceSpec:
        """Key, port and peers are set by wireguard/controller.py."""
        del own
        return WireguardDevice(self.name, lower.address, self.mtu(lower.mtu)[0])

    def replace_reason(self, wanted: DeviceSpec, found: DeviceAttributes) -> str | None:
        """It is of another kind."""
        if found.kind in self.kinds:
            return None
        return f"{wanted.name} is a {found.kind or 'device of another kind'}, not a {KIND}"

    def conflict(self, wanted: DeviceSpec, name: str, other: DeviceAttributes) -> str | None:
        """None: its port is taken when it goes up, by any program."""
        del wanted, name, other
        return None

    def live_changes(self, wanted: DeviceSpec, found: DeviceAttributes) -> dict[str, str]:
        """Peers survive down and up."""
        pairs = {
            "mtu": (str(found.mtu), str(wanted.mtu)),
        }
        return changed(pairs, found.up)


class _Fields(NamedTuple):
    config: WireguardConfig
    family: Family


class Wireguard(RouteAlone, _Fields):
    """Every peer by the tunnel. family: of the pods."""

    __slots__ = ()

    @property
    def type(self) -> str:
        """As flannel names it."""
        return self.config.type

    @property
    def network(self) -> int:
        """One of its kind on a node."""
        return NETWORK

    @property
    def tunnel(self) -> WireguardTunnel:
        """Of the same config."""
        return WireguardTunnel(self.config, self.family)

    @property
    def tables(self) -> tuple[Table, ...]:
        """All; it has entries in the last alone."""
        return TABLES[self.family.number]

    @property
    def overhead(self) -> int:
        """Outer headers."""
        return OVERHEAD

    def fault(self, view: View, own: Endpoint, peer: Endpoint) -> str | None:
        """Its key. (The kernel ignores a peer of our own key without a word.)"""
        del view
        if not peer.key:
            return "BackendData has no PublicKey"
        if peer.key == own.key:
            return f"PublicKey {peer.vtep} is our own (PublicIP {ip_text(peer.subnet.family, peer.public_ip)})"
        return None

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """The route: where it leads beyond the device is said by the peer's AllowedIPs."""
        return [(ROUTE, self.route_key(view, peer.subnet), RouteValue(TUNNEL, 0, False, PROTOCOL))]

    def outer(self) -> Outer:
        """Whoever has no key of a peer is refused by the kernel itself."""
        return Outer(IPPROTO_UDP, listen_port(self.config, self.family), None, sealed=True)
