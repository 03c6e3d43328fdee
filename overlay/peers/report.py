"""What is told of peers: to others who need to know them, and to the log: who came, changed and went, whose entries were put
back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from lease.families import Family
from lease.model import Lease, ip_text
from overlay.kernel.table import Table
from overlay.peers.difference import NAMED
from overlay.peers.reconcile import Reconciler
from overlay.peers.status import node_name
from overlay.peers.table import PeerChanges
from overlay.process.log import log

EACH = 10
"""Of more at once one line speaks."""


class Conflict(NamedTuple):
    """A route of somebody else's that stands before one of ours. device: "" where it has none, or several."""

    destination: str
    via: str
    device: str
    metric: int
    protocol: int


class PeerWatcher(Protocol):
    """Who needs to know the peers before their first packet comes (the guard)."""

    def load(self, packed: Collection[bytes]) -> None:
        """These are all peers."""

    def peer_changed(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""


def log_changes(family: Family, changes: PeerChanges) -> None:
    """A line for each peer that came, changed or went; one line for many."""
    if len(changes) > EACH:
        _log_many(family, changes)
        return
    for was, now in changes.values():
        before, after = _fields(family, was), _fields(family, now)
        if before is None and after is not None:
            log.info("peer.added", **after)
        elif after is None and before is not None:
            log.info("peer.removed", **before)
        elif before is not None and after is not None:
            log.info("peer.changed", **after, was=f"{before['public_ip']} {before['vtep']}")


def _log_many(family: Family, changes: PeerChanges) -> None:
    counts: Counter[str] = Counter()
    for was, now in changes.values():
        counts["removed" if now is None else "added" if was is None else "changed"] += 1
    some = (_fields(family, now or was) for was, now in list(changes.values())[:NAMED])
    names = [f"{each['subnet']} {each['public_ip']}" for each in some if each is not None]
    log.info("peers.changed", **counts, first=", ".join(names))


def _fields(family: Family, lease: Lease | None) -> dict[str, str] | None:
    end = lease.endpoint(family.number) if lease is not None else None
    if lease is None or end is None:
        return None
    return {
        "subnet": str(end.subnet),
        "public_ip": ip_text(family.number, end.public_ip),
        "node": node_name(lease.node),
        "vtep": end.vtep,
    }


class WorkLog:
    """What was written to the kernel, and put back there, since the last line."""

    def __init__(self, family: Family, tables: Sequence[Table]) -> None:
        self._family, self._tables = family, tables
        self._mended: Counter[str] = Counter()
        self._writes: Counter[str] = Counter()

    def has_news(self, mended: Counter[str], writes: Counter[str]) -> bool:
        """Whether `write` would say anything: asked at each pass, of which few write."""
        return mended != self._mended or writes != self._writes

    def write(
        self,
        mended: Counter[str],
        writes: Counter[str],
        whose: Iterable[tuple[int, int]],
        differing: int,
        peer: Callable[[int], Lease | None],
    ) -> None:
        """mended, writes: counted since the start; whose: table and peer of some that were put back; peer: by its number."""
        if more := mended - self._mended:
            entries = [self._entry(table, peer(number)) for table, number in whose]
            rest = sum(more.values()) - len(entries)
            text = ", ".join(entries) + (f" and {rest} more" if rest > 0 else "")
            named = {"entries": text} if entries else {}  # they went with their device, whose own line says so
            log.warning("kernel.mended", **more, **named, effect="put back as it should be")
        if more := writes - self._writes:
            log.info("kernel.reconciled", differing=differing, **more)
        self._mended, self._writes = mended.copy(), writes.copy()

    def _entry(self, table: int, lease: Lease | None) -> str:
        fields: dict[str, Any] = _fields(self._family, lease) or {"subnet": "a peer that went", "node": ""}
        name = f" ({fields['node']})" if fields["node"] else ""
        return f"{self._tables[table].name} of {fields['subnet']}{name}"


def differences(rec: Reconciler) -> Iterator[dict[str, object]]:
    """The entries that are not as they should be, for the status."""
    for peer in (*rec.backing_off, *(peer for peer in rec.pending if peer not in rec.backing_off)):
        for table, key, _ in rec.wanted.entries(peer):
            if rec.is_missing(peer, table):
                yield _difference(rec, table, key, "wrong" if key in rec.extra[table] else "missing")
    for table, extra in enumerate(rec.extra):
        for key in extra:
            if rec.wanted.value(table, key) is None:
                yield _difference(rec, table, key, "extra")


def _difference(rec: Reconciler, table: int, key: Any, state: str) -> dict[str, object]:
    failure = rec.failures.get((table, key))
    error, tries = (str(failure.refusal), failure.count) if failure else ("", 0)
    return {
        "table": rec.tables[table].name,
        "entry": rec.tables[table].text(key),
        "state": state,
        "error": error,
        "tries": tries,
    }
