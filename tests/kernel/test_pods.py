"""The pods' table in a real kernel, with pods that answer as they are told."""

from __future__ import annotations

import errno
from collections.abc import Callable
from ipaddress import IPv6Address

import pytest

from lease.model import ip_number, prefix
from overlay.cni.results import CniResult
from overlay.firewall import antispoof, pods_table
from overlay.firewall.antispoof import AntiSpoof
from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.entries import Link, PodEnd

TABLE, NETWORK = pods_table.table(7), prefix("10.244.0.0/16")
NETWORK6 = prefix("fd00:10:244::/48")
Given = dict[tuple[str, int], CniResult]
BRIDGE = Link(2, "cni0", True, 1450, 1, "bridge", True, True)


def port(index: int, mac: int) -> Link:
    return Link(index, f"veth{index}", True, 1450, mac, "veth", True, True, False, BRIDGE.ifindex, 2, index)


def changed(there: PodEnd, mac: int | None = None, **addresses: frozenset[int]) -> PodEnd:
    """v4, v6: its addresses now."""
    now = {**there.addresses, **{int(name[1]): found for name, found in addresses.items()}}
    return PodEnd(there.mac if mac is None else mac, now)


def end(address: str) -> PodEnd:
    return PodEnd(0x0A0000000000 + ip_number(address, 4), {4: frozenset((ip_number(address, 4),)), 6: frozenset()})


class Pods:
    """What is asked of the kernel; by the number of the port."""

    def __init__(self) -> None:
        self.ends: dict[int, PodEnd | KernelError | None] = {}

    def pod_end(self, link: Link) -> PodEnd | None:
        said = self.ends[link.ifindex]
        if isinstance(said, KernelError):
            raise said
        return said


@pytest.fixture
def pods() -> Pods:
    return Pods()


def antispoofing(
    sets: NetfilterSocket, pods: Pods, clock: Callable[[], float], given: Given | None = None
) -> AntiSpoof:
    """given: what CNI gave to the pod behind a port, by its name and MAC."""
    results = {} if given is None else given
    made = AntiSpoof(sets, pods, clock, lambda: lambda name, mac: results.get((name, mac)))
    made.within([NETWORK])
    return made


@pytest.fixture
def made(sets, pods, clock) -> AntiSpoof:
    return antispoofing(sets, pods, clock)


def addresses(sets: NetfilterSocket) -> set[tuple[int, int]]:
    keys = sets.elements(TABLE, TABLE.sets[3])
    return {(key[0], int.from_bytes(key[4:], "big") & 0xFF) for key in keys}


def test_one_pod_that_cannot_be_asked_keeps_no_other_from_being_bound(made, sets, pods):
    pods.ends = {5: end("10.244.1.5"), 6: KernelError(errno.EPERM, "no"), 7: end("10.244.1.7")}
    made.ports([BRIDGE, port(5, 1), port(6, 2), port(7, 3)], ["cni0"])
    with pytest.raises(KernelError, match="no"):
        made.ensure(TABLE)
    assert addresses(sets) == {(5, 5), (7, 7)}
    pods.ends[6] = end("10.244.1.6")
    made.bind()
    assert addresses(sets) == {(5, 5), (6, 6), (7, 7)}


def test_another_port_of_the_same_number_inherits_nothing(made, sets, pods):
    pods.ends = {5: end("10.244.1.5"), 6: end("10.244.1.6")}
    made.ports([BRIDGE, port(5, 1), port(6, 2)], ["cni0"])
    made.ensure(TABLE)
    pods.ends[5] = None  # not ready yet
    made.ports([BRIDGE, port(5, 9), port(6, 2)], ["cni0"])
    made.bind()
    assert addresses(sets) == {(6, 6)}
    assert [key[0] for key in sets.elements(TABLE, TABLE.sets[0])] == [6], "it is let through until it is known"
    assert [key[4:9] for key in sets.elements(TABLE, TABLE.sets[0])] == [b"veth6"]
    pods.ends[5] = end("10.244.1.99")
    made.bind()
    assert addresses(sets) == {(5, 99), (6, 6)}


def test_a_port_is_told_from_another_by_the_next_agent_too(made, sets, pods):
    pods.ends = {5: end("10.244.1.5"), 6: end("10.244.1.6")}
    made.ports([BRIDGE, port(5, 1), port(6, 2)], ["cni0"])
    made.ensure(TABLE)
    pods.ends = {5: end("10.244.1.99"), 6: end("10.244.1.98")}
    again = antispoofing(sets, pods, lambda: 200.0)
    again.ports([BRIDGE, port(5, 9), port(6, 2)], ["cni0"])
    again.ensure(TABLE)
    assert addresses(sets) == {(5, 99), (6, 6)}
    assert again.mended == 0


def test_a_table_that_knows_no_ends_yet_is_believed(made, sets, pods):
    """As of a version before; and all of it is of this one's form afterwards."""
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    sets.replace(
        TABLE._replace(sets=TABLE.sets[:-1]),
        {one.name: sets.elements(TABLE, one) for one in TABLE.sets if one.name != pods_table.ENDS},
    )
    assert not sets.is_formed(TABLE)
    pods.ends = {5: end("10.244.1.99")}
    again = antispoofing(sets, pods, lambda: 200.0)
    again.ports([BRIDGE, port(5, 1)], ["cni0"])
    again.ensure(TABLE)
    assert sets.is_formed(TABLE)
    assert addresses(sets) == {(5, 5)}
    assert len(sets.elements(TABLE, TABLE.sets[5])) == 1


def test_what_is_bound_stays_so_on_another_bridge(made, sets, pods):
    """That of a subnet which the node lost: its pods stay, and no list names it any more."""
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    again = antispoofing(sets, pods, lambda: 200.0)
    other = BRIDGE._replace(ifindex=3, name="cni1")
    again.ports([BRIDGE, other, port(5, 1)], ["cni1"])
    again.ensure(TABLE)
    assert addresses(sets) == {(5, 5)}
    again.ports([BRIDGE, other], ["cni1"])
    again.bind()
    assert addresses(sets) == set()


def test_a_renamed_port_stays_bound_under_its_new_name(made, sets, pods):
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    pods.ends = {5: end("10.244.1.99")}
    made.ports([BRIDGE, port(5, 1)._replace(name="other")], ["cni0"])
    assert made.next_bind() == 100.0
    made.bind()
    assert [key[4:].rstrip(b"\0") for key in sets.elements(TABLE, TABLE.sets[0])] == [b"other"]
    assert addresses(sets) == {(5, 5)}


def addresses6(sets: NetfilterSocket) -> set[tuple[int, str]]:
    return {(key[0], str(IPv6Address(key[4:]))) for key in sets.elements(TABLE, TABLE.sets[4])}


def macs(sets: NetfilterSocket) -> set[tuple[int, str]]:
    return {(key[0], key[4:10].hex(":")) for key in sets.elements(TABLE, TABLE.sets[2])}


def v6(*texts: str) -> frozenset[int]:
    return frozenset(int(IPv6Address(text)) for text in texts)


def test_ipv6_is_bound_at_once_and_for_good_a_mac_may_change_once(made, sets, pods, clock):
    """A plugin behind the bridge's may set the MAC (tuning)."""
    pods.ends = {5: changed(end("10.244.1.5"), mac=0x0A0000000005, v6=v6("fe80::5", "2001:db8::5"))}
    made.ensure(TABLE)  # nobody knows the bridges yet
    assert sets.elements(TABLE, TABLE.sets[0]) == []
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.bind()
    assert len(sets.elements(TABLE, TABLE.sets[1])) == 1
    made_of_macs = {(5, "fe80::800:ff:fe00:5"), (5, "fe80::858:aff:fef4:105")}
    bound6 = {(5, "fe80::5"), (5, "2001:db8::5")} | made_of_macs
    assert addresses6(sets) == bound6
    of_its_own = {(5, "0a:00:00:00:00:05"), (5, "0a:58:0a:f4:01:05")}
    assert macs(sets) == of_its_own, "and what an old plugin makes of its address"
    assert made.next_bind() == clock.now + antispoof.SETTLED_S
    clock.now += antispoof.SETTLED_S
    pods.ends[5] = changed(pods.ends[5], mac=0x0200000000AA, v4=frozenset((1, 2)), v6=v6("fe80::bad", "fe80::5"))
    made.bind()
    assert macs(sets) == of_its_own | {(5, "02:00:00:00:00:aa")}
    assert addresses6(sets) == bound6
    assert addresses(sets) == {(5, 5)}
    assert made.next_bind() is None


def test_nobody_has_what_is_bound_to_another_or_the_nodes(made, sets, pods, clock):
    gateway = "fe80::200:ff:fe00:1"  # of the bridge's MAC
    pods.ends = {5: changed(end("10.244.1.5"), mac=5, v6=v6("fe80::5"))}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    pods.ends[6] = changed(end("10.244.1.6"), mac=5, v6=v6("fe80::5", "fe80::6", gateway))
    pods.ends[7] = changed(end("10.244.1.7"), mac=BRIDGE.mac, v6=frozenset())
    made.ports([BRIDGE, port(5, 1), port(6, 2), port(7, 3)], ["cni0"])
    made.bind()
    claimed = {item for item in addresses6(sets) if item[1] in ("fe80::5", "fe80::6", gateway)}
    assert claimed == {(5, "fe80::5"), (6, "fe80::6")}
    assert {item for item in macs(sets) if not item[1].startswith("0a:58")} == {(5, "00:00:00:00:00:05")}
    assert made.next_bind() == clock.now + antispoof.SETTLED_S, "7 may make its link-local address yet"
    clock.now += antispoof.SETTLED_S
    pods.ends[7] = changed(pods.ends[7], v6=v6("fe80::5", gateway, "fe80::7", "2001:db8::7"))
    made.bind()
    assert {item for item in addresses6(sets) if item[0] == 7} == {(7, "fe80::7"), (7, "fe80::858:aff:fef4:107")}
    assert made.next_bind() is None


def test_a_pod_without_an_address_is_looked_at_again(made, sets, pods, clock):
    """It must have its network: a sandbox may take the address away to have it for itself."""
    pods.ends = {5: changed(end("10.244.1.5"), v4=frozenset()), 6: end("192.168.7.7")}
    made.ports([BRIDGE, port(5, 1), port(6, 2)], ["cni0"])
    made.ensure(TABLE)
    assert made.next_bind() == clock.now + antispoof.FIRST_LOOKS_S
    clock.now += antispoof.HURRIED_S
    made.bind()
    assert made.next_bind() == clock.now + antispoof.LATER_LOOKS_S
    assert sets.elements(TABLE, TABLE.sets[0]) == []
    pods.ends[5] = end("10.244.1.5")
    made.bind()
    assert addresses(sets) == {(5, 5)}


def test_no_pod_is_bound_to_an_address_of_the_node(made, sets, pods, clock):
    """The gateway's, above all; also not later, when it has nothing else."""
    pods.ends = {5: end("10.244.1.1"), 6: end("10.244.1.6")}
    pods.ends[6] = changed(pods.ends[6], v4=pods.ends[6].addresses[4] | {ip_number("10.244.1.1", 4)})
    made.ports([BRIDGE, port(5, 1), port(6, 2)], ["cni0"], [ip_number("10.244.1.1", 4)])
    made.ensure(TABLE)
    for _ in range(3):
        assert addresses(sets) == {(6, 6)}
        assert sorted(key[0] for key in sets.elements(TABLE, TABLE.sets[0])) == [5, 6], "and it is bound"
        clock.now += antispoof.LATER_LOOKS_S
        made.bind()


def test_bindings_of_before_are_kept_whatever_is_told_first(made, sets, pods, clock):
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    pods.ends = {5: end("10.244.1.99")}
    again = antispoofing(sets, pods, clock)
    again.ensure(TABLE)
    again.ports([BRIDGE, port(5, 1)], ["cni0"])
    again.bind()
    assert addresses(sets) == {(5, 5)}


SUBNET = prefix("10.244.9.0/24")


def many(*last: int, outside: int = 0) -> PodEnd:
    """10.244.9.x, and so many of another node's subnet."""
    own = frozenset(SUBNET.base + each for each in last)
    others = frozenset(ip_number(f"10.244.77.{each}", 4) for each in range(1, outside + 1))
    return PodEnd(0x0A0000000001, {4: own | others, 6: frozenset()})


def test_a_pod_that_shows_many_addresses_gets_a_few_of_its_bridges_subnet(sets, pods, made):
    """Made while no agent ran, and it gave itself all that it could."""
    pods.ends = {5: many(*range(2, 200), outside=50), 6: many(250), 7: many(3)}
    pods.ends[6], pods.ends[7] = (pods.ends[each]._replace(mac=each) for each in (6, 7))
    made.ports([BRIDGE, port(5, 1), port(6, 2), port(7, 3)], ["cni0"], (), {BRIDGE.ifindex: (SUBNET,)})
    made.ensure(TABLE)
    assert addresses(sets) == {(5, 2), (5, 3), (5, 4), (5, 5), (6, 250)}
    many_of_them, taken = made.disputes()
    assert "the pod behind veth5 shows 198 addresses of IPv4, of which 4" in many_of_them
    assert taken == "the pod behind veth7 has 10.244.9.3, which is veth5's, and may not send from it"
    # it goes, and what it kept is the other's
    made.ports([BRIDGE, port(6, 2), port(7, 3)], ["cni0"], (), {BRIDGE.ifindex: (SUBNET,)})
    made.bind()
    assert addresses(sets) == {(6, 250), (7, 3)}
    assert made.disputes() == []


def test_link_local_addresses_are_bounded_too(sets, pods, made, clock):
    first = frozenset((0xFE80 << 112) + each for each in range(1, 2800))
    pods.ends = {5: many(2)._replace(addresses={4: many(2).addresses[4], 6: first})}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    clock.now += antispoof.SETTLED_S
    made.bind()
    there = sets.elements(TABLE, next(each for each in TABLE.sets if each.name == pods_table.SETS[6].addresses))
    assert len(there) <= antispoof.MOST + 2, "and those of its MAC"
    assert "2799 addresses of IPv6" in made.disputes()[0]


def test_cnis_own_word_counts_before_what_a_pod_shows(sets, pods, clock):
    """Whatever it gives itself, and whatever it hides (gVisor)."""
    given = {("veth5", 1): CniResult(1, {4: frozenset({SUBNET.base + 9}), 6: frozenset()}, "shop/web-1")}
    made = antispoofing(sets, pods, clock, given)
    pods.ends = {5: many(7, 8, 9), 6: many()._replace(mac=6), 7: many(9)._replace(mac=7)}
    made.ports([BRIDGE, port(5, 1), port(6, 2), port(7, 3)], ["cni0"], (), {BRIDGE.ifindex: (SUBNET,)})
    made.ensure(TABLE)
    assert addresses(sets) == {(5, 9)}
    given["veth6", 2] = CniResult(2, {4: frozenset({SUBNET.base + 6}), 6: frozenset()}, "shop/web-2")
    given["veth7", 3] = CniResult(3, {4: frozenset({SUBNET.base + 9}), 6: frozenset()}, "shop/web-3")
    clock.now += antispoof.LATER_LOOKS_S
    made.bind()
    assert addresses(sets) == {(5, 9), (6, 6)}


def test_a_pod_that_was_bound_before_cni_had_done_keeps_what_that_says(sets, pods, clock):
    given: Given = {}
    made = antispoofing(sets, pods, clock, given)
    pods.ends = {5: many(7, 8)}
    made.ports([BRIDGE, port(5, 1)], ["cni0"], (), {BRIDGE.ifindex: (SUBNET,)})
    made.ensure(TABLE)
    assert addresses(sets) == {(5, 7), (5, 8)}
    given["veth5", 1] = CniResult(1, {4: frozenset({SUBNET.base + 8}), 6: frozenset()}, "")
    clock.now += antispoof.SETTLED_S
    made.bind()
    assert addresses(sets) == {(5, 8)}


def with_v6(there: PodEnd, *texts: str) -> PodEnd:
    return changed(there, v6=there.addresses[6] | v6(*texts))


def global6(sets: NetfilterSocket) -> set[tuple[int, str]]:
    return {(index, text) for index, text in addresses6(sets) if not text.startswith("fe80")}


def test_a_network_that_comes_later_counts_at_once(made, sets, pods, clock):
    """The form of the table stays as it is when a cluster turns dual stack; the pods made next have both families."""
    pods.ends = {5: end("10.244.1.5"), 6: end("10.244.1.6")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    clock.now += antispoof.HURRIED_S
    made.bind()
    assert made.next_bind() is None
    made.within([NETWORK, NETWORK6])
    assert made.next_bind() == clock.now
    made.ports([BRIDGE, port(5, 1), port(6, 2)], ["cni0"])
    made.bind()
    assert (addresses(sets), global6(sets)) == ({(5, 5), (6, 6)}, set())
    pods.ends[6] = with_v6(end("10.244.1.6"), "fd00:10:244:1::6")  # given after the first one
    pods.ends[5] = with_v6(end("10.244.1.5"), "fd00:10:244:1::99")  # by itself, long after it was made
    clock.now += antispoof.FIRST_LOOKS_S
    assert made.next_bind() == pytest.approx(clock.now)
    made.bind()
    assert global6(sets) == {(6, "fd00:10:244:1::6")}


def test_cnis_word_of_the_second_family_counts_however_late(sets, pods, clock):
    """On a node that takes longer than a pod is waited for."""
    given: Given = {}
    made = antispoofing(sets, pods, clock, given)
    made.within([NETWORK, NETWORK6])
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    clock.now += antispoof.SECOND_S
    made.bind()
    assert (global6(sets), made.next_bind()) == (set(), None)
    given["veth5", 1] = CniResult(1, {4: frozenset({NETWORK.base + 0x105}), 6: v6("fd00:10:244:1::5")}, "shop/web-1")
    made.ensure(TABLE)  # the next check
    assert (global6(sets), made.next_bind()) == ({(5, "fd00:10:244:1::5")}, None)


def test_nothing_is_due_while_nobody_knows_where_pods_are(sets, pods, clock):
    made = antispoofing(sets, pods, clock)
    made.ensure(TABLE)
    made.isolate(frozenset({b"\x0a\xf4\x01\x05"}))
    assert made.next_bind() is None
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    assert made.next_bind() == clock.now


def test_a_pod_that_cni_gave_no_ipv6_gets_none_by_showing_it(sets, pods, clock):
    """However short it is seen: an agent that starts sees every pod for the first time."""
    ip = NETWORK.base + 0x105
    made = antispoofing(sets, pods, clock, {("veth5", 1): CniResult(1, {4: frozenset({ip}), 6: frozenset()}, "")})
    pods.ends = {5: end("10.244.1.5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    made.within([NETWORK, NETWORK6])
    pods.ends[5] = with_v6(end("10.244.1.5"), "fd00:10:244:1::99")
    made.bind()
    assert (addresses(sets), global6(sets)) == ({(5, 5)}, set())


def test_an_address_of_the_pod_network_is_no_pods_by_being_shown_alone(sets, pods, clock):
    """When its port is seen first it may run for long: an agent that starts, anti-spoofing that is switched on."""
    made = antispoofing(sets, pods, clock)
    made.within([NETWORK, NETWORK6])
    own6 = prefix("fd00:10:244:1::/64")
    pods.ends = {5: with_v6(end("10.244.9.5"), "fd00:10:244:1::5", "fd00:10:244:2::77", "2001:db8::5")}
    made.ports([BRIDGE, port(5, 1)], ["cni0"], (), {BRIDGE.ifindex: (SUBNET, own6)})
    made.ensure(TABLE)
    assert global6(sets) == {(5, "fd00:10:244:1::5"), (5, "2001:db8::5")}, "not that of another node's pod"


def test_a_mac_that_a_later_plugin_sets_counts_whenever_cni_says_it(sets, pods, clock):
    """And by the next agent, which was not there when the port was bound."""
    given: Given = {}
    made = antispoofing(sets, pods, clock, given)
    pods.ends = {5: end("10.244.1.5")._replace(mac=5)}
    made.ports([BRIDGE, port(5, 1)], ["cni0"])
    made.ensure(TABLE)
    again = antispoofing(sets, pods, clock, given)
    again.ports([BRIDGE, port(5, 1)], ["cni0"])
    again.ensure(TABLE)
    clock.now += antispoof.HURRIED_S
    again.bind()
    assert again.next_bind() is None
    tuned = 0x0200000000AA
    given["veth5", 1] = CniResult(1, {4: frozenset({NETWORK.base + 0x105}), 6: frozenset()}, "", frozenset({tuned}))
    again.look_again()
    assert again.next_bind() == clock.now
    again.bind()
    assert (5, "02:00:00:00:00:aa") in macs(sets)
