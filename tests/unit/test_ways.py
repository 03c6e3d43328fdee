"""Where the kernel sends elsewhere: what is asked, and how rule and route are named. Pure."""

from __future__ import annotations

import errno

import pytest

from lease.families import V4, V6
from lease.model import ip_number, prefix
from overlay.kernel.route.lookup import (
    FR_ACT_TO_TBL,
    FR_ACT_UNREACHABLE,
    RTN_BLACKHOLE,
    RTN_THROW,
    RTN_UNICAST,
    AnyRoute,
    Packet,
    Rule,
    Way,
)
from overlay.reach import explain, ways


def ip(text: str) -> int:
    return ip_number(text, 4)


def rule(priority: int, table: int, **change) -> Rule:
    return Rule(priority, FR_ACT_TO_TBL, table, 0, -1, 0, -1, "", "", 0, 0, False, -1, False, False)._replace(**change)


def route(text: str, table: int, oif: int = 9, kind: int = RTN_UNICAST, via: int = 0) -> AnyRoute:
    there = prefix(text)
    return AnyRoute(there.base, there.length, table, kind, oif, via)


NAMES = {1: "lo", 2: "eth0", 3: "flannel.1", 8: "cni0", 9: "mesh0"}
KERNELS = [rule(0, 255), rule(32766, 254), rule(32767, 253)]
MAIN = [route("10.244.2.0/24", 254, 3), route("0.0.0.0/0", 254, 2, via=ip("192.168.1.1"))]
NETWORK = prefix("10.244.0.0/16")
TO_POD = Packet(ip("10.244.2.2"))


def decided(rules, packet=TO_POD, **tables):
    there = {254: MAIN, **{int(name[1:]): routes for name, routes in tables.items()}}
    every = sorted([*KERNELS, *rules], key=lambda each: each.priority)
    return explain.decision(V4, every, lambda table: there.get(table, []), NAMES, packet)


def text(found) -> str:
    return explain.cause(V4, NETWORK, found, NAMES)


def test_without_rules_of_others_the_main_table_decides():
    found = decided([])
    assert (found.rule, found.route) == (KERNELS[1], MAIN[0])
    assert "10.244.2.0/24 dev flannel.1 of table main" in text(found)


@pytest.mark.parametrize(
    ("there", "packet", "decides"),
    [
        pytest.param(rule(52, 52), TO_POD, True, id="any packet"),
        pytest.param(rule(52, 52, source=ip("10.244.1.0"), source_length=24), TO_POD, False, id="another source"),
        pytest.param(rule(52, 52, source=ip("10.244.1.0"), source_length=24), TO_POD._replace(source=ip("10.244.1.2")),
                     True, id="that source"),
        pytest.param(rule(52, 52, destination=ip("10.244.0.0"), destination_length=16), TO_POD, True, id="destination"),
        pytest.param(rule(52, 52, destination=ip("10.245.0.0"), destination_length=16), TO_POD, False, id="another"),
        pytest.param(rule(52, 52, iif="cni0"), TO_POD, False, id="forwarded only"),
        pytest.param(rule(52, 52, iif="cni0"), TO_POD._replace(iif=8), True, id="forwarded"),
        pytest.param(rule(52, 52, iif="lo"), TO_POD, True, id="sent by this node"),
        pytest.param(rule(52, 52, oif="eth0"), TO_POD, False, id="of sockets bound to an interface only"),
        pytest.param(rule(52, 52, mark=1, mask=0xF), TO_POD, False, id="marked only"),
        pytest.param(rule(52, 52, mark=1, mask=0xF), TO_POD._replace(mark=0x11), True, id="marked"),
        pytest.param(rule(52, 52, mark=1, mask=0xF, invert=True), TO_POD, True, id="not marked (wg-quick)"),
        pytest.param(rule(52, 52, unclear=True), TO_POD, False, id="by what is not known here"),
        pytest.param(rule(52, 52, suppress=16), TO_POD, False, id="short prefixes are suppressed"),
        pytest.param(rule(52, 52, suppress=0), TO_POD, True, id="only the default route is suppressed"),
        pytest.param(rule(40000, 52), TO_POD, False, id="after main"),
    ],
)  # fmt: skip
def test_which_rule_decides(there, packet, decides):
    found = decided([there], packet, t52=[route("10.244.0.0/16", 52)])
    assert (found.rule == there) == decides


def test_the_longest_prefix_of_a_table_decides_and_throw_leads_on():
    there = [route("10.0.0.0/8", 52), route("10.244.2.0/25", 52, kind=RTN_BLACKHOLE, oif=0)]
    assert decided([rule(9, 52)], t52=there).route == there[1]
    assert "blackhole 10.244.2.0/25 of table 52" in text(decided([rule(9, 52)], t52=there))
    thrown = [*there, route("10.244.2.0/26", 52, kind=RTN_THROW, oif=0)]
    assert decided([rule(9, 52)], t52=thrown).route == MAIN[0]


def test_what_is_said_of_it_can_be_copied_to_a_shell():
    found = decided([rule(5270, 52)], t52=[route("10.244.0.0/16", 52)])
    assert text(found) == (
        "the route 10.244.0.0/16 dev mesh0 of table 52 says so, to which ip rule 5270 (from all lookup 52) leads before the"
        " table main is asked; ip rule add pref 5269 to 10.244.0.0/16 lookup main puts the pod network's routes before it"
    )
    ends = decided([rule(8, 0, action=FR_ACT_UNREACHABLE)])
    assert text(ends).startswith("ip rule 8 (from all unreachable) ends it; ip rule add pref 7")
    assert "ip route" in text(explain.Decision(None, None))
    marked = rule(3, 52, mark=0x10, mask=0xFF, invert=True, iif="cni0", oif="eth0", destination=0, destination_length=0)
    assert explain.rule_text(V4, marked) == "not from all to all fwmark 0x10/0xff iif cni0 oif eth0 lookup 52"
    assert explain.route_text(V4, MAIN[1], NAMES) == "default via 192.168.1.1 dev eth0"
    six = rule(3, 254, source=ip_number("fd00::", 6), source_length=48)
    assert explain.rule_text(V6, six) == "from fd00::/48 lookup main"


HERE = ways.Here(prefix("10.244.1.0/24"), 3, 2, ip("192.168.1.2"), (8,))
PEER = ways.Peer(prefix("10.244.2.0/24"), ip("192.168.1.3"), False)


def test_both_directions_are_asked_and_what_carries_them():
    asked = {question.what: question for question in ways.questions(HERE, PEER)}
    assert asked[ways.OUT] == (Packet(ip("10.244.2.2")), 3, None, ways.OUT)
    assert asked[ways.FORWARDED].packet == Packet(ip("10.244.2.2"), ip("10.244.1.2"), iif=8)
    assert asked[ways.BACK] == (Packet(ip("10.244.1.2"), ip("10.244.2.2"), iif=3), 8, None, ways.BACK)
    assert asked[ways.OUTER].packet == Packet(ip("192.168.1.3"), ip("192.168.1.2"), oif=2)


def test_of_a_peer_reached_directly_the_plain_route_is_asked():
    asked = {question.what: question for question in ways.questions(HERE, PEER._replace(direct=True))}
    assert (asked[ways.OUT].oif, asked[ways.OUT].via, asked[ways.BACK].packet.iif) == (2, ip("192.168.1.3"), 2)
    assert ways.OUTER not in asked


def test_without_pods_only_the_node_itself_is_asked_about():
    assert {q.what for q in ways.questions(HERE._replace(bridges=()), PEER)} == {ways.OUT, ways.OUTER, ways.INCOMING}


@pytest.mark.parametrize(
    ("way", "well"),
    [
        (Way(3, 0, 0), True), (Way(3, 0, ip("10.244.2.0")), True), (Way(9, 0, 0, 52), False),
        (Way(0, 0, 0, 0, errno.EINVAL), False),
    ],
)  # fmt: skip
def test_what_counts_as_the_right_way(way, well):
    question = next(ways.questions(HERE, PEER))
    assert ways.is_as_asked(question, way) == well


def test_a_tunnel_packet_must_find_a_route_by_the_underlay():
    outer = next(question for question in ways.questions(HERE, PEER) if question.what == ways.OUTER)
    assert ways.is_as_asked(outer, Way(2, 0, 0, 254))
    assert not ways.is_as_asked(outer, Way(2, 0, 0, 0)), "none matched: the kernel takes the link for the way"
    direct = next(ways.questions(HERE, PEER._replace(direct=True)))
    assert not ways.is_as_asked(direct, Way(2, 0, ip("192.168.1.1"))), "by another gateway"
