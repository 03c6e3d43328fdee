"""The thread that turns a Tenure: when to settle, when to renew, when to try again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from lease.model import Lease
from lease.store import LeaseExpired, Snapshot, StoreUnavailable, backoff_s
from lease.tenure.claim import Claim
from lease.tenure.etcd import RENEW_AT_LEAST_S, renew_every_s
from lease.tenure.events import Denied, Renewed, TenureEvent

RECHECK_GAP_S = 1.0
"""Our own record is put right at most so often: somebody may write against us without end."""
Clock = Callable[[], float]


def boottime() -> float:
    """Seconds that also pass while the machine sleeps: a lease runs on in the store meanwhile (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Holder(Protocol):
    """What a TenureThread turns: tenure.Tenure on etcd, node_tenure.NodeTenure on Kubernetes."""

    held: Lease | None
    unreported: list[TenureEvent]

    @property
    def unfinished(self) -> bool:
        """Whether it is to be settled again, though something is held."""
        ...

    def settle(self, claim: Claim, snapshot: Snapshot | None = None) -> list[TenureEvent]:
        """Make store and claim agree; what happened. Raises StoreUnavailable."""

    def renew(self) -> Renewed:
        """Keep what is held. Raises LeaseExpired: settle again; StoreUnavailable."""


class TenureThread(threading.Thread):
    """Turns a Holder: settles when the claim changes or a recheck is asked for, renews in time, retries with backoff."""

    def __init__(
        self,
        tenure: Holder,
        post: Callable[[TenureEvent], None],
        renew_within_s: float | None = None,
        clock: Clock = boottime,
    ) -> None:
        """renew_within_s: renew at least so often (flannel's renew margin), None for our own rhythm."""
        super().__init__(name="tenure", daemon=True)
        self._tenure, self._post, self._clock = tenure, post, clock
        self._renew_within_s = renew_within_s or RENEW_AT_LEAST_S
        self._wake = threading.Condition()
        self._claim: Claim | None = None
        self._snapshot: Snapshot | None = None
        self._dirty = self._ending = False
        self._due = 0.0
        self._last = -RECHECK_GAP_S
        self._failures = 0
        self._rng = random.Random()  # noqa: S311 (spreads load, guards nothing)

    def claim(self, claim: Claim, snapshot: Snapshot | None = None) -> None:
        """What this node wants from now on. snapshot: a list read before anything was held, which saves another."""
        with self._wake:
            if claim != self._claim:
                self._claim, self._snapshot = claim, snapshot
                self._failures = 0
                self._recheck_now()

    def recheck(self) -> None:
        """Our record may not be what it was."""
        with self._wake:
            self._snapshot = None
            self._recheck_now(self._last + RECHECK_GAP_S)

    def stop(self) -> None:
        """End the thread; the lease stays."""
        with self._wake:
            self._ending = True
            self._wake.notify()

    def _recheck_now(self, not_before: float = 0.0) -> None:
        self._dirty, self._due = True, min(self._due, not_before)
        self._wake.notify()

    def run(self) -> None:
        while True:
            with self._wake:
                while not self._ending and (self._claim is None or self._clock() < self._due):
                    # in pieces, since a wait does not count the time that the machine slept
                    self._wake.wait(None if self._claim is None else min(30.0, self._due - self._clock()))
                if self._ending:
                    return
                claim, snapshot, dirty = self._claim, self._snapshot, self._dirty
                self._dirty, self._snapshot, self._due = False, None, float("inf")
            assert claim is not None
            wait_s = self._step(claim, snapshot, dirty)
            snapshot = None  # not held while we wait
            with self._wake:  # a claim or recheck that came meanwhile has put it earlier
                if dirty:
                    self._last = self._clock()
                self._due = min(self._due, self._clock() + wait_s)

    def _step(self, claim: Claim, snapshot: Snapshot | None, dirty: bool) -> float:
        """One settling and renewing; seconds until the next."""
        tenure = self._tenure
        try:
            if dirty or tenure.held is None:
                for event in tenure.settle(claim, snapshot):
                    self._post(event)
            if tenure.held is None:
                return self._again()
            renewed = tenure.renew()
        except LeaseExpired:
            return self._again()
        except StoreUnavailable as error:
            unreported, tenure.unreported = tenure.unreported, []
            for event in unreported:
                self._post(event)
            if tenure.held is None:
                self._post(Denied(str(error)))
            return self._again()
        self._post(renewed)
        if tenure.unfinished:
            return self._again()
        self._failures = 0
        return (
            self._renew_within_s if renewed.left_s is None else min(self._renew_within_s, renew_every_s(renewed.left_s))
        )

    def _again(self) -> float:
        """Something is open: settle again after a while."""
        with self._wake:
            self._dirty = True
        self._failures += 1
        return backoff_s(self._failures, self._rng.uniform(0.5, 1.0))
