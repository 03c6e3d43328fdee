"""The Store protocol and its events; backoff and list-then-watch, once, for every store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from lease.model import Lease, Refused
from lease.records.annotations import Hints
from lease.records.packed import Leases

BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.2, 15.0
STEADY_S = 10.0
"""A watch that lived so long was a healthy one: the next failure starts at the first delay again."""


class StoreError(Exception):
    """
    StoreError
    +-- StoreUnavailable    not now: retry with backoff (unreachable, frozen, no leader, no space, no permission)
    +-- SubnetTaken         another node was first; the record was not created
    +-- RecordChanged       the record is not at the revision we read; nothing was written
    +-- LeaseExpired        the etcd lease under the record is gone
    """


class StoreUnavailable(StoreError):
    """The store does not do it now. The message names the endpoint and what it said."""

    refused = False
    """It answered that we may not."""


class SubnetTaken(StoreError):
    """A record of this base, of whatever length or family, stands already."""


class RecordChanged(StoreError):
    """Somebody changed or removed the record since we read it."""


class LeaseExpired(StoreError):
    """The etcd lease to keep alive has run out."""


class Gone(NamedTuple):
    """A record was deleted or expired."""

    key: str


class ConfigText(NamedTuple):
    """The network config as it stands in the store, None where there is none."""

    text: bytes | None


Change = Lease | Refused | Gone | ConfigText | Hints
"""Hints: our own Node changed in what an operator, or the cluster, says of it (Kubernetes only)."""


class Snapshot(NamedTuple):
    """Everything the store says, at one revision. `refused` are records that could not be decoded."""

    revision: int
    config: bytes | None
    leases: Leases
    refused: dict[str, Refused]
    hints: Hints = Hints()


class Changes(NamedTuple):
    """What changed after the last Snapshot or Changes, in the store's order."""

    revision: int
    changes: tuple[Change, ...]


class StoreDown(NamedTuple):
    """The store cannot be read for now; the Feed goes on trying. refused: as of StoreUnavailable."""

    reason: str
    refused: bool = False


class Lifetime(NamedTuple):
    """How long an etcd lease has left, and how long it was granted for, in seconds. None: it never expires."""

    left_s: float | None
    granted_s: float | None


class LeaseSource(Protocol):
    """Where leases are read.

    Every method may raise StoreUnavailable; what else is named. No exception of a client library leaves the adapter.
    """

    @property
    def place(self) -> str:
        """The store and prefix, for messages."""

    @property
    def config_place(self) -> str:
        """Where the network config stands, for messages."""

    def read(self) -> Snapshot:
        """Everything, in one consistent read."""

    def watch(self, after: int) -> Iterator[Changes]:
        """What changes after that revision, for ever. Raises StoreUnavailable too when the history is gone, when the
        server turns out to be behind `after` (restored from a backup), or is silent for more than 15 s."""

    def reconnect(self) -> None:
        """The way there may have changed (our own address did): connections in use are given up, not waited for."""

    def close(self) -> None:
        """End every call under way."""


class Store(LeaseSource, Protocol):
    """Where leases are taken, too (etcd; on Nodes the cluster gives them).

    A write that raised StoreUnavailable may have been carried out: read again before concluding anything.
    """

    def later_than(self, revision: int) -> Leases:
        """The leases that were written after a revision."""

    def create(self, lease: Lease, ttl_s: int) -> Lease:
        """Create the record if no record of that base is there, atomically. ttl_s: its life, 0: for ever (a reservation).
        Raises SubnetTaken."""

    def change(self, old: Lease, new: Lease, ttl_s: int = 0) -> Lease:
        """Replace a record (same key) if it is still at `old.modified`, under the etcd lease of `old` (none: under none);
        ttl_s: under a new one of that life. Raises RecordChanged."""

    def move(self, old: Lease, new: Lease) -> Lease:
        """Replace a record by one of another key, at once, under the same etcd lease, if it is still at `old.modified`
        and no other record of the new one's base is there. Raises RecordChanged."""

    def remove(self, lease: Lease) -> None:
        """Delete a record if it is still at `lease.modified`. Raises RecordChanged."""

    def keep_alive(self, lease: Lease) -> Lifetime:
        """Renew the etcd lease under a record. Raises LeaseExpired."""

    def lifetime(self, lease: Lease) -> Lifetime:
        """How long it has left. Raises LeaseExpired."""


def backoff_s(failures: int, spread: float) -> float:
    """0.2, 0.4, ... 15 s; `spread` in 0.5..1 keeps a thousand nodes from coming back as one."""
    return min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10)) * spread


class Listing(Protocol):
    """What a list is to a Feed."""

    @property
    def revision(self) -> int:
        """What it was read at."""


class Watched(Protocol):
    """What a Feed turns: a LeaseSource, or another resource (lease/kube/watch.py)."""

    def read(self) -> Listing:
        """Everything. Raises StoreUnavailable."""

    def watch(self, after: int) -> Iterator[Any]:
        """What changes after that revision, for ever. Raises StoreUnavailable."""


class Feed(threading.Thread):
    """List, watch, and on any failure list again: the one place where a store's failures end.

    It always lists again, and never resumes a watch by revision: after a restore from a backup the same revisions mean
    other things, and nothing in a watch would show it (docs/decisions.md).
    """

    def __init__(
        self,
        store: Watched,
        post: Callable[[Any], None],
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(name="feed", daemon=True)
        self._store, self._post = store, post
        self._rng = rng or random.Random()  # noqa: S311 (spreads load, guards nothing)
        self._ending = threading.Event()

    def run(self) -> None:
        failures = 0
        while not self._ending.is_set():
            listed_at = None
            try:
                snapshot = self._store.read()
                listed_at, revision = time.monotonic(), snapshot.revision
                self._post(snapshot)
                del snapshot  # it is the agent's now: held here it would live as long as the watch
                for changes in self._store.watch(revision):
                    self._post(changes)
                    if self._ending.is_set():
                        return
            except StoreUnavailable as error:
                if self._ending.is_set():
                    return
                self._post(StoreDown(str(error), error.refused))
            lived = listed_at is not None and time.monotonic() - listed_at > STEADY_S
            failures = 1 if lived else failures + 1
            self._ending.wait(backoff_s(failures, self._rng.uniform(0.5, 1.0)))

    def stop(self) -> None:
        """End the thread; a call under way is ended by `Store.close`."""
        self._ending.set()
