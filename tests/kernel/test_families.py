"""Tables, links, notifications and nftables sets of both families, on the kernel: the same tests for each."""

from __future__ import annotations

import queue
import subprocess
from typing import Any, NamedTuple

import pytest
from pyroute2 import IPRoute

from lease.backend_config import VxlanConfig
from lease.families import V4, V6, Family
from lease.model import Endpoint, Prefix, ip_number, ip_text, prefix
from overlay.backends.base import Entry, Outer, View
from overlay.backends.vxlan import Vxlan
from overlay.firewall import guard
from overlay.firewall.guard import Guard
from overlay.kernel import events
from overlay.kernel.monitor import Monitor
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route import wire
from overlay.kernel.route.entries import TUNNEL, FdbValue, RouteValue
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.kernel.route.links import Links
from overlay.kernel.table import Where
from tests.support.wait import until


class World(NamedTuple):
    """A vxlan device of a family in a namespace. inside: runs something there."""

    family: Family
    network: Prefix
    inside: Any
    requests: RequestSocket
    index: int

    def peer(self, number: int) -> Endpoint:
        if self.family is V4:
            return Endpoint(
                prefix(f"10.244.{number}.0/24"), ip_number(f"192.168.1.{number}", 4), 1, 0x0A << 40 | number
            )
        return Endpoint(
            prefix(f"fd00:10:244:{number:x}::/64"), ip_number(f"fd01::{number:x}", 6), 1, 0x0A << 40 | number
        )

    def entries(self, number: int) -> list[Entry]:
        return Vxlan(VxlanConfig(), self.family).entries(View(self.family, self.network, ()), self.peer(number))

    def send(self, entries: list[Entry], replace: bool = False, remove: bool = False) -> dict[int, Any]:
        first = self.requests.take_seqs(len(entries))
        tables = Vxlan(VxlanConfig(), self.family).tables
        messages = [
            tables[table].remove(first + place, key, value, self.index)
            if remove
            else tables[table].put(first + place, key, value, self.index, replace)
            for place, (table, key, value) in enumerate(entries)
        ]
        return self.requests.execute(messages, first)

    def found(self) -> set[Entry]:
        """All entries of ours, as the tables tell them."""
        where = Where({self.index: TUNNEL}, (self.network.base, self.network.last), lambda _key: False)
        there: set[Entry] = set()
        for number, table in enumerate(Vxlan(VxlanConfig(), self.family).tables):
            for item in self.requests.dump(lambda seq, table=table: table.dump(seq, self.index), table.parse):
                if (entry := table.ours(item, where)) is not None:
                    there.add((number, *entry))
        return there


@pytest.fixture(params=[V4, V6], ids=["IPv4", "IPv6"])
def world(request, inside):
    family: Family = request.param
    name, local = ("flannel.9", "192.168.1.2") if family is V4 else ("flannel-v6.9", "fd01::2")
    own = ip_number("10.244.2.0" if family is V4 else "fd00:10:244:2::", family.number)

    def build() -> int:
        with IPRoute() as ipr:
            lower = ipr.link_lookup(ifname="eth0")[0]
            if family is V6:
                ipr.addr("add", index=lower, address=local, prefixlen=64, flags=2)  # IFA_F_NODAD
        links = Links(family)
        links.create(
            VxlanDevice(name, 9, 8473, ip_number(local, family.number), lower, 1430, 0x0E2A00000009, False, False)
        )
        found = links.read(name)
        assert found is not None
        assert ip_text(family.number, found.local) == local
        assert (found.vni, found.port, found.lower, found.mtu) == (9, 8473, lower, 1430)
        links.set_up(found.ifindex)
        links.add_address(found.ifindex, own, family.bits)
        links.close()
        return found.ifindex

    network = prefix("10.244.0.0/16" if family is V4 else "fd00:10:244::/48")
    made = World(family, network, inside, inside(RequestSocket), inside(build))
    yield made
    made.requests.close()


def test_addresses_are_read_with_their_length(world):
    mine = [a for a in world.requests.addresses(world.family) if a.oif == world.index and a.scope == 0]
    own = ip_number("10.244.2.0" if world.family is V4 else "fd00:10:244:2::", world.family.number)
    assert [(a.address, a.length, a.permanent) for a in mine] == [(own, world.family.bits, True)]


def test_entries_that_are_put_are_what_dumps_show(world):
    wanted = [entry for number in range(3, 40) for entry in world.entries(number)]
    assert world.send(wanted) == {}
    assert world.found() == set(wanted)
    there = world.requests.lookup(world.family, world.peer(3).subnet.base + 7)
    assert there is not None
    assert there[0] == world.index


def test_an_entry_is_replaced_in_place_and_removed(world):
    wanted = world.entries(3)
    assert world.send(wanted) == {}
    moved = [wanted[0], (1, wanted[1][1], FdbValue(world.peer(4).public_ip)), wanted[2]]
    assert world.send(moved, replace=True) == {}
    assert world.found() == set(moved)
    assert world.send(moved, remove=True) == {}
    assert world.found() == set()
    refused = world.send(wanted[2:], remove=True)
    assert refused[0].errno == 3, "ESRCH"


def test_a_route_that_stands_is_not_made_again(world):
    wanted = world.entries(3)
    assert world.send(wanted) == {}
    assert world.send(wanted[2:])[0].errno == 17, "EEXIST"


def test_what_others_do_is_told_by_family(world):
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    monitor = world.inside(lambda: Monitor(inbox.put, 1, (V4, V6)))
    monitor.start()
    try:
        wanted = world.entries(3)
        assert world.send(wanted) == {}
        assert world.send(wanted, remove=True) == {}
        routes: list[tuple[Any, bool]] = []
        others: set[tuple[type, bool, int]] = set()

        def told() -> bool:
            while not inbox.empty():
                event = inbox.get()
                if isinstance(event, events.RouteSeen) and event.route.oif == world.index:
                    assert event.family == world.family.number
                    if event.route.key == wanted[2][1]:
                        routes.append((event.route.via, event.gone))
                if isinstance(event, events.NeighbourMessages):
                    for data in event.messages:
                        for message in wire.split(data):
                            seen = events.parse_event(message, (world.family,))
                            if isinstance(seen, events.NeighbourSeen | events.FdbSeen):
                                others.add((type(seen), seen.gone, seen.family))
            number = world.family.number
            both = {(kind, gone, number) for kind in (events.NeighbourSeen, events.FdbSeen) for gone in (False, True)}
            return routes == [(wanted[2][2].via, False), (wanted[2][2].via, True)] and both <= others

        until("all is told", told)
    finally:
        monitor.stop()


def test_a_route_of_anothers_is_not_ours(world):
    base, length = ("10.244.77.0", 24) if world.family is V4 else ("fd00:10:244:77::", 64)

    def foreign() -> None:
        with IPRoute() as ipr:
            ipr.route("add", dst=f"{base}/{length}", oif=world.index, proto=4, family=world.family.af)

    world.inside(foreign)
    assert world.found() == set()
    assert any(route.key.base == ip_number(base, world.family.number) for route in world.requests.routes(world.family))


def test_a_direct_route_leads_by_the_underlay(world):
    lower = next(link.ifindex for link in world.requests.links() if link.name == "eth0")
    key = world.entries(3)[2][1]
    table = Vxlan(VxlanConfig(), world.family).tables[2]
    first = world.requests.take_seqs(1)
    value = RouteValue(1, world.peer(3).public_ip, False, 111)
    assert world.requests.execute([table.put(first, key, value, lower, False)], first) == {}
    (there,) = [route for route in world.requests.routes(world.family) if route.key == key]
    where = Where({lower: 1}, (world.network.base, world.network.last), lambda _key: False)
    assert table.ours(there, where) == (key, value)


def nft(*words: str) -> str:
    return subprocess.run(["nft", *words], capture_output=True, text=True, check=True).stdout


def test_the_guards_table_and_its_set(world):
    family = world.family
    sets = world.inside(NetfilterSocket)
    try:
        wanted = guard.table(
            family, 9, Outer(17, 8473, 9), guard.Where(world.network, world.peer(250).subnet, "flannel.9")
        )
        made = Guard(family, sets, lambda: 0.0)
        made.ensure(wanted)
        assert sets.is_formed(wanted)
        listed = world.inside(lambda: nft("list", "table", family.nft, wanted.name))
        assert f"{family.nft} saddr {world.network} {family.nft} daddr != {world.network}" in listed
        key = "ipv4_addr" if family is V4 else "ipv6_addr"
        assert f"type {key}" in listed
        keys = [family.packed(world.peer(number).public_ip) for number in range(3, 300 if family is V6 else 200)]
        sets.change(wanted, {guard.VTEPS: keys}, {})
        assert sorted(sets.elements(wanted, wanted.sets[0])) == sorted(keys)
        sets.change(wanted, {}, {guard.VTEPS: keys[:-1]})
        shown = ip_text(family.number, int.from_bytes(keys[-1], "big"))
        assert shown in world.inside(lambda: nft("list", "set", family.nft, wanted.name, guard.VTEPS))
    finally:
        sets.close()
