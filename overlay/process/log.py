"""What the agent says: structlog to stderr, one line for one thing that happened.

structlog and what it imports take 45 ms of a start, and peers come first: lines are kept, with their time, until the peers
are in the kernel, something is wrong, or a second has passed; then they are written. Where nobody said `hold`, none is kept.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
SILENT_S = 1.0
BURST, EVERY_S = 20, 2.0
"""So many lines of one event at once, then one in so long; the rest is counted. (Not debug's: somebody reads those.)"""


class _Allowance:
    """The lines of one event that may still be written, and how many were not."""

    def __init__(self, now: float) -> None:
        self.left, self.since, self.suppressed = float(BURST), now, 0

    def take(self, now: float) -> bool:
        """Whether one more may be written."""
        self.left = min(float(BURST), self.left + (now - self.since) / EVERY_S)
        self.since = now
        if self.left < 1:
            self.suppressed += 1
            return False
        self.left -= 1
        return True


class Log:
    """A logger as structlog's, for constant events with fields. A storm of one event is summed up."""

    def __init__(self) -> None:
        self._allowances: dict[str, _Allowance] = {}
        self._any_suppressed = False
        self._lock = threading.RLock()
        self._threshold = LEVELS["info"]
        self._kept: list[tuple[str, str, dict[str, Any]]] | None = None
        self._console = False
        self._structlog: Any = None
        self._lost, self._why = 0, ""
        """Lines that could not be written."""

    def debug(self, event: str, **fields: object) -> None:
        """For debugging."""
        self._say("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Something happened."""
        self._say("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Needs an operator's attention."""
        self._say("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """It cannot go on like that."""
        self._say("error", event, fields)

    @property
    def debugging(self) -> bool:
        """Whether debug lines are written: what makes one costly asks first."""
        return self._threshold <= LEVELS["debug"]

    def hold(self, level: str, kind: str) -> None:
        """Keep lines of this level and above. kind: console (key=value), json, or auto: console on a terminal."""
        self.set_level(level)
        self._console = kind == "console" or (kind == "auto" and sys.stderr.isatty())
        with self._lock:
            self._kept = []

    def set_level(self, level: str) -> None:
        """Of everything that is said from now on."""
        self._threshold = LEVELS[level]

    def release(self) -> None:
        """Write what was kept, and keep nothing more."""
        with self._lock:
            kept, self._kept = self._kept, None
            for level, event, fields in kept or ():
                self._write(level, event, fields)

    def _say(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS[level] < self._threshold:
            return
        fields.setdefault("timestamp", time.time())
        with self._lock:
            if level != "debug" and not self._allowed(event, fields):
                return
            if self._kept is None:
                self._write(level, event, fields)
                return
            self._kept.append((level, event, fields))
        if LEVELS[level] > LEVELS["info"]:
            self.release()

    def _allowed(self, event: str, fields: dict[str, Any]) -> bool:
        now = time.monotonic()
        allowance = self._allowances.setdefault(event, _Allowance(now))
        if not allowance.take(now):
            self._any_suppressed = True
            return False
        if allowance.suppressed:
            fields["suppressed_before"], allowance.suppressed = allowance.suppressed, 0
        return True

    def sum_up(self) -> None:
        """Say how many lines were not written, once those that are like them have ended."""
        if not self._any_suppressed:
            return
        now = time.monotonic()
        with self._lock:
            waiting = {event: one for event, one in self._allowances.items() if one.suppressed}
            for event, one in waiting.items():
                if now - one.since > EVERY_S * 2:
                    count, one.suppressed = one.suppressed, 0
                    self._say("warning", "log.suppressed", {"of": event, "lines": count})
            self._any_suppressed = any(one.suppressed for one in self._allowances.values())

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if self._structlog is None:
            self._structlog = _configured(self._console)
        try:
            if self._lost:
                sys.stderr.write("\n")  # half a line may stand there
                sys.stderr.flush()
            getattr(self._structlog, level)(event, **fields)
        except OSError as error:  # a full disk, a reader that went: no reason to end
            self._lost += 1
            self._why = str(error)
            return
        if self._lost:
            with suppress(OSError):
                self._structlog.warning("log.lost", timestamp=time.time(), lines=self._lost, reason=self._why)
                self._lost = 0


def _configured(console: bool) -> Any:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _in_reading_order,
            structlog.processors.LogfmtRenderer(bool_as_flag=False) if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS["debug"]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    return structlog.get_logger()


def _in_reading_order(_logger: object, _method: str, event: Any) -> dict[str, Any]:
    """When (ISO 8601, UTC), how bad, what; then the fields."""
    from datetime import UTC, datetime

    at = datetime.fromtimestamp(event.pop("timestamp"), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"timestamp": at, "level": event.pop("level"), "event": event.pop("event"), **event}


log = Log()
"""The one of this process."""
