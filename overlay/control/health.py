"""What is wrong just now, since when, and whether this node is ready: logged once when it changes, readable from other
threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

from lease.families import V6, Family
from overlay.process.log import log

UNREADY_AFTER_S = 10.0
"""Readiness goes once something was wrong for so long: a repair that takes a moment is no news."""
STUCK_S = 20.0
NOT_ENFORCED = "policies not enforced"
"""A subject that costs no packet, and that nobody may miss (policy/problems.py)."""
FIRST = 4
"""The family whose problems and sections of the status have no family in their names."""
REMEMBERED = 50
"""So many problems that are over."""


_CAUSES = ("carrier", "duplicate address", "routes", "forward chain")
_EFFECTS = ("ways", "ways to single peers", "unreachable", "path mtu", "loss")


def rank(subject: str) -> int:
    """The place of a problem among others, for people: causes before what follows from them."""
    name = subject.removesuffix(f" {V6.text}")
    if name in _CAUSES:
        return _CAUSES.index(name) - len(_CAUSES)
    return 1 + _EFFECTS.index(name) if name in _EFFECTS else 0


def few(words: Iterable[str], count: int, most: int) -> str:
    """For a problem's text: so many at most, and how many more of all there are."""
    return ", ".join(islice(words, most)) + (f" and {count - most} more" if count > most else "")


class Problem(NamedTuple):
    """Something that is wrong. since: seconds since the epoch. harmless: pods' traffic is as it should be. outside: it is
    not of our own work: a start does not wait for it."""

    text: str
    since: float
    harmless: bool
    outside: bool = False


class Past(NamedTuple):
    """A problem that is over. since, until: seconds since the epoch."""

    subject: str
    text: str
    since: float
    until: float


class Health:
    """Problems by subject, one line each. Written by the owner thread."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float] = time.time) -> None:
        """clock: seconds, for how long; wall: seconds since the epoch, for people."""
        self._clock, self._wall = clock, wall
        self._lock = threading.Lock()
        self._problems: dict[str, Problem] = {}
        self._past: deque[Past] = deque(maxlen=REMEMBERED)
        self.optional = False
        """IPv6 stands beside IPv4, and does not work here yet: its problems are harmless. Set by the scheduler."""
        self._ready = False
        self._bad_since: float | None = None
        self._last_turn = clock()

    def of(self, family: Family) -> Health:
        """For controllers of a family: the same problems, those of IPv6 by subjects of their own; beside IPv4 they do not
        keep a node from being ready, while nothing of IPv6 works here."""
        return self if family.number == FIRST else FamilyHealth(self, family)

    def pass_made(self) -> None:
        """The loop made a turn."""
        self._last_turn = self._clock()

    def healthy(self) -> bool:
        """Whether the loop turns."""
        return self._clock() - self._last_turn < STUCK_S

    def readiness(self) -> tuple[bool, str]:
        """Whether all is as it must be, and what is not."""
        if not self.healthy():
            return False, "the agent's loop is stuck"
        found = self.problems().items()
        return self._ready, "; ".join(f"{subject}: {problem.text}" for subject, problem in found) or "ok"

    def problems(self) -> dict[str, Problem]:
        """All that is wrong, by subject."""
        with self._lock:
            return dict(self._problems)

    def past(self) -> list[Past]:
        """The last problems that are over, the oldest first."""
        with self._lock:
            return list(self._past)

    def problem(self, subject: str, text: str, harmless: bool = False, outside: bool = False) -> None:
        """Something is wrong."""
        if self.note(subject, text, harmless, outside) != text:
            log.warning("problem", subject=subject, what=text)

    def solved(self, subject: str) -> None:
        """It is not any more."""
        if subject in self._problems and (was := self.note(subject, "")) is not None:
            log.info("problem.solved", subject=subject, was=was)

    def report(self, subject: str, text: str, harmless: bool = False, outside: bool = False) -> None:
        """A problem, or ("") none any more."""
        if text:
            self.problem(subject, text, harmless, outside)
        else:
            self.solved(subject)

    def judge(self, waiting: str) -> bool:
        """Readiness, from what a start waits for and the problems that are not harmless."""
        self.note("waiting", waiting)
        now = self._clock()
        if any(not problem.harmless for problem in self._problems.values()):
            self._bad_since = self._bad_since or now
            ready = self._ready and now - self._bad_since < UNREADY_AFTER_S
        else:
            self._bad_since, ready = None, True
        if ready != self._ready:
            self._ready = ready
            (log.info if ready else log.warning)("ready" if ready else "not_ready", reason=self.readiness()[1])
        return ready

    def in_place(self, waiting: str) -> bool:
        """Whether our own work is done: what others do to pods' traffic keeps a node from being ready, but no start (nor
        what systemd starts after us) waits for it."""
        return not waiting and all(each.harmless or each.outside for each in self._problems.values())

    def note(self, subject: str, text: str, harmless: bool = False, outside: bool = False) -> str | None:
        """Set or ("") clear a problem without a log line; what stood there."""
        with self._lock:
            was = self._problems.get(subject)
            if text:
                since = self._wall() if was is None else was.since
                self._problems[subject] = Problem(text, since, harmless, outside)
            elif self._problems.pop(subject, None) is not None and was is not None:
                self._past.append(Past(subject, was.text, was.since, self._wall()))
        return None if was is None else was.text


def name_of(name: str, family: Family | None) -> str:
    """A controller's name, or a problem's subject, of a family."""
    return name if family is None or family.number == FIRST else f"{name} {family.text}"


class FamilyHealth(Health):
    """One family's view of a Health."""

    def __init__(self, whole: Health, family: Family) -> None:
        self._whole, self._family = whole, family

    def problems(self) -> dict[str, Problem]:
        """Those of the family, by subjects without it."""
        end = f" {self._family.text}"
        found = self._whole.problems().items()
        return {subject.removesuffix(end): problem for subject, problem in found if subject.endswith(end)}

    def problem(self, subject: str, text: str, harmless: bool = False, outside: bool = False) -> None:
        """Something is wrong."""
        self._whole.problem(name_of(subject, self._family), text, harmless or self._whole.optional, outside)

    def solved(self, subject: str) -> None:
        """It is not any more."""
        self._whole.solved(name_of(subject, self._family))

    def note(self, subject: str, text: str, harmless: bool = False, outside: bool = False) -> str | None:
        """Without a log line."""
        return self._whole.note(name_of(subject, self._family), text, harmless or self._whole.optional, outside)
