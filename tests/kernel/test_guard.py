"""The guard's table in a real kernel: as nft lists it, changed by what changes, an address that leaves given its time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lease.families import V4
from lease.model import Endpoint, Lease, ip_number, prefix
from lease.records.packed import pack
from overlay.backends.base import Outer
from overlay.firewall import guard
from overlay.firewall.guard import Guard
from overlay.firewall.let_in import GRACE_S
from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.route import wire

NETWORK = prefix("10.244.0.0/14")
HERE = guard.Where(NETWORK, prefix("10.244.200.0/24"), "flannel.7", alone=False)
TABLE = guard.table(V4, 7, Outer(17, 8472, 7), HERE)


def nft(*words: str) -> str:
    done = subprocess.run(["nft", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def vteps() -> list[str]:
    listed = json.loads(nft("-j", "list", "set", "ip", TABLE.name, "vteps"))["nftables"]
    return sorted(listed[1]["set"].get("elem", []))


def peer(number: int, public_ip: str, source: int = 0) -> Lease:
    subnet = prefix(f"10.244.{number}.0/24")
    end = Endpoint(subnet, ip_number(public_ip, 4), 7, number + 1, source)
    return Lease(f"10.244.{number}.0-24", "vxlan", end, None, "", number, number, 0)


@pytest.fixture
def made(sets, clock) -> Guard:
    return Guard(V4, sets, clock)


def test_nft_lists_what_is_meant(inside, sets):
    inside(lambda: sets.replace(TABLE, {"vteps": [b"\xc0\xa8\x01\x02"]}))
    text = " ".join(inside(lambda: nft("-s", "list", "table", "ip", TABLE.name)).split())
    for words in (
        "set vteps { type ipv4_addr elements = { 192.168.1.2 } }",
        "set pod_interfaces { type iface_index }",
        "set unknown_senders { type ipv4_addr size 64 flags dynamic,timeout timeout 10m }",
        "type filter hook input priority raw; policy accept; udp dport 8472 iif @pod_interfaces",
        'udp dport 8472 @th,96,24 0x7 ip saddr != @vteps goto unknown comment "VXLAN from no peer"',
        'chain unknown { update @unknown_senders { ip saddr timeout 10m } comment "remember the sender"',
        'counter name "from_unknown_senders" drop comment "refuse" }',
        'chain beside { update @beside_sources { ip saddr timeout 10m } comment "remember the sender"',
        'counter name "beside_the_tunnel" drop comment "refuse" }',
        'udp dport 8472 ip saddr 10.244.0.0/14 ip daddr != 10.244.0.0/14 counter name "from_pods" drop',
        'udp dport 8472 ip daddr @vteps counter name "forwarded" drop comment "VXLAN of others to a peer"',
        "type filter hook postrouting priority 300; policy accept; udp sport 8472 udp dport != 8472 ip daddr @vteps",
        'ip saddr 10.244.0.0/14 ip saddr != 10.244.200.0/24 ip daddr 10.244.0.0/14 iifname != "flannel.7" iif != "lo"',
        'iif != "lo" iif != @pod_interfaces iif != @pod_veths goto beside',
        "ip saddr 10.244.200.0/24 ip daddr 10.244.0.0/14 iif @elsewhere goto beside",
    ):
        assert words in text


def test_the_form_follows_where_the_node_is(inside, sets):
    here = HERE._replace(nodes=(prefix("10.246.0.0/16"),), alone=True, direct=24)
    table = guard.table(V4, 7, Outer(17, 8472, 7), here)
    inside(lambda: sets.replace(table, {guard.DIRECT: [b"\x0a\xf4\x05\0"]}))
    assert sets.is_formed(table)
    assert not sets.is_formed(TABLE)
    text = " ".join(inside(lambda: nft("-s", "list", "table", "ip", TABLE.name)).split())
    nodes = "ip saddr != 10.246.0.0/16 ip daddr != 10.246.0.0/16"
    for words in (
        'udp dport 8472 ip saddr != @vteps goto unknown comment "VXLAN from no peer"',
        "set direct_subnets { type ipv4_addr elements = { 10.244.5.0 } }",
        f'ip daddr 10.244.0.0/14 {nodes} iifname != "flannel.7" iif != "lo" iif != @pod_interfaces',
        "iif != @pod_veths ip saddr & 255.255.255.0 != @direct_subnets goto beside",
        f"ip saddr 10.244.200.0/24 ip daddr 10.244.0.0/14 {nodes} iif @elsewhere",
    ):
        assert words in text, text


def test_subnets_of_peers_that_may_be_reached_directly(inside, made, clock):
    """Those with a public IP on the link; of another length, by the network's."""
    here = HERE._replace(direct=24)
    table = guard.table(V4, 7, Outer(17, 8472, 7), here)

    def direct() -> list[str]:
        return sorted(
            json.loads(nft("-j", "list", "set", "ip", TABLE.name, guard.DIRECT))["nftables"][1]["set"].get("elem", [])
        )

    there, away = peer(1, "192.168.1.2"), peer(2, "172.16.0.3")
    wide = there._replace(v4=there.v4._replace(subnet=prefix("10.244.4.0/23")), key="w")
    narrow = there._replace(v4=there.v4._replace(subnet=prefix("10.244.9.128/25")), key="n")
    peers = [pack(there), pack(away), pack(wide)]
    made.load(peers)
    made.reached_directly(24, (prefix("192.168.1.0/24"),))
    made.ensure(table)
    assert inside(direct) == ["10.244.1.0", "10.244.4.0", "10.244.5.0"]
    made.peer_changed(None, narrow)
    made.apply()
    assert inside(direct) == ["10.244.1.0", "10.244.4.0", "10.244.5.0", "10.244.9.0"]
    made.peer_changed(wide, None)
    peers.remove(pack(wide))
    peers.append(pack(narrow))
    clock.now += GRACE_S
    made.apply()
    assert inside(direct) == ["10.244.1.0", "10.244.9.0"]
    made.reached_directly(24, (prefix("172.16.0.0/12"),))
    clock.now += GRACE_S
    made.apply()
    assert inside(direct) == ["10.244.2.0"]
    assert inside(vteps) == ["172.16.0.3", "192.168.1.2"]
    made.reached_directly(0, ())
    made.ensure(TABLE)
    assert not made.has_changes()
    assert made.next_change() is None, "of a set that is gone nothing is due"


def test_a_set_that_the_table_has_no_more_asks_for_nothing(inside, made, sets):
    """Else the loop would be asked at once, for ever: peers change, and nobody can let them in."""
    direct = guard.table(V4, 7, Outer(17, 8472, 7), HERE._replace(direct=24))
    peers = [pack(peer(1, "192.168.1.2"))]
    made.load(peers)
    made.reached_directly(24, (prefix("192.168.1.0/24"),))
    made.ensure(direct)
    sets.replace(TABLE, {"vteps": []})  # as an agent before us left it
    made.ensure(TABLE)
    made.peer_changed(None, peer(2, "192.168.1.3"))
    made.apply()
    assert inside(vteps) == ["192.168.1.2", "192.168.1.3"]
    assert not made.has_changes()


def test_every_alteration_of_the_form_is_seen(inside, sets):
    sets.replace(TABLE, {})
    assert sets.is_formed(TABLE)
    name = TABLE.name
    for change in (
        f"add rule ip {name} input accept", f"insert rule ip {name} unknown accept", f"flush chain ip {name} beside", f"insert rule ip {name} forward counter", f"flush chain ip {name} forward",
        f"add chain ip {name} more", f"delete table ip {name}", f"add set ip {name} more {{ type ipv4_addr; }}",
        f"chain ip {name} input {{ policy drop; }}",
        f"replace rule ip {name} input handle HANDLE udp dport 8472 drop",
        f"replace rule ip {name} input handle HANDLE udp dport 8472 iif @pod_interfaces counter name \"from_pods\" accept",
        f"replace rule ip {name} input handle HANDLE udp dport 8472 iif != @pod_interfaces counter name \"from_pods\" drop",
        f"replace rule ip {name} input handle HANDLE udp dport 8473 iif @pod_interfaces counter name \"from_pods\" drop",
        f"delete rule ip {name} input handle HANDLE", f"add counter ip {name} more",
        f"add table ip {name} {{ flags dormant; }}", f"delete chain ip {name} input",
    ):  # fmt: skip
        listed = inside(lambda: json.loads(nft("-j", "list", "table", "ip", name)))["nftables"]
        handle = next(item["rule"]["handle"] for item in listed if item.get("rule", {}).get("chain") == "input")
        inside(lambda change=change, handle=handle: nft(change.replace("HANDLE", str(handle))))
        assert not sets.is_formed(TABLE), change
        sets.replace(TABLE, {})
        assert sets.is_formed(TABLE), change
    sets.remove(TABLE.family, TABLE.name)
    sets.remove(TABLE.family, TABLE.name)
    assert not sets.is_formed(TABLE)
    assert sets.elements(TABLE, TABLE.sets[0]) == []


def test_a_refused_transaction_changes_nothing_and_says_why(sets):
    with pytest.raises(KernelError, match="sets of nft table ip overlay-7-guard: ENOENT"):
        sets.change(TABLE, {"vteps": [b"\1\2\3\4"]}, {})
    sets.replace(TABLE, {"vteps": [b"\1\2\3\4"]})
    with pytest.raises(KernelError, match="ENOENT"):
        sets.change(TABLE, {"vteps": [b"\1\2\3\5"], "pod_interfaces": [b"\1\0\0\0"]}, {"vteps": [b"\1\2\3\6"]})
    assert sets.elements(TABLE, TABLE.sets[1]) == []
    assert sets.elements(TABLE, TABLE.sets[0]) == [b"\1\2\3\4"]


def test_more_elements_than_one_message_holds(sets):
    keys = {number.to_bytes(4, "big") for number in range(1, 9_001)}
    sets.replace(TABLE, {"vteps": keys})
    assert set(sets.elements(TABLE, TABLE.sets[0])) == keys


def test_a_message_that_holds_other_things_than_keys_is_read():
    """As a set whose elements have a timeout or a comment."""
    element = nf_wire.nest(1, nf_wire.nest(1, wire.attr(1, b"\1\2\3\4")) + nf_wire.word(5, 9))
    body = b"\2\0\0\0" + nf_wire.nest(3, element + nf_wire.nest(1, b""))
    assert nf_wire.elements(memoryview(body), 4) == [b"\1\2\3\4"]
    assert nf_wire.elements(memoryview(b"\2\0\0\0"), 4) == []


def test_an_address_that_leaves_is_given_its_time(inside, made, clock):
    one, two = peer(1, "192.168.1.2"), peer(2, "192.168.1.3")
    made.load([pack(one), pack(two)])
    made.ensure(TABLE)
    assert inside(vteps) == ["192.168.1.2", "192.168.1.3"]
    made.peer_changed(one, None)
    made.apply()
    assert inside(vteps) == ["192.168.1.2", "192.168.1.3"]
    assert made.next_change() == clock.now + GRACE_S
    clock.now += GRACE_S
    made.apply()
    assert inside(vteps) == ["192.168.1.3"]
    made.peer_changed(None, one)
    made.peer_changed(two, None)
    clock.now += GRACE_S - 1
    made.peer_changed(None, two)  # back in time
    clock.now += 2
    made.apply()
    assert inside(vteps) == ["192.168.1.2", "192.168.1.3"]
    assert made.next_change() is None


def test_an_address_of_two_peers_stays_for_the_other(inside, made, clock):
    one, two = peer(1, "192.168.1.2"), peer(2, "192.168.1.2", ip_number("192.168.9.9", 4))
    made.load([pack(one), pack(two)])
    made.ensure(TABLE)
    assert inside(vteps) == ["192.168.1.2", "192.168.9.9"]
    made.peer_changed(one, None)
    clock.now += GRACE_S
    made.apply()
    assert inside(vteps) == ["192.168.1.2", "192.168.9.9"]
    made.peer_changed(two, peer(2, "192.168.1.2"))
    clock.now += GRACE_S
    made.apply()
    assert inside(vteps) == ["192.168.1.2"]


def test_a_new_agent_gives_time_to_what_it_finds_and_writes_nothing(inside, made, sets, clock):
    one, two = peer(1, "192.168.1.2"), peer(2, "192.168.1.3")
    made.load([pack(one), pack(two)])
    made.ensure(TABLE)
    again = Guard(V4, sets, clock)
    again.load([pack(one)])
    before = inside(lambda: nft("-a", "list", "table", "ip", TABLE.name))
    again.ensure(TABLE)
    assert inside(lambda: nft("-a", "list", "table", "ip", TABLE.name)) == before
    clock.now += GRACE_S
    again.apply()
    assert inside(vteps) == ["192.168.1.2"]


def test_what_somebody_took_away_first_is_read_again(inside, made, clock):
    one, two = peer(1, "192.168.1.2"), peer(2, "192.168.1.3")
    made.load([pack(one), pack(two)])
    made.ensure(TABLE)
    inside(lambda: nft(f"delete element ip {TABLE.name} vteps {{ 192.168.1.2 }}"))
    made.peer_changed(one, None)
    made.peer_changed(None, peer(3, "192.168.1.4"))
    clock.now += GRACE_S
    with pytest.raises(KernelError, match="ENOENT"):
        made.apply()
    made.ensure(TABLE)
    assert inside(vteps) == ["192.168.1.3", "192.168.1.4"]
    assert made.mended == 1


@pytest.mark.parametrize("command", ["flush set ip TABLE pod_interfaces", "add element ip TABLE pod_interfaces { 1 }"])
def test_an_alteration_of_the_pods_interfaces_is_seen_by_the_check(inside, made, sets, command):
    made.load([])
    made.attached({guard.POD_INTERFACES: frozenset({2, 3})})
    made.ensure(TABLE)
    made.begin_check(TABLE)

    def rest() -> None:  # it has a socket of its own
        while made.check_slice():
            pass

    inside(rest)
    assert made.mended == 0
    inside(lambda: nft(command.replace("TABLE", TABLE.name)))
    made.begin_check(TABLE)
    there = {int.from_bytes(key, sys.byteorder) for key in sets.elements(TABLE, TABLE.sets[1])}
    assert (there, made.mended) == ({2, 3}, 1)


def test_another_vni_takes_the_table_of_the_first_away(inside, made):
    made.load([pack(peer(1, "192.168.1.2"))])
    made.ensure(TABLE)
    made.ensure(guard.table(V4, 8, Outer(17, 8472, 8), HERE))
    assert "overlay-8-guard" in inside(lambda: nft("list", "tables"))
    assert "overlay-7-guard" not in inside(lambda: nft("list", "tables"))
    made.ensure(TABLE)
    assert inside(lambda: nft("list", "tables")) == f"table ip {TABLE.name}\n"


def test_a_check_in_slices_finds_what_no_event_told(inside, made, clock):
    """Its own changes in the middle of it are no drift; what somebody did is mended."""
    peers = [peer(1 + n % 250, f"10.{n >> 8}.{n & 255}.9") for n in range(5000)]
    made.load([pack(one) for one in peers])
    made.ensure(TABLE)
    made.begin_check(TABLE)
    slices = 0
    while inside(made.check_slice):
        slices += 1
    assert slices >= 2
    assert made.mended == 0
    inside(lambda: nft(f"delete element ip {TABLE.name} vteps {{ 10.3.7.9, 10.4.4.9 }}"))
    inside(lambda: nft(f"add element ip {TABLE.name} vteps {{ 172.16.0.1 }}"))
    made.begin_check(TABLE)
    while inside(made.check_slice):
        pass
    assert made.mended == 1
    assert {"10.3.7.9", "10.4.4.9", "172.16.0.1"} <= set(inside(vteps))
    clock.now += GRACE_S
    made.apply()
    assert "172.16.0.1" not in inside(vteps)
    made.begin_check(TABLE)
    assert inside(made.check_slice)
    made.peer_changed(peers[0], peer(1, "10.99.99.99"))
    clock.now += GRACE_S
    made.apply()
    while inside(made.check_slice):
        made.apply()
    assert made.mended == 1
    assert "10.99.99.99" in inside(vteps)


def test_a_huge_subnet_of_a_peer_stands_for_so_many_keys_and_no_more(made):
    """A record may name any length; it is refused as a peer elsewhere."""
    made.reached_directly(30, (prefix("192.168.1.0/24"),))
    one = peer(1, "192.168.1.2")
    wide = one.v4._replace(subnet=prefix("0.0.0.0/1"))
    assert len(made._direct_keys(wide)) == guard.MOST_KEYS
