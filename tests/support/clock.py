"""The clock of tests: it stands until it is turned."""

from __future__ import annotations


class Clock:
    """Seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
