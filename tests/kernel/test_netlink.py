"""Batches, dumps and notifications against the real kernel."""

import errno
import queue
import struct
import subprocess
import threading

import pytest
from pyroute2 import IPRoute

from lease.families import V4, V6
from lease.model import ip_number
from overlay.kernel.events import (
    AddressSeen,
    FdbSeen,
    LinkSeen,
    NeighbourMessages,
    NeighbourSeen,
    Overrun,
    RouteSeen,
    parse_event,
)
from overlay.kernel.monitor import Monitor
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route import wire
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, FdbValue, NeighbourValue, RouteKey, RouteValue
from overlay.kernel.route.lookup import Packet, Way
from overlay.lab import netns
from overlay.reach import explain

BASE, DST, MAC = ip_number("10.244.9.0", 4), ip_number("192.168.1.9", 4), 0x0E2A00000009
KEY = RouteKey(BASE, 24, 10)


def index_of(requests: RequestSocket, name: str = "flannel.1") -> int:
    return next(link.ifindex for link in requests.links() if link.name == name)


@pytest.fixture
def requests(inside):
    made = inside(RequestSocket)
    yield made
    made.close()


def value(via: int = BASE) -> RouteValue:
    return RouteValue(TUNNEL, via, True, PROTOCOL)


def peer(first: int, index: int, n: int = 0) -> list[bytes]:
    base, mac = BASE + (n << 8), MAC + n
    return [
        wire.neighbour_add(V4, first, base, NeighbourValue(mac), index),
        wire.fdb_add(V4, first + 1, mac, FdbValue(DST + n), index),
        wire.route_add(V4, first + 2, RouteKey(base, 24, 10 + n), value(base), index, False),
    ]


def test_a_batch_is_what_dumps_show(requests):
    index = index_of(requests)
    first = requests.take_seqs(300)
    messages = [message for n in range(100) for message in peer(first + 3 * n, index, n)]
    assert requests.execute(messages, first) == {}
    routes = [r for r in requests.routes(V4) if r.oif == index]
    assert len(routes) == len(requests.neighbours(V4, index)) == len(requests.fdb(V4, index)) == 100
    found = next(r for r in routes if r.key == KEY)
    assert (found.via, found.flags & 4, found.protocol, found.unexpected) == (BASE, 4, PROTOCOL, ())
    assert {n.address: n.mac for n in requests.neighbours(V4, index)}[BASE] == MAC
    assert {f.mac: f.dst for f in requests.fdb(V4, index)}[MAC] == DST


def test_errors_are_matched_to_their_message(requests):
    index = index_of(requests)
    first = requests.take_seqs(5)
    messages = [
        wire.neighbour_add(V4, first, BASE, NeighbourValue(MAC), index),
        wire.neighbour_add(V4, first + 1, BASE + 256, NeighbourValue(MAC), 9999),
        wire.route_add(V4, first + 2, RouteKey(BASE + 7, 24, 5), value(), index, False),
        wire.route_delete(V4, first + 3, RouteKey(BASE, 24, 77), value(), index),
        wire.fdb_add(V4, first + 4, MAC, FdbValue(DST), index),
    ]
    refused = requests.execute(messages, first)
    assert set(refused) == {1, 2, 3}
    assert refused[1].errno == errno.ENODEV
    assert refused[3].errno == errno.ESRCH
    assert "EINVAL" in str(refused[2])
    assert len(requests.neighbours(V4, index)) == len(requests.fdb(V4, index)) == 1


def test_a_foreign_route_is_not_replaced_by_a_create(requests, inside):
    index = index_of(requests)

    def foreign() -> None:
        with IPRoute() as ipr:
            ipr.route("add", dst="10.244.9.0/24", oif=ipr.link_lookup(ifname="eth0")[0], priority=10)

    inside(foreign)
    first = requests.take_seqs(1)
    refused = requests.execute([wire.route_add(V4, first, KEY, value(), index, replace=False)], first)
    assert refused[0].errno == errno.EEXIST
    first = requests.take_seqs(1)
    assert requests.execute([wire.route_delete(V4, first, KEY, value(), index)], first)[0].errno == errno.ESRCH, (
        "nor deleted: the protocol differs"
    )


def test_what_is_absent_says_so_in_the_ways_we_take_for_done(requests):
    index = index_of(requests)
    first = requests.take_seqs(3)
    refused = requests.execute(
        [
            wire.route_delete(V4, first, KEY, value(), index),
            wire.neighbour_delete(V4, first + 1, BASE, NeighbourValue(MAC), index),
            wire.fdb_delete(V4, first + 2, MAC, FdbValue(DST), index),
        ],
        first,
    )
    assert [refused[n].errno for n in range(3)] == [errno.ESRCH, errno.ENOENT, errno.ENOENT]


def test_an_error_inside_the_end_of_a_dump_is_not_an_empty_kernel(requests):
    def of_a_device_that_is_not_there(seq: int) -> bytes:
        body = struct.pack("=BBBBBBBBL", wire.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0) + struct.pack(
            "=HHL", 8, wire.RTA_OIF, 9999
        )
        return (
            struct.pack("=LHHLL", 16 + len(body), wire.RTM_GETROUTE, wire.NLM_F_REQUEST | wire.NLM_F_DUMP, seq, 0)
            + body
        )

    with pytest.raises(KernelError) as caught:
        requests.dump(of_a_device_that_is_not_there, wire.parse_route)
    assert caught.value.errno == errno.ENODEV


def test_a_namespace_that_never_had_a_route_has_none(space):
    name = f"{space}-bare"
    netns.create(name)
    try:
        requests = netns.inside(name, RequestSocket)
        assert requests.routes(V4) == []
        requests.close()
    finally:
        netns.delete(name)


def test_a_bad_length_in_mid_batch_ends_in_a_refusal_not_in_a_hang(requests, monkeypatch):
    monkeypatch.setattr("overlay.kernel.netlink.ANSWER_S", 0.3)
    requests._socket.settimeout(0.3)
    index = index_of(requests)
    first = requests.take_seqs(3)
    messages = [wire.neighbour_add(V4, first + n, BASE + n, NeighbourValue(MAC), index) for n in range(3)]
    messages[1] = (5000).to_bytes(4, "little") + messages[1][4:]
    refused = requests.execute(messages, first)
    assert set(refused) == {0, 1, 2}, "no answer came: all are looked at again"


def test_lookups(requests):
    index = index_of(requests, "eth0")
    assert requests.lookup(V4, ip_number("192.168.1.77", 4)) == Way(index, ip_number("192.168.1.2", 4), 0)
    assert requests.lookup(V4, ip_number("203.0.113.1", 4)) is None
    assert requests.way(V4, Packet(ip_number("203.0.113.1", 4))).error == errno.ENETUNREACH
    bound = requests.lookup(V4, ip_number("203.0.113.1", 4), oif=index)
    assert bound is not None and bound.table == 0, "none matched: it is believed to be on the link"


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_rules_and_tables_of_others(requests, inside, family):
    subnet, host = {4: ("10.9.0.0/16", "10.9.1.1"), 6: ("fd09::/32", "fd09::1")}[family.number]
    six = "-6" if family.number == 6 else "-4"
    inside(lambda: subprocess.run(
        ["sh", "-ec", f"""ip {six} route add {subnet} dev eth0 table 52
ip {six} route add blackhole {subnet} table 53
ip {six} rule add pref 5270 lookup 52
ip {six} rule add pref 6000 not fwmark 0x1/0xf iif eth0 lookup 53 suppress_prefixlength 0
ip {six} rule add pref 10 to {subnet} fwmark 0x7 blackhole"""], check=True))  # fmt: skip
    index, address = index_of(requests, "eth0"), ip_number(host, family.number)
    found = {rule.priority: rule for rule in requests.rules(family)}
    assert sorted(found) == list(found), "in the order in which they are asked"
    assert explain.rule_text(family, found[5270]) == "from all lookup 52"
    assert explain.rule_text(family, found[6000]) == "not from all fwmark 0x1/0xf iif eth0 lookup 53"
    assert found[6000].suppress == 0
    assert explain.rule_text(family, found[10]) == f"from all to {subnet} fwmark 0x7 blackhole"
    (route,) = requests.routes_of(family, 52)
    assert explain.route_text(family, route, {index: "eth0"}) == f"{subnet} dev eth0"
    assert explain.route_text(family, requests.routes_of(family, 53)[0], {}) == f"blackhole {subnet}"
    assert requests.routes_of(family, 99) == []
    way = requests.way(family, Packet(address))
    assert (way.oif, way.table, way.error) == (index, 52, 0)
    assert requests.way(family, Packet(address, mark=7)).error == errno.EINVAL


def test_links_and_addresses(requests):
    links = {link.name: link for link in requests.links()}
    assert links["flannel.1"].kind == "vxlan"
    assert links["eth0"].kind == "veth"
    assert links["eth0"].arp
    assert links["lo"].loopback
    assert not links["lo"].arp
    found = {a.address: a for a in requests.addresses(V4) if a.oif == links["eth0"].ifindex}
    assert found[ip_number("192.168.1.2", 4)].length == 24
    assert found[ip_number("192.168.1.2", 4)].permanent


@pytest.fixture
def heard(inside, requests, monkeypatch):
    """Events as they come, and the monitor."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    died: list = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    monitor = inside(lambda: Monitor(events.put, requests.port))
    monitor.start()
    yield events
    monitor.stop()
    assert not died


MARK = 1399


def drain(events, inside) -> list:
    """All that comes before a change that is made now to eth0: the kernel notifies in order."""

    def make() -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=ipr.link_lookup(ifname="eth0")[0], mtu=MARK)

    inside(make)
    found = []
    while not (found and isinstance(found[-1], LinkSeen) and found[-1].link.mtu == MARK):
        found.append(events.get(timeout=10))
    return found[:-1]


def neighbour_events(told: list) -> list:
    """What notifications that came together say one by one."""
    groups = [event.messages for event in told if isinstance(event, NeighbourMessages)]
    parsed = [parse_event(message) for group in groups for data in group for message in wire.split(data)]
    return [event for event in parsed if event is not None]  # before 6.13 rtnetlink tells of an FDB entry once more


def test_our_own_routes_and_neighbours_are_not_told_back(requests, heard, inside):
    index = index_of(requests)
    first = requests.take_seqs(3)
    assert requests.execute(peer(first, index), first) == {}
    told = drain(heard, inside)
    changes = [type(event) for event in told if not isinstance(event, LinkSeen)]  # a link's come late
    assert changes == [NeighbourMessages], "FDB events bear no sender; the others are filtered in the kernel"
    assert [type(event) for event in neighbour_events(told)] == [FdbSeen], neighbour_events(told)


def test_what_others_do_is_told(requests, heard, inside):
    def others() -> None:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname="flannel.1")[0]
            ipr.route("add", dst="10.244.9.0/24", gateway="10.244.9.0", oif=index, flags="onlink", priority=10)
            ipr.neigh("add", dst="10.244.9.0", lladdr="0e:2a:00:00:00:09", ifindex=index, state="permanent")
            ipr.fdb("add", ifindex=index, lladdr="0e:2a:00:00:00:09", dst="192.168.1.9")
            ipr.addr("add", index=index, address="10.244.2.0", prefixlen=32)
            ipr.route("del", dst="10.244.9.0/24", priority=10)
            ipr.link("set", index=index, state="down")
            ipr.link("del", index=index)

    inside(others)
    told = drain(heard, inside)
    told += neighbour_events(told)
    kinds = [(type(event).__name__, getattr(event, "gone", None)) for event in told]
    for expected in (
        ("RouteSeen", False),
        ("NeighbourSeen", False),
        ("FdbSeen", False),
        ("AddressSeen", False),
        ("RouteSeen", True),
        ("LinkSeen", False),
        ("NeighbourSeen", True),
        ("FdbSeen", True),
        ("LinkSeen", True),
    ):
        assert expected in kinds
    route = next(event for event in told if isinstance(event, RouteSeen)).route
    assert route.key == KEY
    assert (
        next(event.link.up for event in told if isinstance(event, LinkSeen) and event.link.name == "flannel.1") is False
    )
    assert any(isinstance(event, AddressSeen) for event in told)
    assert any(isinstance(event, NeighbourSeen) for event in told)


def test_lost_events_are_told(requests, inside):
    events: queue.SimpleQueue = queue.SimpleQueue()
    monitor = inside(lambda: Monitor(events.put, 0))
    import socket

    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    index = index_of(requests)
    for n in range(30):
        first = requests.take_seqs(3)
        requests.execute(peer(first, index, n), first)
    monitor.start()
    while not isinstance(events.get(timeout=10), Overrun):
        pass
    monitor.stop()


def test_a_stopped_monitor_has_ended_before_its_socket_is_closed(requests, inside):
    """A thread that still waits at a closed socket reads from the file that gets its number next."""
    monitor = inside(lambda: Monitor(lambda _event: None, requests.port))
    monitor.start()
    assert monitor.is_alive()
    monitor.stop()
    assert not monitor.is_alive()


@pytest.mark.parametrize("form", ["scope link", "tos 0x10 scope link", "scope host", "mtu 900 scope link"])
def test_a_route_of_ours_that_somebody_made_in_another_form_goes(inside, requests, form):
    """With our own scope the kernel would say that there is none, and the route would stay for ever."""
    index = index_of(requests)
    command = ["ip", "route", "add", "10.244.9.0/24", "dev", "flannel.1", "metric", "10", "proto", str(PROTOCOL)]
    inside(lambda: subprocess.run([*command, *form.split()], check=True))
    [found] = [route for route in requests.routes(V4) if route.protocol == PROTOCOL]
    first = requests.take_seqs(1)
    message = wire.route_delete(
        V4, first, found.key, RouteValue(TUNNEL, found.via, True, found.protocol, found.unexpected), index
    )
    assert requests.execute([message], first) == {}
    assert [route for route in requests.routes(V4) if route.protocol == PROTOCOL] == []
