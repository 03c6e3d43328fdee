"""Each controller of peers alone: which records are peers, and their entries."""

from __future__ import annotations

from typing import Any

import pytest

from lease.model import ip_number, prefix
from lease.records.packed import Leases
from overlay.control.controller import Waiting
from overlay.control.inputs import Tunnel
from overlay.firewall import guard
from overlay.firewall.controllers import DIRECT_S
from overlay.kernel import events, netlink
from overlay.kernel.route.entries import FoundRoute, RouteKey
from tests.support.bench import OTHER_MTU, RETAINED
from tests.support.fakes import link
from tests.support.make import lease


def test_peers_are_planned_when_the_node_or_the_list_changes(bench):
    controller, planned = bench.table(), []
    controller.planned = lambda: planned.append(1)
    bench.path.replace(Leases.of([lease("10.244.9.0/24", "192.168.1.9"), lease("10.99.0.0/24", "192.168.1.8")]), "")
    bench.reconcile(controller)
    bench.reconcile(controller)
    assert len(planned) == 1
    assert [one.key for one in bench.path.table.accepted()] == ["10.244.9.0-24"]
    assert "outside Network" in controller.status()["refused_records"]["10.99.0.0-24"]
    bench.current.set(**OTHER_MTU)
    bench.reconcile(controller)
    assert len(planned) == 1, "that is nothing to peers"
    bench.current.set(**RETAINED)
    bench.reconcile(controller)
    assert len(planned) == 2


def test_peers_are_in_order_when_the_kernel_was_read_and_nothing_differs(bench, monkeypatch):
    table, controller = bench.table(), bench.peers()
    table.planned = controller.planned
    bench.path.replace(Leases.of([lease("10.244.9.0/24", "192.168.1.9")]), "")
    bench.reconcile(table)
    assert controller.unready() == "for the kernel to be read"
    reads: list[int] = []

    def read(_links: Any) -> bool:
        reads.append(1)
        if len(reads) == 1:
            raise netlink.KernelError(1, "reading: refused")
        bench.path.dumped = True
        return False

    monkeypatch.setattr(bench.path, "resync", read)
    bench.reconcile(controller)
    assert (bench.problems()["dump"], controller.unready()) == ("reading: refused", "for the kernel to be read")
    bench.reconcile(controller)
    assert len(reads) == 1, "it waits for its retry"
    bench.clock.now = controller.due()
    while bench.reconcile(controller):
        pass
    assert (controller.unready(), bench.problems()) == ("", {})
    assert bench.current.inputs.synced
    assert bench.path.rec.writes == {"put_neighbour": 1, "put_fdb": 1, "put_route": 1}


def test_what_goes_with_the_device_is_put_again_at_once(bench):
    table, controller = bench.table(), bench.peers()
    bench.path.replace(Leases.of([lease("10.244.9.0/24", "192.168.1.9")]), "")
    bench.reconcile(table)
    bench.path.dumped = True
    controller._read_whole = False
    bench.reconcile(controller)
    while bench.reconcile(controller):
        pass
    assert bench.path.rec.differing() == 0
    before = bench.current.inputs.tunnels[4]
    bench.current.set(tunnels={4: before._replace(up=False, downs=1)})
    assert bench.tell(controller, events.LinkSeen(link(3, "flannel.1", up=False), gone=False))
    assert bench.path.rec.differing() == 2, "route and neighbour; the FDB stays"
    bench.current.set(tunnels={4: Tunnel("flannel.1", 4, 1450, downs=1, makes=1)})
    bench.tell(controller, events.LinkSeen(link(3, "flannel.1"), gone=True))
    assert bench.path.rec.differing() == 3


def test_nothing_is_due_at_once_while_there_is_no_device(bench):
    """A kernel that refuses to make it for an hour shall not cost a core."""
    table, controller = bench.table(), bench.peers()
    bench.path.replace(Leases.of([lease("10.244.9.0/24", "192.168.1.9")]), "")
    bench.reconcile(table)
    bench.current.set(tunnels={4: Tunnel("flannel.1", 0, 1450, up=False)})
    bench.clock.now = 3600.0
    bench.reconcile(controller)
    due = controller.due()
    assert due is None or due > bench.clock.now


def test_a_reading_that_takes_longer_than_a_minute_is_not_begun_again_at_its_end(bench, monkeypatch):
    controller = bench.peers()
    bench.reconcile(bench.table())
    monkeypatch.setattr(bench.path, "resyncing", lambda: True)
    monkeypatch.setattr(bench.path, "resync", lambda _links: True)
    bench.reconcile(controller)
    controller._read_whole = False
    bench.clock.now = 1000.0
    monkeypatch.setattr(bench.path, "resync", lambda _links: False)
    assert not bench.reconcile(controller)


def test_a_doubt_about_the_device_does_not_turn_the_loop_while_the_kernel_is_not_read(bench):
    """The device cannot be made again, and another plan came meanwhile."""
    controller = bench.peers()
    bench.reconcile(bench.table())
    bench.path.dumped, bench.path.rec.device_gone = True, True
    controller._read_whole = False
    bench.reconcile(controller)
    bench.path.dumped = False
    bench.current.set(tunnels={4: Tunnel("flannel.1", 0, 1450, up=False, downs=1, makes=1)})
    bench.clock.now = 30.0
    for _ in range(3):
        bench.reconcile(controller)
    due = controller.due()
    assert due is None or due > bench.clock.now


def test_a_guard_that_is_off_remembers_nobody(bench):
    controller = bench.guard()
    bench.reconcile(controller)
    list(controller.withdraw())
    for number in range(5):
        one = lease(f"10.244.{number + 9}.0/24", f"192.168.1.{number + 9}")
        controller.guard.peer_changed(None, one)
        controller.guard.peer_changed(one, None)
    assert not controller.guard.has_changes()
    assert controller.guard.next_change() is None
    controller.guard.peer_changed(None, lease("10.244.9.0/24", "192.168.1.9"))
    bench.reconcile(controller)
    assert len(bench.kernel.tables["ip", guard.table_name(1)]["vteps"]) == 1, "on again it lets in who is a peer"


def test_a_device_that_the_kernel_does_not_know_is_doubted_after_a_while(bench):
    controller = bench.peers()
    bench.reconcile(bench.table()) if bench.path.has_unplanned() else bench.path.replace(Leases.of([]), "")
    bench.reconcile(bench.table())
    bench.path.dumped, bench.path.rec.device_gone = True, True
    controller._read_whole = False
    controller.reconcile(controller.wants(bench.current.inputs))
    bench.path.rec.device_gone = True
    controller.reconcile(controller.wants(bench.current.inputs))
    assert bench.posted == []
    bench.clock.now = 2.1
    controller.reconcile(controller.wants(bench.current.inputs))
    assert bench.posted == [events.DeviceUnknown()]


def test_peers_may_come_without_the_tunnel_for_an_hour_after_the_config_ended_that(bench):
    """It reaches nodes one by one. Also where the agent is a new one, by what the table has."""
    direct = bench.current.inputs.config
    direct = direct._replace(backend=direct.backend._replace(direct_routing=True))
    tunnel = bench.current.inputs.config

    def lets_in() -> bool:
        return guard.DIRECT in bench.kernel.tables["ip", guard.table_name(1)]

    controller = bench.guard()
    bench.reconcile(controller)
    assert not lets_in()
    bench.current.set(config=direct)
    bench.reconcile(controller)
    assert lets_in()
    bench.current.set(config=tunnel)
    bench.clock.now += 1
    bench.reconcile(controller)
    assert lets_in()
    bench.clock.now += DIRECT_S
    bench.reconcile(controller)
    assert not lets_in()


def test_direct_routes_wait_until_others_may_know(bench):
    """Of a config that changes under a running network; at a node's first start there is nothing to wait for."""
    tunnel = bench.current.inputs.config
    direct = tunnel._replace(backend=tunnel.backend._replace(direct_routing=True))
    near = bench.current.inputs.underlays[4]._replace(neighbours=(prefix("192.168.1.0/24"),))
    bench.current.set(config=direct, underlays={4: near})
    controller = bench.table()
    bench.reconcile(controller)
    assert bench.path.node.neighbours == near.neighbours
    bench.current.set(config=tunnel)
    bench.reconcile(controller)
    bench.current.set(config=direct)
    bench.reconcile(controller)
    assert bench.path.node.neighbours == ()
    assert "a moment ago" in controller.status()["direct_routing"]
    bench.clock.now = controller.due()
    bench.reconcile(controller)
    assert bench.path.node.neighbours == near.neighbours
    assert controller.due() is None


@pytest.mark.parametrize(
    ("via", "waits"),
    [
        pytest.param("10.244.9.0", True, id="all went by the tunnel"),
        pytest.param("192.168.1.9", False, id="it sent directly before"),
    ],
)
def test_direct_routes_wait_at_a_start_that_brings_the_config(bench, via, waits):
    """A roll-out restarts agents one by one, each with the new config at once."""
    config = bench.current.inputs.config
    near = bench.current.inputs.underlays[4]._replace(neighbours=(prefix("192.168.1.0/24"),))
    bench.current.set(config=config._replace(backend=config.backend._replace(direct_routing=True)), underlays={4: near})
    bench.kernel.routes_there.append(found("10.244.9.0", via))
    controller = bench.table()
    bench.reconcile(controller)
    assert (bench.path.node.neighbours == ()) == waits
    assert (controller.due() is not None) == waits


def test_peers_wait_where_the_lease_lost_this_family(bench):
    """The tunnel device stays, as it is the other family's lease that this one gave way to."""
    controller = bench.table()
    assert not isinstance(controller.wants(bench.current.inputs), Waiting)
    own = bench.current.inputs.own
    bench.current.set(own=own._replace(v4=None, v6=own.v4._replace(subnet=prefix("fd00:10:244:2::/64"))))
    assert controller.wants(bench.current.inputs) == Waiting("for a subnet of IPv4")


def test_what_was_planned_is_taken_away_whatever_the_files_say_and_nothing_of_others(bench):
    """A pod network of this agent's, which no file names (yet); and one of another agent on this node."""
    table, controller = bench.table(), bench.peers()
    table.planned = controller.planned
    bench.path.replace(Leases.of([lease("10.244.9.0/24", "192.168.1.9")]), "")
    bench.reconcile(table)
    assert controller.due() == 0.0, "it is asked for the new plan, whatever events come"
    bench.reconcile(controller)
    assert bench.owned.prefixes(4) == [prefix("10.244.0.0/16")]
    assert bench.tell(controller, events.RouteSeen(found("10.244.9.0", "192.168.1.9"), gone=True))
    bench.kernel.routes_there += [found("10.244.9.0", "192.168.1.9"), found("10.99.9.0", "192.168.1.9")]
    bench.kernel.refuse = 1
    with pytest.raises(OSError, match="refused"):
        list(controller.withdraw())
    assert bench.owned.prefixes(4) == [prefix("10.244.0.0/16")], "until it is done"
    bench.kernel.refuse = 0
    assert list(controller.withdraw()) == ["1 routes of ours"]
    assert bench.owned.prefixes(4) == []
    assert list(controller.withdraw()) == [], "what is not ours says nothing"
    assert controller.due() is None or controller.due() > 0
    assert not bench.tell(controller, events.RouteSeen(found("10.99.9.0", "192.168.1.9"), gone=True))


def found(base: str, via: str) -> FoundRoute:
    return FoundRoute(RouteKey(ip_number(base, 4), 24, 9), 2, ip_number(via, 4), 4, 111, ())
