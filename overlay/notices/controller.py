"""The controller that tells Kubernetes what is wrong on this node, and when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from lease.tenure.events import Held
from overlay.control.background import BackgroundController
from overlay.control.controller import Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import Inputs
from overlay.notices import events

LOOK_S, AFTER_S = 10.0, 15.0
"""How often it looks; what passes within AFTER_S is no news."""
SAY_AGAIN_S = 900.0
"""So often the condition is set whatever was set before: somebody may have altered it."""
MOST, WITHIN_S = 10, 600.0
"""So many Events within so long: what comes and goes all the time fills no API server."""


class Teller(Protocol):
    """Who writes it (lease.stores.kubernetes.NodeStore). Each raises StoreUnavailable or ApiError."""

    zone: str
    """Of our Node, "" where it has none."""

    def tell(self, event: dict[str, Any]) -> None:
        """Create an Event."""

    def set_condition(self, condition: dict[str, str]) -> None:
        """Set a condition of our Node."""


class _Wants(NamedTuple):
    node: str


class NoticesController(BackgroundController):
    """Tells it, in a thread of its own; on Kubernetes alone."""

    name = "events"
    harmless = True
    rechecked = False

    def __init__(
        self,
        post: Callable[[Any], None],
        health: Health,
        clock: Callable[[], float],
        teller: Teller | None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(post, health)
        self._clock, self._teller, self._wall = clock, teller, wall
        self._next = clock() + LOOK_S
        self._told: dict[str, str] = {}
        """Texts by subject, as they were told."""
        self._said: events.Says | None = None
        """What the condition says, as it was set last: None: not yet, or on a Node that is another now."""
        self._say_again = 0.0
        self._times: list[float] = []
        """Of the last Events."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """And a lease, which may be of a Node that was made again."""
        return {**super().handles, Held: self._on_held}

    def _on_held(self, _event: Held) -> bool:
        self._say_again = 0.0
        return False

    def wants(self, inputs: Inputs) -> object:
        """On which Node."""
        if self._teller is None or not inputs.settings.kube:
            return None
        return Waiting("for a lease") if inputs.own is None else _Wants(inputs.settings.node_name)

    def reconcile(self, wants: Any) -> bool:
        """Tell what changed; not before the first look is due: an agent that starts is not ready for a moment."""
        if self._clock() < self._next and not self._refused:
            return False
        self._next = self._clock() + LOOK_S
        if self._clock() >= self._say_again:
            # what is under way may say it on the Node of before
            self._say_again, self._said = self._clock() + (LOOK_S if self.busy else SAY_AGAIN_S), None
        return super().reconcile((wants.node, *self._news()))

    def _news(self) -> tuple[list[events.Notice], events.Says | None]:
        now = self._wall()
        problems = {
            subject: each for subject, each in self._health.problems().items() if subject not in (self.name, "waiting")
        }
        self._times = [at for at in self._times if at > self._clock() - WITHIN_S]
        notices = events.changes(self._told, events.settled(problems, now, AFTER_S))[: MOST - len(self._times)]
        ready, why = self._health.readiness()
        says = events.says(ready, why, problems)
        return notices, None if self._said is not None and self._said[:2] == says[:2] else says

    def _work(self, wants: Any) -> tuple[list[events.Notice], events.Says | None]:
        """What was told. One that is refused ends it: the others are tried with the next."""
        node: str = wants[0]
        notices: list[events.Notice] = wants[1]
        says: events.Says | None = wants[2]
        assert self._teller is not None
        if says is not None:
            self._teller.set_condition(events.condition(says, self._wall()))
        for notice in notices:
            self._teller.tell(events.event(node, notice, self._wall()))
        return notices, says

    def _done(self, result: tuple[list[events.Notice], events.Says | None]) -> None:
        notices, says = result
        self._said = says or self._said
        for notice in notices:
            self._times.append(self._clock())
            if notice.gone:
                self._told.pop(notice.subject, None)
            else:
                self._told[notice.subject] = notice.text

    def due(self) -> float | None:
        """Now and then."""
        return self._next

    def status(self) -> Mapping[str, object]:
        """`zone`: of our Node, "" where it has none."""
        return {"zone": self._teller.zone if self._teller is not None else ""}

    def withdraw(self) -> Iterator[str]:
        """Events end by themselves (an hour); the condition is taken off with the annotations (lease.tenure.kubernetes)."""
        return super().withdraw()
