"""The loop: take what is in the inbox, ask each controller, publish. It knows no feature by name.

Everything is level-triggered: each pass asks what should be from the inputs as they are now and makes it so. An event only
says that something is to be checked; a lost one costs time until the next check.
"""

from __future__ import annotations

import os
import queue
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from overlay import __version__
from overlay.control.controller import Controller
from overlay.control.health import FIRST, Health
from overlay.control.inputs import CurrentInputs
from overlay.control.schedule import Schedule
from overlay.kernel import namespaces
from overlay.process.log import SILENT_S, log

if TYPE_CHECKING:
    from overlay.api.status import Status  # 8 ms, when somebody asks

TURN_S = 1.0
"""The loop turns at least so often; `healthy` means that it does."""
MINUTES = 60
"""For so many of the last minutes repairs are counted."""
PASS_BOUNDS_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5)
"""Passes are counted by how long they took."""
EVENTS_A_TURN = 20_000
"""So many are taken in before a pass is made, under whatever storm."""


class Stop(NamedTuple):
    """End the loop; the datapath stays."""

    reason: str
    code: int = 0


class Reload(NamedTuple):
    """Read the files again that an operator may have changed (SIGHUP)."""


class Died(NamedTuple):
    """A thread ended that must not."""

    thread: str
    error: BaseException


class Asked(NamedTuple):
    """Somebody wants the status."""

    answer: queue.SimpleQueue[Status]


class Loop:
    """One node's agent. `run` owns all state; `post` is for every other thread."""

    def __init__(
        self,
        controllers: Sequence[Controller],
        current: CurrentInputs,
        health: Health,
        inbox: queue.SimpleQueue[Any],
        clock: Callable[[], float],
    ) -> None:
        self._current, self.health, self._inbox, self._clock = current, health, inbox, clock
        self._schedule = Schedule(controllers, current, health, clock)
        self.started: Callable[[], None] = lambda: None
        """Called when our own work is done for the first time; set before `run`."""
        self.each_pass: Callable[[], None] = lambda: None
        """Called at the end of each pass; set before `run`."""
        self.reload: Callable[[], None] = lambda: None
        """Called for Reload; set before `run`."""
        self.alive: Callable[[], None] = lambda: None
        """Called at each turn; set before `run`."""
        self._began = clock()
        self.ever_started = self._log_released = False
        """Whether `started` was called; whether the lines of the start were written."""
        self._passes, self._passes_s = [0] * (len(PASS_BOUNDS_S) + 1), 0.0
        """How many passes took how long, by PASS_BOUNDS_S, and seconds of all."""
        self._mends: deque[int] = deque(maxlen=MINUTES)
        """Of the last minutes, how often something was put right."""
        self._mended, self._next_minute = 0, clock() + 60.0

    # --- for other threads -------------------------------------------------------------------------------------------

    def post(self, event: Any) -> None:
        """Put an event into the inbox."""
        self._inbox.put(event)

    def ask_status(self, timeout_s: float = 8.0) -> Status | None:
        """The status, from the loop itself; None when it does not answer."""
        answer: queue.SimpleQueue[Status] = queue.SimpleQueue()
        self.post(Asked(answer))
        try:
            return answer.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def passes(self) -> tuple[tuple[int, ...], float]:
        """How many passes took how long, by PASS_BOUNDS_S and one more; seconds of all."""
        return tuple(self._passes), self._passes_s

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until Stop; the exit code."""
        more = True  # links and underlay are read while the first list is on its way
        while True:
            stop = self._take_in(0.0 if more else self._wait_s())
            if stop is not None:
                (log.error if stop.code else log.info)("agent.stopped", reason=stop.reason, datapath="stays in place")
                return stop.code
            more = self.run_pass()
            self.health.pass_made()
            self.alive()
            if not self._log_released and self._clock() - self._began > SILENT_S:
                self._release_log()

    def run_pass(self) -> bool:
        """Ask each controller once, and judge. Whether there is more to do at once."""
        began = time.perf_counter()
        more = self._schedule.run_pass()
        took = time.perf_counter() - began
        self._passes[bisect_left(PASS_BOUNDS_S, took)] += 1
        self._passes_s += took
        if log.debugging:
            log.debug("pass", took_us=round(took * 1e6), more=more)
        log.sum_up()
        self.each_pass()
        if self._clock() >= self._next_minute:
            self._count_mends()
        waiting = self._schedule.waiting()
        if not self._log_released and not waiting and "kernel" not in self.health.problems():
            self._release_log()
        self.health.judge(waiting)
        if not self.ever_started and self.health.in_place(waiting):
            self.ever_started = True
            self.started()
        return more

    def _count_mends(self) -> None:
        self._next_minute = self._clock() + 60.0
        counters = [controller.counters() for controller in self._schedule.controllers]
        total = sum(count for those in counters for name, count in those.items() if name.startswith("mended_"))
        self._mends.append(max(0, total - self._mended))
        self._mended = total

    def _release_log(self) -> None:
        """Write the log lines that were kept while peers came first."""
        self._log_released = True
        log.release()

    def _wait_s(self) -> float:
        now = self._clock()
        return max(0.0, min(self._schedule.next_due(), now + TURN_S) - now)

    def _take_in(self, wait_s: float) -> Stop | None:
        """Everything in the inbox, after waiting for the first of it."""
        try:
            event = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        left = EVENTS_A_TURN
        while True:
            if isinstance(event, Stop):
                return event
            if isinstance(event, Died):
                log.error("thread.died", thread=event.thread, error=repr(event.error))
                return Stop(f"thread {event.thread} died", 1)
            if isinstance(event, Reload):
                self.reload()
            elif isinstance(event, Asked):
                event.answer.put(self._status())
            else:
                self._schedule.handle(event)
            left -= getattr(event, "weight", 1)
            if left <= 0:
                return None
            try:
                event = self._inbox.get_nowait()
            except queue.Empty:
                return None

    def _status(self) -> Status:
        from overlay.api.family import SECOND
        from overlay.api.status import Status

        sections: dict[str, object] = {}
        counters: dict[str, int] = {}
        settings = self._current.inputs.settings
        for controller in self._schedule.working():
            end = "" if controller.family is None or controller.family.number == FIRST else SECOND
            sections.update({f"{name}{end}": section for name, section in controller.status().items()})
            for name, count in controller.counters().items():
                counters[name] = counters.get(name, 0) + count
        return Status(
            version=__version__,
            node_name=settings.node_name,
            uptime_s=round(self._clock() - self._began, 1),
            ready=self.health.readiness()[0],
            problems=self.health.problems(),
            sections=sections,
            counters=counters,
            past=self.health.past(),
            mends_per_minute=tuple(self._mends),
            pid=os.getpid(),
            network_namespace=os.readlink(namespaces.OWN),
            files={
                "subnet_file": settings.subnet_file,
                "cni_conf_dir": settings.cni_conf_dir,
                "run_dir": settings.run_dir,
            },
        )
