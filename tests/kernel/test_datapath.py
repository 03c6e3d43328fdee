"""The peers' part on the real kernel: what somebody does between two slices of a look, odd entries, and changed records."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyroute2 import IPRoute

from lease.backend_config import VxlanConfig
from lease.families import V4
from lease.model import Lease, prefix
from lease.records.packed import Leases
from overlay.backends.choose import backend_of
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route import wire
from overlay.kernel.route.fast import NEIGHBOURS, ROUTES
from overlay.peers import plan
from overlay.peers.datapath import Datapath
from tests.support.clock import Clock
from tests.support.make import lease, node
from tests.support.tunnel import TunnelNews

NETWORK = prefix("10.128.0.0/9")


class Peers:
    """A datapath in a namespace, with so many peers in the kernel."""

    def __init__(self, inside: Callable[[Callable[[], Any]], Any], **config: Any) -> None:
        self.inside, self.clock = inside, Clock()
        self.requests = inside(RequestSocket)
        self.path, self.device = Datapath(V4, self.requests, self.clock, random.Random(1)), TunnelNews()
        self.index = next(link.ifindex for link in self.requests.links() if link.name == "flannel.1")
        own = lease("10.255.255.0/24", "192.168.1.2", "0e:2a:00:00:00:01")
        self.node = node(network=NETWORK, own=own, backend=backend_of(VxlanConfig(**config), V4))

    def load(self, records: list[Lease]) -> None:
        self.path.plan(self.node, "", Leases.of(records))
        self.device.stands(self.path, self.index)
        self.look()
        self.settle()

    def look(self, between: Callable[[], None] = lambda: None) -> None:
        """A whole look; `between` is done after its first slice."""

        def run() -> None:
            more = self.path.resync({})
            between()
            while more:
                more = self.path.resync({})

        self.inside(run)

    def settle(self) -> None:
        while self.path.apply():
            pass

    def there(self) -> tuple[int, int, int]:
        """Routes, neighbours and FDB entries of the device."""
        requests = self.inside(RequestSocket)
        try:
            routes = [route for route in requests.routes(V4) if route.oif == self.index]
            return len(routes), len(requests.neighbours(V4, self.index)), len(requests.fdb(V4, self.index))
        finally:
            requests.close()

    def ip(self, act: Callable[[IPRoute], Any]) -> Any:
        def run() -> Any:
            with IPRoute() as ipr:
                return act(ipr)

        return self.inside(run)


def peer(number: int, mac: str = "", public_ip: str = "") -> Lease:
    high, low = divmod(number, 256)
    return lease(
        f"10.{128 + high}.{low}.0/24", public_ip or f"172.16.{high}.{low}", mac or f"0a:00:00:00:{high:02x}:{low:02x}"
    )


@pytest.fixture
def peers(space, inside) -> Iterator[Peers]:
    made = Peers(inside)
    yield made
    made.requests.close()


def test_a_device_that_goes_down_between_two_slices_of_a_look(peers):
    peers.load([peer(number) for number in range(2000)])
    assert peers.there() == (2000, 2000, 2000)

    def down_and_up() -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=peers.index, state="down")
            ipr.link("set", index=peers.index, state="up")
        peers.device.went_down(peers.path)
        peers.device.set_up(peers.path)

    peers.look(down_and_up)
    peers.settle()
    assert peers.there() == (2000, 2000, 2000)
    assert peers.path.rec.differing() == 0


def test_what_left_during_the_first_look_is_removed(peers):
    """The kernel has it from an earlier run; the dump shows it after its record went."""
    everyone = [peer(number) for number in range(2000)]
    peers.load(everyone)
    peers.path.plan(peers.node, "", Leases.of(everyone))  # nothing is known again
    peers.look(lambda: [peers.path.drop(one.key) for one in everyone[::2]] and None)
    peers.settle()
    peers.look()
    peers.settle()
    assert peers.there() == (1000, 1000, 1000)


@pytest.mark.parametrize("direct", [False, True])
def test_what_somebody_deletes_during_the_first_look_comes_back(space, inside, direct):
    """Also where an extra entry is known, or routes may go directly, and every notification is read the plain way."""
    peers = Peers(inside, direct_routing=direct)
    everyone = [peer(number) for number in range(1500)]
    peers.load(everyone)
    peers.path.plan(peers.node, "", Leases.of(everyone))
    peers.path.rec.extra[NEIGHBOURS][1] = object()

    def delete() -> None:
        peers.path.rec.extra[NEIGHBOURS].clear()
        requests = inside(RequestSocket)
        for one in everyone[1000:]:
            assert one.v4 is not None
            value = peers.path.rec.wanted.value(NEIGHBOURS, one.v4.subnet.base)
            assert not requests.execute([wire.neighbour_delete(V4, 1, one.v4.subnet.base, value, peers.index)], 1)
            added = wire.neighbour_add(V4, 1, one.v4.subnet.base, value, peers.index)
            peers.path.on_neighbour_messages([added[:4] + struct.pack("=H", wire.RTM_DELNEIGH) + added[6:]])
        requests.close()

    def after_routes() -> None:
        """The routes' slices first: the neighbours' dump is what shall be under way."""
        while peers.path.rec.touched is None or not peers.path._resync or kind_of(peers) != NEIGHBOURS:
            peers.path.resync({})
        delete()

    peers.look(after_routes)
    peers.settle()
    assert peers.there()[1] == 1500
    peers.requests.close()


def kind_of(peers: Peers) -> int | None:
    """Of which table the resync under way reads entries."""
    frame = peers.path._resync.gi_yieldfrom.gi_frame  # type: ignore[union-attr]
    return frame.f_locals.get("table")


def test_a_changed_record_touches_what_changed_and_no_more(peers):
    peers.load([peer(number) for number in range(10)])
    writes = peers.path.rec.writes.copy()
    peers.path.put(peer(3, mac="0a:00:00:00:99:99"))
    assert peers.path.rec.differing() == 3, "a neighbour, an FDB entry, and the old FDB entry"
    peers.settle()
    done = peers.path.rec.writes - writes
    assert dict(done) == {"put_neighbour": 1, "put_fdb": 1, "remove_fdb": 1}
    assert not peers.path.rec.in_doubt
    assert peers.there() == (10, 10, 10)


def test_a_list_after_renewals_changes_nothing(peers):
    peers.load([peer(number) for number in range(200)])
    writes = peers.path.rec.writes.copy()
    peers.path.replace(Leases.of(peer(number)._replace(modified=99) for number in range(200)), "")
    assert peers.path.rec.differing() == 0
    peers.settle()
    assert peers.path.rec.writes == writes
    assert not peers.path.rec.in_doubt


def test_a_device_that_somebody_made_anew_is_filled(peers):
    peers.load([peer(number) for number in range(50)])
    old = peers.index

    def anew(ipr: IPRoute) -> None:
        ipr.link("del", index=old)
        lower = ipr.link_lookup(ifname="eth0")[0]
        ipr.link(
            "add", ifname="flannel.1", kind="vxlan", vxlan_id=1, vxlan_link=lower, vxlan_local="192.168.1.2",
            vxlan_port=8472, vxlan_learning=0,
        )  # fmt: skip
        peers.index = ipr.link_lookup(ifname="flannel.1")[0]
        ipr.link("set", index=peers.index, state="up")

    peers.ip(anew)
    assert peers.index != old
    assert peers.device.stands(peers.path, peers.index), "it is to be read: others may have filled it"
    peers.settle()
    assert peers.there() == (50, 50, 50)


@pytest.mark.parametrize("place", ["prepend", "append"])
def test_a_second_route_at_our_key_goes_and_the_looks_end(peers, space, place):
    peers.load([peer(number) for number in range(5)])
    key = next(
        key
        for kind, key, _ in peers.path.rec.wanted.entries(next(iter(peers.path.rec.wanted.peers())))
        if kind == ROUTES
    )
    base = f"10.128.{(key.base >> 8) & 255}.0"
    command = ["ip", "route", place, f"{base}/24", "via", base, "dev", "flannel.1", "onlink", "metric", str(key.metric)]
    subprocess.run(["ip", "netns", "exec", space, *command], check=True)
    assert peers.there()[0] == 6
    for _ in range(6):
        peers.look()
        peers.settle()
        peers.clock.now += 1.0
        if peers.there()[0] == 5 and peers.path.rec.differing() == 0 and not peers.path.rec.in_doubt:
            break
        peers.path.rec.in_doubt = False
    else:
        raise AssertionError(f"after six looks: {peers.there()}, {peers.path.rec.differing()}")
    writes = peers.path.rec.writes.copy()
    peers.look()
    peers.settle()
    assert peers.path.rec.writes == writes, "it rests"


def test_an_fdb_entry_with_a_port_of_its_own_goes(peers, space):
    peers.load([peer(1)])
    for more in (("port", "9999"), ("vni", "77")):
        subprocess.run(
            ["ip", "netns", "exec", space, "bridge", "fdb", "add", "0a:11:11:11:11:11", "dev", "flannel.1", "dst", "9.9.9.9", *more],
            check=True,
        )  # fmt: skip
        assert peers.there()[2] == 2
        peers.look()
        peers.settle()
        assert peers.there()[2] == 1


def test_many_subnets_of_one_mac_cost_what_they_cost_alone():
    """Hostile, or odd: the same VTEP in thousands of records. They are no dispute."""
    from overlay.peers.table import PeerTable

    table = PeerTable(V4, lambda _: None)
    asked = 0
    real = PeerTable.peer

    def counted(self: PeerTable, number: int) -> Lease:
        nonlocal asked
        asked += 1
        return real(self, number)

    PeerTable.peer = counted  # type: ignore[method-assign]
    try:
        table.load(Leases.of(peer(number, mac="0a:00:00:00:00:01", public_ip="172.16.0.1") for number in range(1000)))
    finally:
        PeerTable.peer = real  # type: ignore[method-assign]
    assert len(table.packed) == 1000
    assert asked < 5000, "some for each, and not all for each"


def test_a_peers_entries_are_made_once_for_a_change(peers, monkeypatch):
    peers.load([peer(number) for number in range(10)])
    made: list[Lease] = []
    real = plan.entries
    monkeypatch.setattr(plan, "entries", lambda node, one: made.append(one) or real(node, one))
    peers.path.put(peer(77))
    peers.settle()
    assert [one.key for one in made] == [peer(77).key], "for the difference, for the message and for what asks again"
    made.clear()
    changed = peer(77, mac="0a:00:00:00:99:99")
    peers.path.put(changed)
    peers.settle()
    assert len([one for one in made if one.v4 == changed.v4]) == 1
    assert peers.there() == (11, 11, 11)
