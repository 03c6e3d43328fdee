"""A store in memory that passes the same contract tests as the one on etcd (tests/store/test_contract.py)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from lease.model import Lease, Refused
from lease.records.codec import BadRecord, decode_lease, encode_value, key_ranges
from lease.records.packed import Leases
from lease.store import Changes, Gone, LeaseExpired, Lifetime, RecordChanged, Snapshot, StoreUnavailable, SubnetTaken


class FakeStore:
    """Records as bytes, revisions, etcd leases by number. `away` makes every call fail; `before_create` runs in between
    a list and a create, where another node may be faster."""

    def __init__(self, config: bytes | None = b'{"Network":"10.244.0.0/16"}') -> None:
        self._lock = threading.RLock()
        self.config = config
        self.revision = 1
        self.records: dict[str, tuple[bytes, int, int, int]] = {}
        self.leases: dict[int, float] = {}
        self.granted = 86_400
        self.away = ""
        self.before_create: Callable[[Lease], None] = lambda _lease: None
        self.reads = 0
        self._watchers: list[queue.SimpleQueue[Changes | None]] = []
        self._history: list[Changes] = []

    place = "memory /test"
    config_place = "memory /test/config"

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable(self.away)

    # what others do
    def put(self, key: str, value: bytes, handle: int = 0) -> None:
        with self._lock:
            self.revision += 1
            created = self.records[key][1] if key in self.records else self.revision
            self.records[key] = (value, created, self.revision, handle)
            self._tell(self._decode(key))

    def delete(self, key: str) -> None:
        with self._lock:
            self.revision += 1
            self.records.pop(key, None)
            self._tell(Gone(key))

    def _tell(self, change: Lease | Refused | Gone) -> None:
        self._history.append(Changes(self.revision, (change,)))
        for watcher in self._watchers:
            watcher.put(self._history[-1])

    def _decode(self, key: str) -> Lease | Refused:
        value, created, modified, handle = self.records[key]
        try:
            return decode_lease(key, value, created, modified, handle)
        except BadRecord as error:
            return Refused(key, str(error), modified)

    # the protocol
    def read(self) -> Snapshot:
        with self._lock:
            self._check()
            self.reads += 1
            found = [self._decode(key) for key in self.records]
            return Snapshot(
                self.revision,
                self.config,
                Leases.of(item for item in found if isinstance(item, Lease)),
                {item.key: item for item in found if isinstance(item, Refused)},
            )

    def later_than(self, revision: int) -> Leases:
        with self._lock:
            self._check()
            found = [self._decode(key) for key, record in self.records.items() if record[2] > revision]
            return Leases.of(item for item in found if isinstance(item, Lease))

    def watch(self, after: int) -> Iterator[Changes]:
        self._check()
        watcher: queue.SimpleQueue[Changes | None] = queue.SimpleQueue()
        with self._lock:
            for changes in self._history:
                watcher.put(changes)
            self._watchers.append(watcher)
        while (changes := watcher.get()) is not None:
            if changes.revision > after:
                yield changes
        raise StoreUnavailable("closed")

    def create(self, lease: Lease, ttl_s: int) -> Lease:
        self._check()
        self.before_create(lease)
        with self._lock:
            if self._taken(lease.key):
                raise SubnetTaken(lease.key)
            handle = len(self.leases) + 1
            self.leases[handle] = ttl_s
            self.put(lease.key, encode_value(lease), handle)
            return lease._replace(created=self.revision, modified=self.revision, handle=handle)

    def _taken(self, key: str, without: str = "") -> bool:
        """Whether a record of the same base stands, but one."""
        ranges = key_ranges(key, without)
        return any(first <= there.encode() < after for there in self.records for first, after in ranges)

    def move(self, old: Lease, new: Lease) -> Lease:
        with self._lock:
            self._check()
            if self.records.get(old.key, (b"", 0, 0, 0))[2] != old.modified or self._taken(new.key, old.key):
                raise RecordChanged(old.key)
            handle = self.records[old.key][3]
            self.delete(old.key)
            self.put(new.key, encode_value(new), handle)
            return new._replace(created=self.revision, modified=self.revision, handle=handle)

    def change(self, old: Lease, new: Lease, ttl_s: int = 0) -> Lease:
        with self._lock:
            self._check()
            assert old.key == new.key
            if old.key not in self.records or self.records[old.key][2] != old.modified:
                raise RecordChanged(old.key)
            handle = old.handle
            if ttl_s:
                handle = len(self.leases) + 1000
                self.leases[handle] = ttl_s
            if handle and handle not in self.leases:
                raise RecordChanged(old.key)
            self.put(old.key, encode_value(new), handle)
            return new._replace(created=self.records[old.key][1], modified=self.revision, handle=handle)

    def remove(self, lease: Lease) -> None:
        with self._lock:
            self._check()
            if lease.key not in self.records or self.records[lease.key][2] != lease.modified:
                raise RecordChanged(lease.key)
            self.delete(lease.key)

    def keep_alive(self, lease: Lease) -> Lifetime:
        self._check()
        if not lease.handle:
            return Lifetime(None, None)
        if lease.handle not in self.leases:
            raise LeaseExpired(lease.key)
        self.leases[lease.handle] = self.granted
        return Lifetime(self.granted, self.granted)

    def lifetime(self, lease: Lease) -> Lifetime:
        self._check()
        if not lease.handle:
            return Lifetime(None, None)
        if lease.handle not in self.leases:
            raise LeaseExpired(lease.key)
        return Lifetime(self.leases[lease.handle], self.granted)

    def reconnect(self) -> None:
        """Nothing is connected."""

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.put(None)
