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
        self._stands = False
        self._new: set[int] = set()
        """Keys of peers that the kernel's set does not have."""
        self._beyond: set[int] = set()
        """Keys that the kernel's set has, and no peer: these two instead of a set of all, which is 2 MiB at 20,000 peers."""
        self._leaving: dict[int, float] = {}
        """Keys that no peer has any more, and until when they are let in; the first goes first."""
        self._touched: set[int] | None = None
        """Keys that changed since the check under way began."""

    # --- what is wanted

    def load(self, keys: Iterable[int]) -> None:
        """These are the keys of all peers, one after the other."""
        there, before, self.uses = self.there, self.uses, Counter(keys)
        self._believe(there)
        for key in before.keys() - self.uses.keys():
            self._leaves(key)

    def use(self, keys: Iterable[int]) -> None:
        """A peer came that has them."""
        for key in keys:
            if (count := self.uses.get(key, 0)) == 0 and self._stands:
                if key in self._beyond:
                    self._beyond.discard(key)
                else:
                    self._new.add(key)
            self.uses[key] = count + 1

    def leave(self, keys: Iterable[int]) -> None:
        """A peer went that had them."""
        for key in keys:
            left = self.uses.get(key, 0) - 1
            if left > 0:
                self.uses[key] = left
            elif self.uses.pop(key, None) is not None and self._stands:
                if key in self._new:
                    self._new.discard(key)
                else:
                    self._beyond.add(key)
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

    @property
    def there(self) -> set[int]:
        """What the set of the kernel has."""
        return (self.uses.keys() - self._new) | self._beyond if self._stands else set()

    def _believe(self, there: set[int]) -> None:
        if self._stands:  # (of two large sets the difference by `-` keeps the memory of the first, however small it is)
            self._new = {key for key in self.uses if key not in there}
            self._beyond = {key for key in there if key not in self.uses}

    def made(self, keys: set[int]) -> None:
        """The set was made with these."""
        self._stands = True
        self._believe(keys)

    def found(self, keys: set[int]) -> None:
        """The set was read: it has these."""
        self.made(keys)
        for key in self._beyond - self._leaving.keys():
            self._leaves(key)

    def forget(self) -> None:
        """The set is gone."""
        self._stands = False
        self._new.clear()
        self._beyond.clear()
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
        return [*self._new], [key for key in gone if key in self._beyond], gone

    def changed(self, add: list[int], take: list[int], gone: list[int]) -> None:
        """That was done."""
        self._new.difference_update(add)
        self._beyond.difference_update(take)
        for emptied in (self._new, self._beyond):
            if not emptied:
                emptied.clear()  # a set that was emptied one by one keeps its memory
        if self._touched is not None:
            self._touched.update(add, take)
        for key in gone:
            del self._leaving[key]

    # --- a check, during which peers come and go

    def check_begins(self) -> None:
        """From now on it is noted what changes."""
        self._touched = set()

    def altered(self, found: set[int]) -> bool:
        """Whether what the kernel was seen to have is not what we believe."""
        touched, self._touched = self._touched or set(), None
        there = self.there
        return bool(there - found - touched or found - there - touched)
