"""What Kubernetes is told of this node's problems, and how often."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lease.store import StoreUnavailable
from lease.tenure.events import Held
from overlay.control.background import Finished
from overlay.control.health import Problem
from overlay.notices import events
from overlay.notices.controller import AFTER_S, LOOK_S, MOST, SAY_AGAIN_S, WITHIN_S, NoticesController


class Api:
    """The API server."""

    zone = "zone-a"

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.conditions: list[dict[str, str]] = []
        self.refuses = ""

    def tell(self, event: dict[str, Any]) -> None:
        if self.refuses:
            raise StoreUnavailable(self.refuses)
        self.events.append(event)

    def set_condition(self, condition: dict[str, str]) -> None:
        if self.refuses:
            raise StoreUnavailable(self.refuses)
        self.conditions.append(condition)


class Told:
    def __init__(self, bench) -> None:
        self.bench, self.api, self.wall = bench, Api(), [10_000.0]
        bench.health._wall = lambda: self.wall[0]
        bench.current.set(settings=bench.settings._replace(kube=True, node_name="Node.1"))
        self.controller = NoticesController(
            bench.posted.append, bench.health, bench.clock, self.api, lambda: self.wall[0]
        )

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_S)):
            self.bench.clock.now += LOOK_S
            self.wall[0] += LOOK_S
            self.bench.health.pass_made()
            self.bench.health.judge("")
            try:
                self.bench.reconcile(self.controller)
            except Exception as error:
                self.bench.health.problem("events", str(error), harmless=True)
            end = time.monotonic() + 10
            while not self.bench.posted and time.monotonic() < end:
                time.sleep(0.001)
            finished = self.bench.posted.pop()
            assert isinstance(finished, Finished)
            if self.controller.handles[Finished](finished) and finished.refused:
                self.bench.health.problem("events", finished.refused, harmless=True)
                self.controller._refused = ""

    def reasons(self) -> list[str]:
        return [event["reason"] for event in self.api.events]


@pytest.fixture
def told(bench) -> Told:
    bench.clock.now = 1000.0
    return Told(bench)


def test_a_problem_that_lasts_is_an_event_once_and_another_when_it_is_over(told):
    told.bench.health.problem("path mtu", "n2: small packets pass", harmless=True)
    told.run(60)
    assert told.reasons() == ["OverlayPathMtu"]
    (event,) = told.api.events
    assert event["type"] == "Warning"
    assert event["message"] == "n2: small packets pass"
    assert event["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "Node.1", "uid": "Node.1"}
    assert event["metadata"] == {"generateName": "node.1.overlay.", "namespace": "default"}
    told.bench.health.solved("path mtu")
    told.run(60)
    assert told.reasons() == ["OverlayPathMtu", "OverlayPathMtuSolved"]
    assert told.api.events[-1]["type"] == "Normal"


def test_what_passes_in_a_moment_is_no_news(told):
    told.bench.health.problem("unreachable", "n2", harmless=True)
    told.run(min(LOOK_S, AFTER_S))
    told.bench.health.solved("unreachable")
    told.run(60)
    assert told.reasons() == []


def test_the_condition_follows_readiness_and_is_set_when_it_changes_alone(told):
    told.run(60)
    assert [each["status"] for each in told.api.conditions] == ["True"]
    told.bench.health.problem("device", "cannot be made")
    told.run(60)
    assert [each["status"] for each in told.api.conditions] == ["True", "False"]
    assert "cannot be made" in told.api.conditions[-1]["message"]
    told.bench.health.solved("device")
    told.run(60)
    assert [each["status"] for each in told.api.conditions] == ["True", "False", "True"]


def test_what_comes_and_goes_all_the_time_fills_no_api_server(told):
    for turn in range(100):
        (told.bench.health.solved if turn % 2 else told.bench.health.problem)(
            *(["unreachable"] if turn % 2 else ["unreachable", "n2", True])
        )
        told.run(20)
    assert len(told.api.events) <= (2000 / WITHIN_S + 1) * MOST


def test_an_api_server_that_refuses_is_told_and_asked_again_and_nothing_is_lost(told):
    told.run(20)
    told.api.refuses = "403 events is forbidden"
    told.bench.health.problem("unreachable", "n2", harmless=True)
    told.run(60)
    assert "forbidden" in told.bench.problems()["events"]
    told.api.refuses = ""
    told.run(30)
    assert told.reasons() == ["OverlayUnreachable"], "and its own trouble is no Event"


def test_beside_kubernetes_nobody_is_told(bench):
    controller = NoticesController(bench.posted.append, bench.health, bench.clock, None)
    assert controller.wants(bench.current.inputs) is None
    bench.current.set(settings=bench.settings._replace(kube=False))
    assert NoticesController(bench.posted.append, bench.health, bench.clock, Api()).wants(bench.current.inputs) is None


def test_a_message_fits():
    assert len(events.condition(events.Says(False, "x", "x" * 5000), 0)["message"]) == events.LONGEST
    assert events.reason("ways") == "OverlayWays"


def test_policies_that_nobody_enforces_are_in_the_condition():
    """A node that is ready otherwise: no packet is lost by it."""
    assert events.says(True, "", {}).reason == "OverlayIsReady"
    text = "2 policies exist, and none is enforced: --network-policy is false"
    found = events.says(True, "", {"policies not enforced": Problem(text, 0.0, True)})
    assert (found.ready, found.reason) == (True, "OverlayPoliciesNotEnforced")
    assert text in found.message
    assert events.says(False, "no lease", {"policies not enforced": Problem(text, 0.0, True)}).message == "no lease"


def test_the_condition_is_set_again_on_a_node_made_again_and_now_and_then(told):
    told.run(LOOK_S * 3)
    assert len(told.api.conditions) == 1
    told.bench.tell(told.controller, Held(told.bench.current.inputs.own, "podCIDR of Node Node.1"))
    told.run(LOOK_S)
    assert len(told.api.conditions) == 2
    told.run(SAY_AGAIN_S + LOOK_S)
    assert len(told.api.conditions) == 3
