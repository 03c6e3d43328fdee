"""Records that change again and again: what such a key said before counts until it is the same for a while. Pure.

Route-flap damping (RFC 2439), of records in place of routes. Each change of a key by which peers came, changed or went adds
to its penalty, which halves every HALF_LIFE_S. Above LIMIT the key is held: its changes are noted and not settled, so that
neither the kernel nor other records follow what two writers fight over, or what one of them does to cost work. It is settled
once it has not changed for a wait that grows with the penalty, to which changes add meanwhile whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from lease.model import Lease
from lease.records.packed import Leases, pack, unpack

CAME_OR_WENT, IN_PLACE, BACK_AGAIN = 0.05, 0.5, 3.0
"""Penalties: of a record that comes or goes, says something new, or says what it said one change before, which two writers
make who undo each other's work, and seldom a node."""
LIMIT = 10.0
HALF_LIFE_S = 30.0
LEAST_S, MOST_S, DOUBLES = 2.0, 30.0, 15.0
"""The wait: at the limit, at most; it doubles with so much more penalty. Our nodes put their records right each second."""
MOST_PENALTY = 70.0
"""That of the longest wait: more would only outlast it (RFC 2439, 4.2: the ceiling)."""
SETTLED_S = 30.0
"""What a key said for so long is what it goes back to."""
FORGOTTEN_S, MOST_KEYS = 300.0, 4096
"""A key is remembered for so long after its last change; so many are."""


class _Flap:
    """at: of the last change; step: its penalty. before: what it said when that was quiet; last: what it says; earlier: what
    it said before that."""

    __slots__ = ("at", "before", "earlier", "last", "penalty", "step")

    def __init__(self, before: bytes | None, at: float) -> None:
        self.before = self.last = before
        self.earlier: bytes | None = None
        self.penalty, self.step, self.at = 0.0, 0.0, at

    def count(self) -> None:
        """The last change counts; once."""
        self.penalty, self.step = min(MOST_PENALTY, self.penalty + self.step), 0.0

    def wait_s(self) -> float:
        return min(MOST_S, LEAST_S * 2 ** (max(0.0, self.penalty - LIMIT) / DOUBLES))


class Flaps:
    """The keys that changed lately."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._flaps: dict[str, _Flap] = {}
        """By key; the one that changed last is the last. Not those that only came."""
        self._held: dict[str, None] = {}
        self._next: float | None = None
        """Not after the first of the held may be settled."""

    def changes(
        self, records: Mapping[str, Lease | None], known: Callable[[str], Lease | None]
    ) -> dict[str, Lease | None]:
        """What to settle now, of what changed. None: there is no record. known: what was settled last, by key."""
        self._forget()
        found: dict[str, Lease | None] = {}
        for key, lease in records.items():
            flap = self._flaps.get(key)
            if flap is None:
                was = known(key)
                if was is not None and not _same(was, lease):
                    flap = self._begin(key, was)
            if flap is None:
                found[key] = lease
            elif self._note(key, flap, lease):
                found[key] = _lease(flap.before)
            elif key not in self._held:
                found[key] = lease
        return found

    def _begin(self, key: str, was: Lease) -> _Flap | None:
        if len(self._flaps) >= MOST_KEYS:
            oldest = next(iter(self._flaps))
            if oldest in self._held:
                return None
            del self._flaps[oldest]
        flap = self._flaps[key] = _Flap(pack(was), self._clock() - SETTLED_S)
        return flap

    def _note(self, key: str, flap: _Flap, lease: Lease | None) -> bool:
        """A key says this now; whether it is held from now on."""
        last, held = _lease(flap.last), key in self._held
        if _same(last, lease):
            return False
        now = self._clock()
        if not held and now >= flap.at + SETTLED_S:
            flap.before = flap.last
        flap.step = _step(_lease(flap.earlier), last, lease)
        flap.penalty *= 0.5 ** ((now - flap.at) / HALF_LIFE_S)
        flap.at, flap.earlier, flap.last = now, flap.last, None if lease is None else pack(lease)
        self._flaps[key] = self._flaps.pop(key)
        if not held and flap.penalty + flap.step <= LIMIT:
            return False  # counted once it is known what came of it
        flap.count()
        if held:
            return False
        self._held[key] = None
        self._next = min(self._next or float("inf"), now + flap.wait_s())
        return True

    def had_effect(self, keys: Iterable[str]) -> None:
        """By the changes of these keys that were settled last, peers came, changed or went."""
        for key in keys:
            flap = self._flaps.get(key)
            if flap is not None and key not in self._held:
                flap.count()

    def _forget(self) -> None:
        """Keys that have been quiet for long; they are the first."""
        until = self._clock() - FORGOTTEN_S
        for key in [key for key, _ in zip(self._flaps, range(64), strict=False)]:
            if key in self._held or self._flaps[key].at > until:
                return
            del self._flaps[key]

    def listed(self, leases: Leases) -> Leases:
        """A whole list, with what counts of the keys that are held. Of others it is the latest word."""
        for key in [key for key, flap in self._flaps.items() if key not in self._held]:
            if not _same(_lease(self._flaps[key].last), leases.get(key)):
                del self._flaps[key]
        if not self._held:
            return leases
        packed = dict(leases.packed)
        for key in self._held:
            flap = self._flaps[key]
            self._note(key, flap, leases.get(key))
            packed.pop(key, None)
            if flap.before is not None:
                packed[key] = flap.before
        return Leases(packed)

    def over(self) -> dict[str, Lease | None]:
        """Those that have been the same for long enough, and what they say."""
        now = self._clock()
        if self._next is None or now < self._next:
            return {}
        ends = {key: self._flaps[key].at + self._flaps[key].wait_s() for key in self._held}
        found: dict[str, Lease | None] = {}
        for key in [key for key, at in ends.items() if at <= now]:
            del self._held[key], ends[key]
            flap = self._flaps[key]
            flap.before = flap.last
            found[key] = _lease(flap.last)
        self._next = min(ends.values(), default=None)
        return found

    def due(self) -> float | None:
        """When the first of the held may be settled."""
        return self._next

    def held(self) -> tuple[str, ...]:
        """The keys that are held."""
        return tuple(self._held)


def _lease(packed: bytes | None) -> Lease | None:
    return None if packed is None else unpack(packed)


def _step(earlier: Lease | None, last: Lease | None, now: Lease | None) -> float:
    if last is None or now is None or last.created != now.created:
        return CAME_OR_WENT
    return BACK_AGAIN if _same(earlier, now) else IN_PLACE


def _same(one: Lease | None, other: Lease | None) -> bool:
    """Whether a record is the same claim: one that is only written again (renewed by flannel) is no change."""
    if one is None or other is None:
        return one is other
    return one.created == other.created and one.same_claim(other)
