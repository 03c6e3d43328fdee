"""The peers' part of the kernel: wanted from records, found from dumps and events, applied through the reconciler.

Belongs to the agent's owner thread. Everything is level-triggered; see reconcile.py for how the two are made one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from lease.model import Lease, Prefix, ip_text, mac_text
from overlay import plan
from overlay.backends.vxlan import Entries
from overlay.kernel import netlink
from overlay.kernel.entries import (
    RTNH_F_ONLINK,
    TUNNEL,
    FdbValue,
    FoundFdb,
    FoundNeighbour,
    FoundRoute,
    Link,
    NeighbourValue,
    RouteKey,
    RouteValue,
    fdb_is_ours,
    neighbour_is_ours,
    route_role,
)
from overlay.peers import PeerTable, Turned
from overlay.reconcile import Device, Kind, Reconciler, Refused
from overlay.status import Difference, PeerStatus

log = structlog.get_logger()
TOLD_AT = (2, 10, 100, 1000, 10000)
"""The tries at which a refused entry is logged: not the first, which a stale view may cause and the next dump mends."""
SHOWN = 100
"""How many differing entries a status lists."""


class Datapath:
    """Routes, neighbours and FDB entries of all peers."""

    def __init__(self, requests: netlink.RequestSocket, clock: Callable[[], float], rng: random.Random) -> None:
        self._requests = requests
        self.rec = Reconciler(requests, clock, rng)
        self.node: plan.Node | None = None
        self.table = PeerTable(lambda _lease: "no lease of our own yet")
        self.dumped = False
        self.in_the_way: dict[RouteKey, str] = {}
        """Routes of others that stand before ours, in words."""
        self.refusals = Refusals()
        self._rising: set[int] = set()
        """Devices that we set up, whose notification of that has not come yet."""
        self._told_mended: Counter[str] = Counter()
        self._told_writes: Counter[str] = Counter()

    # --- wanted --------------------------------------------------------------------------------------------------------

    def plan(self, node: plan.Node, others: Mapping[str, Lease]) -> None:
        """Everything anew: the node itself changed (config, underlay, own lease), or this is the first list."""
        self.node = node
        self.table.judge_again(lambda lease: plan.refusal(node, lease))
        self.table.replace(others)
        wanted: tuple[dict[Any, Any], ...] = ({}, {}, {})
        for lease in self.table.accepted():
            for kind, key, value in _flat(plan.entries(node, lease)):
                wanted[kind][key] = value
        for kind in Kind:
            self.rec.want_exactly(kind, wanted[kind])
        for key, reason in self.table.refused.items():
            self.refusals.tell(key, reason)
        log.info("peers", wanted=len(self.table.records) - len(self.table.refused), refused=len(self.table.refused))

    def replace(self, others: Mapping[str, Lease]) -> None:
        """A new list: by value, so that a changed MAC is a change and a missed deletion a deletion."""
        if self.node is not None:
            self._turn(self.table.replace(others))

    def put(self, lease: Lease) -> None:
        """A record came or changed."""
        if self.node is None:
            return  # `plan` takes all records over, once we have a lease
        self._turn(self.table.put(lease))
        if reason := self.table.refused.get(lease.key):
            self.refusals.tell(lease.key, reason)
        else:
            self.refusals.forget(lease.key)

    def drop(self, key: str) -> None:
        """A record went."""
        self.refusals.forget(key)
        if self.node is not None:
            self._turn(self.table.drop(key))

    def _turn(self, turned: Turned) -> None:
        assert self.node is not None
        for was, _ in turned.values():
            if was is not None:
                for kind, key, _value in _flat(plan.entries(self.node, was)):
                    self.rec.unwant(kind, key)
        for was, now in turned.values():
            for lease in (now, *self._of_the_same_mac(was)):
                if lease is not None:
                    for kind, key, value in _flat(plan.entries(self.node, lease)):
                        self.rec.want(kind, key, value)

    def _of_the_same_mac(self, was: Lease | None) -> Iterator[Lease]:
        """A node with two subnets has one FDB entry: it stays while one of them does."""
        if was is not None and was.v4 is not None and was.v4.mac is not None:
            yield from self.table.sharing_mac(was.v4.mac)

    # --- found: events ---------------------------------------------------------------------------------------------------

    def on_route(self, event: netlink.RouteSeen, links: Mapping[int, Link]) -> None:
        """A route of the main table came, changed or went."""
        route = event.route
        role = self._role(route, self._roles())
        if role is None:
            if not event.gone and self.rec.routes.is_found(route.key):
                self.rec.lose(Kind.ROUTE, route.key)  # replaced under our feet by a foreign one
            if event.gone and self.in_the_way.pop(route.key, None) is not None:
                self.rec.retry_now(Kind.ROUTE)
            elif not event.gone:
                self._watch_foreign(route, links)
        elif event.gone:
            self.rec.lose(Kind.ROUTE, route.key)
        else:
            self.rec.find(Kind.ROUTE, route.key, _route_value(route, role))

    def on_neighbour(self, event: netlink.NeighbourSeen) -> None:
        """A neighbour came, changed or went."""
        device, found = self.rec.devices.get(TUNNEL), event.neighbour
        if device is not None and found.oif == device.ifindex:
            there = not event.gone and neighbour_is_ours(found, device.ifindex)
            self._seen(Kind.NEIGHBOUR, found.address, _neighbour_value(found) if there else None)

    def on_fdb(self, event: netlink.FdbSeen) -> None:
        """An FDB entry came, changed or went."""
        device, entry = self.rec.devices.get(TUNNEL), event.entry
        if device is not None and entry.oif == device.ifindex:
            there = not event.gone and fdb_is_ours(entry, device.ifindex)
            self._seen(Kind.FDB, entry.mac, _fdb_value(entry) if there else None)

    def _seen(self, kind: Kind, key: int, value: object) -> None:
        """An entry of ours as it is now; None: there is none. (Losing what we did not know of would be news to nobody,
        and would end the backoff of an entry that is refused.)"""
        if value is not None:
            self.rec.find(kind, key, value)
        elif self.rec.tracker(kind).is_found(key):
            self.rec.lose(kind, key)

    def on_link(self, link: Link, gone: bool) -> int | None:
        """A link changed; the role of the device that was lost by it, if one was. Never coalesced: a device that was
        down for a moment lost its routes in it, without another word from the kernel."""
        if link.ifindex in self._rising:
            if gone or link.up:
                self._rising.discard(link.ifindex)
            else:
                return None  # the news of how it was before we set it up; what we put on it came later
        for role, device in list(self.rec.devices.items()):
            if device.ifindex == link.ifindex and (gone or not link.up):
                self.rec.device_lost(role, fdb_too=gone)
                if gone:
                    del self.rec.devices[role]
                else:
                    self.rec.devices[role] = Device(link.ifindex, False)
                return role
        return None

    def set_tunnel(self, ifindex: int, lost: bool, made: bool) -> None:
        """The tunnel device stands and is up. lost: we had to set it up; made: we had to make it."""
        if made or lost:
            self.rec.device_lost(TUNNEL, fdb_too=made)
            self._rising.add(ifindex)
        self.rec.devices[TUNNEL] = Device(ifindex, True)

    def events_lost(self) -> None:
        """Notifications were dropped: none is waited for any more."""
        self._rising.clear()

    # --- found: the whole kernel ---------------------------------------------------------------------------------------

    def read_kernel(self, links: Mapping[int, Link]) -> None:
        """Read routes, neighbours and FDB whole. Raises KernelError."""
        device = self.rec.devices.get(TUNNEL)
        if device is None:
            return
        foreign: list[FoundRoute] = []
        self.rec.merge_dump(Kind.ROUTE, self._found_routes(foreign), lambda: self._found_routes([]))
        self.rec.merge_dump(
            Kind.NEIGHBOUR, self._found_neighbours(device.ifindex), lambda: self._found_neighbours(device.ifindex)
        )
        self.rec.merge_dump(Kind.FDB, self._found_fdb(device.ifindex), lambda: self._found_fdb(device.ifindex))
        before, self.in_the_way = self.in_the_way, {}
        for route in foreign:
            self._watch_foreign(route, links, before)
        self.dumped = True

    def _found_routes(self, foreign: list[FoundRoute]) -> dict[RouteKey, RouteValue]:
        found: dict[RouteKey, RouteValue] = {}
        roles = self._roles()
        for route in self._requests.routes():
            role = self._role(route, roles)
            if role is None:
                foreign.append(route)
            else:
                found[route.key] = _route_value(route, role)
        return found

    def _found_neighbours(self, index: int) -> dict[int, NeighbourValue]:
        found = (item for item in self._requests.neighbours(index) if neighbour_is_ours(item, index))
        return {item.address: _neighbour_value(item) for item in found}

    def _found_fdb(self, index: int) -> dict[int, FdbValue]:
        return {item.mac: _fdb_value(item) for item in self._requests.fdb(index) if fdb_is_ours(item, index)}

    def _roles(self) -> dict[int, int]:
        """Roles by interface number."""
        return {device.ifindex: role for role, device in self.rec.devices.items()}

    def _role(self, route: FoundRoute, roles: dict[int, int]) -> int | None:
        """The role of a route that is ours; one of ours that somebody altered on our own device is still ours."""
        network = self.node.network if self.node is not None else Prefix(4, 0, 0)
        role = route_role(route, roles, (network.base, network.last))
        if role is None and roles.get(route.oif) == TUNNEL and self.rec.routes.is_wanted(route.key):
            return TUNNEL
        return role

    def _watch_foreign(
        self, route: FoundRoute, links: Mapping[int, Link], known: Mapping[RouteKey, str] | None = None
    ) -> None:
        """Note a route of somebody else's that stands before one of ours. It is never touched."""
        node = self.node
        if node is None or not node.network.holds(route.key.base) or route.key.length < node.network.length:
            return
        prefix = Prefix(4, route.key.base, route.key.length)
        if not any(
            lease.v4 is not None
            and (lease.v4.subnet != prefix or route.key.metric <= plan.route_key(node, prefix).metric)
            for lease in self.table.covering(prefix)
        ):
            return
        via = f" via {ip_text(4, route.via)}" if route.via else ""
        device = f" dev {links[route.oif].name}" if route.oif in links else " to nowhere, or to several gateways"
        what = f"{prefix}{via}{device} metric {route.key.metric} proto {route.protocol}"
        if route.key not in (self.in_the_way if known is None else known):
            log.warning("route.in_the_way", route=what, effect="not ours, so it stays; that subnet goes by it")
        self.in_the_way[route.key] = what

    # --- making them one ---------------------------------------------------------------------------------------------

    def apply(self) -> bool:
        """One slice. Whether there is more to do at once."""
        more, refused = self.rec.apply()
        for item in refused:
            self._tell_failure(item)
        differing = self.rec.differing()
        if not more:
            self._tell_done(differing)
        return more

    def _tell_failure(self, item: Refused) -> None:
        if item.failure.count in TOLD_AT:
            log.warning(
                "kernel.refused",
                kind=item.kind.name.lower(),
                entry=entry_text(item.kind, item.key),
                error=str(item.failure.refusal),
                tries=item.failure.count,
                effect="retried with backoff; the other entries go on",
            )

    def _tell_done(self, differing: int) -> None:
        if self.rec.mended == self._told_mended and self.rec.writes == self._told_writes:
            return
        if mended := self.rec.mended - self._told_mended:
            log.warning("kernel.mended", **mended, effect="put back as it should be")
        if writes := self.rec.writes - self._told_writes:
            log.info("kernel.reconciled", differing=differing, **writes)
        self._told_mended, self._told_writes = self.rec.mended.copy(), self.rec.writes.copy()

    # --- for the status --------------------------------------------------------------------------------------------------

    def peers(self) -> Iterator[PeerStatus]:
        """Each peer and how it stands."""
        node = self.node
        if node is None:
            return
        for lease in self.table.accepted():
            assert lease.v4 is not None
            entries = list(_flat(plan.entries(node, lease)))
            missing = [kind.name.lower() for kind, key, _ in entries if key in self.rec.tracker(kind).missing]
            yield PeerStatus(
                str(lease.v4.subnet),
                ip_text(4, lease.v4.public_ip),
                mac_text(lease.v4.mac or 0),
                lease.node.split("/")[1] if lease.node.count("/") == 2 else "",
                "direct" if len(entries) == 1 else "vxlan",
                "ok" if not missing else "missing " + ", ".join(missing),
            )

    def differences(self) -> Iterator[Difference]:
        """The entries that are not as they should be, at most SHOWN."""
        shown = 0
        for kind in Kind:
            tracker: Any = self.rec.tracker(kind)
            for key in tracker.missing.keys() | tracker.extra.keys():
                if shown == SHOWN:
                    return
                shown += 1
                failure = self.rec.failures.get((kind, key))
                state = "extra" if key not in tracker.missing else ("wrong" if key in tracker.extra else "missing")
                yield Difference(
                    kind.name.lower(),
                    entry_text(kind, key),
                    state,
                    str(failure.refusal) if failure else "",
                    failure.count if failure else 0,
                )


class Refusals:
    """Says once why a record cannot be used, and again only when the reason changes: re-lists repeat them all."""

    MOST = 1000
    """Lines altogether before the rest is only counted in the status: a store full of rubbish fills no disk."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}
        self._lines = 0

    def tell(self, key: str, reason: str) -> None:
        """A record cannot be used."""
        if self._told.get(key) == reason or self._lines > self.MOST:
            return
        self._told[key] = reason
        self._lines += 1
        if self._lines > self.MOST:
            log.warning("record.refused", effect="too many to log; `overlay status` has them all")
        else:
            log.warning("record.refused", key=key, reason=reason, effect="skipped until it changes")

    def forget(self, key: str) -> None:
        """It is gone, or good now."""
        self._told.pop(key, None)


def entry_text(kind: Kind, key: Any) -> str:
    """An entry's key as people write it."""
    if kind is Kind.ROUTE:
        return f"{Prefix(4, key.base, key.length)} metric {key.metric}"
    return mac_text(key) if kind is Kind.FDB else ip_text(4, key)


def _flat(entries: Entries) -> Iterator[tuple[Kind, Any, Any]]:
    if entries.neighbour is not None:
        yield Kind.NEIGHBOUR, *entries.neighbour
    if entries.fdb is not None:
        yield Kind.FDB, *entries.fdb
    yield Kind.ROUTE, *entries.route


def _route_value(route: FoundRoute, role: int) -> RouteValue:
    return RouteValue(role, route.via, bool(route.flags & RTNH_F_ONLINK), route.protocol, route.odd)


def _neighbour_value(found: FoundNeighbour) -> NeighbourValue:
    return NeighbourValue(found.mac or 0, found.odd)


def _fdb_value(entry: FoundFdb) -> FdbValue:
    return FdbValue(entry.dst or 0, entry.odd)
