"""What stood on this node before its network config named another device or backend: left as soon as that can be."""

from __future__ import annotations

from collections.abc import Callable

from overlay.control.health import Health
from overlay.kernel.netlink import error_text

FIRST_WAIT_S, MOST_WAIT_S, MOST_REFUSED_S = 0.2, 1.0, 30.0
"""It is tried again after so long at first; at most, while something has to wait, and where it is refused."""
SUBJECT = "former network"


class Former:
    """The devices, or backends, of before, by what names them in the file of our device. Belongs to the owner thread."""

    def __init__(self, health: Health, clock: Callable[[], float], drop: Callable[[str, str, set[str]], bool]) -> None:
        """drop: takes one away, given what stands in its place, and the names of those that did their part of it before (a
        set that it adds to); whether nothing is left. Raises OSError."""
        self._health, self._clock, self._drop = health, clock, drop
        self._there: dict[str, set[str]] = {}
        self.at: float | None = None
        """When it is tried again."""
        self._wait_s = FIRST_WAIT_S

    def leave(self, former: list[str], mark: str) -> list[str]:
        """Leave them, as far as that can be now and was not tried a moment ago; those of which something is left. mark: what
        stands in their place."""
        if former != list(self._there):
            self._there, self.at = {one: self._there.get(one, set()) for one in former}, None
            self._wait_s = FIRST_WAIT_S
        if not former:
            self._health.solved(SUBJECT)
        if not former or (self.at is not None and self._clock() < self.at):
            return former
        most, problems = MOST_WAIT_S, []
        for one in former:
            try:
                if self._drop(one, mark, self._there[one]):
                    del self._there[one]
            except OSError as error:
                most = MOST_REFUSED_S
                problems.append(
                    f"{one}, which the network config does not name any more: {error_text(error)}; tried again"
                )
        self._health.report(SUBJECT, "; ".join(problems), harmless=True)
        self.at = self._clock() + self._wait_s if self._there else None
        self._wait_s = min(2 * self._wait_s, most)
        return list(self._there)

    def stands(self, mark: str) -> None:
        """It is to stand again: what was left of it may be made anew, whatever comes of that."""
        self._there.pop(mark, None)

    def forget(self) -> None:
        """All is withdrawn."""
        self._there, self.at = {}, None
