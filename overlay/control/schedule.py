"""What is due to be looked at, and the steps that do it: one that is refused is a problem of its name until it is solved,
and due again a moment later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from overlay.control.health import Health
from overlay.kernel.netlink import words_of
from overlay.node.underlay import UnderlayError

FIRST_RETRY_S, RETRY_S = 0.1, 2.0
"""After a refusal; twice as long after each that follows, up to the second."""


class Due:
    """Things to look at in this pass."""

    links: bool
    underlay: bool
    device: bool
    nat: bool
    forward: bool
    sysctl: bool
    files: bool
    strangers: bool
    reach: bool
    dump = False
    """The kernel is to be read whole: peers' entries, the addresses that are let in, pods' ports."""
    guard = False
    """The guard's table is to be read whole, in one go; `guard_check`: in slices."""
    guard_check = False
    pods = False

    def __init__(self) -> None:
        self.everything()

    def everything(self, dump: bool = True, guard: bool = True) -> None:
        """As at the start. dump, guard: whether those that cost more with more peers are among it; those that are due stay
        so."""
        self.links = self.underlay = self.device = self.nat = self.forward = self.sysctl = self.files = True
        self.strangers = self.reach = True
        self.dump, self.guard = self.dump or dump, self.guard or guard
        self.guard_check, self.pods = self.guard_check or dump, self.pods or dump


class Steps:
    """What is due, now or later."""

    def __init__(self, health: Health, clock: Callable[[], float]) -> None:
        self._health, self._clock = health, clock
        self.due = Due()
        self._retry_at: dict[str, float] = {}
        self._refusals: Counter[str] = Counter()
        """In a row."""

    def step(self, name: str, act: Callable[[], None]) -> None:
        """Do a step if it is due."""
        if not getattr(self.due, name):
            return
        setattr(self.due, name, False)
        if self.tried(name, act):
            self._health.solved(name)

    def tried(self, name: str, act: Callable[[], None]) -> bool:
        """Whether it was not refused."""
        try:
            act()
        except (OSError, UnderlayError) as error:
            self.refused(name, words_of(error))
            return False
        del self._refusals[name]
        return True

    def solved(self, name: str) -> None:
        """A step that is done elsewhere was done."""
        del self._refusals[name]
        self._health.solved(name)

    def refused(self, name: str, words: str) -> None:
        """A step cannot be done: a problem, and due again."""
        self._health.problem(name, words)
        self._retry_at[name] = self._clock() + min(RETRY_S, FIRST_RETRY_S * 2 ** min(self._refusals[name], 9))
        self._refusals[name] += 1

    def again(self, name: str, at: float | None = None) -> None:
        """A step is due again then (None: after the usual time), or earlier where it is already."""
        then = self._clock() + RETRY_S if at is None else at
        self._retry_at[name] = min(then, self._retry_at.get(name, then))

    def waits(self, name: str) -> bool:
        """Whether a step was refused, and is not due again yet."""
        return name in self._retry_at

    def times(self) -> Iterable[float]:
        """When something is due again."""
        return self._retry_at.values()

    def begin(self) -> None:
        """A pass begins: what waited long enough is due."""
        now = self._clock()
        for name in [name for name, at in self._retry_at.items() if at <= now]:
            del self._retry_at[name]
            setattr(self.due, name, True)
