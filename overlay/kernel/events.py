"""The kernel's notifications, as values: posted by the monitors, taken by the loop. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lease.families import V4, Family
from overlay.kernel.route import wire
from overlay.kernel.route.entries import Address, FoundFdb, FoundNeighbour, FoundRoute, Link


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


class NftSeen(NamedTuple):
    """Somebody touched one of our nftables tables; "": events were lost, maybe one of these."""

    table: str


class SysctlSeen(NamedTuple):
    """Somebody wrote a sysctl of IPv4 that the kernel notifies of: forwarding, rp_filter."""


KernelEvent = (
    LinkSeen | AddressSeen | RouteSeen | NeighbourSeen | NeighbourMessages | FdbSeen | Overrun | NftSeen | SysctlSeen
)


def parse_event(message: wire.Message, families: Sequence[Family] = (V4,)) -> KernelEvent | None:
    """What one notification says, of these families; None for what nobody here needs. Pure."""
    kind, body = message.kind, message.body
    if kind in (wire.RTM_NEWLINK, wire.RTM_DELLINK):
        # A bridge announces its ports with family AF_BRIDGE: not the interface itself.
        return None if body[0] == wire.AF_BRIDGE else LinkSeen(wire.parse_link(body), kind == wire.RTM_DELLINK)
    if kind == wire.RTM_NEWNETCONF:
        return SysctlSeen()
    for family in families:
        event = _parse_event(message, family)
        if event is not None:
            return event
    return None


def _parse_event(message: wire.Message, family: Family) -> KernelEvent | None:
    kind, body, number = message.kind, message.body, family.number
    if kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
        route = wire.parse_route(family, body)
        return None if route is None else RouteSeen(route, kind == wire.RTM_DELROUTE, number)
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
