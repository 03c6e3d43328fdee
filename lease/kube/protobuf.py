"""Nodes of Kubernetes in protobuf, the few fields that we read. Pure.

The wire format is walked here, and what is of no interest (nine tenths of it) is stepped over: protobuf's own parser decodes
all of it, which costs a heartbeat eight times the CPU and an agent 2.7 MiB (docs/decisions.md, "Nodes are read by hand").
tests/unit/test_node_forms.py compares the two on recordings and on damaged bytes.

Source: protobuf's encoding guide (varint tags; length-delimited fields); k8s.io/apimachinery pkg/runtime/generated.proto
(Unknown), pkg/apis/meta/v1/generated.proto (ListMeta, ObjectMeta, Status, WatchEvent), k8s.io/api/core/v1/generated.proto
(Node, NodeSpec), pkg/runtime/serializer/protobuf (the four bytes `k8s\\0`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import AnyStr

from lease.kube.objects import NO_TIME, Event, NodeSeen, Page, Summary

_MAGIC = b"k8s\0"
_LONGEST_VARINT = 63
"""Where its last seven bits start."""


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: number, and where its value starts and ends; of a varint the value, and -1."""
    while at < end:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        kind = tag & 7
        if kind == 2:
            size, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
            if at + size > end:
                raise ValueError("a field reaches beyond its message")
            yield tag >> 3, at, at + size
            at += size
        elif kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value, -1
        else:
            raise ValueError(f"a field of the form {kind}, which Kubernetes does not use")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift <= _LONGEST_VARINT:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number without end")


def unwrapped(data: bytes) -> bytes:
    """The object in runtime.Unknown, behind the four bytes. Raises as `page`."""
    if data[:4] != _MAGIC:
        raise ValueError(f"not a Kubernetes object in protobuf: {data[:20]!r}")
    return next((data[start:end] for number, start, end in _fields(data, 4, len(data)) if number == 2), b"")


def page(data: bytes, interesting: Collection[str]) -> Page:
    """A list of Nodes, or of their metadata. Raises ValueError, LookupError."""
    data = unwrapped(data)
    version = token = ""
    nodes: list[NodeSeen] = []
    for number, start, end in _fields(data, 0, len(data)):
        if number == 1:
            for inner, at, to in _fields(data, start, end):
                if inner == 2:
                    version = data[at:to].decode()
                elif inner == 3:
                    token = data[at:to].decode()
        elif number == 2:
            nodes.append(_named(_node(data, start, end, interesting)))
    if not version:
        raise ValueError("a list without a resourceVersion")
    return Page(version, token, nodes)


def event(data: bytes, interesting: Collection[str]) -> Event:
    """WatchEvent: the kind, and a RawExtension with the object as another answer would have it. Raises as `page`."""
    kind, inner = "", b""
    for number, start, end in _fields(data, 0, len(data)):
        if number == 1:
            kind = data[start:end].decode()
        elif number == 2:
            for field, at, to in _fields(data, start, end):
                if field == 1:
                    inner = _once(inner) or unwrapped(data[at:to])
    if kind == "ERROR":
        code = next((value for number, value, end in _fields(inner, 0, len(inner)) if number == 6 and end < 0), 0)
        return Event(kind, None, f"{code} {_status(inner)[0]}")
    seen = _node(inner, 0, len(inner), interesting)
    return Event(kind, seen if kind == "BOOKMARK" else _named(seen), "")


def _named(seen: NodeSeen) -> NodeSeen:
    if not seen.name or not seen.uid:
        raise ValueError("a Node without a name or a uid")
    return seen


def _node(data: bytes, at: int, end: int, interesting: Collection[str]) -> NodeSeen:
    """A Node; or PartialObjectMetadata, whose field 1 is the metadata as well."""
    name = uid = version = only = ""
    created = NO_TIME
    notes: dict[str, str] = {}
    cidrs: list[str] = []
    notes_from = notes_to = 0
    for part, first, last in _fields(data, at, end):
        if part == 1:
            for number, start, to in _fields(data, first, last):
                if number == 12:
                    notes_from, notes_to = notes_from or start, to
                    key, value = _pair(data, start, to)
                    if key in interesting:
                        notes[key] = value.decode("utf-8", "replace")  # as Go writes them in JSON
                elif number == 1:
                    name = _once(name) or data[start:to].decode()
                elif number == 5:
                    uid = _once(uid) or data[start:to].decode()
                elif number == 6:
                    version = _once(version) or data[start:to].decode()
                elif number == 8:
                    created = next((value for field, value, kind in _fields(data, start, to) if field == 1), NO_TIME)
        elif part == 2:
            for number, start, to in _fields(data, first, last):
                if number == 7:
                    cidrs.append(data[start:to].decode())
                elif number == 1:
                    only = data[start:to].decode()
            break  # status, the largest part, is behind it
    if not version:
        raise ValueError("an object without a resourceVersion")
    raw = hash(data[notes_from:notes_to])
    return NodeSeen(name, uid, version, created, notes, cidrs or ([only] if only else []), raw)


def _once(before: AnyStr) -> AnyStr:
    """Refuses what is said twice: nobody writes so, and of damaged bytes a Summary would have the first, this the last."""
    if before:
        raise ValueError(f"{before[:60]!r} is followed by another")
    return before


_LABEL, _NOTE = 11 << 3 | 2, 12 << 3 | 2
_USUAL = re.compile(
    rb"\n\x08MODIFIED\x12.{1,3}\n.{1,3}k8s\0\n'\n\x0emeta\.k8s\.io/v1\x12\x15PartialObjectMetadata\x12.{1,3}\n.{1,3}"
    rb'\n(.)([a-z0-9.-]+)\x12\0\x1a\0"\0\*\$([0-9a-f-]{36})2(.)([0-9]+)8\0B\x08\x08.{5}\x10\0',
    re.DOTALL,
)
"""An event up to the labels: name and resourceVersion, with their lengths, and the uid."""


def summary(data: bytes) -> Summary | None:
    """Of an event of a Node that changed, laid out as usual, what shows whether anybody changed an annotation; None: of any
    other. Raises as `page`."""
    usual = _USUAL.match(data)
    if usual is None:
        return None
    name_size, name, uid, version_size, version = usual.groups()
    if name_size[0] != len(name) or version_size[0] != len(version):
        return None
    at, end, first, last = usual.end(), len(data) - 3, 0, 0
    while at < end:
        tag, size = data[at], data[at + 1]
        if tag not in (_LABEL, _NOTE):
            break
        at += 2
        if size > 127:
            size += (data[at] << 7) - 128
            at += 1
            if size > 16383:
                return None
        if tag == _NOTE:
            first, last = first or at, at + size
        at += size
    if not first:  # no annotation, or something else before them
        return None
    return Summary(name.decode(), uid.decode(), version.decode(), hash(data[first:last]))


def node(data: bytes, interesting: Collection[str]) -> NodeSeen:
    """A Node. Raises as `page`."""
    whole = unwrapped(data)
    return _node(whole, 0, len(whole), interesting)


def status(data: bytes) -> tuple[str, str]:
    """A Status: its message, and what it says was not found (`nodes/node1`). Raises as `page`."""
    return _status(unwrapped(data))


def _pair(data: bytes, at: int, end: int) -> tuple[str, bytes]:
    """An entry of a map of texts."""
    key = value = b""
    for number, start, to in _fields(data, at, end):
        if number == 1:
            key = data[start:to]
        elif number == 2:
            value = data[start:to]
    return key.decode("utf-8", "replace"), value


def _status(data: bytes) -> tuple[str, str]:
    message = reason = name = kind = ""
    for number, start, end in _fields(data, 0, len(data)):
        if number == 3:
            message = data[start:end].decode()
        elif number == 4:
            reason = data[start:end].decode()
        elif number == 5:
            for field, at, to in _fields(data, start, end):
                if field == 1:
                    name = data[at:to].decode()
                elif field == 3:
                    kind = data[at:to].decode()
    return message, f"{kind}/{name}" if reason == "NotFound" else ""
