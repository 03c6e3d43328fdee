"""The clock of tests: it stands until it is turned."""

from __future__ import annotations


class Clock:
    """Seconds, from 0."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
