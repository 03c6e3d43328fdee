"""The controllers of one family's peers: which records are peers, and their entries in the kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import Lease, Prefix
from lease.store import Changes, Snapshot
from lease.tenure.events import Held
from overlay.backends.choose import tunnel_devices
from overlay.control.controller import Controller, Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs, Tunnel
from overlay.control.schedule import Cadence, Retry
from overlay.kernel import events, netlink
from overlay.kernel.netlink import error_text
from overlay.kernel.route import wire
from overlay.kernel.route.entries import PROTOCOL, UNDERLAY, FoundRoute, RouteValue
from overlay.node.interfaces import addresses_of
from overlay.node.owned import Owned
from overlay.peers import plan
from overlay.peers.datapath import Datapath
from overlay.process.log import log

DOUBT_GAP_S, DOUBT_SHARE = 0.5, 20
"""After a refusal that contradicts what we believe the kernel is read again: so long after the last time, or 20 times its
cost."""
DEVICE_DOUBT_S = 2.0
"""The kernel says soon that a device went; where that got lost it is checked after so long."""
KNOWN_AFTER_S, KNOWN_AFTER_KUBE_S = 2.0, 90.0
"""A change of the network config is known on all nodes after so long: by a watch of etcd, by the kubelets' ConfigMaps (each
minute, and a cache)."""
BATCH = 500
"""Routes removed at once."""


class PeerTableController(Controller):
    """Which records are peers of this node. What its peers are, the guard must know before their entries are made."""

    name = "records"
    rechecked = False

    def __init__(
        self,
        current: CurrentInputs,
        family: Family,
        path: Datapath,
        own_key: Callable[[], str],
        clock: Callable[[], float],
        routes: Callable[[], Iterable[FoundRoute]],
    ) -> None:
        """routes: the kernel's, of the main table. own_key: of our record."""
        self._current, self._family, self._path, self._own_key = current, family, path, own_key
        self._clock, self._routes = clock, routes
        self._directly_from: float | None = None
        """DirectRouting was switched on: peers are reached so from then on."""
        self.planned: Callable[[], None] = lambda: None
        """Called after each plan. Set before the loop runs."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What may leave records without a plan."""
        return dict.fromkeys((Snapshot, Held), lambda _event: self._path.has_unplanned())

    def wants(self, inputs: Inputs) -> object:
        """What the plan needs to know of this node."""
        number = self._family.number
        under = inputs.underlays.get(number)
        if not inputs.listed or inputs.own is None or inputs.config is None or under is None:
            return Waiting("for a lease")
        if inputs.own.backend != inputs.config.backend.type:
            return Waiting(f"for a lease of type {inputs.config.backend.type}")
        if number not in inputs.tunnels or inputs.backend(number) != inputs.config.backend:
            return Waiting("for the tunnel device")
        if inputs.end(number) is None:  # the device stays where a lease of both families gives way to one of the other
            return Waiting(f"for a subnet of {self._family.text}")
        return plan.node_of(
            inputs.config,
            self._family,
            inputs.own,
            under.on_link,
            addresses_of(inputs.addresses_of(number).values(), under.ifindex),
            inputs.retained,
            inputs.settings.underlay_cidrs_of(number),
            1 if inputs.settings.kube else 2,
            under.neighbours,
        )

    def reconcile(self, wants: Any) -> bool:
        """Plan anew when anything but single records changed. Raises KernelError."""
        wants = self._until_peers_know(wants)
        if wants != self._path.node or self._path.has_unplanned():
            self._path.plan(wants, self._own_key())
            self.planned()
        return False

    def _until_peers_know(self, node: plan.Node) -> plan.Node:
        """A network config that switches DirectRouting on reaches nodes one after the other, and none takes packets from
        outside the tunnel before it knows. An agent that starts may have come with that config. Raises KernelError."""
        before = self._path.node
        if not node.backend.reaches_directly or node.backend.tunnel is None:
            self._directly_from = None
            return node
        if self._only_by_tunnel(node) if before is None else not before.backend.reaches_directly:
            kube = self._current.inputs.settings.kube
            self._directly_from = self._clock() + (KNOWN_AFTER_KUBE_S if kube else KNOWN_AFTER_S)
        if self._directly_from is None or self._clock() >= self._directly_from:
            self._directly_from = None
            return node
        return node._replace(neighbours=())

    def _only_by_tunnel(self, node: plan.Node) -> bool:
        """Whether an agent before us, or flannel, sent to peers by the tunnel alone. Raises KernelError."""
        gateways = {route.via for route in self._routes() if node.network.holds(route.key.base)} - {0}
        return bool(gateways) and not any(there.holds(via) for there in node.neighbours for via in gateways)

    def due(self) -> float | None:
        """When peers know."""
        return self._directly_from

    def status(self) -> Mapping[str, object]:
        """`refused_records`; `direct_routing`: to whom plain routes lead, and why to nobody, "" where it is off."""
        return {"refused_records": dict(self._path.table.refused), "direct_routing": self._direct_routing()}

    def _direct_routing(self) -> str:
        node, under = self._path.node, self._current.inputs.underlays.get(self._family.number)
        if node is None or under is None or not node.backend.reaches_directly or node.backend.tunnel is None:
            return ""
        if self._directly_from is not None:
            return "no peer yet: it was switched on a moment ago, which others must know first"
        if node.neighbours:
            return f"peers in {', '.join(map(str, node.neighbours))}, the neighbours on {under.name}"
        why = (
            "finds no neighbours by ARP" if not under.arp else "has no prefix whose hosts are reached without a gateway"
        )
        return f"no peer: {under.name} {why}, so all are reached by the tunnel"


class _Wants(NamedTuple):
    """displaced, displacements: by the inputs of these names; after either it is to be said anew that all is in order."""

    tunnel: Tunnel
    underlay: int
    underlay_up: bool
    displaced: bool
    displacements: int


class PeersController(Controller):
    """The peers' entries in the kernel: read whole where that is due, and made as they should be, a slice at a time."""

    name = "peers"
    reports = ("kernel", "dump")
    rechecked = False

    def __init__(
        self,
        current: CurrentInputs,
        family: Family,
        path: Datapath,
        requests: netlink.RequestSocket,
        health: Health,
        clock: Callable[[], float],
        post: Callable[[Any], None],
        owned: Owned,
    ) -> None:
        self._current, self._family, self._path, self._requests = current, family, path, requests
        self._health, self._clock, self._post, self._owned = health, clock, post, owned
        self._read_whole = True
        """The kernel is to be read whole, when the read under way, if there is one, has ended."""
        self._cadence, self._reading = Cadence(clock), Retry(clock)
        self._no_doubt_before = 0.0
        self._doubt_at: float | None = None
        self._device_doubt_at: float | None = None
        self._overruns = 0
        self._new_plan = False

    # --- events

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Changes of peers, and all news of the kernel's entries."""
        return {
            Snapshot: lambda _event: self._planned,
            Changes: lambda _event: self._planned,
            events.LinkSeen: self._on_link,
            events.AddressSeen: self._on_address,
            events.RouteSeen: self._on_route,
            events.NeighbourMessages: self._on_neighbours,
            events.Overrun: self._on_overrun,
        }

    @property
    def _planned(self) -> bool:
        """Whether there is a plan: without one there is nothing to see to, and nothing to withdraw again."""
        return self._path.node is not None

    def _on_link(self, event: events.LinkSeen) -> bool:
        tunnel = self._current.inputs.tunnels.get(self._family.number)
        if tunnel is not None:
            self._read_whole |= self._path.set_tunnel(tunnel)
        # down and up again looks unchanged afterwards, but took the direct routes with it
        self._read_whole |= self._path.on_underlay_link(event.link, event.gone)
        return self._planned

    def _on_address(self, event: events.AddressSeen) -> bool:
        """The last address takes the routes with it, silently: read them again."""
        if event.gone and any(device.ifindex == event.address.oif for device in self._path.rec.devices.values()):
            self._read_whole = True
        return self._read_whole and self._planned

    def _on_route(self, event: events.RouteSeen) -> bool:
        self._path.on_route(event, self._current.inputs.links)
        return self._planned

    def _on_neighbours(self, event: events.NeighbourMessages) -> bool:
        self._path.on_neighbour_messages(event.messages)
        return self._planned

    def _on_overrun(self, _event: events.Overrun) -> bool:
        self._overruns += 1
        log.warning("monitor.overrun", effect="events were lost; the kernel is read whole again")
        self._read_whole = True
        return self._planned

    def planned(self) -> None:
        """There is a new plan: of what the kernel has nothing is believed until it is read."""
        self._read_whole = self._new_plan = True
        if self._path.node is not None:
            self._owned.planned[self._family.number] = self._path.node.network

    # --- making it so

    def wants(self, inputs: Inputs) -> object:
        """The devices the entries stand on; the entries themselves are wanted by the plan."""
        number = self._family.number
        tunnel, under = inputs.tunnels.get(number), inputs.underlays.get(number)
        if tunnel is None or under is None:
            return Waiting("for the tunnel device")
        return _Wants(tunnel, under.ifindex, under.up, inputs.displaced, inputs.displacements)

    def reconcile(self, wants: Any) -> bool:
        """One slice of reading the kernel, where that is due, and one of what differs."""
        path = self._path
        if path.node is None:
            return False
        self._new_plan = False
        self._read_whole |= path.set_tunnel(wants.tunnel)
        self._read_whole |= path.set_underlay(wants.underlay, wants.underlay_up)
        more = path.rec.main in path.rec.devices and self._read_slice()
        if path.dumped:
            more = path.apply() or more
        self._note_doubts()
        self._note_difference()
        if path.dumped and not wants.displaced and path.rec.settled():
            # an entry that the kernel refuses (which is reported and retried) does not keep the whole node from its pods
            self._current.set(synced_families=self._current.inputs.synced_families | {self._family.number})
        return more

    def _read_slice(self) -> bool:
        """A slice of reading the kernel whole, where that is due or under way; whether there is more of it."""
        path, cadence, now = self._path, self._cadence, self._clock()
        due = now >= cadence.at and not path.resyncing()
        if due or (self._doubt_at is not None and now >= self._doubt_at):
            self._doubt_at, self._read_whole = None, True
        if not path.resyncing():
            if not self._read_whole or self._reading.waits():
                return False
            self._read_whole = False
            cadence.began()
        began = time.thread_time()
        try:
            more = path.resync(self._current.inputs.links)
        except OSError as error:  # the kernel's word, or no descriptor for a socket
            self._read_whole = True
            self._reading.refused()
            self._health.problem("dump", error_text(error))
            return False
        cadence.spent(time.thread_time() - began)
        if not more:
            cadence.ended()
            self._reading.succeeded()
            self._health.solved("dump")
            self._no_doubt_before = self._clock() + max(DOUBT_GAP_S, cadence.cost_s * DOUBT_SHARE)
        return more or self._read_whole

    def _note_doubts(self) -> None:
        rec, now = self._path.rec, self._clock()
        if rec.in_doubt:
            rec.in_doubt = False
            self._doubt_at = min(max(now, self._no_doubt_before), self._doubt_at or float("inf"))
        if not rec.device_gone:
            self._device_doubt_at = None
        elif self._device_doubt_at is None:
            self._device_doubt_at = now + DEVICE_DOUBT_S
        elif now >= self._device_doubt_at:
            self._device_doubt_at = now + DEVICE_DOUBT_S
            self._post(events.DeviceUnknown())

    def _note_difference(self) -> None:
        differing = self._path.rec.differing()
        self._health.note("kernel", f"{differing} entries are not as they should be" if differing else "")

    def due(self) -> float | None:
        """A retry, a doubt, the next check."""
        asked = [self._path.rec.next_retry(), self._device_doubt_at, 0.0 if self._new_plan else None]
        if self._path.rec.main in self._path.rec.devices:  # else there is nothing to read, however long it is due
            asked += [self._doubt_at, self._cadence.at, (self._reading.at or 0.0) if self._read_whole else None]
        return min((at for at in asked if at is not None), default=None)

    def unready(self) -> str:
        """Whether the kernel was read since the last plan."""
        return "" if self._path.dumped else "for the kernel to be read"

    # --- taking away

    def withdraw(self) -> Iterator[str]:
        """Remove the routes of our protocol number that are this network's, but those that go with the tunnel device:
        another network's agent may have its own on this node. Raises ValueError where it is not known whose they are."""
        self._path.reset()
        self._current.set(synced_families=self._current.inputs.synced_families - {self._family.number})
        self._new_plan = False
        kinds = tunnel_devices(self._owned.networks(), self._family)
        links = [link for link in self._requests.links() if link.kind in kinds.get(link.name, ())]
        tunnels = {link.ifindex for link in links}
        shared = self._current.inputs.others_devices(self._family.number)
        dying = {link.ifindex for link in links if link.name not in shared and not self._owned.flannel_has_it()}
        networks = self._owned.prefixes(self._family.number)
        left = [
            route
            for route in self._requests.routes(self._family)
            if route.protocol == PROTOCOL and route.oif not in dying
        ]
        routes = [
            route
            for route in left
            if route.oif in tunnels or any(network.holds(route.key.base) for network in networks)
        ]
        if routes:
            self._remove(routes)
            yield f"{len(routes)} routes of ours"
        self._owned.planned.pop(self._family.number, None)
        if len(left) > len(routes) and not networks and self._current.inputs.config is None:  # who uninstalls is told
            raise ValueError(
                f"{len(left) - len(routes)} routes are ours, or another network's on this node, of which nothing here says"
                f" which: ip -{self._family.number} route show proto {PROTOCOL}"
            )

    def _remove(self, routes: list[FoundRoute]) -> None:
        for start in range(0, len(routes), BATCH):
            part = routes[start : start + BATCH]
            first = self._requests.take_seqs(len(part))
            messages = [
                wire.route_delete(
                    self._family, first + place, route.key, RouteValue(UNDERLAY, route.via, False, PROTOCOL), route.oif
                )
                for place, route in enumerate(part)
            ]
            for refusal in self._requests.execute(messages, first).values():
                if refusal.errno not in wire.ABSENT:
                    raise netlink.KernelError(refusal.errno, f"deleting our routes: {refusal}")

    # --- what is reported

    def some(self, place: int, count: int) -> Iterator[tuple[Prefix, int, bool, str]]:
        """Subnet, public IP, whether it is reached directly, and node, of the peers from a place on whose entries stand."""
        return self._path.some_peers(place, count)

    def refused(self) -> Iterator[Lease]:
        """The records that are not peers."""
        return self._path.table.waiting()

    def status(self) -> Mapping[str, object]:
        """`peers`, `differences`, `differing_entries`, `conflicting_routes`."""
        return {
            "peers": self._path.peers(),
            "differing_entries": self._path.rec.differing(),
            "differences": list(self._path.differences()),
            "conflicting_routes": [route._asdict() for route in self._path.conflicting.values()],
        }

    def counters(self) -> Mapping[str, int]:
        """Entries put back and written, by kind; what reading the kernel whole cost."""
        rec, cadence = self._path.rec, self._cadence
        return {
            **{f"mended_{kind}": count for kind, count in rec.mended.items()},
            **{f"writes_{kind}": count for kind, count in rec.writes.items()},
            "monitor_overruns": self._overruns,
            "full_checks": cadence.count,
            "full_checks_cpu_ms": round(cadence.total_s * 1000),
            "full_check_longest_slice_us": round(cadence.longest_s * 1e6),
        }
