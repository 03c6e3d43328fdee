"""How often something happened lately. Pure."""

from __future__ import annotations

from collections import deque


class Recent:
    """The last times of something: whether it was often, `most` times within so long."""

    def __init__(self, most: int, within_s: float) -> None:
        self._times: deque[float] = deque(maxlen=most)
        self._most, self._within_s = most, within_s

    def add(self, now: float) -> None:
        """Once more."""
        self._times.append(now)

    def often(self, now: float) -> bool:
        """Whether it was too often lately."""
        return len(self._times) == self._most and now - self._times[0] < self._within_s
