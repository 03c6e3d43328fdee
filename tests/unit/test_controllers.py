"""Each controller alone, on a kernel in memory: what it does (what it wants: test_wants.py)."""

from __future__ import annotations

from typing import Any

import pytest

from lease.config import parse_config
from lease.model import Refused, ip_number
from lease.records.annotations import Hints
from lease.records.packed import Leases
from lease.store import Changes, ConfigText, Gone, Snapshot, StoreDown
from lease.tenure.events import Denied, Held, Lost, Renewed
from overlay.cni.lists import CONFLIST
from overlay.control.controller import CannotReconcile
from overlay.control.inputs import Tunnel
from overlay.control.schedule import Schedule
from overlay.firewall import antispoof, guard
from overlay.firewall.worker import Finished
from overlay.kernel import events, netlink
from overlay.kernel.nftables import program
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.node import sysctls
from overlay.node.underlay import UnderlayError
from overlay.process.watched import FileText
from tests.support.bench import CONFIG, OTHER_MTU, RETAINED, Bench
from tests.support.fakes import address, by_index, link
from tests.support.make import lease


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


# --- this machine


def test_links_are_read_when_one_is_told(bench):
    controller = bench.links()
    bench.kernel.there[9] = link(9, "veth9")
    assert bench.tell(controller, events.LinkSeen(link(9, "veth9"), gone=False))
    bench.reconcile(controller)
    assert bench.current.inputs.links == bench.kernel.there
    bench.kernel.refuse = 1
    with pytest.raises(OSError, match="links"):
        bench.reconcile(controller)


def test_the_underlay_is_kept_while_its_address_is_there(bench):
    controller = bench.underlay()
    bench.current.set(underlays={})
    bench.reconcile(controller)
    assert bench.current.inputs.underlays[4].local == ip_number("192.168.1.2", 4)
    bench.current.set(links=by_index([link(2, "eth0", mac=5)]))
    bench.reconcile(controller)
    assert (bench.current.inputs.underlays[4].mac, bench.posted) == (5, [])
    moved = address(2, "192.168.1.3")
    bench.current.set(addresses={4: {(2, moved.address, 24): moved}})
    bench.reconcile(controller)
    assert bench.posted == ["moved"], "the store's connection is made anew"
    bench.current.set(addresses={})
    with pytest.raises(UnderlayError, match="no IPv4 address"):
        bench.reconcile(controller)
    assert bench.current.inputs.underlays[4].local == moved.address, "and what was chosen stays"


def test_the_device_is_made_told_and_made_again(bench):
    controller = bench.device()
    bench.current.set(tunnels={})
    bench.reconcile(controller)
    tunnel = bench.current.inputs.tunnels[4]
    assert (tunnel.name, tunnel.up, tunnel.rising, tunnel.makes) == ("flannel.1", True, True, 1)
    assert [word for word in bench.kernel.done if word.startswith(("create", "up", "address"))] == [
        "create flannel.1", f"up {tunnel.ifindex}", "address 32",
    ]  # fmt: skip
    there = bench.kernel.there[tunnel.ifindex]
    bench.tell(controller, events.LinkSeen(there._replace(up=False), gone=False))
    assert bench.current.inputs.tunnels[4] == tunnel, "how it was before we set it up"
    bench.tell(controller, events.LinkSeen(there, gone=False))
    assert bench.tell(controller, events.LinkSeen(there._replace(up=False), gone=False))
    seen = bench.current.inputs.tunnels[4]
    assert (seen.up, seen.rising, seen.downs, seen.makes) == (False, False, tunnel.downs + 1, 1)
    bench.kernel.delete(tunnel.ifindex)
    assert bench.tell(controller, events.LinkSeen(there, gone=True))
    assert bench.current.inputs.tunnels[4].ifindex == 0
    bench.reconcile(controller)
    assert bench.current.inputs.tunnels[4].makes == 3
    assert controller.counters() == {"mended_device": 1}, "one deletion, told twice"


def test_a_device_that_another_agent_keeps_is_left_to_it(bench):
    controller = bench.device()
    bench.lock.other = 77
    bench.reconcile(controller)
    assert bench.current.inputs.tunnels == {}, "all that stands on it waits"
    assert "pid 77" in bench.problems()["another agent"]
    assert controller.due() == 1.0
    bench.lock.other = None
    bench.reconcile(controller)
    assert bench.problems() == {}
    assert bench.current.inputs.tunnels[4].name == "flannel.1"


def test_the_device_of_an_earlier_vni_goes_with_all_that_was_made_for_it(bench):
    (bench.folder / "device").write_text("flannel.7")
    bench.kernel.create(VxlanDevice("flannel.7", 7, 8472, 1, 2, 1450, 3, False, False))
    controller = bench.device()
    bench.reconcile(controller)
    assert "flannel.7" not in bench.kernel.vxlans
    assert bench.posted == [7]


def test_the_device_is_withdrawn_unless_flannel_has_the_node(bench):
    (bench.folder / "device").write_text("flannel.1")
    bench.reconcile(bench.device())
    (bench.folder / "cni").mkdir()
    (bench.folder / "cni" / CONFLIST).write_text('{"plugins":[{"type":"flannel"}]}')
    assert list(bench.device().withdraw()) == []
    (bench.folder / "cni" / CONFLIST).unlink()
    assert list(bench.device().withdraw()) == ["device flannel.1, with its routes, neighbours and FDB"]
    assert bench.kernel.vxlans == {}


def test_a_lost_subnet_is_kept_until_its_last_pod_is_gone(bench):
    controller = bench.bridges()
    lost = lease("10.244.7.0/24", "192.168.1.2")
    bench.tell(controller, Lost(lost, "older"))
    assert [str(subnet) for subnet in bench.current.inputs.retained] == ["10.244.7.0/24"]
    bridge, port = link(8, "cni0", "bridge"), link(9, "veth9", "veth", master=8)
    gateway = address(8, "10.244.7.1")
    bench.kernel.there = by_index([bridge, port])
    bench.current.set(links=bench.kernel.there, addresses={4: {(8, gateway.address, 24): gateway}})
    bench.reconcile(controller)
    assert bench.current.inputs.bridges == {"cni0"}, "its bridge counts as ours"
    bench.reconcile(controller)
    assert bench.current.inputs.retained
    bench.kernel.there = by_index([bridge])
    bench.current.set(links=bench.kernel.there)
    bench.reconcile(controller)
    assert bench.current.inputs.retained == ()
    assert bench.kernel.there == {}, "the bridge went, too"
    bench.tell(controller, Lost(lost, "older"))
    bench.tell(controller, Held(lost, "taken again"))
    assert bench.current.inputs.retained == ()


def test_sysctls_are_set_where_they_are_wrong(bench, monkeypatch):
    there = {"net/ipv4/ip_forward": "0", "net/bridge/bridge-nf-call-iptables": "0"}
    monkeypatch.setattr(sysctls, "read_sysctl", there.get)
    monkeypatch.setattr(sysctls, "write_sysctl", there.__setitem__)
    controller = bench.sysctl()
    bench.reconcile(controller)
    assert there["net/ipv4/ip_forward"] == "1"
    assert controller.due() == sysctls.LOOK_S
    bench.current.set(bridges=frozenset({"cni0"}), settings=bench.settings._replace(kube=True))
    bench.reconcile(controller)
    assert "bridge-nf-call-iptables is 0" in bench.problems()["bridge filter"]


def test_routes_that_are_not_ours_to_put_back_are_told(bench):
    controller = bench.reach()
    bench.reconcile(controller)
    assert bench.problems() == {}
    gateway = address(8, "10.244.2.1")
    bench.current.set(
        links=by_index([link(8, "cni0", "bridge")]), addresses={4: {(8, gateway.address, 24): gateway}}, **RETAINED
    )
    bench.kernel.ways[ip_number("192.168.1.9", 4)] = None
    bench.reconcile(controller)
    found = bench.problems()
    assert "no route leads 10.244.2.0/24 to cni0" in found["routes"]
    assert "no route leads to 192.168.1.9, a peer" in found["routes"]
    assert "10.244.77.0/24 is not ours any more (nobody holds it now)" in found["retained"]


# --- the store's side


def snapshot(*leases: Any, config: str | None = CONFIG, refused: dict[str, Refused] | None = None) -> Snapshot:
    return Snapshot(1, config.encode() if config else None, Leases.of(leases), refused or {})


def test_records_are_sorted_into_ours_peers_and_what_cannot_be_read(bench):
    controller = bench.records()
    bench.current.set(config=None, listed=False)
    assert controller.unready() == "for the first list from the store"
    bench.tell(controller, StoreDown("away"))
    assert controller.unready().endswith(": away")
    own, peer = bench.current.inputs.own, lease("10.244.9.0/24", "192.168.1.9")
    bench.tell(controller, snapshot(own, peer, refused={"x": Refused("x", "bad", 0)}))
    assert bench.current.inputs.config == parse_config(CONFIG)
    assert bench.path.has_unplanned()
    status = controller.status()
    assert status["unreadable_records"] == {"x": "bad"}
    assert status["store"] == {"type": "etcd", "address": "etcd there", "up": True, "error": ""}
    bench.reconcile(bench.table())
    assert [one.key for one in bench.path.table.accepted()] == [peer.key]
    changes = (Gone("x"), Refused(peer.key, "JSON", 2), ConfigText(None))
    bench.tell(controller, Changes(2, changes))
    assert controller.status()["unreadable_records"] == {peer.key: "JSON"}
    assert list(bench.path.table.accepted()) == []
    assert "no network config" in bench.problems()["config"]
    assert bench.claims.rechecks == 0
    bench.tell(controller, Changes(3, (Gone(own.key),)))
    assert bench.claims.rechecks == 1, "our own record is the tenure's to put back"


def test_what_an_operator_wrote_on_our_node_is_an_input(bench):
    controller = bench.records()
    bench.tell(controller, Changes(2, (Hints(public_ip=ip_number("192.168.1.5", 4), faults=("no address",)),)))
    assert bench.current.inputs.settings.public_ip == ip_number("192.168.1.5", 4)
    assert bench.problems()["annotations"] == "no address"
    bench.tell(controller, Changes(3, (Hints(),)))
    assert bench.current.inputs.settings.public_ip == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no network config at the store; waiting for it; the running config is kept"),
        ("{", "the store: not JSON"),
        ('{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}', "does not hold our subnet 10.244.2.0/24"),
        ('{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}', "IPv6 datapath"),
    ],
)
def test_a_network_config_that_cannot_be_used_is_told_and_the_running_one_kept(bench, text, words):
    before = bench.current.inputs.config
    bench.network.read(text.encode() if text else None)
    assert words in bench.problems()["config"]
    assert bench.current.inputs.config == before
    bench.network.read(CONFIG.encode())
    assert bench.problems() == {}


def test_the_lease_is_claimed_held_lost_and_renewed(bench):
    controller = bench.ownership()
    own = bench.current.inputs.own._replace(created=3, modified=4, handle=5)
    bench.current.set(own=None)
    bench.reconcile(controller)
    claim, _ = bench.claims.claims[-1]
    assert (claim.public_ip, claim.identity.name) == (ip_number("192.168.1.2", 4), "node1")
    assert controller.unready() == "for a lease"
    bench.tell(controller, Denied("no subnet is free"))
    assert bench.problems()["lease"] == "no subnet is free"
    bench.tell(controller, Held(own, "allocated"))
    assert bench.current.inputs.own == own._replace(created=0, modified=0, handle=0)
    assert (controller.unready(), bench.problems()) == ("", {})
    bench.tell(controller, Renewed(30.0))
    assert controller.status()["lease"]["left_s"] == 30
    bench.clock.now = 31.0
    controller.judge_renewal()
    assert "not renewed in time" in bench.problems()["renewal"]
    bench.tell(controller, Renewed(None))
    assert bench.problems() == {}
    bench.current.set(synced=True)
    bench.tell(controller, Lost(own, "an older record"))
    assert (bench.current.inputs.displaced, bench.current.inputs.synced) == (True, False)
    assert "we lost 10.244.2.0/24" in bench.problems()["lease"]


def test_a_lost_lease_is_told_until_there_is_another(bench):
    """Whatever is claimed meanwhile: a claim is no lease."""
    controller = bench.ownership()
    schedule = Schedule([controller], bench.current, bench.health, bench.clock)
    own = bench.current.inputs.own
    schedule.handle(Held(own, "allocated"))
    schedule.run_pass()
    schedule.handle(Lost(own, "an older record"))
    bench.current.set(**OTHER_MTU)
    schedule.run_pass()
    assert len(bench.claims.claims) == 2
    assert "we lost 10.244.2.0/24" in bench.problems()["lease"]
    schedule.handle(Held(own, "taken again"))
    assert bench.problems() == {}


def test_a_conflict_about_our_address_ends_the_agent_before_it_holds_anything(bench):
    controller = bench.ownership()
    for _ in range(2):
        bench.tell(controller, Denied("192.168.1.2 is another node's", conflict=True))
    assert bench.stopped == ["192.168.1.2 is another node's"]


def test_rivals_are_looked_at_where_they_are_older(bench):
    controller = bench.ownership()
    controller.held = bench.current.inputs.own._replace(created=10)
    younger, older = (lease("10.244.2.0/24", "192.168.1.9", created=created) for created in (11, 9))
    controller.check_rival(younger)
    assert bench.claims.rechecks == 0
    controller.check_rival(older)
    assert bench.claims.rechecks == 1


def test_files_of_an_operator_change_the_inputs_or_are_told(bench):
    controller = bench.live()
    bench.tell(controller, FileText("cni-conf", "/c", b"{}"))
    assert bench.current.inputs.cni_template == b"{}"
    bench.tell(controller, FileText("live", "/l", b'{"ip-masq": true, "log-level": "debug"}'))
    assert bench.current.inputs.settings.ip_masq
    assert bench.posted == ["debug"]
    bench.tell(controller, FileText("live", "/l", b'{"iface": "eth1"}'))
    assert "needs a restart" in bench.problems()["live-settings"]
    assert bench.current.inputs.settings.ip_masq, "what ran is kept"
    bench.tell(controller, FileText("cni-conf", "/c", None))
    assert bench.problems()["file cni-conf"] == "/c is gone; what it said last is kept"
    assert bench.current.inputs.cni_template == b"{}"


# --- peers


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


def test_a_guard_that_is_off_remembers_nobody(bench):
    controller = bench.guard()
    bench.reconcile(controller)
    list(controller.withdraw())
    for number in range(5):
        one = lease(f"10.244.{number + 9}.0/24", f"192.168.1.{number + 9}")
        controller.guard.turn(None, one)
        controller.guard.turn(one, None)
    assert not controller.guard.has_changes()
    assert controller.guard.next_change() is None
    controller.guard.turn(None, lease("10.244.9.0/24", "192.168.1.9"))
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


# --- nftables


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("guard", ("ip", guard.table_name(1))),
        ("pods", ("bridge", antispoof.table_name(1))),
    ],
)
def test_a_table_is_made_mended_left_and_withdrawn(bench, name, table):
    controller = getattr(bench, name)()
    bench.reconcile(controller)
    assert set(bench.kernel.tables) == {table}
    bench.kernel.tables.clear()
    assert not bench.tell(controller, events.NftSeen("somebody's"))
    assert bench.tell(controller, events.NftSeen(table[1]))
    bench.reconcile(controller)
    assert set(bench.kernel.tables) == {table}
    assert controller.counters()[f"mended_{name}"] == 1
    bench.kernel.tables["ip", "overlay-7-guard"] = bench.kernel.tables["bridge", "overlay-7-pods"] = {}
    assert len(list(controller.leave(7))) == 1, "of an earlier network"
    bench.kernel.tables.pop(("ip", "overlay-7-guard"), None)
    bench.kernel.tables.pop(("bridge", "overlay-7-pods"), None)
    assert list(controller.withdraw()) == [f"nft table {table[0]} {table[1]}"]
    assert bench.kernel.tables == {}
    bench.reconcile(controller)
    assert set(bench.kernel.tables) == {table}, "switched on again"
    bench.kernel.refuse = 1
    bench.tell(controller, events.NftSeen(""))
    with pytest.raises(OSError, match="refused"):
        bench.reconcile(controller)


def test_who_may_send_is_let_in_before_a_route_leads_there(bench):
    controller = bench.guard()
    bench.reconcile(controller)
    controller.guard.turn(None, lease("10.244.9.0/24", "192.168.1.9"))
    assert controller.due() == 0.0, "at once"
    bench.reconcile(controller)
    there = bench.kernel.tables["ip", guard.table_name(1)]["vteps"]
    assert there == {ip_number("192.168.1.9", 4).to_bytes(4, "big")}


@pytest.mark.parametrize("name", ["nat", "forward"])
def test_what_the_nft_program_does_ends_later(bench, name, monkeypatch):
    loaded: list[Any] = []
    monkeypatch.setattr(program, "read_table", lambda _family, _name: loaded[-1] if loaded else [])
    monkeypatch.setattr(program, "load_table", lambda _family, _name, wanted: loaded.append(wanted))
    monkeypatch.setattr("overlay.firewall.forward.ensure", lambda _family, _name, _network: ([], "chain x drops"))
    controller = getattr(bench, name)()
    begun: list[Any] = []
    controller._worker.begin = begun.append
    bench.reconcile(controller)
    assert controller.unready() == f"for the {name} rules"
    work = begun.pop()
    assert not bench.tell(controller, Finished("another", None, "")), "not its own"
    assert bench.tell(controller, Finished(name, None, "no such program"))
    assert controller.unready() == "", "that is told as a problem, and keeps no pod from the node"
    with pytest.raises(CannotReconcile, match="no such program"):
        bench.reconcile(controller)
    bench.reconcile(controller)
    assert not bench.tell(controller, Finished(name, work(), ""))
    assert (controller.completed, controller.unready()) == (True, "")
    if name == "forward":
        assert bench.problems() == {"forward chain": "chain x drops"}
        bench.tell(controller, events.NftSeen("filter"))
        assert controller.due() == 2.0, "kube-proxy writes there often"
    else:
        assert bench.tell(controller, events.NftSeen("overlay-1"))
        assert loaded, "the table stands"


# --- the files pods are made by


def test_the_network_list_waits_for_the_peers_and_goes_with_the_lease(bench):
    controller = bench.cni()
    conflist = bench.folder / "cni" / CONFLIST
    bench.reconcile(controller)
    assert "FLANNEL_SUBNET=10.244.2.1/24" in (bench.folder / "subnet.env").read_text()
    assert (bench.folder / "device").read_text() == "flannel.1"
    assert not conflist.exists()
    bench.current.set(synced=True)
    bench.reconcile(controller)
    assert conflist.exists()
    assert bench.posted == ["cni0"]
    conflist.write_text("somebody's")
    bench.clock.now = 1.1
    assert controller.due() == 0.0
    bench.reconcile(controller)
    assert controller.counters() == {"mended_file": 1}
    bench.current.set(displaced=True, synced=False)
    bench.reconcile(controller)
    assert not conflist.exists()
    bench.current.set(displaced=False, synced=True)
    bench.reconcile(controller)
    assert conflist.exists()
    assert sorted(controller.withdraw()) == sorted([str(conflist), str(bench.folder / "subnet.env")])


def test_a_template_that_cannot_be_used_is_told_and_all_else_written(bench):
    controller = bench.cni()
    bench.current.set(synced=True, cni_template=b"{")
    bench.reconcile(controller)
    assert "not JSON" in bench.problems()["cni"]
    assert (bench.folder / "subnet.env").exists()
    assert not (bench.folder / "cni" / CONFLIST).exists()
    bench.current.set(cni_template=None)
    bench.reconcile(controller)
    assert bench.problems() == {}
