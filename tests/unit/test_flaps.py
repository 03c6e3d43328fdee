"""Records that change again and again: what they said before counts, until they are quiet. The clock is a number."""

from __future__ import annotations

import pytest

from lease.model import Lease
from lease.records.packed import Leases
from lease.store import Changes, Gone, Snapshot
from overlay.cluster import flaps
from overlay.cluster.flaps import FORGOTTEN_S, HALF_LIFE_S, LEAST_S, LIMIT, MOST_KEYS, MOST_S, SETTLED_S, Flaps
from tests.support.bench import CONFIG
from tests.support.make import lease

GOOD = lease("10.244.9.0/24", "192.168.1.9")
BAD = GOOD._replace(v4=GOOD.v4._replace(public_ip=GOOD.v4.public_ip + 1))
KEY = GOOD.key


class Followed:
    """A Flaps, and what was settled by it."""

    def __init__(self, clock, first: Lease | None = GOOD) -> None:
        self.clock, self.flaps = clock, Flaps(clock)
        self.settled: dict[str, Lease | None] = {KEY: first}

    def say(self, state: Lease | None) -> Lease | None:
        """The key says this; what counts now."""
        settled = self.flaps.changes({KEY: state}, self.settled.get)
        self.flaps.had_effect(settled)
        self.settled |= settled
        return self.settled[KEY]

    def wait(self, seconds: float) -> Lease | None:
        self.clock.now += seconds
        self.settled |= self.flaps.over()
        return self.settled[KEY]


@pytest.fixture
def followed(bench) -> Followed:
    bench.clock.now = 1000.0
    return Followed(bench.clock)


def test_a_few_changes_count_at_once(followed):
    for state in (BAD, GOOD, BAD):
        assert followed.say(state) == state
        followed.wait(0.1)
    assert followed.flaps.held() == ()
    assert followed.flaps.due() is None


def test_what_two_fight_over_stays_as_it_was_before(followed):
    """Whoever of them writes last at any moment."""
    seen = []
    for _ in range(100):
        for state in (BAD, GOOD):
            seen.append(followed.say(state))
            followed.wait(0.5)
    first = seen.index(GOOD, 3)
    assert first <= 4, "soon"
    assert set(seen[first:]) == {GOOD}
    assert followed.flaps.held() == (KEY,)
    # and the other way round: what was there for long counts, not what is right
    other = Followed(followed.clock, BAD)
    for _ in range(20):
        for state in (GOOD, BAD):
            last = other.say(state)
    assert last == BAD


def test_it_counts_once_it_is_quiet_sooner_or_later(followed):
    def until_quiet(changes: int) -> float:
        for count in range(changes):
            followed.say((BAD, GOOD)[count % 2])
            followed.wait(0.05)
        followed.say(BAD)
        assert followed.settled[KEY] == GOOD
        began = followed.clock.now
        while followed.wait(0.5) != BAD:
            assert followed.clock.now < began + MOST_S + 1
        assert followed.flaps.held() == ()
        return followed.clock.now - began

    soon = until_quiet(4)
    assert LEAST_S <= soon < 2 * LEAST_S
    followed.wait(FORGOTTEN_S)
    followed.say(GOOD)
    followed.wait(SETTLED_S)
    assert until_quiet(100) > 5 * soon, "less and less often"
    followed.wait(FORGOTTEN_S)
    assert followed.say(GOOD) == GOOD, "as if nothing had been"


@pytest.mark.parametrize("what", ["comes and goes", "is new each time"])
def test_a_node_that_is_made_again_and_again_is_less_in_doubt_than_a_fight(followed, what):
    """A node that is made anew all the time (a test, a crash loop) is followed for long; not for ever."""
    if what == "comes and goes":
        states = [one for number in range(2, 200) for one in (None, GOOD._replace(created=number))]
    else:
        states = [GOOD._replace(v4=GOOD.v4._replace(mac=GOOD.v4.mac + number)) for number in range(1, 100)]
    counted = 0
    for state in states:
        if followed.say(state) != state:
            break
        counted += 1
    assert counted == pytest.approx(LIMIT / (flaps.CAME_OR_WENT if what == "comes and goes" else flaps.IN_PLACE), abs=1)
    assert followed.settled[KEY] == GOOD


def test_a_fight_without_end_costs_no_agent_its_life(followed):
    """Thousands of changes: the penalty has a ceiling, and so has the wait."""
    for count in range(20_000):
        followed.say((BAD, GOOD)[count % 2])
    assert followed.wait(MOST_S + 1) == GOOD
    assert followed.flaps.held() == ()


def test_slow_changes_are_no_flapping(followed):
    for count in range(50):
        assert followed.say((BAD, GOOD)[count % 2]) == (BAD, GOOD)[count % 2]
        followed.wait(HALF_LIFE_S)


def test_what_comes_to_nothing_is_no_flapping(bench):
    """A record that is refused for one reason after the other costs nobody anything."""
    controller = bench.records()
    bench.tell(controller, Snapshot(1, CONFIG.encode(), Leases.of([GOOD]), {}))
    bench.reconcile(bench.table())
    for number in range(20):
        refused = GOOD._replace(v4=GOOD.v4._replace(public_ip=number))
        bench.tell(controller, Changes(2, (refused,)))
        bench.reconcile(controller)
        assert bench.path.record(KEY) == refused
    assert bench.problems() == {}


def test_what_is_written_again_as_it_was_is_no_change(followed):
    for number in range(50):
        again = GOOD._replace(modified=number, handle=number)
        assert followed.say(again) == again
    assert followed.flaps.held() == ()


def test_who_only_comes_is_not_remembered(bench):
    there = Flaps(bench.clock)
    for number in range(3000):
        one = lease(f"10.{number >> 8}.{number & 255}.0/24", "192.168.1.9")
        assert there.changes({one.key: one}, lambda _key: None) == {one.key: one}
    assert len(there._flaps) == 0


def test_so_many_keys_are_remembered(bench):
    there = Flaps(bench.clock)
    for number in range(MOST_KEYS + 100):
        one = lease(f"10.{number >> 8}.{number & 255}.0/24", "192.168.1.9")
        assert there.changes({one.key: None}, lambda _key, one=one: one) == {one.key: None}
    assert len(there._flaps) == MOST_KEYS
    bench.clock.now += FORGOTTEN_S + 1
    for _ in range(MOST_KEYS // 64 + 1):
        there.changes({KEY: GOOD}, lambda _key: None)
    assert len(there._flaps) == 0


def test_a_list_changes_nothing_of_it(followed):
    for count in range(9):
        followed.say((BAD, GOOD)[count % 2])
    assert followed.flaps.held() == (KEY,)
    other = lease("10.244.10.0/24", "192.168.1.10")
    assert dict(followed.flaps.listed(Leases.of([GOOD, other]))) == {KEY: GOOD, other.key: other}
    assert dict(followed.flaps.listed(Leases.of([other]))) == {KEY: GOOD, other.key: other}
    assert followed.wait(MOST_S) is None, "what the list said, once it was the same for long"
    assert dict(followed.flaps.listed(Leases.of([other]))) == {other.key: other}


def test_of_each_key_the_last_state_of_a_pass_is_settled_and_flapping_is_told(bench):
    controller, asked = bench.records(), []
    bench.tell(controller, Snapshot(1, CONFIG.encode(), Leases.of([GOOD]), {}))
    bench.reconcile(bench.table())
    change, bench.path.change = bench.path.change, lambda records: asked.append(records) or change(records)
    for state in (BAD, GOOD) * 20:
        bench.tell(controller, Changes(2, (state,)))
    bench.tell(controller, Changes(3, (BAD, Gone("10.244.77.0-24"))))
    assert asked == []
    bench.reconcile(controller)
    assert asked == [{KEY: BAD, "10.244.77.0-24": None}]
    assert bench.problems() == {}
    for state in (GOOD, BAD) * 5:
        bench.tell(controller, Changes(2, (state,)))
        bench.reconcile(controller)
    assert bench.path.record(KEY).v4 == GOOD.v4
    assert bench.problems()["flapping records"].startswith(f"{KEY}: changed again and again")
    assert bench.health.problems()["flapping records"].harmless
    assert controller.status()["flapping_records"] == [KEY]
    while (at := controller.due()) is not None:
        assert at > bench.clock.now
        bench.clock.now = at
        bench.reconcile(controller)
    assert bench.path.record(KEY).v4 == BAD.v4
    assert bench.problems() == {}


assert flaps.BACK_AGAIN * 4 > LIMIT >= flaps.BACK_AGAIN * 3 + flaps.IN_PLACE, "what the tests above count by"
