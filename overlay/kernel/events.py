"""The kernel's notifications, as values: posted by the monitors, taken by the loop. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lease.families import V4, Family
from overlay.kernel.route import wire
from overlay.kernel.route.entries import RT_TABLE_MAIN, Address, FoundFdb, FoundNeighbour, FoundRoute, Link
from overlay.kernel.route.lookup import RTM_DELRULE, RTM_NEWRULE

_KERNELS_TABLES = (RT_TABLE_MAIN, 255)
"""255 is local: it has routes of this node's own addresses."""


class LinkSeen(NamedTuple):
    """An interface was made, changed or (gone) deleted."""

    link: Link
    gone: bool


class AddressSeen(NamedTuple):
    """An address came or went. family: 4 or 6."""

    address: Address
    gone: bool
    family: int = 4


class RouteSeen(NamedTuple):
    """A route of the main table came, changed or went. family: 4 or 6."""

    route: FoundRoute
    gone: bool
    family: int = 4


class NeighbourSeen(NamedTuple):
    """A neighbour came, changed or went. family: 4 or 6."""

    neighbour: FoundNeighbour
    gone: bool
    family: int = 4


class FdbSeen(NamedTuple):
    """An entry of a vxlan's forwarding table came, changed or went. family: of its underlay."""

    entry: FoundFdb
    gone: bool
    family: int = 4


class NeighbourMessages(NamedTuple):
    """Notifications of neighbours and FDB entries, not taken apart: a device that goes takes 40,000 with it, our own FDB
    entries come back (they do not say whose doing they are), and a matcher recognises quickly what is no news."""

    messages: list[bytes]

    @property
    def weight(self) -> int:
        """How many events it stands for."""
        return len(self.messages)


class DeviceUnknown(NamedTuple):
    """The kernel refused an entry because it does not know the tunnel's device, and has not said that it went."""


class Overrun(NamedTuple):
    """Events were lost: only a dump is reliable now."""


SELDOM_S = 1.0
"""What others do all the time is reported so often at most: who hears it must look later than that, or misses the rest."""


class RoutingSeen(NamedTuple):
    """A routing rule, or a route of a table other than main, came or went: reported once in SELDOM_S at most."""


class ForeignRulesSeen(NamedTuple):
    """Somebody changed rules or chains of nftables that are none of ours: reported once in SELDOM_S at most."""


class NftSeen(NamedTuple):
    """Somebody touched one of our nftables tables; "": events were lost, maybe one of these."""

    table: str


class SysctlSeen(NamedTuple):
    """Somebody wrote a sysctl of IPv4 that the kernel notifies of: forwarding, rp_filter."""


KernelEvent = (
    LinkSeen
    | AddressSeen
    | RouteSeen
    | RoutingSeen
    | NeighbourSeen
    | NeighbourMessages
    | FdbSeen
    | Overrun
    | NftSeen
    | ForeignRulesSeen
    | SysctlSeen
)


def parse_event(message: wire.Message, families: Sequence[Family] = (V4,)) -> KernelEvent | None:
    """What one notification says, of these families; None for what nobody here needs. Pure."""
    kind, body = message.kind, message.body
    if kind in (wire.RTM_NEWLINK, wire.RTM_DELLINK):
        # A bridge announces its ports with family AF_BRIDGE: not the interface itself.
        return None if body[0] == wire.AF_BRIDGE else LinkSeen(wire.parse_link(body), kind == wire.RTM_DELLINK)
    if kind == wire.RTM_NEWNETCONF:
        return SysctlSeen()
    if kind in (RTM_NEWRULE, RTM_DELRULE):
        return RoutingSeen()
    for family in families:
        event = _parse_event(message, family)
        if event is not None:
            return event
    return None


def _parse_event(message: wire.Message, family: Family) -> KernelEvent | None:
    kind, body, number = message.kind, message.body, family.number
    if kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
        route = wire.parse_route(family, body)
        if route is not None:
            return RouteSeen(route, kind == wire.RTM_DELROUTE, number)
        return RoutingSeen() if body[0] == family.af and body[4] not in _KERNELS_TABLES else None
    if kind in (wire.RTM_NEWNEIGH, wire.RTM_DELNEIGH):
        gone = kind == wire.RTM_DELNEIGH
        if body[0] == wire.AF_BRIDGE:
            entry = wire.parse_fdb(family, body)
            return None if entry is None else FdbSeen(entry, gone, number)
        neighbour = wire.parse_neighbour(family, body)
        return None if neighbour is None else NeighbourSeen(neighbour, gone, number)
    if kind in (wire.RTM_NEWADDR, wire.RTM_DELADDR):
        address = wire.parse_address(family, body)
        return None if address is None else AddressSeen(address, kind == wire.RTM_DELADDR, number)
    return None
