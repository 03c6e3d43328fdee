"""Each controller of this machine alone: links, underlay, device, bridges, sysctls, routes."""

from __future__ import annotations

import pytest

from lease.families import V4, V6
from lease.model import Prefix, ip_number
from lease.tenure.events import Held, Lost
from overlay.cni.lists import CONFLIST
from overlay.control.controller import CannotReconcile
from overlay.kernel import events
from overlay.kernel.netlink import KernelError
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.kernel.route.lookup import Way
from overlay.node import sysctls
from overlay.node.device import DeviceController
from overlay.node.underlay import UnderlayError
from overlay.process.rundir import Holder
from overlay.reach import ways
from overlay.reach.controller import AGAIN_S, MOMENT_S, ReachController
from tests.support.bench import RETAINED
from tests.support.fakes import address, by_index, link, underlay
from tests.support.make import lease


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
    bench.lock.squatters["flannel.1"] = Holder(4242, 1000)
    bench.reconcile(controller)
    assert bench.problems().keys() == {"device lock"}, "it waits for an agent alone"
    assert "uid 1000, pid 4242" in bench.problems()["device lock"]
    assert bench.current.inputs.tunnels[4].name == "flannel.1"
    del bench.lock.squatters["flannel.1"]
    bench.reconcile(controller)
    assert bench.problems() == {}


def test_nothing_is_claimed_while_another_agent_keeps_the_device(bench):
    """Both would hold one record, and each put it right again and again."""
    bench.lock.other = 77
    with pytest.raises(CannotReconcile, match=r"another agent keeps flannel\.1"):
        bench.device().existing_mac(bench.current.inputs.config)
    assert "pid 77" in bench.problems()["another agent"]
    bench.lock.other = None
    assert bench.device().existing_mac(bench.current.inputs.config) is None
    assert bench.problems() == {}


def test_the_device_of_an_earlier_vni_goes_with_all_that_was_made_for_it(bench):
    (bench.folder / "device").write_text("flannel.7")
    bench.kernel.create(VxlanDevice("flannel.7", 7, 8472, 1, 2, 1450, 3, False, False))
    controller = bench.device()
    bench.reconcile(controller)
    assert "flannel.7" not in bench.kernel.vxlans
    assert bench.posted == [7]
    assert (bench.folder / "device").read_text() == "flannel.1"
    assert controller.due() is None


@pytest.mark.parametrize("how", ["leaves_later", "leaving_refused"])
def test_peers_get_onto_the_new_device_whatever_is_left_of_the_one_before(bench, how):
    """And it is known what is left, by a next run too, though there is yet another network before that is done."""
    (bench.folder / "device").write_text("flannel.7")
    controller = bench.device()
    setattr(bench, how, True)
    bench.reconcile(controller)
    tunnel, config = bench.current.inputs.tunnels[4], bench.current.inputs.config
    assert (tunnel.name, tunnel.mark, bench.current.inputs.backend(4)) == (
        "flannel.1", "flannel.1\nflannel.7", config.backend,
    )  # fmt: skip
    assert ("former network" in bench.problems()) == (how == "leaving_refused")
    assert controller.due() is not None
    asked = len(bench.posted)
    bench.reconcile(controller)
    assert len(bench.posted) == asked, "not at each event"
    bench.current.set(config=config._replace(backend=config.backend._replace(vni=2)))
    assert bench.current.inputs.backend(4).vni == 1, "until there is its device"
    again = bench.device()
    bench.reconcile(again)
    assert (bench.folder / "device").read_text().split() == ["flannel.2", "flannel.1", "flannel.7"]
    assert bench.owned.networks() == [1, 2, 7]
    assert bench.current.inputs.backend(4).vni == 2
    setattr(bench, how, False)
    bench.clock.now = again.due()
    bench.reconcile(again)
    assert (bench.folder / "device").read_text() == "flannel.2"
    assert (again.due(), bench.problems()) == (None, {})
    assert bench.lock.taken == {"flannel.2"}, "another agent may have those before"
    list(again.withdraw())
    assert bench.lock.taken == set()


def test_a_device_that_was_begun_and_refused_is_known_and_costs_nothing(bench, monkeypatch):
    """Another comes in its place: what was made of it is to go. Until then the one before carries packets."""
    bench.current.set(tunnels={})
    controller, guard = bench.device(), bench.guard()
    controller.before_up = lambda name: guard.shut(bench.current.inputs, name)
    controller.refused = guard.open_again
    bench.reconcile(controller)
    config = bench.current.inputs.config
    shut = []

    def refuse(_index: int) -> None:
        shut.append(bench.kernel.tables["ip", "overlay-2-guard"])
        raise KernelError(98, "Address already in use")

    monkeypatch.setattr(bench.kernel, "set_up", refuse)
    bench.current.set(config=config._replace(backend=config.backend._replace(vni=2)))
    with pytest.raises(OSError, match="already in use"):
        bench.reconcile(controller)
    (elements,) = shut
    assert elements["pod_interfaces"] == {(3).to_bytes(4, "little")}, "what comes by the device that stands goes on"
    assert ("ip", "overlay-2-guard") not in bench.kernel.tables, "nor is there a table of the one that was refused"
    assert bench.owned.networks() == [1, 2]
    assert bench.current.inputs.tunnels[4].mark.split() == ["flannel.1", "flannel.2"], (
        "as the files' controller keeps it"
    )
    assert bench.current.inputs.backend(4).vni == 1
    assert "flannel.2" in bench.kernel.vxlans
    monkeypatch.undo()
    bench.current.set(config=config)
    bench.reconcile(controller)
    assert bench.kernel.vxlans.keys() == {"flannel.1"}
    assert (bench.folder / "device").read_text() == "flannel.1"


def test_what_waits_for_another_agent_does_not_turn_the_loop_for_a_former_network(bench):
    (bench.folder / "device").write_text("flannel.7")
    bench.leaves_later = True
    controller = bench.device()
    bench.reconcile(controller)
    config = bench.current.inputs.config
    bench.lock.others = {"flannel.2": 4711}
    bench.current.set(config=config._replace(backend=config.backend._replace(vni=2)))
    for _ in range(3):
        bench.clock.now += 5
        bench.reconcile(controller)
        assert controller.due() > bench.clock.now


def test_what_stands_again_is_left_by_all_the_next_time(bench):
    """It was left half: guard was done, policies were not."""
    (bench.folder / "device").write_text("flannel.7")
    asked: list[set[str]] = []

    def leave(_network: int, _family: object, done: set[str]) -> bool:
        asked.append(set(done))
        done.add("guard")
        return False

    controller = bench.device()
    controller._leave = leave
    bench.reconcile(controller)
    config = bench.current.inputs.config
    for vni in (7, 1):
        bench.current.set(config=config._replace(backend=config.backend._replace(vni=vni)))
        bench.reconcile(controller)
    assert asked == [set(), set(), set()]


def test_two_devices_of_one_lock_do_not_give_it_back(bench):
    """WireGuard's of IPv6, alone and shared with IPv4."""
    made = DeviceController(
        bench.current,
        V6,
        bench.kernel,
        bench.kernel,
        bench.lock,
        bench.health,
        bench.owned,
        lambda *_: True,
        bench.clock,
    )
    assert made._drop("flannel-wg", "flannel-wg-v6", set())
    assert bench.lock.taken == {"flannel-wg-v6"}


def test_a_former_device_that_another_agent_has_now_is_not_touched(bench):
    (bench.folder / "device").write_text("flannel.7")
    bench.kernel.create(VxlanDevice("flannel.7", 7, 8472, 1, 2, 1450, 3, False, False))
    bench.lock.others = {"flannel.7": 4711}
    bench.reconcile(bench.device())
    assert "flannel.7" in bench.kernel.vxlans
    assert bench.posted == []
    assert (bench.folder / "device").read_text() == "flannel.1"


def test_the_device_is_withdrawn_unless_flannel_has_the_node(bench):
    (bench.folder / "device").write_text("flannel.1")
    bench.reconcile(bench.device())
    (bench.folder / "cni").mkdir()
    (bench.folder / "cni" / CONFLIST).write_text('{"plugins":[{"type":"flannel"}]}')
    assert list(bench.device().withdraw()) == []
    (bench.folder / "cni" / CONFLIST).unlink()
    assert list(bench.device().withdraw()) == ["device flannel.1, with its routes, neighbours and FDB"]
    assert bench.kernel.vxlans == {}


def test_what_names_our_device_is_written_before_anything_is_made_for_its_network(bench):
    """By it an agent that starts with the guard switched off finds a table that was left."""
    bench.current.set(tunnels={})
    bench.reconcile(bench.device())
    assert (bench.folder / "device").read_text() == "flannel.1"
    bench.reconcile(bench.guard())
    assert list(bench.guard().withdraw()) == ["nft table ip overlay-1-guard"]


def test_report_10_a_refusal_of_the_device_names_the_one_in_its_way(bench):
    bench.current.set(tunnels={})
    bench.kernel.create(VxlanDevice("vx9", 1, 8472, 1, 2, 1450, 3, False, False))

    def refused(device):
        del device
        raise KernelError(17, "making flannel.1: File exists")

    bench.kernel.create = refused
    with pytest.raises(OSError, match=r"making flannel\.1: File exists; vx9 has VNI 1 on port 8472 already: remove it"):
        bench.reconcile(bench.device())


def test_a_full_disk_costs_no_peer(bench, monkeypatch):
    bench.current.set(tunnels={})
    controller = bench.device()

    def full(path: str, content: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr("overlay.node.device.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        bench.reconcile(controller)
    assert bench.current.inputs.tunnels[4].name == "flannel.1"


def test_a_bridge_that_the_kernel_does_not_let_go_keeps_no_other(bench):
    controller = bench.bridges()
    bench.tell(controller, Lost(lease("10.244.7.0/24", "192.168.1.2"), "older"))
    unfinished, empty = link(8, "cni0", "bridge", mac=0), link(9, "cni1", "bridge", mac=5)
    gateway = address(9, "10.244.7.1")
    bench.kernel.there = by_index([unfinished, empty])
    bench.current.set(
        links=dict(bench.kernel.there),
        addresses={4: {(9, gateway.address, 24): gateway}},
        bridges=frozenset({"cni0", "cni1"}),
    )
    delete = bench.kernel.delete

    def busy(index: int) -> None:
        if index == 9:
            raise KernelError(16, "busy")
        delete(index)

    bench.kernel.delete = busy
    with pytest.raises(OSError, match="busy"):
        bench.reconcile(controller)
    assert bench.kernel.there.keys() == {9}, "the other is gone"
    assert bench.current.inputs.retained, "and its subnet is kept"
    bench.kernel.delete = delete
    bench.reconcile(controller)
    assert (bench.kernel.there, bench.current.inputs.retained) == ({}, ())


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
    assert "there is no br_netfilter" in sysctls.bridge_filter_fault(there.get, V6)
    there["net/bridge/bridge-nf-call-ip6tables"] = "1"
    assert sysctls.bridge_filter_fault(there.get, V6) == "", "that of IPv6 alone counts there"
    assert controller.due() == sysctls.CHECK_EVERY_S
    bench.current.set(bridges=frozenset({"cni0"}), settings=bench.settings._replace(kube=True))
    bench.reconcile(controller)
    assert bench.problems() == {}, "frames between pods are given to the node"
    assert bench.current.inputs.bridge_filtered is False
    bench.current.set(settings=bench.settings._replace(kube=True, pod_lift="off"))
    bench.reconcile(controller)
    assert "bridge-nf-call-iptables is 0" in bench.problems()["bridge filter"]


def test_routes_that_are_not_ours_to_put_back_are_told(bench):
    controller, peer, pod = bench.reach(), ip_number("192.168.1.9", 4), ip_number("10.244.9.2", 4)
    bench.current.set(synced_families=frozenset({4}))
    bench.kernel.ways[pod] = Way(3, 0, 0)
    bench.reconcile(controller)
    assert bench.problems() == {}
    gateway = address(8, "10.244.2.1")
    bench.current.set(
        links=by_index([link(8, "cni0", "bridge"), link(2, "eth0"), link(3, "flannel.1", "vxlan")]),
        addresses={4: {(8, gateway.address, 24): gateway}},
        **RETAINED,
    )
    bench.kernel.ways |= {peer: None, pod: Way(2, 0, ip_number("192.168.1.1", 4))}
    bench.reconcile(controller)
    found = bench.problems()
    assert "10.244.77.0/24 is not ours any more (nobody holds it now)" in found["retained"]
    assert not {"ways", "routes"} & found.keys(), "it may be a moment of somebody's change"
    assert controller.due() == bench.clock.now + MOMENT_S
    bench.clock.now += AGAIN_S
    bench.reconcile(controller)
    found = bench.problems()
    assert "no route leads 10.244.2.0/24 to cni0" in found["routes"]
    assert found["ways"].count("ip route") == 1, "one cause, said once"
    for words in (
        "packets of this node to 10.244.9.0/24 leave by eth0 via 192.168.1.1, not by flannel.1",
        "packets of pods here to 10.244.9.0/24 leave by eth0",
        "packets from 10.244.9.0/24 to pods here leave by eth0, not by cni0",
        "packets of the tunnel to 10.244.9.0/24 go nowhere (no route)",
    ):
        assert words in found["ways"]
    assert not bench.health.problems()["ways"].harmless
    assert not bench.health.problems()["routes"].harmless
    assert bench.health.problems()["retained"].harmless


def test_an_underlay_without_carrier_is_told(bench):
    controller = bench.reach()
    for there, words in ((underlay(carrier=False), "has no carrier"), (underlay(up=False), "ip link set eth0 up")):
        bench.current.set(underlays={4: there})
        bench.reconcile(controller)
        assert words in bench.problems()["carrier"]
        assert not bench.health.problems()["carrier"].harmless
    bench.current.set(underlays={4: underlay()})
    bench.reconcile(controller)
    assert bench.problems() == {}


def test_nothing_is_asked_while_the_peers_are_not_in_the_kernel(bench):
    """A time that is past would make the loop turn without end."""
    controller = bench.reach()
    for change in (
        {"synced_families": frozenset()},
        {"synced_families": frozenset({4}), "underlays": {4: underlay(up=False)}},
    ):
        bench.current.set(**change)
        bench.reconcile(controller)
        assert controller.due() is None
    bench.current.set(underlays={4: underlay()})
    bench.kernel.ways[ip_number("10.244.9.2", 4)] = Way(3, 0, 0)
    bench.reconcile(controller)
    assert controller.due() > bench.clock.now


@pytest.mark.parametrize("count", [3, 700])
def test_a_record_whose_address_no_route_leads_to_is_that_peers_trouble_alone(bench, count):
    bad = 2 if count == 3 else 300
    peers = [
        ways.Peer(Prefix(4, (10 << 24) + (n << 8), 24), ip_number("192.168.7.0", 4) + n, False) for n in range(count)
    ]
    controller = ReachController(V4, bench.kernel, bench.health, bench.clock, lambda at, n: peers[at : at + n], list)
    bench.kernel.ways = {peer.subnet.base + 2: Way(3, 0, 0) for peer in peers} | {peers[bad].public_ip: None}
    bench.current.set(synced_families=frozenset({4}))
    for _ in range(8):
        bench.reconcile(controller)
        bench.clock.now = max(controller.due(), bench.clock.now)
    found = bench.health.problems()
    assert str(peers[bad].subnet) in found["ways to single peers"].text
    assert found["ways to single peers"].harmless
    assert "ways" not in found
    bench.kernel.ways[peers[bad].subnet.base + 2] = Way(9, 0, 0)
    for _ in range(4):
        bench.reconcile(controller)
        bench.clock.now = max(controller.due(), bench.clock.now)
    assert str(peers[bad].subnet) in bench.problems()["ways"], "routes of others are another matter"


def test_the_underlay_of_a_family_that_is_switched_off_counts_no_more(bench):
    """Its MTU would: a device that both families share has the least."""
    controller = bench.underlay()
    bench.reconcile(controller)
    assert 4 in bench.current.inputs.underlays
    assert list(controller.withdraw()) == []
    assert bench.current.inputs.underlays == {}
    bench.reconcile(controller)
    assert 4 in bench.current.inputs.underlays, "switched on again"
