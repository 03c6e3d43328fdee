"""When a controller is asked, what becomes of a refusal, and that adding a controller is a class and a line."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from overlay.agent.loop import Loop, Stop
from overlay.control import schedule
from overlay.control.controller import CannotReconcile, Controller, Source, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.control.schedule import RECHECK_S, Cadence, Schedule, retry_delay_s
from overlay.settings.settings import Settings
from tests.support.clock import Clock


class Poked(NamedTuple):
    """An event of the toy's own."""


class Toy(Controller):
    """Keeps a value in `kernel`, as a new feature would: the flag --node-name, of all things."""

    name = "toy"

    def __init__(self, kernel: dict[str, str]) -> None:
        self.kernel, self.asked = kernel, 0
        self.error: Exception | None = None
        self.left = 0
        """Slices that it needs more."""
        self.at: float | None = None

    @property
    def handles(self) -> dict[type, Any]:
        return {Poked: lambda _event: True}

    def wants(self, inputs: Inputs) -> object:
        if not inputs.listed:
            return Waiting("for the first list")
        return inputs.settings.node_name or None

    def reconcile(self, wants: str) -> bool:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.left:
            self.left -= 1
            return True
        self.kernel["toy"] = wants
        return False

    def due(self) -> float | None:
        return self.at

    def withdraw(self) -> Iterator[str]:
        if self.kernel.pop("toy", None) is not None:
            yield "toy"

    def status(self) -> dict[str, object]:
        return {"toy": self.kernel.get("toy")}


class Lister(Source):
    """Sets what the toy waits for."""

    name = "lister"

    def __init__(self, current: CurrentInputs) -> None:
        self.current = current

    @property
    def handles(self) -> dict[type, Any]:
        return {str: self.heard}

    def heard(self, event: str) -> bool:
        self.current.set(settings=Settings(node_name=event), listed=True)
        return False


class World:
    def __init__(self) -> None:
        self.clock, self.kernel = Clock(), {}
        self.current = CurrentInputs(Settings())
        self.health = Health(self.clock)
        self.toy = Toy(self.kernel)
        self.schedule = Schedule([Lister(self.current), self.toy], self.current, self.health, self.clock)

    def turn(self) -> None:
        for _ in range(10):
            if not self.schedule.run_pass():
                return
        raise AssertionError("it never ends")


@pytest.fixture
def world() -> World:
    made = World()
    made.turn()
    return made


def test_what_waits_is_not_touched(world):
    assert (world.toy.asked, world.kernel) == (0, {})
    assert world.schedule.waiting() == "for the first list"
    world.schedule.handle("node1")
    world.turn()
    assert (world.toy.asked, world.kernel) == (1, {"toy": "node1"})
    assert world.schedule.waiting() == ""


def test_it_is_asked_when_what_it_wants_changed_and_not_else(world):
    world.schedule.handle("node1")
    world.turn()
    world.schedule.handle("node1")
    world.turn()
    assert world.toy.asked == 1
    world.schedule.handle("node2")
    world.turn()
    assert (world.toy.asked, world.kernel) == (2, {"toy": "node2"})


def test_a_start_does_not_wait_for_what_is_harmless(world, monkeypatch):
    """As probes, which wait for a link."""
    monkeypatch.setattr(Toy, "harmless", True)
    assert world.schedule.waiting() == ""


@pytest.mark.parametrize(
    "now", [{"listed": False}, {"settings": Settings(node_name="")}], ids=["it waits again", "it is switched off"]
)
def test_what_was_found_says_nothing_any_more_once_nobody_looks(world, now):
    world.toy.reports = ("toy's finding",)
    world.schedule.handle("node1")
    world.turn()
    world.health.problem("toy's finding", "a stone")
    world.schedule.handle("node2")
    world.turn()
    assert "toy's finding" in world.health.problems()
    world.current.set(**now)
    world.turn()
    assert world.health.problems() == {}


def test_an_event_of_its_own_its_time_and_the_minute_ask_it(world):
    world.schedule.handle("node1")
    world.turn()
    world.schedule.handle(Poked())
    world.turn()
    assert world.toy.asked == 2
    world.toy.at = 5.0
    assert world.schedule.next_due() == 5.0
    world.clock.now = 5.0
    world.schedule.run_pass()
    assert world.toy.asked == 3
    world.toy.at = None
    assert world.schedule.next_due() == RECHECK_S
    world.clock.now = RECHECK_S
    world.turn()
    assert world.toy.asked == 4


@pytest.mark.parametrize("error", [OSError(1, "no"), CannotReconcile("no"), PermissionError(13, "no", "/a/file")])
def test_a_refusal_is_a_problem_tried_again_later_and_less_often(world, error):
    world.toy.error = error
    world.schedule.handle("node1")
    for refusals in range(1, 8):
        world.turn()
        assert world.toy.asked == refusals
        assert "no" in world.health.problems()["toy"].text
        due = world.schedule.next_due()
        assert due == pytest.approx(world.clock.now + retry_delay_s(refusals))
        world.clock.now += retry_delay_s(refusals) / 2
        world.turn()
        assert world.toy.asked == refusals, "it waits"
        world.clock.now = due
    world.toy.error = None
    world.turn()
    assert world.health.problems() == {}
    assert world.kernel == {"toy": "node1"}
    world.toy.error = error
    world.schedule.handle(Poked())
    world.turn()
    assert world.schedule.next_due() == pytest.approx(world.clock.now + schedule.FIRST_RETRY_S), "it begins anew"


class Ended(NamedTuple):
    """The end of what `Later` began."""

    refused: bool


class Later(Controller):
    """Begins only; the end is an event."""

    name = "later"
    answers_later = True

    def __init__(self, health: Health) -> None:
        self.health, self.begun, self.refused = health, 0, False

    @property
    def handles(self) -> dict[type, Any]:
        return {Ended: self.ended}

    def ended(self, event: Ended) -> bool:
        self.refused = event.refused
        if not event.refused:
            self.health.solved(self.name)
        return event.refused

    def wants(self, inputs: Any) -> object:
        return inputs.listed

    def reconcile(self, wants: Any) -> bool:
        del wants
        if self.refused:
            self.refused = False
            raise CannotReconcile("no")
        self.begun += 1
        return False


def test_what_is_refused_later_is_tried_again_less_and_less_often_too():
    clock = Clock()
    health = Health(clock)
    later = Later(health)
    world = Schedule([later], CurrentInputs(Settings()), health, clock)
    world.run_pass()
    for refusals in range(1, 8):
        assert later.begun == refusals
        world.handle(Ended(refused=True))
        world.run_pass()
        assert health.problems()["later"].text == "no"
        assert world.next_due() == pytest.approx(clock.now + retry_delay_s(refusals))
        clock.now = world.next_due()
        world.run_pass()
        assert world.next_due() > clock.now, "it is under way, and not asked again at once"
    world.handle(Ended(refused=False))
    world.run_pass()
    assert health.problems() == {}
    later.refused = True
    clock.now += RECHECK_S
    world.run_pass()
    assert world.next_due() == pytest.approx(clock.now + schedule.FIRST_RETRY_S), "it begins anew"


def test_what_was_refused_and_must_wait_now_is_not_asked_without_end(world):
    world.toy.error = OSError(1, "no")
    world.schedule.handle("node1")
    world.turn()
    world.current.set(listed=False)
    world.turn()
    world.clock.now += 30
    assert world.schedule.next_due() > world.clock.now


def test_what_was_refused_is_no_problem_of_one_that_waits(world):
    world.toy.error = OSError(1, "no")
    world.schedule.handle("node1")
    world.turn()
    assert "toy" in world.health.problems()
    world.current.set(listed=False)
    world.turn()
    assert world.health.problems() == {}


def test_a_problem_that_a_controller_set_itself_is_its_own_to_clear(world):
    world.health.problem("toy", "something else")
    world.schedule.handle("node1")
    world.turn()
    assert world.health.problems()["toy"].text == "something else"


def test_news_ends_the_waiting_for_a_retry(world):
    world.toy.error = OSError(1, "no")
    world.schedule.handle("node1")
    world.turn()
    world.toy.error = None
    world.schedule.handle(Poked())
    world.turn()
    assert world.kernel == {"toy": "node1"}


def test_another_error_is_a_bug_and_not_hidden(world):
    world.toy.error = KeyError("a bug")
    world.schedule.handle("node1")
    with pytest.raises(KeyError):
        world.turn()


def test_switched_off_is_withdrawn_once_and_on_again_made(world):
    world.schedule.handle("node1")
    world.turn()
    world.schedule.handle("")
    world.turn()
    assert world.kernel == {}
    assert world.schedule.waiting() == "", "what is switched off keeps nobody waiting"
    world.schedule.handle("node1")
    world.turn()
    assert world.kernel == {"toy": "node1"}


def test_slices_are_passes_and_others_have_their_turn_between(world):
    world.toy.left = 3
    world.schedule.handle("node1")
    passes = 1
    while world.schedule.run_pass():
        passes += 1
    assert (passes, world.toy.asked) == (4, 4)


class After(Toy):
    name = "after"
    after = ("toy",)


class Yields(Toy):
    name = "yields"
    yields = True


def test_what_comes_after_another_waits_until_that_was_done_once():
    world = World()
    second = After({})
    toys = [Lister(world.current), world.toy, second]
    world.schedule = Schedule(toys, world.current, world.health, world.clock)
    world.toy.error = OSError(1, "no")
    world.schedule.handle("node1")
    world.turn()
    assert second.asked == 0
    world.toy.error, world.clock.now = None, 1.0
    world.turn()
    assert second.asked == 1
    world.toy.error = OSError(1, "no")
    world.schedule.handle(Poked())
    world.turn()
    assert second.asked == 2, "once is enough"


def test_what_yields_waits_in_the_first_seconds_while_there_is_more_to_do():
    world = World()
    second = Yields({})
    world.schedule = Schedule([Lister(world.current), world.toy, second], world.current, world.health, world.clock)
    world.toy.left = 5
    world.schedule.handle("node1")
    world.schedule.run_pass()
    assert second.asked == 0
    world.clock.now = schedule.PEERS_FIRST_S
    world.schedule.run_pass()
    assert second.asked == 1


def test_two_of_one_name_are_a_bug():
    world = World()
    with pytest.raises(AssertionError, match="two controllers of one name"):
        Schedule([world.toy, Toy({})], world.current, world.health, world.clock)


def test_an_event_that_nobody_takes_is_a_bug(world):
    with pytest.raises(KeyError):
        world.schedule.handle(3.5)


def test_what_is_dear_is_checked_less_often():
    clock = Clock()
    cadence = Cadence(clock)
    assert cadence.at == RECHECK_S
    cadence.began()
    cadence.spent(0.01)
    cadence.ended()
    assert cadence.at == RECHECK_S
    cadence.began()
    cadence.spent(0.05)
    cadence.spent(0.15)
    cadence.ended()
    assert cadence.at == pytest.approx(0.2 * schedule.CHECK_SHARE)
    assert (cadence.count, cadence.total_s, cadence.longest_s) == (2, pytest.approx(0.21), 0.15)


def test_the_loop_takes_a_controller_it_has_never_heard_of():
    """A new feature is a folder and a line in compose.py: nothing else names it, and the status has it all the same."""
    world, inbox = World(), queue.SimpleQueue()
    loop = Loop([Lister(world.current), world.toy], world.current, world.health, inbox, world.clock)
    for event in ("node1", Poked(), Stop("done", 3)):
        loop.post(event)
    assert loop.run() == 3
    loop.run_pass()
    found = loop._status().json()
    assert found["toy"] == "node1"
    assert found["problems"] == []
    assert loop.health.readiness() == (True, "ok")


def test_the_loop_does_not_wait_for_a_first_event():
    """Links and underlay are read while the first list is on its way."""
    world, inbox = World(), queue.SimpleQueue()
    world.current.set(settings=Settings(node_name="node1"), listed=True)
    loop = Loop([world.toy], world.current, world.health, inbox, world.clock)
    loop.each_pass = lambda: inbox.put(Stop("after the first pass"))
    assert loop.run() == 0
    assert world.toy.asked == 1


def test_a_start_waits_for_our_own_work_not_for_what_others_do():
    health = Health(Clock())
    health.problem("device", "refused")
    assert not health.in_place("")
    health.solved("device")
    assert not health.in_place("for a lease")
    health.problem("ways", "a rule of others", outside=True)
    health.problem("mtu", "lowered", harmless=True)
    assert health.in_place("")
    assert not health.judge(""), "but the node is not ready"
