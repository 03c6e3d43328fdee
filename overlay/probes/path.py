"""Which size passes on a path that loses full-size packets: looked for one packet at a time, as RFC 4821 does. Pure."""

from __future__ import annotations

LEAST = 576
"""What every IPv4 host takes (RFC 1122, 3.3.3); paths below are called by no number."""


class Search:
    """Of one peer. found: the size of the largest packets that pass, in bytes; 0: not known yet."""

    __slots__ = ("_high", "_low", "_turn", "found", "largest")

    def __init__(self, largest: int) -> None:
        """largest: a size that is lost."""
        self.largest, self.found, self._turn = largest, 0, 0
        self._low, self._high = 0, largest
        """The largest that passed, the smallest that was lost."""

    def next(self) -> int:
        """The size to be tried. Once it is known: what passed, and one more, in turn; the path may change."""
        if not self._low:
            return min(LEAST, self.largest)
        if self._high - self._low > 1:
            return (self._low + self._high) // 2
        self._turn ^= 1
        return self._high if self._turn else self._low

    def passed(self, size: int) -> None:
        """One came through."""
        self._low = max(self._low, size)
        if self._low >= self._high:  # what was lost before was lost by chance, or the path is another now
            self._high = self.largest
        self._settle()

    def lost(self, size: int) -> None:
        """One did not."""
        self._high = min(self._high, size)
        if self._high <= self._low:
            self._low = 0
        self._settle()

    def _settle(self) -> None:
        if self._low and self._high - self._low == 1:
            self.found = self._low
