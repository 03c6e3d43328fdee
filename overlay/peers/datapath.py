"""The peers' part of the kernel: wanted from records, found from dumps and events, applied through the reconciler.

Belongs to the agent's owner thread. Everything is level-triggered; see reconcile.py for how the two are made one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lease.families import Family
from lease.model import Lease, Prefix, ip_text
from lease.records.packed import Leases, number, pack, unpack
from overlay.backends.base import Entry
from overlay.control.inputs import Tunnel
from overlay.kernel import events, netlink
from overlay.kernel.route import wire
from overlay.kernel.route.entries import TUNNEL, UNDERLAY, FoundFdb, FoundNeighbour, FoundRoute, Link, RouteKey
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.route.tables import TABLES
from overlay.kernel.table import Where
from overlay.peers import plan, report
from overlay.peers.difference import Device
from overlay.peers.reconcile import Reconciler, Refused
from overlay.peers.refusals import Refusals
from overlay.peers.report import Conflict, PeerWatcher
from overlay.peers.resync import Resync
from overlay.peers.status import Peers, node_name
from overlay.peers.table import PeerChanges, PeerTable
from overlay.peers.wanted import NothingWanted, Wanted, leads_as_ours
from overlay.process.log import log

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
        family: Family,
        requests: netlink.RequestSocket,
        clock: Callable[[], float],
        rng: random.Random,
        refusals: Refusals | None = None,
        watchers: Sequence[PeerWatcher] = (),
    ) -> None:
        self._family, self._requests, self._watchers = family, requests, watchers
        self._tables = TABLES[family.number]
        self.node: plan.Node | None = None
        self.table = PeerTable(family, lambda _lease: "no lease of our own yet")
        self.rec = Reconciler(self._tables, NothingWanted(), requests, clock, rng)
        self.dumped = False
        self.conflicting: dict[RouteKey, Conflict] = {}
        """Routes of others that stand before ours."""
        self._foreign_since: set[RouteKey] = set()
        """Keys of foreign routes that events spoke of since the resync under way began."""
        self.refusals = refusals if refusals is not None else Refusals()
        self._unplanned: Leases | None = None
        """Records, until there is a plan for them; then the table has all but the one at our own key."""
        self._resync: Generator[None] | None = None
        """A resync that is under way."""
        self._tunnel: Tunnel | None = None
        """As it was when it was checked last."""
        self._work = report.WorkLog(family, self._tables)
        self.rec.observe = self._log_sent

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
        self._stand_on(TUNNEL if node.backend.tunnel is not None else UNDERLAY)
        self.table = PeerTable(
            self._family, lambda lease: plan.refusal(node, lease), plan.quick(node), self.table.listed
        )
        self.table.load(records, own)
        for watcher in self._watchers:
            watcher.load(self.table.packed.values())
        self._forget_kernel()
        for key, reason in self.table.refused.items():
            self.refusals.report(key, reason)
        log.info("peers", wanted=len(self.table.packed), refused=len(self.table.refused))

    def _stand_on(self, main: int) -> None:
        """The backend may be another, without a tunnel or with one: that device is to be found anew."""
        if self.rec.main != main:
            self.rec.main, self._tunnel, self.rec.device_gone = main, None, False
            self.rec.devices.pop(TUNNEL, None)

    def _forget_kernel(self) -> None:
        assert self.node is not None
        self.end_resync()
        self.rec.forget(Wanted(self.node, self.table))
        self.dumped = False

    def reset(self) -> None:
        """Nothing is wanted any more; the records are kept for the next plan."""
        if self._unplanned is None:
            self._unplanned = self.table.records()
        self.node = self._tunnel = None
        self.table = PeerTable(self._family, lambda _lease: "no lease of our own yet", listed=self.table.listed)
        self.end_resync()
        self.rec.forget(NothingWanted())
        self.rec.devices.clear()
        self.dumped = False
        self.conflicting.clear()

    def replace(self, leases: Leases, own: str) -> None:
        """A new list: by value, so that a changed MAC is a change and a missed deletion a deletion. Records without a part
        of this family are nothing to it."""
        leases = leases.of_family(self._family.number)
        if self.node is None or self._unplanned is not None:
            self._unplanned = Leases(dict(leases.packed))  # the tenure's thread may be reading the other
            return
        self._peers_changed(self.table.replace(leases, own))
        for key, reason in self.table.refused.items():
            self.refusals.report(key, reason)

    def enter(self, lease: Lease) -> None:
        """A record more, which was none of a peer: everything is planned anew."""
        if self._unplanned is None:
            self._unplanned = self.table.records()
        if lease.endpoint(self._family.number) is not None:
            self._unplanned.packed[lease.key] = pack(lease)

    def put(self, lease: Lease) -> Collection[str]:
        """A record came or changed; whose peers are others now."""
        changes = self.table.put(lease)
        self._peers_changed(changes)
        self._log_refusal(lease.key)
        return changes.keys()

    def change(self, records: Mapping[str, Lease | None]) -> Collection[str]:
        """What came, changed or went (None) at once; the keys of those that are peers now, were, or are others. Work that
        disputes make is done once for all of it."""
        number = self._family.number
        records = {
            key: lease if lease is None or lease.endpoint(number) is not None else None
            for key, lease in records.items()
        }
        if self._unplanned is not None:
            for key, lease in records.items():
                self._unplanned.packed.pop(key, None)
                if lease is not None:
                    self._unplanned.packed[key] = pack(lease)
            return ()
        if len(records) == 1:
            ((key, lease),) = records.items()
            return self.drop(key) if lease is None else self.put(lease)
        if not records or self.node is None:
            return ()
        changes = self.table.change(records)
        self._peers_changed(changes)
        for key in records:
            self._log_refusal(key)
        return changes.keys()

    def record(self, key: str) -> Lease | None:
        """The record of a key as it was taken last, None: there is none."""
        if self._unplanned is not None:
            return self._unplanned.get(key)
        return self.table.record(key)

    def refused_of(self, key: str) -> bool:
        """Whether the record of a key is refused."""
        return key in self.table.refused

    def _log_refusal(self, key: str) -> None:
        """Why a record that changed is refused, if it is."""
        if reason := self.table.refused.get(key):
            self.refusals.report(key, reason)
        else:
            self.refusals.forget(key)

    def drop(self, key: str) -> Collection[str]:
        """A record went; whose peers are others now."""
        changes = self.table.drop(key)
        self._peers_changed(changes)
        self._log_refusal(key)
        return changes.keys()

    def _peers_changed(self, changes: PeerChanges) -> None:
        assert self.node is not None
        for watcher in self._watchers:
            for was, now in changes.values():
                watcher.peer_changed(was, now)
        report.log_changes(self._family, changes)
        before = {entry for was, _ in changes.values() for entry in self._entries(was)}
        after = {entry for _, now in changes.values() for entry in self._entries_now(now)}
        for peer, entry in sorted(before - after, key=_by_kind):
            self.rec.unwant(peer, (entry,))
        for peer, entry in sorted(after - before, key=_by_kind):
            self.rec.want(peer, (entry,))

    def _entries(self, lease: Lease | None) -> list[tuple[int, Entry]]:
        """A peer's entries, each with its number."""
        assert self.node is not None
        end = None if lease is None else lease.endpoint(self._family.number)
        if lease is None or end is None:
            return []
        peer = number(end.subnet)
        return [(peer, entry) for entry in plan.entries(self.node, lease)]

    def _entries_now(self, lease: Lease | None) -> list[tuple[int, Entry]]:
        """The same of one that is a peer now: made once, for this and for the message."""
        end = None if lease is None else lease.endpoint(self._family.number)
        if end is None:
            return []
        peer = number(end.subnet)
        return [(peer, entry) for entry in self.rec.wanted.entries(peer)]

    # --- found: events ---------------------------------------------------------------------------------------------------

    def _where(self, table: int) -> Where:
        """How entries of a table are recognised as ours."""
        roles = {device.ifindex: role for role, device in self.rec.devices.items()}
        network = (self.node.network.base, self.node.network.last) if self.node is not None else (0, 0)
        wanted = self.rec.wanted

        def is_copy(found: FoundRoute) -> bool:
            return leads_as_ours(wanted, table, found, roles.get(found.oif))

        return Where(roles, network, lambda key: wanted.value(table, key) is not None, is_copy)

    def on_route(self, event: events.RouteSeen, links: Mapping[int, Link]) -> None:
        """A route of the main table came, changed or went."""
        if event.family != self._family.number:
            return
        route = event.route
        entry = self._tables[ROUTES].ours(route, self._where(ROUTES))
        if entry is None:
            if not event.gone and self.rec.is_found(ROUTES, route.key):
                self.rec.lose(ROUTES, route.key)  # replaced under our feet by a foreign one
            elif not event.gone:
                self.rec.touch(ROUTES, route.key)
            self._foreign_since.add(route.key)
            if event.gone and (was := self.conflicting.pop(route.key, None)) is not None:
                log.info("route.conflict_over", **was._asdict())
                self.rec.retry_now(ROUTES)
            elif not event.gone:
                self._watch_foreign(route, links)
        elif event.gone:
            self.rec.lose(ROUTES, route.key)
        else:
            self.rec.find(ROUTES, *entry)

    def on_neighbour_messages(self, messages: list[bytes]) -> None:
        """Neighbours or FDB entries came, changed or went; most say what we did ourselves, or went with their device."""
        device, wanted, rec = self.rec.devices.get(TUNNEL), self.rec.wanted, self.rec
        if device is None or not isinstance(wanted, Wanted):
            return
        messages = wire.of_neighbours_on(messages, device.ifindex)
        if not messages or (len(messages) > MANY and not netlink.exists(device.ifindex)):
            return  # they went with their device, whose own notification says all that at once
        matcher = wanted.matcher({TUNNEL: device.ifindex})
        risen = self._tunnel is None or not self._tunnel.rising
        ours = [] if matcher is None else matcher.put_by_us(messages)
        if ours and not rec.some_missing(FDB, ours):
            rec.touch_peers(FDB, ours)  # what we wrote just now comes back: many thousand at the start
            return
        for data in messages:
            seen = (NEIGHBOURS, False, 0) if matcher is None else matcher.event(data)
            if seen is None:
                continue
            table, gone, peer = seen
            if gone and self._tables[table].lost_when_down and not risen:
                continue  # gone when the device went down; what we put on it since comes later
            if peer and not (gone and rec.extra[table]):
                if rec.is_missing(peer, table) == gone:
                    rec.touch_peers(table, (peer,))
                    continue
                if gone:
                    rec.lose_of(peer, table)
                    continue
            for message in wire.split(data):
                self._on_neighbour_message(message)

    def _on_neighbour_message(self, message: wire.Message) -> None:
        event = events.parse_event(message, (self._family,))
        if isinstance(event, events.FdbSeen):
            self.on_entry(FDB, event.entry, event.entry.mac, event.gone)
        elif isinstance(event, events.NeighbourSeen):
            self.on_entry(NEIGHBOURS, event.neighbour, event.neighbour.address, event.gone)

    def on_entry(self, table: int, found: FoundNeighbour | FoundFdb, key: int, gone: bool) -> None:
        """An entry as it is now. (Losing what we did not know of would be news to nobody, and would end the back-off of an
        entry that is refused.)"""
        device = self.rec.devices.get(TUNNEL)
        if device is None or found.oif != device.ifindex:
            return
        entry = None if gone else self._tables[table].ours(found, self._where(table))
        if entry is not None:
            self.rec.find(table, *entry)
        elif self.rec.is_found(table, key):
            self.rec.lose(table, key)
        else:
            self.rec.touch(table, key)

    def on_underlay_link(self, link: Link, gone: bool) -> bool:
        """A link changed; whether the underlay was lost by it, with the routes that go by it."""
        device = self.rec.devices.get(UNDERLAY)
        if device is None or device.ifindex != link.ifindex or not (gone or not link.up):
            return False
        self.rec.device_lost(UNDERLAY, deleted=False)
        self.rec.devices[UNDERLAY] = Device(link.ifindex, False)
        return True

    def set_underlay(self, ifindex: int, up: bool) -> bool:
        """The underlay as it is now; whether it is another interface: the kernel is to be read whole."""
        before = self.rec.devices.get(UNDERLAY)
        other = before is not None and before.ifindex != ifindex
        if other:
            self.rec.device_lost(UNDERLAY, deleted=False)
        self.rec.devices[UNDERLAY] = Device(ifindex, up)
        return other

    def set_tunnel(self, tunnel: Tunnel) -> bool:
        """The tunnel device as it is now, and what was lost with it meanwhile; whether the kernel is to be read whole,
        since somebody else made the device, or a resync was at another."""
        before, self._tunnel = self._tunnel, tunnel
        if before == tunnel or self.rec.main != TUNNEL:
            return False
        known = self.rec.devices.get(TUNNEL)
        made = before is None or before.makes != tunnel.makes
        down = before is None or before.downs != tunnel.downs
        if not tunnel.ifindex:
            if known is not None:
                self.rec.device_lost(TUNNEL, deleted=True)
                del self.rec.devices[TUNNEL]
            self.rec.device_gone = False
            return False
        other = known is None or known.ifindex != tunnel.ifindex
        again = other and (self.resyncing() or not made)
        if other:
            self.end_resync()
        if (made or down or other) and before is not None:
            self.rec.device_lost(TUNNEL, deleted=made or other)
        self.rec.devices[TUNNEL] = Device(tunnel.ifindex, tunnel.up)
        if before is None or before.checks != tunnel.checks:
            self.rec.device_gone = False
        return again

    # --- found: the whole kernel ---------------------------------------------------------------------------------------

    def resync(self, links: Mapping[int, Link]) -> bool:
        """Read routes, neighbours and FDB whole, a slice for each call; whether there is more of it. Raises KernelError."""
        if self._resync is None:
            if self.rec.main not in self.rec.devices:
                return False
            self._resync = self._whole_resync(links)
        try:
            next(self._resync)
        except StopIteration:
            self._resync = None
            return False
        except BaseException:
            self.end_resync()
            raise
        return True

    def resyncing(self) -> bool:
        """Whether a resync is under way."""
        return self._resync is not None

    def end_resync(self) -> None:
        """Break it off."""
        if self._resync is not None:
            self._resync.close()
        self._resync = None

    def _whole_resync(self, links: Mapping[int, Link]) -> Generator[None]:
        reading = Resync(self.rec, self._where)
        self._foreign_since.clear()
        yield from reading.run()
        since = self._foreign_since  # of these the events know better
        before, self.conflicting = self.conflicting, {k: v for k, v in self.conflicting.items() if k in since}
        for route in reading.foreign:
            if route.key not in since:
                self._watch_foreign(route, links, before)
        for key in before.keys() - self.conflicting.keys():
            log.info("route.conflict_over", **before[key]._asdict())
        self.dumped = True

    def _watch_foreign(
        self, route: FoundRoute, links: Mapping[int, Link], known: Mapping[RouteKey, Conflict] | None = None
    ) -> None:
        """Note a route of somebody else's that stands before one of ours. It is never touched."""
        node = self.node
        if node is None or not node.network.holds(route.key.base) or route.key.length < node.network.length:
            return
        number = self._family.number
        prefix = Prefix(number, route.key.base, route.key.length)
        subnets = [end.subnet for lease in self.table.covering(prefix) if (end := lease.endpoint(number)) is not None]
        if not any(there != prefix or route.key.metric <= plan.route_key(node, prefix).metric for there in subnets):
            return
        device = links[route.oif].name if route.oif in links else ""
        via = ip_text(number, route.via) if route.via else ""
        what = Conflict(str(prefix), via, device, route.key.metric, route.protocol)
        if route.key not in (self.conflicting if known is None else known):
            log.warning("route.conflict", **what._asdict(), effect="not ours, so kept; that subnet's traffic takes it")
        self.conflicting[route.key] = what

    # --- making them one ---------------------------------------------------------------------------------------------

    def apply(self) -> bool:
        """One slice. Whether there is more to do at once."""
        more, refused = self.rec.apply()
        for item in refused:
            self._log_failure(item)
        differing = self.rec.differing()
        if not more:
            self._log_done(differing)
        return more

    def _log_sent(self, operation: str, table: int, key: Any, peer: int) -> None:
        """At debug, each entry that is written or removed."""
        lease = self._peer(peer)
        end = lease.endpoint(self._family.number) if lease is not None else None
        log.debug(
            f"kernel.{operation}",
            table=self._tables[table].name,
            entry=self._tables[table].text(key),
            peer=str(end.subnet) if end is not None else "",
        )

    def _log_failure(self, item: Refused) -> None:
        if item.failure.count in TOLD_AT:
            log.warning(
                "kernel.refused",
                table=self._tables[item.table].name,
                entry=self._tables[item.table].text(item.key),
                error=str(item.failure.refusal),
                tries=item.failure.count,
                effect="retried with back-off; the other entries go on",
            )

    def _log_done(self, differing: int) -> None:
        rec = self.rec
        if self._work.has_news(rec.mended, rec.writes):
            self._work.write(rec.mended, rec.writes, rec.take_mended(), differing, self._peer)

    def _peer(self, subnet: int) -> Lease | None:
        packed = self.table.packed.get(subnet)
        return None if packed is None else unpack(packed)

    # --- for the status --------------------------------------------------------------------------------------------------

    def peers(self) -> Peers:
        """Each peer and how it stands, to be written out by whoever asked: at 20,000 peers that takes a while."""
        rec = self.rec
        peers = (*rec.pending, *rec.backing_off)
        missing = {peer: rec.pending.get(peer, 0) | rec.backing_off.get(peer, 0) for peer in peers}
        return Peers(self.node, tuple(self.table.packed.values()), missing)

    def some_peers(self, place: int, count: int) -> Iterator[tuple[Prefix, int, bool, str]]:
        """As `peer_of`, of so many peers from a place in their order on."""
        for subnet in islice(self.table.packed, place, place + count):
            if (found := self.peer_of(subnet)) is not None:
                yield found

    def peer_of(self, subnet: int) -> tuple[Prefix, int, bool, str] | None:
        """Subnet, public IP, whether it is reached directly, and node, of the peer of a number; None where there is none, or
        its entries differ."""
        packed = self.table.packed.get(subnet)
        if packed is None or self.node is None or subnet in self.rec.pending or subnet in self.rec.backing_off:
            return None
        lease = unpack(packed)
        end = lease.endpoint(self._family.number)
        assert end is not None, "a peer has the family's part"
        direct = plan.is_direct(plan.entries(self.node, lease))
        return end.subnet, end.public_ip, direct, node_name(lease.node)

    def differences(self) -> Iterator[dict[str, object]]:
        """The entries that are not as they should be, at most SHOWN."""
        return islice(report.differences(self.rec), SHOWN)


def _by_kind(item: tuple[int, Entry]) -> tuple[int, int]:
    return item[0], item[1][0]
