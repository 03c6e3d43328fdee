"""The peers' part of the kernel: wanted from records, found from dumps and events, applied through the reconciler.

Belongs to the agent's owner thread. Everything is level-triggered; see reconcile.py for how the two are made one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lease.model import Lease, Prefix, ip_text, mac_text
from lease.records.packed import Leases, number, pack
from overlay.control.inputs import Tunnel
from overlay.kernel import netlink
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    TUNNEL,
    UNDERLAY,
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
from overlay.peers.refusals import Refusals
from overlay.peers.resync import Look, fdb_value, neighbour_value, route_value
from overlay.peers.table import PeerTable, Turned
from overlay.peers.wanted import Wanted, flat
from overlay.process.log import log

if TYPE_CHECKING:
    from overlay.peers.status import Peers

TOLD_AT = (2, 10, 100, 1000, 10000)
"""The tries at which a refused entry is logged: not the first, which a stale view may cause and the next dump mends."""
MANY = 64
"""Notifications at once of neighbours and FDB entries from which on we ask whether their device is there at all."""
SHOWN = 100
"""How many differing entries a status lists."""


class Conflict(NamedTuple):
    """A route of somebody else's that stands before one of ours. device: "" where it has none, or several."""

    destination: str
    via: str
    device: str
    metric: int
    protocol: int


class PeerWatcher(Protocol):
    """Who needs to know the peers before their first packet comes (the guard)."""

    def load(self, packed: Iterable[bytes]) -> None:
        """These are all peers."""

    def turn(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""


class Datapath:
    """Routes, neighbours and FDB entries of all peers."""

    def __init__(
        self,
        requests: netlink.RequestSocket,
        clock: Callable[[], float],
        rng: random.Random,
        refusals: Refusals | None = None,
        watchers: Sequence[PeerWatcher] = (),
    ) -> None:
        self._requests, self._watchers = requests, watchers
        self.node: plan.Node | None = None
        self.table = PeerTable(lambda _lease: "no lease of our own yet")
        self.rec = Reconciler(NOTHING, requests, clock, rng)
        self.dumped = False
        self.conflicting: dict[RouteKey, Conflict] = {}
        """Routes of others that stand before ours."""
        self._foreign_since: set[RouteKey] = set()
        """Keys of foreign routes that events spoke of since the look under way began."""
        self.refusals = refusals if refusals is not None else Refusals()
        self._unplanned: Leases | None = None
        """Records, until there is a plan for them; then the table has all but the one at our own key."""
        self._look: Generator[None] | None = None
        """A look through the kernel that is under way."""
        self._tunnel: Tunnel | None = None
        """As it was when it was looked at last."""
        self._told_mended: Counter[str] = Counter()
        self._told_writes: Counter[str] = Counter()

    # --- wanted --------------------------------------------------------------------------------------------------------

    def has_unplanned(self) -> bool:
        """Whether there are records that are in no plan yet."""
        return self._unplanned is not None

    def plan(self, node: plan.Node, own: str, records: Leases | None = None) -> None:
        """Everything anew: the node itself changed (config, underlay, own lease), or this is the first list. Of what the
        kernel has nothing is believed until it is read. own: the key of our own record, which is no peer's; records: None:
        those that are known."""
        if records is None:
            records = self._unplanned if self._unplanned is not None else self.table.records()
        self._unplanned, self.node = None, node
        self.table = PeerTable(lambda lease: plan.refusal(node, lease), plan.quick(node), self.table.listed)
        self.table.load(records, own)
        for watcher in self._watchers:
            watcher.load(self.table.packed.values())
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
        if self.node is None or self._unplanned is not None:
            self._unplanned = Leases(dict(leases.packed))  # the tenure's thread may be reading the other
            return
        self._turn(self.table.replace(leases, own))
        for key, reason in self.table.refused.items():
            self.refusals.tell(key, reason)

    def enter(self, lease: Lease) -> None:
        """A record more, which was none of a peer: everything is planned anew."""
        if self._unplanned is None:
            self._unplanned = self.table.records()
        self._unplanned.packed[lease.key] = pack(lease)

    def put(self, lease: Lease) -> None:
        """A record came or changed."""
        self._turn(self.table.put(lease))
        self._tell(lease.key)

    def change(self, records: Mapping[str, Lease | None]) -> None:
        """What came, changed or went at once; None: went. Work that disputes make is done once for all of it."""
        if self._unplanned is not None:
            for key, lease in records.items():
                self._unplanned.packed.pop(key, None)
                if lease is not None:
                    self._unplanned.packed[key] = pack(lease)
            return
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

    def refused_of(self, key: str) -> bool:
        """Whether the record of a key is refused."""
        return key in self.table.refused

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
        for watcher in self._watchers:
            for was, now in turned.values():
                watcher.turn(was, now)
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
            if event.gone and self.conflicting.pop(route.key, None) is not None:
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
        risen = self._tunnel is None or not self._tunnel.rising
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

    def on_underlay_link(self, link: Link, gone: bool) -> bool:
        """A link changed; whether the underlay was lost by it, with the routes that go by it."""
        device = self.rec.devices.get(UNDERLAY)
        if device is None or device.ifindex != link.ifindex or not (gone or not link.up):
            return False
        self.rec.device_lost(UNDERLAY, fdb_too=False)
        self.rec.devices[UNDERLAY] = Device(link.ifindex, False)
        return True

    def set_underlay(self, ifindex: int, up: bool) -> bool:
        """The underlay as it is now; whether it is another interface: the kernel is to be read whole."""
        before = self.rec.devices.get(UNDERLAY)
        other = before is not None and before.ifindex != ifindex
        if other:
            self.rec.device_lost(UNDERLAY, fdb_too=False)
        self.rec.devices[UNDERLAY] = Device(ifindex, up)
        return other

    def set_tunnel(self, tunnel: Tunnel) -> bool:
        """The tunnel device as it is now, and what was lost with it meanwhile; whether the kernel is to be read whole,
        since somebody else made the device, or a look through the kernel was at another."""
        before, self._tunnel = self._tunnel, tunnel
        if before == tunnel:
            return False
        known = self.rec.devices.get(TUNNEL)
        made = before is None or before.makes != tunnel.makes
        down = before is None or before.downs != tunnel.downs
        if not tunnel.ifindex:
            if known is not None:
                self.rec.device_lost(TUNNEL, fdb_too=True)
                del self.rec.devices[TUNNEL]
            self.rec.device_gone = False
            return False
        other = known is None or known.ifindex != tunnel.ifindex
        again = other and (self.looking() or not made)
        if other:
            self.end_look()
        if (made or down or other) and before is not None:
            self.rec.device_lost(TUNNEL, fdb_too=made or other)
        self.rec.devices[TUNNEL] = Device(tunnel.ifindex, tunnel.up)
        if before is None or before.checks != tunnel.checks:
            self.rec.device_gone = False
        return again

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
        before, self.conflicting = self.conflicting, {k: v for k, v in self.conflicting.items() if k in since}
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
        self, route: FoundRoute, links: Mapping[int, Link], known: Mapping[RouteKey, Conflict] | None = None
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
        device = links[route.oif].name if route.oif in links else ""
        via = ip_text(4, route.via) if route.via else ""
        what = Conflict(str(prefix), via, device, route.key.metric, route.protocol)
        if route.key not in (self.conflicting if known is None else known):
            log.warning("route.conflict", **what._asdict(), effect="not ours, so it stays; that subnet goes by it")
        self.conflicting[route.key] = what

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
        from overlay.peers.status import Peers

        rec = self.rec
        missing = {peer: rec.todo.get(peer, 0) | rec.held.get(peer, 0) for peer in (*rec.todo, *rec.held)}
        return Peers(self.node, tuple(self.table.packed.values()), missing)

    def differences(self) -> Iterator[dict[str, object]]:
        """The entries that are not as they should be, at most SHOWN."""
        return islice(self._differences(), SHOWN)

    def _differences(self) -> Iterator[dict[str, object]]:
        rec = self.rec
        for peer in (*rec.held, *(peer for peer in rec.todo if peer not in rec.held)):
            for kind, key, _ in rec.wanted.entries(peer):
                if rec.is_missing(peer, kind):
                    yield self._difference(kind, key, "wrong" if key in rec.extra[kind] else "missing")
        for kind in Kind:
            for key in rec.extra[kind]:
                if rec.wanted.value(kind, key) is None:
                    yield self._difference(kind, key, "extra")

    def _difference(self, kind: Kind, key: Any, state: str) -> dict[str, object]:
        failure = self.rec.failures.get((kind, key))
        error, tries = (str(failure.refusal), failure.count) if failure else ("", 0)
        return {
            "table": kind.name.lower(),
            "entry": entry_text(kind, key),
            "state": state,
            "error": error,
            "tries": tries,
        }


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


def entry_text(kind: Kind, key: Any) -> str:
    """An entry's key as people write it."""
    if kind is Kind.ROUTE:
        return f"{Prefix(4, key.base, key.length)} metric {key.metric}"
    return mac_text(key) if kind is Kind.FDB else ip_text(4, key)
