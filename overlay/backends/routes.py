"""What all backends' routes to peers have in common. Pure."""

from __future__ import annotations

from lease.families import V6
from lease.model import WIDTH, Prefix
from overlay.backends.base import Bulk, View
from overlay.kernel.route.entries import RouteKey

METRIC6 = 2048
"""Of routes of IPv6."""
ROUTE = 2
"""The number of the table of routes among kernel/route/tables.py's."""
ROUTE_ALONE = 1 << ROUTE


def route_key(view: View, subnet: Prefix) -> RouteKey:
    """With a metric of its own for each subnet of IPv4 (1 + its place in the network): the kernel looks routes of one metric
    up in a list, which makes N of them cost N^2 (docs/decisions.md). IPv6 has no such list, and 2048 stands behind flannel's
    1024, as ours of IPv4 stand behind its 0."""
    if view.family is V6:
        return RouteKey(subnet.base, subnet.length, METRIC6)
    place = (subnet.base - view.network.base) >> (WIDTH[subnet.family] - subnet.length)
    return RouteKey(subnet.base, subnet.length, 1 + place)


class Common:
    """What most backends answer alike; a backend is a tuple of its fields besides. Each answer: base.Backend."""

    __slots__ = ()

    @property
    def reaches_directly(self) -> bool:
        """Never: Direct does."""
        return False

    @property
    def has_vteps(self) -> bool:
        """The base of each subnet is on its node's device."""
        return True

    def fault_of_own(self, public_ip: int, addresses: frozenset[int]) -> str | None:
        """None."""
        del public_ip, addresses
        return None

    def route_key(self, view: View, subnet: Prefix) -> RouteKey:
        """As all."""
        return route_key(view, subnet)


class RouteAlone(Common):
    """One whose peers have a route each, and no other entry."""

    __slots__ = ()

    @property
    def full(self) -> int:
        """A route."""
        return ROUTE_ALONE

    def bulk(self, view: View) -> Bulk | None:
        """None: entry by entry."""
        del view
        return None
