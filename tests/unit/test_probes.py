"""Which peers are asked when, and what is said of them, with a clock that is a number and a network that is a function."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lease.config import parse_config
from lease.model import ip_number, prefix
from lease.records.packed import number, pack
from overlay.control.controller import Waiting
from overlay.kernel.route.entries import Address
from overlay.probes.controller import PeerOfPath
from overlay.probes.mesh import ANSWER_S, BUDGET, INTERVAL_S, OF_DOUBTS
from overlay.probes.path import Search
from overlay.probes.verdict import Kind, Outcome, State, judge
from tests.support.make import lease
from tests.support.probed import Probed

OK, LOST = Outcome(3, 3), Outcome(3, 0)


@pytest.fixture(autouse=True)
def _time(bench):
    bench.clock.now = 5000.0


def test_all_are_asked_in_an_interval_where_they_are_few(bench):
    it = Probed(bench, 50)
    sent = it.run(INTERVAL_S)
    assert it.states() == {"ok": 50}
    assert sum(it.run(INTERVAL_S)) == pytest.approx(50, abs=2), "one packet each, while they answer"
    assert max(sent) <= BUDGET


@pytest.mark.parametrize("answers", [True, False])
def test_the_budget_is_the_same_at_any_size(bench, answers):
    it = Probed(bench, 20000, lambda _address, _size: answers)
    sent = it.run(60)
    assert max(sent) <= BUDGET
    assert min(sent) >= BUDGET - 4
    asked = Counter(address for address, _ in it.network.sent)
    if answers:
        assert max(asked.values()) == 1, "none twice before the others"
    else:
        assert len(asked) > 60 * (BUDGET - OF_DOUBTS), "others are asked beside those in doubt"


def test_who_comes_is_asked_first(bench):
    it = Probed(bench, 20000)
    it.run(3)
    new = it.join(30000, tell=True)
    it.run(1)
    assert new.subnet.base in {address for address, _ in it.network.sent[-BUDGET:]}


def test_who_does_not_answer_is_said_in_two_intervals_and_nobody_else(bench):
    silent = lambda: it.peers[number(prefix("10.64.3.0/24"))]  # noqa: E731
    it = Probed(bench, 20)
    it.run(2 * INTERVAL_S)
    assert bench.problems() == {}
    it.network.answers = lambda address, _size: address != silent().subnet.base
    it.run(2 * INTERVAL_S)
    assert list(bench.problems()) == ["unreachable"]
    text = bench.problems()["unreachable"]
    assert text.startswith("n3 192.168.0.3: its underlay address answers, its VTEP does not: UDP 8472")
    assert bench.health.problems()["unreachable"].harmless
    assert it.states() == {"ok": 19, "unreachable": 1}
    it.network.answers = lambda _address, _size: True
    it.run(INTERVAL_S + ANSWER_S + 1)
    assert bench.problems() == {}
    assert it.states() == {"ok": 20}


def test_one_lost_probe_is_no_news(bench):
    it = Probed(bench, 4)
    it.run(2 * INTERVAL_S)
    it.network.answers = lambda _address, _size: False
    it.run(2)
    it.network.answers = lambda _address, _size: True
    it.run(3 * INTERVAL_S)
    assert bench.problems() == {}
    assert it.controller.counters()["probes_lost"] > 0


def test_small_packets_alone_are_a_path_mtu(bench):
    it = Probed(bench, 3, lambda _address, size: size < 1380)
    it.run(2 * INTERVAL_S)
    assert bench.problems()["path mtu"].startswith("all 3 peers, each: small packets pass, full-size ones are lost")
    assert it.states() == {"path_mtu": 3}
    it.run(60)
    passes = 1380 - 1 + 28
    text = bench.problems()["path mtu"]
    assert f"the largest that pass have {passes} bytes; so it is this node, most likely; set Backend.MTU" in text
    assert {each["path_mtu"] for each in it.shown()} == {passes}


def test_the_size_that_passes_is_found_anew_when_the_path_changes():
    search, tried = Search(1450), list[int]()
    for most in (1337, 1281, 1400):
        for _ in range(40):
            tried.append(search.next())
            (search.passed if tried[-1] <= most else search.lost)(tried[-1])
        assert search.found == most, tried
    assert max(tried) <= 1450


def test_a_path_on_which_nothing_but_small_packets_passes_has_no_number():
    search = Search(1450)
    for _ in range(40):
        search.lost(search.next())
    assert search.found == 0


def test_a_kernel_that_does_not_send_is_this_nodes_own(bench):
    it = Probed(bench, 3)
    it.run(INTERVAL_S)
    it.network.refuses = 22
    it.run(2 * INTERVAL_S)
    assert "this node's kernel does not send there: a blackhole route" in bench.problems()["unreachable"]
    assert it.controller.counters()["probes_refused"] > 0


def test_who_never_answered_nor_anybody_at_its_address_is_no_problem(bench):
    """Records outlive their nodes."""
    it = Probed(
        bench,
        300,
        lambda address, _size: (
            address < ip_number("10.64.100.0", 4) or ip_number("192.168.0.100", 4) > address > 1 << 31
        ),
    )
    it.run(30 * INTERVAL_S)
    assert bench.problems() == {}
    assert it.states() == {"ok": 100, "silent": 200}
    there = it.peers[number(prefix("10.64.150.0/24"))]
    it.network.answers = lambda address, _size: address < ip_number("10.64.100.0", 4) or address == there.public_ip
    it.run(30 * INTERVAL_S)
    assert "n150 192.168.0.150: its underlay address answers, its VTEP does not" in bench.problems()["unreachable"]


GATEWAY = "its underlay address answers, its pods' gateway, which did, does not"


@pytest.fixture
def without_vteps(bench):
    """A network of host-gw, in which pods' gateways are asked."""
    bench.current.set(config=parse_config('{"Network":"10.64.0.0/10","Backend":{"Type":"host-gw"}}'))
    return Probed(bench, 4, lambda address, _size: address > 1 << 31)


def test_a_gateway_that_was_never_there_is_no_problem_and_not_called_well(bench, without_vteps):
    it = without_vteps
    it.run(6 * INTERVAL_S)
    assert bench.problems() == {}
    assert it.states() == {"untried": 4}
    assert it.place == 1
    assert "no pod was made there" in it.shown()[0]["text"]
    before = len(it.network.sent)
    it.run(10 * INTERVAL_S)
    assert len(it.network.sent) - before <= 4 * 10 * 2, "it costs a visit in its turn"
    it.network.answers = lambda _address, _size: True
    it.run(2 * INTERVAL_S)
    assert it.states() == {"ok": 4}
    it.network.answers = lambda address, _size: address > 1 << 31
    it.run(2 * INTERVAL_S)
    assert GATEWAY in bench.problems()["unreachable"]
    it.network.answers = lambda _address, _size: False
    it.run(2 * INTERVAL_S)
    assert "neither its underlay address nor its pods' gateway answers" in bench.problems()["unreachable"]


def goes_and_comes_back_without_pods(bench, it):
    it.network.answers = lambda _address, _size: False
    it.run(4 * INTERVAL_S)
    assert "neither its underlay address nor its pods' gateway answers" in bench.problems()["unreachable"]
    it.network.answers = lambda address, _size: address > 1 << 31
    it.run(4 * INTERVAL_S)
    assert bench.problems() == {}
    assert it.states() == {"untried": 4}


def test_a_node_without_pods_that_goes_is_said(bench, without_vteps):
    it = without_vteps
    it.run(6 * INTERVAL_S)
    goes_and_comes_back_without_pods(bench, it)


def test_a_node_that_started_anew_without_pods_is_no_problem(bench, without_vteps):
    it = without_vteps
    it.network.answers = lambda _address, _size: True
    it.run(3 * INTERVAL_S)
    assert it.states() == {"ok": 4}
    goes_and_comes_back_without_pods(bench, it)


def test_a_kernel_that_refuses_is_said_of_a_gateway_that_never_answered(bench, without_vteps):
    it = without_vteps
    it.run(6 * INTERVAL_S)
    it.network.refuses = 22
    it.run(4 * INTERVAL_S)
    assert "this node's kernel does not send there" in bench.problems()["unreachable"]


def test_a_node_that_comes_up_is_not_called_lossy(bench):
    it = Probed(bench, 2, lambda _address, _size: False)
    it.run(20 * INTERVAL_S)
    assert it.states() == {"silent": 2}
    it.network.answers = lambda _address, _size: True
    it.run(3 * INTERVAL_S)
    assert (bench.problems(), it.states()) == ({}, {"ok": 2})
    assert not list(it.controller.mesh.lossy(0.01, 1))


def test_a_gateway_that_asks_is_there(bench, without_vteps):
    it = without_vteps
    it.run(6 * INTERVAL_S)
    it.network.asking.asks(ip_number("10.64.2.1", 4))
    it.run(3 * INTERVAL_S)
    assert "n2 192.168.0.2: its underlay address answers" in bench.problems()["unreachable"]


def test_gateways_are_asked_from_our_own_where_there_is_one(bench, without_vteps):
    it = without_vteps
    it.run(2)
    assert {source for _, source in it.network.sources} == {0}
    own = bench.current.inputs.end(4).subnet.base + 1
    bench.current.set(addresses={4: {(7, own, 24): Address(4, 7, own, 24, 0, False, False, True)}})
    it.run(2 * INTERVAL_S)
    assert {source for address, source in it.network.sources if address < 1 << 31} == {0, own}
    assert {source for address, source in it.network.sources if address > 1 << 31} == {0}


def test_much_loss_is_said(bench):
    it = Probed(bench, 3)
    turns = Counter()

    def answers(address: int, size: int) -> bool:
        if address != prefix("10.64.1.0/24").base or size < 1000:
            return True
        turns[address] += 1
        return turns[address] % 2 == 0

    it.network.answers = answers
    it.run(40 * INTERVAL_S)
    assert "n1 192.168.0.1 (" in bench.problems()["loss"]
    assert it.states() == {"ok": 3}
    it.network.answers = lambda _address, _size: True
    it.run(30 * INTERVAL_S)
    assert bench.problems() == {}


def test_half_of_the_packets_lost_is_said_whichever_they_are(bench):
    """A peer that seems gone for a moment, and is not, keeps what is known of its visits before."""
    late = []
    for seed in range(40):
        luck = random.Random(seed)
        it = Probed(bench, 3)
        it.run(3 * INTERVAL_S)
        gone = it.peers[number(prefix("10.64.1.0/24"))]
        lost = {gone.public_ip, gone.subnet.base}
        it.network.answers = lambda address, _size, lost=lost, luck=luck: address not in lost or luck.random() < 0.5
        said = (it.run(1) and "n1 " in bench.problems().get("loss", "") for _ in range(int(20 * INTERVAL_S)))
        late += [] if any(said) else [seed]
        list(it.controller.withdraw())
    assert late == []


def test_who_asks_us_is_heard(bench):
    it = Probed(bench, 2, lambda address, _size: address == prefix("10.64.1.0/24").base)
    it.run(1)
    for _ in range(30):
        it.network.asking.asks(prefix("10.64.0.0/24").base)
        it.network.asking.asks(prefix("10.99.0.0/24").base)  # nobody's
        it.network.answers = lambda address, _size: address != prefix("10.64.0.0/24").base
        it.run(1)
    assert "the way there is broken, not the way back" in bench.problems()["unreachable"]
    (heard,) = (each for each in it.shown() if each["subnet"] == "10.64.0.0/24")
    assert heard["heard_age_s"] <= 2
    assert heard["answered_age_s"] is None


def test_peers_with_subnets_of_other_lengths_are_heard(bench):
    it = Probed(bench, 2)
    it.run(1)
    small = lease("10.64.0.192/26", "192.168.9.9")
    number_of = number(small.first.subnet)
    it.leases[number_of] = small
    it.peers[number_of] = PeerOfPath(small.first.subnet, small.first.public_ip, False, "small")
    it.controller.load({each: pack(one) for each, one in it.leases.items()}.values())
    it.run(1)
    assert it.askers[1:] == (26, 0), "the socket lets its questions in"
    it.network.asking.asks(small.first.subnet.base)
    it.run(1)
    (heard,) = (each for each in it.shown() if each["subnet"] == "10.64.0.192/26")
    assert heard["heard_age_s"] is not None


def test_who_asks_very_often_takes_no_place_of_answers(bench):
    it = Probed(bench, 20)
    for _ in range(30):
        for _ in range(5000):
            it.network.asking.asks(prefix("10.64.0.0/24").base)
        it.run(1)
    assert bench.problems() == {}
    assert it.states() == {"ok": 20}


@pytest.mark.parametrize("change", [{"direct": False}, {"public_ip": ip_number("192.168.9.9", 4)}])
def test_a_peer_in_doubt_that_is_reached_another_way_now_is_asked_anew(bench, change):
    """DirectRouting was switched off, or it has another address: what was found says nothing of it."""
    it = Probed(bench, 3, lambda _address, size: size < 1473 - 50)
    for each, peer in it.peers.items():
        it.peers[each] = peer._replace(direct=True)
    it.run(3 * INTERVAL_S)
    assert it.states() == {"path_mtu": 3}
    for each, peer in it.peers.items():
        it.peers[each] = peer._replace(direct=False)._replace(**change)
    it.run(2 * INTERVAL_S)
    assert bench.problems() == {}
    assert it.states() == {"ok": 3}


def test_probes_of_before_say_nothing_of_a_peer_that_changed(bench):
    it = Probed(bench, 1, lambda _address, _size: False)
    it.run(1)
    it.network.answers = lambda _address, _size: True
    ((there, one),) = it.leases.items()
    it.peers[there] = it.peers[there]._replace(public_ip=ip_number("192.168.9.9", 4))
    it.controller.peer_changed(one, one)
    it.run(5)
    assert it.controller.counters()["probes_lost"] == 0
    assert it.states() == {"ok": 1}


def test_peers_whose_entries_are_refused_keep_nobody_from_his_turn(bench):
    it = Probed(bench, 100)
    it.run(20)
    for place in range(1000, 1000 + 3 * BUDGET):  # came, and never stood
        peer = it.join(place, tell=True)
        del it.peers[number(peer.subnet)]
    new = it.join(2000, tell=True)
    it.run(5)
    assert new.subnet.base in {address for address, _ in it.network.sent}


def test_nothing_is_said_of_peers_while_our_own_side_is_not_whole(bench):
    it = Probed(bench, 3)
    it.run(2)
    under = bench.current.inputs.underlays[4]
    bench.current.set(underlays={4: under._replace(carrier=False)})
    waits = it.controller.wants(bench.current.inputs)
    assert isinstance(waits, Waiting)
    assert "a link" in waits.reason
    bench.current.set(underlays={4: under}, settings=bench.settings._replace(probes=False))
    assert it.controller.wants(bench.current.inputs) is None
    list(it.controller.withdraw())
    assert it.controller.due() is None


def test_peers_that_go_are_forgotten(bench):
    it = Probed(bench, 5)
    it.run(INTERVAL_S)
    it.network.answers = lambda _address, _size: False
    it.run(2 * INTERVAL_S)
    assert "all 5 peers" in bench.problems()["unreachable"]
    for each, one in list(it.leases.items()):
        del it.peers[each], it.leases[each]
        it.controller.peer_changed(one, None)
    it.controller.load({}.values())
    it.run(3)
    assert bench.problems() == {}
    assert len(it.controller.mesh.known().slots) == 0


@pytest.mark.parametrize(
    ("outcomes", "state", "words"),
    [
        ({}, State.UNTRIED, "not tried"),
        ({Kind.VTEP_FULL: OK}, State.OK, "answers"),
        ({Kind.VTEP_FULL: OK, Kind.UNDERLAY: LOST}, State.OK, "answers"),
        (
            {Kind.VTEP: OK, Kind.VTEP_FULL: LOST, Kind.UNDERLAY: OK, Kind.UNDERLAY_FULL: LOST},
            State.PATH_MTU,
            "path's MTU",
        ),
        (
            {Kind.VTEP: OK, Kind.VTEP_FULL: LOST, Kind.UNDERLAY: OK, Kind.UNDERLAY_FULL: OK},
            State.PATH_MTU,
            "of the tunnel",
        ),
        ({Kind.VTEP: LOST, Kind.VTEP_FULL: LOST, Kind.UNDERLAY: LOST}, State.UNREACHABLE, "neither"),
        ({Kind.VTEP: LOST, Kind.VTEP_FULL: LOST, Kind.UNDERLAY: OK}, State.UNREACHABLE, "UDP 8472"),
        ({Kind.VTEP: Outcome(3, 0, "no route"), Kind.VTEP_FULL: LOST, Kind.UNDERLAY: OK}, State.REFUSED, "no route"),
        ({Kind.VTEP: OK, Kind.VTEP_FULL: Outcome(3, 0, "Message too long")}, State.PATH_MTU, "too long"),
    ],
)
def test_what_it_means(outcomes, state, words):
    found = judge(outcomes, 8472)
    assert (found.state, words in found.text) == (state, True), found
    assert bool(found.remedy) == (state not in (State.OK, State.UNTRIED))
