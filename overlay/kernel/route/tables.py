"""The tables of rtnetlink: neighbours, a vxlan device's forwarding table (FDB), routes; of either family. Pure."""

from __future__ import annotations

import errno
import socket
from typing import Any

from lease.families import FAMILIES, Family
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    ELSEWHERE,
    RTNH_F_ONLINK,
    RTPROT_BOOT,
    TUNNEL,
    UNDERLAY,
    FdbValue,
    FoundFdb,
    FoundNeighbour,
    FoundRoute,
    NeighbourValue,
    RouteKey,
    RouteValue,
    fdb_is_ours,
    neighbour_is_ours,
    route_role,
)
from overlay.kernel.table import Table, Where


class NeighbourTable(Table):
    """Key: the VTEP's address; value: its MAC."""

    name = "neighbour"

    def __init__(self, family: Family) -> None:
        self._family = family

    def put(self, seq: int, key: int, value: NeighbourValue, oif: int, replace: bool) -> bytes:
        """Always replacing."""
        del replace
        return wire.neighbour_add(self._family, seq, key, value, oif)

    def remove(self, seq: int, key: int, value: NeighbourValue, oif: int) -> bytes:
        """RTM_DELNEIGH."""
        return wire.neighbour_delete(self._family, seq, key, value, oif)

    def dump(self, seq: int, oif: int) -> bytes:
        """Those of the tunnel."""
        return wire.neighbour_dump(self._family, seq, oif)

    def parse(self, body: memoryview) -> FoundNeighbour | None:
        """A neighbour."""
        return wire.parse_neighbour(self._family, body)

    def ours(self, found: FoundNeighbour, where: Where) -> tuple[int, NeighbourValue] | None:
        """Permanent ones on the tunnel."""
        if where.roles.get(found.oif) != TUNNEL or not neighbour_is_ours(found, found.oif):
            return None
        return found.address, NeighbourValue(found.mac or 0, found.unexpected)

    def text(self, key: int) -> str:
        """The address."""
        return _text(self._family, key)


class FdbTable(Table):
    """Key: the VTEP's MAC; value: the underlay address behind it."""

    name = "fdb"
    lost_when_down = False

    def __init__(self, family: Family) -> None:
        """family: of the underlay."""
        self._family = family

    def put(self, seq: int, key: int, value: FdbValue, oif: int, replace: bool) -> bytes:
        """Always replacing."""
        del replace
        return wire.fdb_add(self._family, seq, key, value, oif)

    def remove(self, seq: int, key: int, value: FdbValue, oif: int) -> bytes:
        """RTM_DELNEIGH."""
        return wire.fdb_delete(self._family, seq, key, value, oif)

    def dump(self, seq: int, oif: int) -> bytes:
        """That of the tunnel."""
        return wire.fdb_dump(seq, oif)

    def parse(self, body: memoryview) -> FoundFdb | None:
        """An FDB entry."""
        return wire.parse_fdb(self._family, body)

    def ours(self, found: FoundFdb, where: Where) -> tuple[int, FdbValue] | None:
        """Lasting unicast ones on the tunnel."""
        if where.roles.get(found.oif) != TUNNEL or not fdb_is_ours(found, found.oif):
            return None
        return found.mac, FdbValue(found.dst or 0, found.unexpected)

    def text(self, key: int) -> str:
        """The MAC."""
        return key.to_bytes(6, "big").hex(":")


class RouteTable(Table):
    """Key: destination and metric; value: device and gateway."""

    name = "route"
    stands_on = (TUNNEL, UNDERLAY, ELSEWHERE)
    needs_up = True
    takes_over = True
    watched = True
    empty = (errno.ENOENT,)  # a namespace that never had a route has no main table yet

    def __init__(self, family: Family) -> None:
        self._family = family

    def role(self, value: RouteValue) -> int:
        """The tunnel's, or the underlay's where a peer is reached directly."""
        return value.role

    def put(self, seq: int, key: RouteKey, value: RouteValue, oif: int, replace: bool) -> bytes:
        """A foreign one of that key is never replaced."""
        return wire.route_add(self._family, seq, key, value, oif, replace)

    def remove(self, seq: int, key: RouteKey, value: RouteValue, oif: int) -> bytes:
        """RTM_DELROUTE; one elsewhere is deleted by its key alone: 0 matches any device."""
        return wire.route_delete(self._family, seq, key, value, oif)

    def dump(self, seq: int, oif: int) -> bytes:
        """The whole main table: those of others matter, too."""
        del oif
        return wire.route_dump(self._family, seq)

    def parse(self, body: memoryview) -> FoundRoute | None:
        """A route."""
        return wire.parse_route(self._family, body)

    def ours(self, found: FoundRoute, where: Where) -> tuple[RouteKey, RouteValue] | None:
        """By `route_role`; one of ours that somebody altered on our own device is still ours."""
        role = route_role(found, where.roles, where.network)
        if role is None and where.roles.get(found.oif) == TUNNEL and where.is_wanted(found.key):
            role = TUNNEL
        if role is None and found.protocol == RTPROT_BOOT and not found.unexpected and where.is_copy(found):
            role = where.roles.get(found.oif)
        if role is None:
            return None
        onlink = bool(found.flags & RTNH_F_ONLINK)
        return found.key, RouteValue(role, found.via, onlink, found.protocol, found.unexpected)

    def text(self, key: RouteKey) -> str:
        """As `ip route` writes it."""
        return f"{_text(self._family, key.base)}/{key.length} metric {key.metric}"


def _text(family: Family, address: Any) -> str:
    return socket.inet_ntop(family.af, family.packed(address))


TABLES: dict[int, tuple[Table, ...]] = {
    number: (NeighbourTable(family), FdbTable(family), RouteTable(family)) for number, family in FAMILIES.items()
}
"""By family, in the order in which a peer's entries are put in place."""
