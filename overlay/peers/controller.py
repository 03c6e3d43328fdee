"""The peers' part of the kernel: wanted from records, found from dumps and events, applied through the reconciler.

Belongs to the agent's owner thread. Everything is level-triggered; see reconcile.py for how the two are made one.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from lease.model import Lease, Prefix, ip_text, mac_text
from lease.records.packed import Leases, number
from overlay.firewall.guard import Guard
from overlay.kernel import netlink
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    TUNNEL,
    FoundRoute,
    Kind,
    Link,
    RouteKey,
    fdb_is_ours,
    neighbour_is_ours,
    route_role,
)
from overlay.peers import plan
from overlay.peers.reconcile import Device, Entry, Reconciler, Refused
from overlay.peers.resync import Look, fdb_value, neighbour_value, route_value
from overlay.peers.table import PeerTable, Turned
from overlay.peers.wanted import Wanted, flat
from overlay.process.log import log

if TYPE_CHECKING:
    from overlay.api.status import Difference, Peers

TOLD_AT = (2, 10, 100, 1000, 10000)
"""The tries at which a refused entry is logged: not the first, which a stale view may cause and the next dump mends."""
MANY = 64
"""Notifications at once of neighbours and FDB entries from which on we ask whether their device is there at all."""
SHOWN = 100
"""How many differing entries a status lists."""


class Datapath:
    """Routes, neighbours and FDB entries of all peers."""

    def __init__(
        self,
        requests: netlink.RequestSocket,
        clock: Callable[[], float],
        rng: random.Random,
        guard: Guard | None = None,
    ) -> None:
        self._requests, self._guard = requests, guard
        self.node: plan.Node | None = None
        self.table = PeerTable(lambda _lease: "no lease of our own yet")
        self.rec = Reconciler(NOTHING, requests, clock, rng)
        self.dumped = False
        self.in_the_way: dict[RouteKey, str] = {}
        """Routes of others that stand before ours, in words."""
        self._foreign_since: set[RouteKey] = set()
        """Keys of foreign routes that events spoke of since the look under way began."""
        self.refusals = Refusals()
        self._look: Generator[None] | None = None
        """A look through the kernel that is under way."""
        self._rising: set[int] = set()
        """Devices that we set up, whose notification of that has not come yet."""
        self._told_mended: Counter[str] = Counter()
        self._told_writes: Counter[str] = Counter()

    # --- wanted --------------------------------------------------------------------------------------------------------

    def plan(self, node: plan.Node, leases: Leases, own: str) -> None:
        """Everything anew: the node itself changed (config, underlay, own lease), or this is the first list. Of what the
        kernel has nothing is believed until it is read. own: the key of our own record, which is no peer's."""
        self.node = node
        self.table = PeerTable(lambda lease: plan.refusal(node, lease), plan.quick(node), self.table.listed)
        self.table.load(leases, own)
        if self._guard is not None:
            self._guard.load(self.table.packed.values())
        self._know_nothing()
        for key, reason in self.table.refused.items():
            self.refusals.tell(key, reason)
        log.info("peers", wanted=len(self.table.packed), refused=len(self.table.refused))

    def _know_nothing(self) -> None:
        assert self.node is not None
        self.end_look()
        self.rec.know_nothing(Wanted(self.node, self.table))
        self.dumped = False

    def replace(self, leases: Leases, own: str) -> None:
        """A new list: by value, so that a changed MAC is a change and a missed deletion a deletion."""
        if self.node is not None:
            self._turn(self.table.replace(leases, own))
            for key, reason in self.table.refused.items():
                self.refusals.tell(key, reason)

    def put(self, lease: Lease) -> None:
        """A record came or changed."""
        self._turn(self.table.put(lease))
        self._tell(lease.key)

    def change(self, records: Mapping[str, Lease | None]) -> None:
        """What came, changed or went at once; None: went. Work that disputes make is done once for all of it."""
        if len(records) == 1:
            ((key, lease),) = records.items()
            if lease is None:
                self.drop(key)
            else:
                self.put(lease)
            return
        if not records or self.node is None:
            return
        self._turn(self.table.change(records))
        for key in records:
            self._tell(key)

    def _tell(self, key: str) -> None:
        """Why a record that changed is refused, if it is."""
        if reason := self.table.refused.get(key):
            self.refusals.tell(key, reason)
        else:
            self.refusals.forget(key)

    def drop(self, key: str) -> None:
        """A record went."""
        self.refusals.forget(key)
        self._turn(self.table.drop(key))

    def _turn(self, turned: Turned) -> None:
        assert self.node is not None
        if self._guard is not None:
            for was, now in turned.values():
                self._guard.turn(was, now)
        for was, now in turned.values():
            if was is not None and now is not None and was.v4 is not None and now.v4 is not None:
                log.info(
                    "peer.changed",
                    subnet=str(now.v4.subnet),
                    public_ip=ip_text(4, now.v4.public_ip),
                    vtep_mac=mac_text(now.v4.mac or 0),
                    was=f"{ip_text(4, was.v4.public_ip)} {mac_text(was.v4.mac or 0)}",
                )
        before = {entry for was, _ in turned.values() for entry in self._entries(was)}
        after = {entry for _, now in turned.values() for entry in self._entries(now)}
        for peer, entry in sorted(before - after, key=_by_kind):
            self.rec.left(peer, (entry,))
        for peer, entry in sorted(after - before, key=_by_kind):
            self.rec.joined(peer, (entry,))

    def _entries(self, lease: Lease | None) -> list[tuple[int, Entry]]:
        """A peer's entries, each with its number."""
        assert self.node is not None
        if lease is None or lease.v4 is None:
            return []
        peer = number(lease.v4.subnet)
        return [(peer, entry) for entry in flat(plan.entries(self.node, lease))]

    # --- found: events ---------------------------------------------------------------------------------------------------

    def on_route(self, event: netlink.RouteSeen, links: Mapping[int, Link]) -> None:
        """A route of the main table came, changed or went."""
        route = event.route
        role = self._role(route, self._roles())
        if role is None:
            if not event.gone and self.rec.is_found(Kind.ROUTE, route.key):
                self.rec.lose(Kind.ROUTE, route.key)  # replaced under our feet by a foreign one
            elif not event.gone:
                self.rec.touch(Kind.ROUTE, route.key)
            self._foreign_since.add(route.key)
            if event.gone and self.in_the_way.pop(route.key, None) is not None:
                self.rec.retry_now(Kind.ROUTE)
            elif not event.gone:
                self._watch_foreign(route, links)
        elif event.gone:
            self.rec.lose(Kind.ROUTE, route.key)
        else:
            self.rec.find(Kind.ROUTE, route.key, route_value(route, role))

    def on_neighbour_messages(self, messages: list[bytes]) -> None:
        """Neighbours or FDB entries came, changed or went; most say what we did ourselves, or went with their device."""
        device, wanted, rec = self.rec.devices.get(TUNNEL), self.rec.wanted, self.rec
        if device is None or not isinstance(wanted, Wanted):
            return
        if len(messages) > MANY and not netlink.exists(device.ifindex):
            return  # they went with their device, whose own notification says all that at once
        sieve = wanted.sieve(device.ifindex)
        risen = device.ifindex not in self._rising
        for data in messages:
            told = sieve.event(data)
            if told is None:
                continue
            kind, gone, peer = told
            if gone and kind is Kind.NEIGHBOUR and not risen:
                continue  # gone when the device went down; what we put on it since comes later
            if peer and not (gone and rec.extra[kind]):
                if rec.is_missing(peer, kind) == gone:
                    rec.touch_peers(kind, (peer,))
                    continue
                if gone:
                    rec.lose_of(peer, kind)
                    continue
            for message in wire.split(data):
                event = netlink.parse_event(message)
                if isinstance(event, netlink.FdbSeen):
                    self.on_fdb(event)
                elif isinstance(event, netlink.NeighbourSeen):
                    self.on_neighbour(event)

    def on_neighbour(self, event: netlink.NeighbourSeen) -> None:
        """A neighbour came, changed or went."""
        device, found = self.rec.devices.get(TUNNEL), event.neighbour
        if device is not None and found.oif == device.ifindex:
            there = not event.gone and neighbour_is_ours(found, device.ifindex)
            self._seen(Kind.NEIGHBOUR, found.address, neighbour_value(found) if there else None)

    def on_fdb(self, event: netlink.FdbSeen) -> None:
        """An FDB entry came, changed or went."""
        device, entry = self.rec.devices.get(TUNNEL), event.entry
        if device is not None and entry.oif == device.ifindex:
            there = not event.gone and fdb_is_ours(entry, device.ifindex)
            self._seen(Kind.FDB, entry.mac, fdb_value(entry) if there else None)

    def _seen(self, kind: Kind, key: int, value: object) -> None:
        """An entry of ours as it is now; None: there is none. (Losing what we did not know of would be news to nobody,
        and would end the backoff of an entry that is refused.)"""
        if value is not None:
            self.rec.find(kind, key, value)
        elif self.rec.is_found(kind, key):
            self.rec.lose(kind, key)
        else:
            self.rec.touch(kind, key)

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
                    self.rec.device_gone = False
                else:
                    self.rec.devices[role] = Device(link.ifindex, False)
                return role
        return None

    def set_tunnel(self, ifindex: int, lost: bool, made: bool) -> bool:
        """The tunnel device stands and is up. lost: we had to set it up; made: we had to make it. Whether a look through the
        kernel, which was at another device, has to begin again."""
        before = self.rec.devices.get(TUNNEL)
        other = before is None or before.ifindex != ifindex
        again = other and (self.looking() or not made)  # somebody else made it, and may have put entries on it
        if other:
            self.end_look()
        if made or lost or (other and before is not None):
            self.rec.device_lost(TUNNEL, fdb_too=made or other)
        if made or lost:
            self._rising.add(ifindex)
        self.rec.devices[TUNNEL] = Device(ifindex, True)
        self.rec.device_gone = False
        return again

    def events_lost(self) -> None:
        """Notifications were dropped: none is waited for any more."""
        self._rising.clear()

    # --- found: the whole kernel ---------------------------------------------------------------------------------------

    def look(self, links: Mapping[int, Link]) -> bool:
        """Read routes, neighbours and FDB whole, a slice for each call; whether there is more of it. Raises KernelError."""
        if self._look is None:
            if TUNNEL not in self.rec.devices:
                return False
            self._look = self._looking(links)
        try:
            next(self._look)
        except StopIteration:
            self._look = None
            return False
        except BaseException:
            self.end_look()
            raise
        return True

    def looking(self) -> bool:
        """Whether a look through the kernel is under way."""
        return self._look is not None

    def end_look(self) -> None:
        """Break it off."""
        if self._look is not None:
            self._look.close()
        self._look = None

    def _looking(self, links: Mapping[int, Link]) -> Generator[None]:
        look = Look(self.rec, self.rec.devices[TUNNEL].ifindex, lambda route: self._role(route, self._roles()))
        self._foreign_since.clear()
        yield from look.run()
        since = self._foreign_since  # of these the events know better
        before, self.in_the_way = self.in_the_way, {k: v for k, v in self.in_the_way.items() if k in since}
        for route in look.foreign:
            if route.key not in since:
                self._watch_foreign(route, links, before)
        self.dumped = True

    def _roles(self) -> dict[int, int]:
        """Roles by interface number."""
        return {device.ifindex: role for role, device in self.rec.devices.items()}

    def _role(self, route: FoundRoute, roles: dict[int, int]) -> int | None:
        """The role of a route that is ours; one of ours that somebody altered on our own device is still ours."""
        network = self.node.network if self.node is not None else Prefix(4, 0, 0)
        role = route_role(route, roles, (network.base, network.last))
        if role is None and roles.get(route.oif) == TUNNEL and self.rec.wanted.value(Kind.ROUTE, route.key) is not None:
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

    def peers(self) -> Peers:
        """Each peer and how it stands, to be written out by whoever asked: at 20,000 peers that takes a while."""
        from overlay.api.status import Peers

        rec = self.rec
        missing = {peer: rec.todo.get(peer, 0) | rec.held.get(peer, 0) for peer in (*rec.todo, *rec.held)}
        return Peers(self.node, tuple(self.table.packed.values()), missing)

    def differences(self) -> Iterator[Difference]:
        """The entries that are not as they should be, at most SHOWN."""
        return islice(self._differences(), SHOWN)

    def _differences(self) -> Iterator[Difference]:
        rec = self.rec
        for peer in (*rec.held, *(peer for peer in rec.todo if peer not in rec.held)):
            for kind, key, _ in rec.wanted.entries(peer):
                if rec.is_missing(peer, kind):
                    yield self._difference(kind, key, "wrong" if key in rec.extra[kind] else "missing")
        for kind in Kind:
            for key in rec.extra[kind]:
                if rec.wanted.value(kind, key) is None:
                    yield self._difference(kind, key, "extra")

    def _difference(self, kind: Kind, key: Any, state: str) -> Difference:
        from overlay.api.status import Difference

        failure = self.rec.failures.get((kind, key))
        refused, tries = (str(failure.refusal), failure.count) if failure else ("", 0)
        return Difference(kind.name.lower(), entry_text(kind, key), state, refused, tries)


class _NothingWanted:
    """Before there is a plan."""

    def peers(self) -> tuple[int, ...]:
        return ()

    def bits(self, peer: int) -> int:
        raise LookupError(peer)

    def entries(self, peer: int) -> list[Entry]:
        raise LookupError(peer)

    def owners(self, kind: Kind, key: Any) -> tuple[int, ...]:
        del kind, key
        return ()

    def value(self, kind: Kind, key: Any) -> None:
        del kind, key

    def serves(self, key: Any) -> int:
        del key
        return 0

    def alike(self) -> bool:
        return True

    def messages(self, peer: int, bits: int, seq: int, oif: int) -> None:
        raise LookupError(peer, bits, seq, oif)


NOTHING = _NothingWanted()


def _by_kind(item: tuple[int, Entry]) -> tuple[int, int]:
    return item[0], item[1][0]


class Refusals:
    """Says once why a record cannot be used, and again only when the reason changes: re-lists repeat them all."""

    MOST, EVERY_S = 1000, 86_400.0
    """So many lines a day; the rest is only counted in the status: a store full of rubbish fills no disk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self._told: dict[str, str] = {}
        self._lines = 0

    def tell(self, key: str, reason: str) -> None:
        """A record cannot be used."""
        if self._clock() >= self._since + self.EVERY_S:
            self._since, self._lines = self._clock(), 0
        if self._told.get(key) == reason or self._lines > self.MOST:
            return
        self._told[key] = reason
        self._lines += 1
        if self._lines > self.MOST:
            log.warning("record.refused", effect="too many to log; `overlay status` has them all")
        else:
            log.warning(
                "record.refused", key=key, reason=reason, effect="skipped until somebody corrects or deletes it"
            )

    def forget(self, key: str) -> None:
        """It is gone, or good now."""
        self._told.pop(key, None)


def entry_text(kind: Kind, key: Any) -> str:
    """An entry's key as people write it."""
    if kind is Kind.ROUTE:
        return f"{Prefix(4, key.base, key.length)} metric {key.metric}"
    return mac_text(key) if kind is Kind.FDB else ip_text(4, key)
