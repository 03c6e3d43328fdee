"""What an API server says of Nodes, in the two forms it has: JSON, and protobuf at a fifth of the CPU. Pure.

Protobuf is asked for first; a server, or something before one, that knows only JSON may answer so. Of a Node we read a few
fields, so its wire format is walked here, and what is of no interest (nine tenths of it) is stepped over: protobuf's own
classes would decode all of it. tests/unit/test_node_forms.py compares the two forms, and real recordings of both.

Source: protobuf's encoding guide (varint tags; length-delimited fields); k8s.io/apimachinery pkg/runtime/generated.proto
(Unknown), pkg/apis/meta/v1/generated.proto (ListMeta, ObjectMeta, Status, WatchEvent), k8s.io/api/core/v1/generated.proto
(Node, NodeSpec), pkg/runtime/serializer/protobuf (the four bytes `k8s\\0`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any, AnyStr, NamedTuple

PROTOBUF = "application/vnd.kubernetes.protobuf"
_METADATA, _METADATA_LIST = (
    "as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    "as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
)
WHOLE = f"{PROTOBUF},application/json"
"""What to accept (RFC 9110, 12.5.1): whole objects, or the metadata alone of one or of a list."""
METADATA = f"{PROTOBUF};{_METADATA},application/json;{_METADATA}"
METADATA_LIST = f"{PROTOBUF};{_METADATA_LIST},application/json;{_METADATA_LIST}"
NO_TIME = 1 << 40
"""Of a Node without a creationTimestamp: it counts as younger than any."""
_MAGIC = b"k8s\0"
_LONGEST_VARINT = 63
"""Where its last seven bits start."""
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading something else than we asked for may raise."""


class NodeSeen(NamedTuple):
    """A Node as far as it concerns us. version: its resourceVersion; created: seconds since the epoch; annotations: those
    that were asked for; pod_cidrs: as they stand there, in whatever form (empty where only metadata was asked for); raw: a
    hash of all annotations as they were written, to compare with a Glance's; 0 in JSON."""

    name: str
    uid: str
    version: str
    created: int
    annotations: dict[str, Any]
    pod_cidrs: Any
    raw: int = 0


class Glance(NamedTuple):
    """What tells of most events that they are no news: nobody changed an annotation of that Node. Fields as NodeSeen's."""

    name: str
    uid: str
    version: str
    raw: int


class Page(NamedTuple):
    """A part of a list. token: asks for the next, "" at its end."""

    version: str
    token: str
    nodes: list[NodeSeen]


class Event(NamedTuple):
    """Of a watch: ADDED, MODIFIED, DELETED, BOOKMARK; or ERROR, with words instead of a Node."""

    kind: str
    node: NodeSeen | None
    error: str


class Answer(NamedTuple):
    """The body of an answer, and whether it is protobuf."""

    data: bytes
    protobuf: bool

    def page(self, interesting: Collection[str]) -> Page:
        """As a list of Nodes, or of their metadata. Raises one of MALFORMED."""
        return _page(_unwrapped(self.data), interesting) if self.protobuf else _page_of_json(self.data, interesting)

    def event(self, interesting: Collection[str]) -> Event:
        """As one event of a watch. Raises as `page`."""
        return _event(self.data, interesting) if self.protobuf else _event_of_json(self.data, interesting)

    def glance(self) -> Glance | None:
        """The same of an event that is laid out as usual, at a fifth of the cost; None: ask `event`."""
        return _glance(self.data) if self.protobuf else None

    def node(self, interesting: Collection[str]) -> NodeSeen:
        """As a Node. Raises as `page`."""
        if self.protobuf:
            data = _unwrapped(self.data)
            return _node(data, 0, len(data), interesting)
        return node_of_json(json.loads(self.data), interesting)

    def refusal(self) -> tuple[str, str]:
        """As a Status: its message, and what it says was not found (`nodes/node1`). Raises as `page`."""
        return _status(_unwrapped(self.data)) if self.protobuf else _status_of_json(json.loads(self.data))


# --- JSON


def _page_of_json(data: bytes, interesting: Collection[str]) -> Page:
    page = json.loads(data)
    meta = page["metadata"]
    token = _text(meta.get("continue") or "")
    return Page(_text(meta["resourceVersion"]), token, [node_of_json(item, interesting) for item in page["items"]])


def _event_of_json(data: bytes, interesting: Collection[str]) -> Event:
    event = json.loads(data)
    item = event["object"]
    if event["type"] == "ERROR":
        return Event("ERROR", None, f"{item.get('code')} {item.get('message')}")
    if event["type"] == "BOOKMARK":
        version = _text(item["metadata"]["resourceVersion"])
        return Event("BOOKMARK", NodeSeen("", "", version, NO_TIME, {}, ()), "")
    return Event(_text(event["type"]), node_of_json(item, interesting), "")


def node_of_json(item: Any, interesting: Collection[str]) -> NodeSeen:
    """A Node, or its metadata, as JSON was read. Raises one of MALFORMED."""
    meta, spec = item["metadata"], item.get("spec") or {}
    notes = meta.get("annotations") or {}
    return NodeSeen(
        _text(meta["name"]),
        _text(meta["uid"]),
        _text(meta["resourceVersion"]),
        _seconds(meta.get("creationTimestamp")),
        {name: text for name, text in notes.items() if name in interesting},
        spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else []),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    value.encode()  # half a surrogate pair cannot be asked for again
    return value


def _seconds(text: object) -> int:
    """RFC 3339."""
    try:
        return int(datetime.fromisoformat(_text(text).replace("Z", "+00:00")).timestamp())
    except (ValueError, TypeError):
        return NO_TIME


def _status_of_json(said: Any) -> tuple[str, str]:
    details = said.get("details") or {}
    missing = said.get("kind") == "Status" and said.get("reason") == "NotFound"
    return str(said.get("message", "")), f"{details.get('kind')}/{details.get('name')}" if missing else ""


# --- protobuf


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


def _unwrapped(data: bytes) -> bytes:
    """The object in runtime.Unknown, behind the four bytes."""
    if data[:4] != _MAGIC:
        raise ValueError(f"no object of Kubernetes in protobuf: {data[:20]!r}")
    return next((data[start:end] for number, start, end in _fields(data, 4, len(data)) if number == 2), b"")


def _page(data: bytes, interesting: Collection[str]) -> Page:
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


def _event(data: bytes, interesting: Collection[str]) -> Event:
    """WatchEvent: the kind, and a RawExtension with the object as another answer would have it."""
    kind, inner = "", b""
    for number, start, end in _fields(data, 0, len(data)):
        if number == 1:
            kind = data[start:end].decode()
        elif number == 2:
            for field, at, to in _fields(data, start, end):
                if field == 1:
                    inner = _once(inner) or _unwrapped(data[at:to])
    if kind == "ERROR":
        code = next((value for number, value, end in _fields(inner, 0, len(inner)) if number == 6 and end < 0), 0)
        return Event(kind, None, f"{code} {_status(inner)[0]}")
    node = _node(inner, 0, len(inner), interesting)
    return Event(kind, node if kind == "BOOKMARK" else _named(node), "")


def _named(node: NodeSeen) -> NodeSeen:
    if not node.name or not node.uid:
        raise ValueError("a Node without a name or a uid")
    return node


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
    """Refuses what is said twice: nobody writes so, and of damaged bytes a Glance would have read the first, we the last."""
    if before:
        raise ValueError(f"{before[:60]!r} is followed by another")
    return before


_LABEL, _NOTE = 11 << 3 | 2, 12 << 3 | 2
_USUAL = re.compile(
    rb"\n\x08MODIFIED\x12.{1,3}\n.{1,3}k8s\0\n'\n\x0emeta\.k8s\.io/v1\x12\x15PartialObjectMetadata\x12.{1,3}\n.{1,3}"
    rb'\n(.)([a-z0-9.-]+)\x12\0\x1a\0"\0\*\$([0-9a-f-]{36})2(.)([0-9]+)8\0B\x08\x08.{5}\x10\0',
    re.DOTALL,
)
"""An event up to the labels: the lengths of name and resourceVersion, and what is told of them."""


def _glance(data: bytes) -> Glance | None:
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
    return Glance(name.decode(), uid.decode(), version.decode(), hash(data[first:last]))


def _pair(data: bytes, at: int, end: int) -> tuple[str, bytes]:
    """An entry of a map of texts."""
    key = value = b""
    for number, start, to in _fields(data, at, end):
        if number == 1:
            key = data[start:to]
        else:
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
