"""Probes, what is counted of them, and what follows from it."""

from __future__ import annotations

import struct

import pytest

from lease.model import ip_number
from overlay.probes.echo import sum_of
from overlay.trace import points, probe
from overlay.trace.end import Passed
from overlay.trace.points import FROM_ANOTHER, PLAIN, TO_ANOTHER, Gap, Names, Point
from overlay.trace.probe import Answer, Probe
from overlay.trace.verdict import Seen, State, judge

ONE, OTHER, ROUTER = (ip_number(each, 4) for each in ("10.244.1.2", "10.244.2.2", "192.168.1.9"))
NAMES = Names("veth1", "cni0", "flannel.1", "eth0", 8472)


def made(protocol: str = "icmp", size: int = 100) -> Probe:
    return Probe(ONE, OTHER, protocol, 0 if protocol == "icmp" else 80, 61000, 0x1234, size)


# --- packets


@pytest.mark.parametrize("protocol", ["icmp", "tcp", "udp"])
@pytest.mark.parametrize("size", [28, 61, 1450])
def test_a_packet_has_its_size_its_mark_and_right_checksums(protocol, size):
    one = made(protocol, size)
    packet = probe.packet(one, 1)
    least = {"tcp": 40}.get(protocol, 28)
    assert len(packet) == max(size, least) == int.from_bytes(packet[2:4], "big")
    assert sum_of(packet[:20]) == 0xFFFF
    assert int.from_bytes(packet[4:6], "big") == 0x1234
    body = packet[20:]
    pseudo = b"" if protocol == "icmp" else struct.pack("!LLBBH", ONE, OTHER, 0, one.number, len(body))
    assert sum_of(pseudo + body) == 0xFFFF


def reply(one: Probe, body: bytes, source: int = OTHER, protocol: int | None = None) -> bytes:
    head = struct.pack("!BBHHHBBHLL", 0x45, 0, 20 + len(body), 7, 0, 64, protocol or one.number, 0, source, ONE)
    return head + body


def test_answers_are_known_and_those_to_others_are_not():
    icmp, tcp, udp = made(), made("tcp", 40), made("udp")
    assert probe.answer_of_packet(icmp, reply(icmp, struct.pack("!BBHHH", 0, 0, 0, 61000, 1))).good
    assert probe.answer_of_packet(icmp, reply(icmp, struct.pack("!BBHHH", 0, 0, 0, 61001, 1))) is None
    assert probe.answer_of_packet(icmp, reply(icmp, struct.pack("!BBHHH", 8, 0, 0, 61000, 1))) is None
    reset = struct.pack("!HHLLBBHHH", 80, 61000, 0, 1, 5 << 4, 20, 0, 0, 0)
    assert probe.answer_of_packet(tcp, reply(tcp, reset)) == Answer(
        "refused (nobody listens on that port)", True, OTHER, True
    )
    accepted = struct.pack("!HHLLBBHHH", 80, 61000, 0, 1, 5 << 4, 18, 0, 0, 0)
    assert probe.answer_of_packet(tcp, reply(tcp, accepted)).text == "answered (the port is open)"
    assert probe.answer_of_packet(tcp, reply(tcp, struct.pack("!HHLL", 81, 61000, 0, 1))) is None
    assert probe.answer_of_packet(udp, reply(udp, struct.pack("!HHHH", 80, 61000, 8, 0))).good
    for rubbish in (b"", b"\x45", b"\x60" * 60, b"\x45" * 27):
        assert probe.answer_of_packet(icmp, rubbish) is None


def test_an_error_about_a_probe_is_no_answer_unless_the_destination_itself_refuses():
    one = made("udp")
    error = struct.pack("!BBHHH", 3, 3, 0, 0, 0) + probe.packet(one, 0)[:28]
    assert probe.answer_of_packet(one, reply(one, error, OTHER, 1)) == Answer(
        "refused (nobody listens on that port)", True, OTHER, True
    )
    assert probe.answer_of_packet(one, reply(one, error, ROUTER, 1)) == Answer(
        "nobody listens on that port", False, ROUTER, True
    )
    too_large = struct.pack("!BBHHH", 3, 4, 0, 0, 1400) + probe.packet(one, 0)[:28]
    assert "too large" in probe.answer_of_packet(one, reply(one, too_large, ROUTER, 1)).text
    anothers = struct.pack("!BBHHH", 3, 4, 0, 0, 1400) + probe.packet(one._replace(ip_id=9), 0)[:28]
    assert probe.answer_of_packet(one, reply(one, anothers, ROUTER, 1)) is None


# --- points


def test_the_points_of_a_way_are_in_order_and_each_has_its_rules():
    there = [*points.from_pod(NAMES), *points.onward(NAMES), *points.into_tunnel(NAMES)]
    assert [point.gap for point in there] == [
        Gap.SENT, Gap.BRIDGE, Gap.PREROUTING, Gap.ROUTING, Gap.FORWARD, Gap.POSTROUTING, Gap.DEVICE, Gap.OUTPUT,
    ]  # fmt: skip
    found = points.objects(there, made(), 8472, "t")
    rules = [each["rule"] for those in found.values() for each in those if "rule" in each]
    assert {int(rule["comment"].split()[0]) for rule in rules} == set(range(len(there)))
    assert all("counter" in rule["expr"][-1] for rule in rules), "they count, and decide nothing"
    direct = Names("veth1", "cni0", "", "eth0", 8472)
    assert list(points.into_tunnel(direct)) == []
    assert [point.iif for point in points.out_of_tunnel(direct)] == ["eth0", "eth0"]


def test_what_was_counted_is_read_by_place_and_form():
    rule = {"rule": {"comment": "3 plain", "expr": [{"match": {}}, {"counter": {"packets": 2, "bytes": 168}}]}}
    assert list(points.counted([{"chain": {}}, rule, {"rule": {"expr": []}}])) == [(3, "plain", 2)]


# --- the verdict


def passed(node: str, what: str, gap: Gap, count: int, back: bool = False, form: str = PLAIN) -> Passed:
    return Passed(node, Point(what, gap, "ip", "forward", back=back), {form: count})


def seen(
    *counts: int, back: tuple[int, ...] = (), complete: bool = True, looked=None, answers=(), form: str = PLAIN
) -> Seen:
    gaps = (Gap.SENT, Gap.ROUTING, Gap.UNDERLAY, Gap.FORWARD)
    there = [
        passed("n1" if place < 2 else "n2", f"step {place}", gaps[place], count, form=form)
        for place, count in enumerate(counts)
    ]
    ways = (Gap.ANSWER, Gap.INPUT)
    answer = [passed("n2", f"back {place}", ways[place], count, True) for place, count in enumerate(back)]
    return Seen(there, answer, looked or {}, answers, 3, complete, "n2")


GOOD, BAD = Answer("answered", True, OTHER), Answer("forbidden by a filter", False, ROUTER)
RESET = Answer("refused (nobody listens on that port)", True, OTHER, True)


@pytest.mark.parametrize(
    ("what", "state", "gap", "words"),
    [
        (seen(3, 3, 3, 3, answers=[GOOD]), State.DELIVERED, None, "delivered, and answered"),
        (seen(3, 3, 3, 3), State.DELIVERED, None, "not counted"),
        (
            seen(3, 3, 3, 3, back=(0, 0)),
            State.UNANSWERED,
            Gap.ANSWER,
            "whether that took it is not seen, and no answer came",
        ),
        (seen(3, 3, 3, 3, back=(3, 3)), State.LOST_BACK, Gap.TAKEN, "did not come to who asked"),
        (seen(3, 3, 3, 3, answers=[RESET]), State.DELIVERED, None, "delivered, and refused"),
        (seen(3, 3, 3, 0, answers=[RESET]), State.DROPPED, Gap.FORWARD, "dropped at n2"),
        (seen(3, 3, 3, 0, answers=[GOOD]), State.DELIVERED, None, "delivered, and answered"),
        (seen(3, 3, 3, 3, back=(3, 0)), State.LOST_BACK, Gap.INPUT, "its answer was dropped at n2"),
        (seen(3, 0, 0, 0), State.DROPPED, Gap.ROUTING, 'dropped at n1, between "step 0" and "step 1"'),
        (seen(3, 3, 0, 0), State.DROPPED, Gap.UNDERLAY, "dropped at n2"),
        (seen(3, 0, 3, 0), State.DROPPED, Gap.FORWARD, 'between "step 2" and "step 3"'),
        (seen(0, 0, 0, 0), State.DROPPED, Gap.SENT, 'before "step 0"'),
        (seen(3, 3, complete=False), State.LEFT, None, "at n2 is not known"),
    ],
)
def test_what_it_means(what, state, gap, words):
    found = judge(what)
    assert (found.state, found.gap) == (state, gap)
    assert words in found.text
    assert bool(found.reasons) == (gap is not None), "where it is dropped something is said of why"


def test_reasons_are_those_of_the_step_and_the_direction():
    looked = {
        "n1": {(Gap.ROUTING, False): ["a blackhole"], (Gap.INPUT, False): ["a filter"]},
        "n2": {(Gap.INPUT, True): ["one back"]},
    }
    assert judge(seen(3, 0, 0, 0, looked=looked)).reasons == ("a blackhole",)
    assert judge(seen(3, 3, 3, 3, back=(3, 0), looked=looked)).reasons == ("one back",)
    assert judge(seen(3, 3, 3, 0, looked=looked)).reasons == (f"it is one of: {Gap.FORWARD.value}",)
    assert judge(seen(3, 0, 0, 0, looked=looked, answers=[BAD])).reasons[0] == "192.168.1.9 says: forbidden by a filter"


@pytest.mark.parametrize(
    ("looked", "node", "words"),
    [
        ({"n1": {(Gap.TUNNEL, False): ["a rule"]}, "n2": {}}, "n1", "dropped at n1, between"),
        ({"n1": {}, "n2": {(Gap.TUNNEL, True): ["a rule"]}}, "n2", "dropped at n2, between"),
        ({"n1": {}, "n2": {}}, "", "dropped between n1 and n2, between"),
        ({"n1": {}}, "", "dropped between the nodes, between"),
    ],
)
def test_where_nobody_can_look_into_the_tunnel_the_node_with_a_reason_is_named(looked, node, words):
    there = [passed("n1", "left", Gap.SENT, 3), passed("n2", "came", Gap.TUNNEL, 0)]
    found = judge(Seen(there, [], looked, (), 3, True, "n2"))
    assert (found.state, found.node) == (State.DROPPED, node)
    assert words in found.text


def test_what_nobody_answered_arp_for_did_not_leave():
    looked = {"n1": {(Gap.NEXT_HOP, False): ["nobody answers ARP"]}}
    found = judge(seen(3, 3, complete=False, looked=looked))
    assert (found.state, found.node, found.reasons) == (State.DROPPED, "n1", ("nobody answers ARP",))


def test_another_source_or_destination_on_the_way_is_noted():
    assert "it was masqueraded" in judge(seen(3, 3, 3, 3, form=FROM_ANOTHER)).notes[0]
    assert "its destination was changed" in judge(seen(3, 3, 3, 3, form=TO_ANOTHER)).notes[0]
    assert judge(seen(3, 3, 3, 2)).notes == ('of 3 packets 2 got on at n2, between "step 2" and "step 3"',)
    dropped = judge(seen(3, 3, 3, 0, form=TO_ANOTHER, looked={"n1": {(Gap.PREROUTING, False): ["a rule"]}}))
    assert dropped.reasons[:2] == ("its destination was changed at n1 before it step 0", "a rule")
    assert "somebody on the way refused in the destination's name" in judge(seen(3, 0, 0, 0, answers=[RESET])).notes[-1]
