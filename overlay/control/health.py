"""What is wrong just now, and whether this node is ready: told once when it changes, readable from other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from overlay.process.log import log

UNREADY_AFTER_S = 10.0
"""Readiness goes once something was wrong for so long: a repair that takes a moment is no news."""
STUCK_S = 20.0
HARMLESS = frozenset(
    {"mtu", "config", "store", "annotations", "live-settings", "file net-conf", "file cni-conf", "file live"}
    | {"forward", "forward chain", "bridge filter", "bridge", "guard", "strangers", "strange frames", "pods"}
    | {"reach", "routes", "retained"}
)
"""Problems an operator should see, with which pods' traffic is as it should be."""


class Health:
    """Problems by subject, one line each. Written by the owner thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._problems: dict[str, str] = {}
        self._ready = False
        self._bad_since: float | None = None
        self._last_turn = clock()

    def turned(self) -> None:
        """The loop made a turn."""
        self._last_turn = self._clock()

    def healthy(self) -> bool:
        """Whether the loop turns."""
        return self._clock() - self._last_turn < STUCK_S

    def readiness(self) -> tuple[bool, str]:
        """Whether all is as it must be, and what is not."""
        if not self.healthy():
            return False, "the agent's loop is stuck"
        return self._ready, "; ".join(f"{name}: {what}" for name, what in self.problems().items()) or "ok"

    def problems(self) -> dict[str, str]:
        """All that is wrong, by subject."""
        with self._lock:
            return dict(self._problems)

    def problem(self, subject: str, what: str) -> None:
        """Something is wrong."""
        if self._set(subject, what) != what:
            log.warning("problem", subject=subject, what=what)

    def solved(self, subject: str) -> None:
        """It is not any more."""
        if (was := self._set(subject, "")) is not None:
            log.info("problem.solved", subject=subject, was=was)

    def tell(self, subject: str, what: str) -> None:
        """A problem, or ("") none any more."""
        if what:
            self.problem(subject, what)
        else:
            self.solved(subject)

    def judge(self, waiting: str, differing: int) -> bool | None:
        """Readiness, from what a start waits for and how many kernel entries differ; its new value when it changed."""
        self._set("waiting", waiting)
        self._set("kernel", f"{differing} entries are not as they should be" if differing else "")
        now = self._clock()
        if any(subject not in HARMLESS for subject in self._problems):
            self._bad_since = self._bad_since or now
            ready = self._ready and now - self._bad_since < UNREADY_AFTER_S
        else:
            self._bad_since, ready = None, True
        if ready == self._ready:
            return None
        self._ready = ready
        (log.info if ready else log.warning)("ready" if ready else "not_ready", because=self.readiness()[1])
        return ready

    def _set(self, subject: str, what: str) -> str | None:
        """Set or ("") clear a problem; what stood there."""
        with self._lock:
            was = self._problems.get(subject)
            if what:
                self._problems[subject] = what
            else:
                self._problems.pop(subject, None)
        return was
