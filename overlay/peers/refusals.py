"""Logs why records cannot be used: once each, and again only when the reason changes."""

from __future__ import annotations

import time
from collections.abc import Callable

from overlay.process.log import log


class Refusals:
    """What was logged, by key: a list read again repeats them all."""

    MOST, EVERY_S = 1000, 86_400.0
    """So many lines a day; the rest is only counted in the status: a store full of rubbish fills no disk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self._reported: dict[str, str] = {}
        self._lines = 0

    def report(self, key: str, reason: str) -> None:
        """A record cannot be used."""
        if self._clock() >= self._since + self.EVERY_S:
            self._since, self._lines = self._clock(), 0
        if self._reported.get(key) == reason or self._lines > self.MOST:
            return
        self._reported[key] = reason
        self._lines += 1
        if self._lines > self.MOST:
            log.warning("record.refused", effect="too many to log; `overlay status` has them all")
        else:
            log.warning(
                "record.refused", key=key, reason=reason, effect="skipped until somebody corrects or deletes it"
            )

    def forget(self, key: str) -> None:
        """It is gone, or good now."""
        if (reason := self._reported.pop(key, None)) is not None:
            log.info("record.refused_no_more", key=key, was=reason)
