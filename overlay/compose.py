"""Which controllers there are, in the order of dependence: the only place that knows them all.

A new feature is a folder and a line here. `overlay uninstall` withdraws the same controllers in reverse.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lease.families import V4, V6, Family
from lease.model import Lease
from lease.tenure.claim import Answer
from overlay.api.serve import Handler
from overlay.ask.controller import AskController
from overlay.ask.server import NO_ROUTES, AskRoutes
from overlay.backends.wireguard import KIND
from overlay.cluster.live import LiveFiles
from overlay.cluster.network import NetworkConfigInput
from overlay.cluster.ownership import Ownership
from overlay.cluster.records import RecordsSource
from overlay.cni.controller import CniController, bridges_listed
from overlay.cni.lists import recorded_public_ip
from overlay.cni.results import CniResults
from overlay.control.controller import Controller, NotYet
from overlay.control.health import Health, name_of
from overlay.control.inputs import CurrentInputs
from overlay.firewall.antispoof import AntiSpoof
from overlay.firewall.controllers import GuardController, PodsController
from overlay.firewall.guard import Guard
from overlay.firewall.rules import ForwardController, NatController
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.links import Links
from overlay.node.bridges import BridgesController
from overlay.node.device import DeviceController, userspace_folder
from overlay.node.duplicates import AddressController
from overlay.node.links import LinksSource
from overlay.node.owned import Owned
from overlay.node.sysctls import SysctlController
from overlay.node.underlay_source import UnderlaySource
from overlay.notices.controller import NoticesController, Teller
from overlay.page.controller import MakeHandler, PageController
from overlay.peers.controller import PeersController, PeerTableController
from overlay.peers.datapath import Datapath
from overlay.peers.mixed import MixedController
from overlay.peers.refusals import Refusals
from overlay.policy.controller import PolicyController
from overlay.policy.nodes import Nodes
from overlay.policy.sources import Feeds as PolicyFeeds
from overlay.policy.sources import NoFeeds
from overlay.probes.controller import PeerOfPath, ProbesController
from overlay.process.log import log
from overlay.process.rundir import DeviceLock
from overlay.reach import ways
from overlay.reach.controller import ReachController
from overlay.reach.foreign_rules import ForeignRulesController
from overlay.settings.settings import Settings
from overlay.trace.controller import TracesController
from overlay.wireguard.controller import Device as WireguardDevice
from overlay.wireguard.controller import WireguardController
from overlay.wireguard.keys import KeyController, KeyHolder
from overlay.wireguard.peers import Keyed

if TYPE_CHECKING:
    from lease.tenure.claim import Identity


NO_POLICY_FEEDS = NoFeeds()
FAMILIES: tuple[Family, ...] = (V4, V6)
"""Those that the agent has a datapath for; what is of neither family is built with the first."""


class Outside(NamedTuple):
    """What the process gives the controllers: the ways to store and loop. The defaults serve who only withdraws."""

    clock: Callable[[], float]
    post: Callable[[Any], None] = lambda _event: None
    """Puts an event into the loop's inbox."""
    stop: Callable[[str], None] = lambda _reason: None
    """Ends the agent."""
    store_place: Callable[[], str] = lambda: ""
    config_place: str = ""
    store_hosts: Callable[[int], dict[str, int | None]] = lambda _family: {}
    reconnect: Callable[[], None] = lambda: None
    identity_of: Callable[[str], Identity] | None = None
    who_answers: Callable[[int], Answer] = lambda _address: Answer(False, None)
    """Who on the link answers for an address of the first family."""
    page_handler: MakeHandler = lambda _secret_file, _loopback: Handler
    """What serves the page."""
    ask_routes: AskRoutes = NO_ROUTES
    """What other nodes' agents may ask this one."""
    set_log_level: Callable[[str], None] = lambda _level: None
    teller: Teller | None = None
    """Who tells Kubernetes what is wrong, None: there is none."""
    give_up: Callable[[], Iterator[str]] = lambda: iter(())
    """Takes what our record says to others out of the store."""
    policy_feeds: PolicyFeeds = NO_POLICY_FEEDS
    """Who brings policies, pods and namespaces."""
    bridges: tuple[str, ...] = ()
    """Bridges that a network list of ours named, where that is gone already."""
    networks: tuple[int, ...] = ()
    """Numbers of networks that are ours though no file says so."""


class Composed(NamedTuple):
    """Controllers in order, and what the process needs of them."""

    controllers: list[Controller]
    current: CurrentInputs
    health: Health
    ownership: Ownership
    ports: tuple[int, int]
    """The netlink ports of our own requests (rtnetlink, nftables), whose echoes the monitors need not report."""


class _Shared(NamedTuple):
    """What the controllers of all families are built with."""

    outside: Outside
    current: CurrentInputs
    health: Health
    owned: Owned
    requests: RequestSocket
    sets: NetfilterSocket
    refusals: Refusals
    own_key: Callable[[], str]
    """The key of our record."""
    leave: Callable[[int, Family, set[str]], bool]
    """Takes away what was made for a network that this node left with a family."""


class _OfFamily:
    """The controllers of one family."""

    def __init__(self, family: Family, shared: _Shared) -> None:
        outside, current, whole, owned, requests, sets, refusals, own_key, leave = shared
        clock, post, links, health = outside.clock, outside.post, Links(family), whole.of(family)
        guard = Guard(family, sets, clock)
        rng = random.Random()  # noqa: S311 (spreads load, guards nothing)
        probes = ProbesController(family, health, clock, self._paths, self._path_of)
        self.keyed, self.nodes = Keyed(family), Nodes(family)
        self.path = Datapath(family, requests, clock, rng, refusals, (guard, probes, self.keyed, self.nodes))

        def recorded(now: Settings) -> int:
            return recorded_public_ip(now.run_dir, family.number)

        self.underlay = UnderlaySource(
            current, family, requests, outside.store_hosts, outside.reconnect, recorded
        )  # fmt: skip
        self.device = DeviceController(current, family, requests, links, DeviceLock(), health, owned, leave, clock)
        self.bridges = BridgesController(current, family, links, owned, outside.bridges)
        self.table = PeerTableController(current, family, self.path, own_key, clock, lambda: requests.routes(family))
        self.peers = PeersController(current, family, self.path, requests, health, clock, post, owned)
        guarding = GuardController(family, guard, sets, owned, health, clock)
        self.device.before_up = lambda name: guarding.shut(current.inputs, name)
        self.device.refused = guarding.open_again
        self.rest = (
            guarding,
            self.peers,
            NatController(family, post, health, owned),
            ForwardController(family, post, health, owned, clock),
            SysctlController(current, family, health, clock),
            AddressController(family, post, health, clock, outside.who_answers),
            ReachController(family, requests, health, clock, self._some_peers, self.peers.refused),
            ForeignRulesController(family, post, health, clock, self._some_peers),
            probes,
            MixedController(family, self.path, health, clock),
        )
        used = bool(owned.prefixes(family.number))
        for controller in (self.underlay, self.device, self.bridges, self.table, *self.rest):
            controller.family, controller.used = family, used

    def _some_peers(self, place: int, count: int) -> list[ways.Peer]:
        return [ways.Peer(*each[:3]) for each in self.peers.some(place, count)]

    def _paths(self, place: int, count: int) -> list[PeerOfPath]:
        return [PeerOfPath(*each) for each in self.peers.some(place, count)]

    def _path_of(self, subnet: int) -> PeerOfPath | None:
        found = self.path.peer_of(subnet)
        return None if found is None else PeerOfPath(*found)


def compose(settings: Settings, outside: Outside) -> Composed:
    """All controllers of an agent. Raises OSError: no socket to the kernel."""
    clock, requests, sets = outside.clock, RequestSocket(), NetfilterSocket()
    current, health, owned, refusals = (
        CurrentInputs(settings),
        Health(clock),
        Owned(settings, outside.networks),
        Refusals(),
    )

    def leave(network: int, family: Family, done: set[str]) -> bool:
        return leave_network(controllers, network, family, done)

    shared = _Shared(outside, current, health, owned, requests, sets, refusals, lambda: ownership.key, leave)
    each = [_OfFamily(family, shared) for family in FAMILIES]
    first = each[0]
    existing_macs = {family.number: of.device.existing_mac for family, of in zip(FAMILIES, each, strict=True)}
    ownership = Ownership(current, health, clock, outside.identity_of, existing_macs, outside.stop, outside.give_up)
    network = NetworkConfigInput(current, health, outside.config_place)
    paths = [of.path for of in each]

    def entered(lease: Lease) -> None:
        for path in paths:
            path.enter(lease)

    for of in each:
        of.table.planned = _both(of.peers.planned, ownership.check_rivals)
    ownership.displaced_record = entered
    ownership.refused_records = lambda: (lease for of in each for lease in of.peers.refused())

    keys = KeyHolder()
    results = CniResults(settings.cni_results_dir)
    ports = PodsController(AntiSpoof(sets, requests, clock, results.refreshed), sets, owned, health, clock)
    controllers: list[Controller] = [
        LiveFiles(current, health, network, outside.set_log_level),
        LinksSource(current, FAMILIES, requests),
        *(of.underlay for of in each),
        RecordsSource(current, health, paths, ownership, network, refusals, outside.store_place, clock),
        KeyController(current, keys, owned, clock),
        ownership,
        *(part for of in each for part in (of.device, of.bridges, of.table)),
        WireguardController(
            current, health, keys, [of.keyed for of in each], lambda name: _wireguard(name, settings), clock
        ),
        *(part for of in each for part in of.rest),
        PolicyController(
            current,
            sets,
            owned,
            health,
            clock,
            outside.policy_feeds,
            results.every,
            {family.number: of.nodes for family, of in zip(FAMILIES, each, strict=True)},
        ),
        ports,
        CniController(current, health, owned, clock, first.bridges.named, lambda: ports.lifts),
        AskController(health, outside.ask_routes),
        PageController(outside.page_handler),
        TracesController(outside.post, health, clock),
        NoticesController(outside.post, health, clock, outside.teller),
    ]
    return Composed(controllers, current, health, ownership, (requests.port, sets.port))


def leave_network(controllers: Iterable[Controller], network: int, family: Family, done: set[str]) -> bool:
    """Take away what was made for a network that this node left with a family, by its number; whether nothing is left. done:
    the names of controllers that need not be asked again. What is of no family says itself whether it is of the network yet.
    Raises OSError, when all others are done."""
    waits, refused = False, None
    for controller in controllers:
        name = name_of(controller.name, controller.family)
        if name in done or controller.family not in (family, None):
            continue
        try:
            for line in controller.leave(network):
                log.info("withdrawn", controller=name, removed=line)
            done.add(name)
        except NotYet:
            waits = True
        except OSError as error:
            refused = error
    if refused is not None:
        raise refused
    return not waits


def _wireguard(name: str, settings: Settings) -> WireguardDevice:
    """The device of a name, of the kernel or of a program. One whose program cannot be asked is deleted, and then made
    again. Raises KernelError."""
    from overlay.kernel.wireguard.genl import KernelWireguard
    from overlay.kernel.wireguard.userspace import UserspaceWireguard

    links, folder = Links(), userspace_folder(settings.run_dir)
    try:
        there = links.read(name)
        if there is None or there.kind == KIND:
            return KernelWireguard(name)
        made = UserspaceWireguard(name, folder)
        try:
            made.read()
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):  # it is dead, and its device serves nobody
                links.delete(there.ifindex)
            raise
        return made
    finally:
        links.close()


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def withdraw(settings: Settings, outside: Outside) -> Iterator[tuple[str, Iterator[str]]]:
    """All controllers of this node in reverse order: each one's name, and its withdrawing."""
    outside = outside._replace(bridges=(*outside.bridges, *bridges_listed(settings)))
    for controller in reversed(compose(settings, outside).controllers):
        yield controller.name, controller.withdraw()
