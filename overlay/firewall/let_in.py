"""A set of the guard's table whose keys are peers': each stands as long as a peer uses it, and a while more. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import takewhile

GRACE_S = 60.0
"""A key that no peer has any more is let in for so long: what is under way, a node that comes back."""


class LetIn:
    """One set: what it should have, and what the kernel has, believed as we wrote it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.uses: dict[int, int] = {}
        """Keys of peers; by how many of them each is used."""
        self.there: set[int] = set()
        """What the set of the kernel has."""
        self._stands = False
        self._new: set[int] = set()
        self._leaving: dict[int, float] = {}
        """Keys that no peer has any more, and until when they are let in; the first goes first."""
        self._touched: set[int] | None = None
        """Keys that changed since the check under way began."""

    # --- what is wanted

    def load(self, keys: Iterable[int]) -> None:
        """These are the keys of all peers, one after the other."""
        before, self.uses = self.uses, Counter(keys)
        if self._stands:
            self._new |= self.uses.keys() - self.there
        for key in before.keys() - self.uses.keys():
            self._leaves(key)

    def use(self, keys: Iterable[int]) -> None:
        """A peer came that has them."""
        for key in keys:
            self.uses[key] = self.uses.get(key, 0) + 1
            if self._stands and key not in self.there:
                self._new.add(key)

    def leave(self, keys: Iterable[int]) -> None:
        """A peer went that had them."""
        for key in keys:
            left = self.uses.get(key, 0) - 1
            if left > 0:
                self.uses[key] = left
            elif self.uses.pop(key, None) is not None:
                self._leaves(key)

    def _leaves(self, key: int) -> None:
        if not self._stands:  # there is nobody to let go of; it begins with those of then
            return
        self._leaving.pop(key, None)
        self._leaving[key] = self._clock() + GRACE_S

    def wanted(self) -> set[int]:
        """All keys that should stand now."""
        now = self._clock()
        return self.uses.keys() | {key for key, until in self._leaving.items() if until > now}

    # --- what the kernel has

    def made(self, keys: set[int]) -> None:
        """The set was made with these."""
        self._stands, self.there = True, keys
        self._new.clear()

    def found(self, keys: set[int]) -> None:
        """The set was read: it has these."""
        self._stands, self.there = True, keys
        self._new = self.uses.keys() - keys
        for key in keys - self.uses.keys() - self._leaving.keys():
            self._leaves(key)

    def forget(self) -> None:
        """The set is gone."""
        self._stands = False
        self._new.clear()
        self._leaving.clear()

    def has_changes(self) -> bool:
        """Whether there are keys to let in at once."""
        return bool(self._new)

    def next_change(self) -> float | None:
        """When a key leaves, None: none does."""
        return next(iter(self._leaving.values()), None)

    def changes(self) -> tuple[list[int], list[int], list[int]]:
        """What to add and to take, with work in proportion to these alone; and what left, for `changed`."""
        now = self._clock()
        gone = [key for key, _ in takewhile(lambda item: item[1] <= now, self._leaving.items())]
        take = [key for key in gone if key in self.there and key not in self.uses]
        return [key for key in self._new if key in self.uses and key not in self.there], take, gone

    def changed(self, add: list[int], take: list[int], gone: list[int]) -> None:
        """That was done."""
        self.there.update(add)
        self.there.difference_update(take)
        if self._touched is not None:
            self._touched.update(add, take)
        self._new.clear()
        for key in gone:
            del self._leaving[key]

    # --- a check, during which peers come and go

    def check_begins(self) -> None:
        """From now on it is noted what changes."""
        self._touched = set()

    def altered(self, found: set[int]) -> bool:
        """Whether what the kernel was seen to have is not what we believe."""
        touched, self._touched = self._touched or set(), None
        return bool(self.there - found - touched or found - self.there - touched)
