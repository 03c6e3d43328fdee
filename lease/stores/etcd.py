"""Store on etcd v3: flannel's keys under one prefix, read by one range, changed by transactions only."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

from lease.etcd.client import EtcdClient, EtcdSettings, one_line, rpc
from lease.model import Lease, Refused
from lease.records.codec import BadRecord, decode_key, decode_lease, encode_value, key_ranges
from lease.records.packed import Leases, decode, pack
from lease.store import (
    Change,
    Changes,
    ConfigText,
    Gone,
    LeaseExpired,
    Lifetime,
    RecordChanged,
    Snapshot,
    StoreUnavailable,
    SubnetTaken,
)

_KEY_SHOWN = 120
PAGE, PAGES = 1000, 20
"""Records in a page; a longer list has larger pages."""


class EtcdStore:
    """The records of one network. Config and records stand under one prefix: one range and one watch cover both."""

    def __init__(self, settings: EtcdSettings, prefix: str) -> None:
        """Raises EtcdSettingsError."""
        self._client = EtcdClient(settings)
        root = posixpath.normpath("/" + prefix.strip("/"))  # flannel: path.Join; its keys start with a slash
        self._config_key = f"{root}/config".encode()
        self._subnets = f"{root}/subnets/".encode()
        self._first, self._end = f"{root}/".encode(), f"{root}0".encode()  # '0' follows '/': the whole prefix
        self._root = root

    @property
    def place(self) -> str:
        return f"etcd {self._client.endpoint} {self._root}"

    @property
    def config_place(self) -> str:
        return f"{self.place}/config"

    def read(self) -> Snapshot:
        """In pages at one revision, each reduced before the next: a range of 20,000 at once keeps 20 MiB. At most 21
        of them, since etcd counts the whole range for each."""
        config: bytes | None = None
        leases: dict[str, bytes] = {}
        refused: dict[str, Refused] = {}
        revision = 0
        for page in self._client.pages(self._first, self._end, PAGE, PAGES):
            revision = revision or int(page.header.revision)
            for kv in self._take_usual(page.kvs, leases):
                change = self._decode(kv)
                if isinstance(change, Lease):
                    leases[change.key] = pack(change)
                elif isinstance(change, Refused):
                    refused[change.key] = change
                elif isinstance(change, ConfigText):
                    config = change.text
        return Snapshot(revision, config, Leases(leases), refused)

    def later_than(self, revision: int) -> Leases:
        pages = self._client.pages(self._subnets, self._subnets[:-1] + b"0", PAGE, PAGES, later_than=revision)
        return Leases.of(item for page in pages for kv in page.kvs if isinstance(item := self._decode(kv), Lease))

    def _take_usual(self, kvs: Iterable[Any], leases: dict[str, bytes]) -> list[Any]:
        """Enter the records that have flannel's usual form; the others."""
        rest: list[Any] = []
        lead, skip = self._subnets, len(self._subnets)
        for kv in kvs:
            key = kv.key
            packed = None
            if key.startswith(lead):
                packed = decode(key[skip:], kv.value, kv.create_revision, kv.mod_revision, kv.lease)
            if packed is None:
                rest.append(kv)
            else:
                leases[key[skip:].decode()] = packed
        return rest

    def watch(self, after: int) -> Iterator[Changes]:
        stream = self._client.watch(self._first, self._end, after + 1)
        failed = True
        try:
            for answer in stream.answers():
                where = self._client.endpoint
                if answer.compact_revision:
                    raise StoreUnavailable(f"{where}: revision {after + 1} is compacted; the list is read again")
                if answer.canceled:
                    raise StoreUnavailable(
                        f"{where}: the watch was refused: {one_line(answer.cancel_reason) or 'no reason given'}"
                    )
                if answer.created and answer.header.revision < after:
                    raise StoreUnavailable(
                        f"{where}: is at revision {answer.header.revision}, before {after} which we read:"
                        " restored from a backup; the list is read again"
                    )
                changes = tuple(change for event in answer.events if (change := self._decode_event(event)) is not None)
                if changes:
                    yield Changes(int(answer.header.revision), changes)
        except GeneratorExit:
            failed = False
            raise
        finally:
            self._client.forget(stream, failed)

    def create(self, lease: Lease, ttl_s: int) -> Lease:
        handle = self._client.grant(ttl_s) if ttl_s else 0
        key, value = self._subnets + lease.key.encode(), encode_value(lease)
        answer = self._client.txn(self._absent(key_ranges(lease.key)), [_put(key, value, handle)])
        if not answer.succeeded:
            if handle:
                self._client.revoke(handle)
            raise SubnetTaken(f"{lease.key} was taken by another node first")
        revision = int(answer.header.revision)
        return lease._replace(created=revision, modified=revision, handle=handle)

    def _absent(self, ranges: Iterable[tuple[bytes, bytes]]) -> list[Any]:
        """That no key stands in ranges."""
        return [
            rpc.Compare(
                result=rpc.Compare.EQUAL,
                target=rpc.Compare.CREATE,
                create_revision=0,
                key=self._subnets + first,
                range_end=self._subnets + after,
            )
            for first, after in ranges
        ]

    def move(self, old: Lease, new: Lease) -> Lease:
        was, key = self._subnets + old.key.encode(), self._subnets + new.key.encode()
        delete = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=was))
        absent = self._absent(key_ranges(new.key, without=old.key))
        try:
            answer = self._client.txn(
                [_unchanged(was, old), *absent], [delete, _put(key, encode_value(new), old.handle)]
            )
        except LeaseExpired:
            raise RecordChanged(f"{old.key}: the etcd lease under it ran out") from None
        if not answer.succeeded:
            raise RecordChanged(f"{old.key} was changed since revision {old.modified}, or {new.key} is another's")
        revision = int(answer.header.revision)
        return new._replace(created=revision, modified=revision, handle=old.handle)

    def change(self, old: Lease, new: Lease, ttl_s: int = 0) -> Lease:
        assert new.key == old.key
        key = self._subnets + old.key.encode()
        handle = self._client.grant(ttl_s) if ttl_s else old.handle
        try:
            answer = self._client.txn([_unchanged(key, old)], [_put(key, encode_value(new), handle)])
        except LeaseExpired:
            raise RecordChanged(f"{old.key}: the etcd lease under it ran out") from None
        if not answer.succeeded:
            if ttl_s:
                self._client.revoke(handle)
            raise RecordChanged(f"{old.key} was changed since revision {old.modified}")
        return new._replace(created=old.created, modified=int(answer.header.revision), handle=handle)

    def remove(self, lease: Lease) -> None:
        key = self._subnets + lease.key.encode()
        delete = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
        if not self._client.txn([_unchanged(key, lease)], [delete]).succeeded:
            raise RecordChanged(f"{lease.key} was changed since revision {lease.modified}")

    def keep_alive(self, lease: Lease) -> Lifetime:
        if not lease.handle:
            return Lifetime(None, None)
        left = self._client.keep_alive(lease.handle)
        return Lifetime(left, left)

    def lifetime(self, lease: Lease) -> Lifetime:
        if not lease.handle:
            return Lifetime(None, None)
        return Lifetime(*self._client.time_to_live(lease.handle))

    def reconnect(self) -> None:
        self._client.reconnect()

    def close(self) -> None:
        self._client.close()

    def _decode_event(self, event: Any) -> Change | None:
        if event.type == event.DELETE:
            if event.kv.key == self._config_key:
                return ConfigText(None)
            return Gone(_shown(event.kv.key[len(self._subnets) :])) if self._is_record(event.kv.key) else None
        return self._decode(event.kv)

    def _decode(self, kv: Any) -> Change | None:
        """What one key says; None for keys that are none of ours (another network below our prefix)."""
        if kv.key == self._config_key:
            return ConfigText(bytes(kv.value))
        if not self._is_record(kv.key):
            return None
        name = _shown(kv.key[len(self._subnets) :])
        try:
            return decode_lease(name, kv.value, kv.create_revision, kv.mod_revision, kv.lease)
        except BadRecord as error:
            return Refused(name, str(error), kv.mod_revision)

    def _is_record(self, key: bytes) -> bool:
        return key.startswith(self._subnets)


def _shown(key: bytes) -> str:
    """A key's last part as text that can be logged whole, whatever somebody wrote there."""
    text = key.decode("utf-8", "backslashreplace")
    try:
        decode_key(text)
    except BadRecord:
        return ascii(text)[1:-1][:_KEY_SHOWN]
    return text


def _put(key: bytes, value: bytes, handle: int) -> Any:
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=handle))


def _unchanged(key: bytes, lease: Lease) -> Any:
    return rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, key=key, mod_revision=lease.modified)
