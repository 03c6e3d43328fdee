"""The host-gw backend: a plain route to each peer, which must be on the underlay's own link. Pure.

Source: flannel pkg/backend/hostgw: `SUBNET via PUBLIC-IP dev UNDERLAY`, MTU of the underlay.
"""

from __future__ import annotations

from typing import NamedTuple

from lease.families import Family
from lease.model import Endpoint, ip_text
from overlay.backends.base import Entry, Outer, TunnelDevice, View
from overlay.backends.routes import ROUTE, RouteAlone
from overlay.kernel.route.entries import PROTOCOL, UNDERLAY, RouteValue
from overlay.kernel.route.tables import TABLES
from overlay.kernel.table import Table

TYPE = "host-gw"
NETWORK = 10_000_000
"""Its number among the networks of one node: above those of VNIs."""


class _Fields(NamedTuple):
    family: Family
    type: str = TYPE


class HostGw(RouteAlone, _Fields):
    """family: of pods and underlay. type: BackendType; a field, so that backends of two kinds are never equal."""

    __slots__ = ()

    @property
    def network(self) -> int:
        """One of its kind on a node."""
        return NETWORK

    @property
    def tunnel(self) -> TunnelDevice | None:
        """Nothing encapsulates."""
        return None

    @property
    def tables(self) -> tuple[Table, ...]:
        """All; it has entries in the last alone."""
        return TABLES[self.family.number]

    @property
    def reaches_directly(self) -> bool:
        """All of them."""
        return True

    @property
    def overhead(self) -> int:
        """Outer headers."""
        return 0

    @property
    def has_vteps(self) -> bool:
        """No peer has an address on a tunnel device."""
        return False

    def fault_of_own(self, public_ip: int, addresses: frozenset[int]) -> str | None:
        """Peers send to the public IP, as to any router on their link: it must be an address of this node (flannel:
        pkg/backend/hostgw)."""
        if public_ip in addresses:
            return None
        address = ip_text(self.family.number, public_ip)
        return (
            f"public IP {address} is no address of this node, and with host-gw peers send packets of pods to it as they"
            " are: leave --public-ip out, or name an interface that has it (--iface)"
        )

    def fault(self, view: View, own: Endpoint, peer: Endpoint) -> str | None:
        """Beyond a router nobody knows where pods' packets are to go."""
        del own
        if any(there.holds(peer.public_ip) for there in view.neighbours):
            return None
        links = ", ".join(map(str, view.neighbours)) or "no prefix of which asks for neighbours"
        address = ip_text(self.family.number, peer.public_ip)
        return f"PublicIP {address} is no neighbour on this node's link ({links}), and host-gw reaches neighbours alone"

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """The route."""
        value = RouteValue(UNDERLAY, peer.public_ip, False, PROTOCOL)
        return [(ROUTE, self.route_key(view, peer.subnet), value)]

    def outer(self) -> Outer | None:
        """Nothing encapsulates."""
        return None
