"""Which controllers there are, in the order of dependence: the only place that knows them all.

A new feature is a folder and a line here. `overlay uninstall` withdraws the same controllers in reverse.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lease.families import V4
from overlay.cluster.live import LiveFiles
from overlay.cluster.network import NetworkConfigInput
from overlay.cluster.ownership import Ownership
from overlay.cluster.records import RecordsSource
from overlay.cni.controller import CniController, bridges_listed
from overlay.control.controller import Controller
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs
from overlay.firewall.antispoof import AntiSpoof
from overlay.firewall.controllers import GuardController, PodsController
from overlay.firewall.guard import Guard
from overlay.firewall.rules import ForwardController, NatController
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.links import Links
from overlay.node.bridges import BridgesController
from overlay.node.device import DeviceController
from overlay.node.links import LinksSource
from overlay.node.owned import Owned
from overlay.node.reach import ReachController
from overlay.node.sysctls import SysctlController
from overlay.node.underlay_source import UnderlaySource
from overlay.peers.controller import PeersController, PeerTableController
from overlay.peers.datapath import Datapath
from overlay.peers.refusals import Refusals
from overlay.process.rundir import DeviceLock
from overlay.settings.settings import Settings

if TYPE_CHECKING:
    from lease.tenure.claim import Identity


class Outside(NamedTuple):
    """What the process gives the controllers: the ways to store and loop. The defaults serve who only withdraws."""

    clock: Callable[[], float]
    post: Callable[[Any], None] = lambda _event: None
    """Puts an event into the loop's inbox."""
    stop: Callable[[str], None] = lambda _reason: None
    """Ends the agent."""
    store_place: Callable[[], str] = lambda: ""
    config_place: str = ""
    store_hosts: Callable[[], dict[str, int | None]] = dict
    reconnect: Callable[[], None] = lambda: None
    identity_of: Callable[[str], Identity] | None = None
    set_log_level: Callable[[str], None] = lambda _level: None
    give_up: Callable[[], Iterator[str]] = lambda: iter(())
    """Takes what our record says to others out of the store."""
    bridges: tuple[str, ...] = ()
    """Bridges that a network list of ours named, where that is gone already."""


class Composed(NamedTuple):
    """Controllers in order, and what the process needs of them."""

    controllers: list[Controller]
    current: CurrentInputs
    health: Health
    ownership: Ownership
    ports: tuple[int, int]
    """The netlink ports of our own requests (rtnetlink, nftables), whose echoes the monitors need not tell."""


def compose(settings: Settings, outside: Outside) -> Composed:
    """All controllers of an agent. Raises OSError: no socket to the kernel."""
    clock, post = outside.clock, outside.post
    requests, sets, links = RequestSocket(), NetfilterSocket(), Links(V4)
    current, health, owned = CurrentInputs(settings), Health(clock), Owned(settings)
    rng, refusals = random.Random(), Refusals()  # noqa: S311 (spreads load, guards nothing)
    guard = Guard(V4, sets, clock)
    path = Datapath(V4, requests, clock, rng, refusals, (guard,))

    guarding = GuardController(V4, guard, sets, owned, health, clock)
    pods = PodsController(AntiSpoof(sets, requests, clock), sets, owned, clock)
    nat = NatController(V4, post, health, owned)
    forward = ForwardController(V4, post, health, owned, clock)

    def leave(vni: int) -> None:
        for each in (guarding, pods, nat, forward):
            for _ in each.leave(vni):
                pass

    device = DeviceController(current, V4, requests, links, DeviceLock(), health, owned, leave, clock)
    ownership = Ownership(
        current, health, clock, outside.identity_of, device.existing_mac, outside.stop, outside.give_up
    )
    table = PeerTableController(current, V4, path, lambda: ownership.key)
    peers = PeersController(current, V4, path, requests, health, clock, post, owned)
    bridges = BridgesController(current, V4, links, owned, outside.bridges)
    network = NetworkConfigInput(current, health, outside.config_place)

    def planned() -> None:
        peers.planned()
        ownership.check_rivals()

    table.planned = planned
    ownership.displaced_record, ownership.refused_records = path.enter, peers.refused

    controllers: list[Controller] = [
        LiveFiles(current, health, network, outside.set_log_level),
        LinksSource(current, requests),
        UnderlaySource(current, V4, requests, outside.store_hosts, outside.reconnect),
        RecordsSource(current, health, path, ownership, network, refusals, outside.store_place),
        ownership,
        device,
        bridges,
        table,
        guarding,
        peers,
        nat,
        forward,
        SysctlController(V4, health, clock),
        ReachController(V4, requests, health, peers.a_peer, peers.refused),
        pods,
        CniController(current, V4, health, owned, clock, bridges.named),
    ]
    return Composed(controllers, current, health, ownership, (requests.port, sets.port))


def withdraw(settings: Settings, outside: Outside) -> Iterator[tuple[str, Iterator[str]]]:
    """All controllers of this node in reverse order: each one's name, and its withdrawing."""
    outside = outside._replace(bridges=(*outside.bridges, *bridges_listed(settings)))
    for controller in reversed(compose(settings, outside).controllers):
        yield controller.name, controller.withdraw()
