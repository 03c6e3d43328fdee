"""The ipip backend: IPv4 in IPv4, by one device for all peers. Pure.

Source: flannel pkg/backend/ipip: device `flannel.ipip`, routes `SUBNET via PUBLIC-IP dev flannel.ipip onlink`, MTU less 20;
net/ipv4/ipip.c (what can be changed live).
"""

from __future__ import annotations

from typing import NamedTuple

from lease.backend_config import IpipConfig
from lease.families import Family
from lease.model import Endpoint, ip_text
from overlay.backends.base import DeviceSpec, Entry, Lower, Outer, View
from overlay.backends.devices import changed
from overlay.backends.routes import ROUTE, RouteAlone
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, RouteValue
from overlay.kernel.route.link_wire import DeviceAttributes, IpipDevice
from overlay.kernel.route.tables import TABLES
from overlay.kernel.table import Table

KIND, NAME = "ipip", "flannel.ipip"
NETWORK = 10_000_001
"""Its number among the networks of one node: above those of VNIs."""
OVERHEAD = 20
IPPROTO_IPIP = 4
"""RFC 2003."""


class IpipTunnel(NamedTuple):
    """The device. family: of the underlay."""

    family: Family
    name: str = NAME

    @property
    def kinds(self) -> tuple[str, ...]:
        """An ipip."""
        return (KIND,)

    @property
    def shared(self) -> bool:
        """Whether one device carries both families."""
        return False

    def mtu(self, underlay_mtu: int) -> tuple[int, str]:
        """That of the underlay without the outer header."""
        return underlay_mtu - OVERHEAD, ""

    def device(self, lower: Lower, own: Endpoint) -> DeviceSpec:
        """From our address, to anybody."""
        del own
        return IpipDevice(self.name, lower.address, self.mtu(lower.mtu)[0])

    def replace_reason(self, wanted: DeviceSpec, found: DeviceAttributes) -> str | None:
        """It is of another kind, or leads to one address alone."""
        if found.kind != KIND:
            return f"{wanted.name} is a {found.kind or 'device of another kind'}, not an {KIND}"
        return f"it has {found.special}, which the kernel cannot take away" if found.special else None

    def conflict(self, wanted: DeviceSpec, name: str, other: DeviceAttributes) -> str | None:
        """No two may have one pair of addresses: EEXIST (net/ipv4/ip_tunnel.c)."""
        if other.kind != KIND or other.local != wanted.local or other.special:
            return None
        address = ip_text(self.family.number, other.local)
        return f"{name} is an ipip device of {address} already: remove it (ip link del {name})"

    def live_changes(self, wanted: DeviceSpec, found: DeviceAttributes) -> dict[str, str]:
        """Nothing is lost by any of these."""
        number = self.family.number
        pairs = {
            "local": (ip_text(number, found.local), ip_text(number, wanted.local)),
            "mtu": (str(found.mtu), str(wanted.mtu)),
        }
        return changed(pairs, found.up)


class _Fields(NamedTuple):
    config: IpipConfig
    family: Family


class Ipip(RouteAlone, _Fields):
    """Every peer by the tunnel, with a route alone. family: of pods and underlay, IPv4."""

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
    def tunnel(self) -> IpipTunnel:
        """The device."""
        return IpipTunnel(self.family)

    @property
    def tables(self) -> tuple[Table, ...]:
        """All; it has entries in the last alone."""
        return TABLES[self.family.number]

    @property
    def overhead(self) -> int:
        """Outer headers."""
        return OVERHEAD

    def fault(self, view: View, own: Endpoint, peer: Endpoint) -> str | None:
        """None: a peer publishes its address alone."""
        del view, own, peer
        return None

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """The route; its gateway is the outer destination."""
        value = RouteValue(TUNNEL, peer.public_ip, True, PROTOCOL)
        return [(ROUTE, self.route_key(view, peer.subnet), value)]

    def outer(self) -> Outer:
        """RFC 2003."""
        return Outer(IPPROTO_IPIP, 0, None)
