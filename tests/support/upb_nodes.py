"""Nodes read by protobuf's own parser, as lease/kube/protobuf.py reads them by hand: what that is compared with.

The messages are described here, since the API's own descriptors (and typed models) would decode all of an object, nine
tenths of which is of no interest. Every field is `repeated`, so that what is said twice is seen, and refused: parsers differ
in which of the two they take. Texts are bytes, decoded where they are read.

Source: k8s.io/apimachinery pkg/runtime/generated.proto (Unknown), pkg/apis/meta/v1/generated.proto (ListMeta, ObjectMeta,
Status, WatchEvent), k8s.io/api/core/v1/generated.proto (Node, NodeSpec), pkg/runtime/serializer/protobuf (the four bytes
`k8s\\0`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from lease.kube.objects import NO_TIME, Event, NodeSeen, Page, Summary

_MAGIC = b"k8s\0"
_BYTES, _INT = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES, descriptor_pb2.FieldDescriptorProto.TYPE_INT64
_T = TypeVar("_T")
_MESSAGES: dict[str, dict[str, tuple[int, int | str]]] = {
    "Unknown": {"raw": (2, _BYTES)},
    "List": {"metadata": (1, "ListMeta"), "items": (2, _BYTES)},
    "ListMeta": {"version": (2, _BYTES), "token": (3, _BYTES)},
    "Node": {"metadata": (1, "ObjectMeta"), "spec": (2, "NodeSpec")},
    "ObjectMeta": {
        "name": (1, _BYTES),
        "uid": (5, _BYTES),
        "version": (6, _BYTES),
        "created": (8, "Time"),
        "annotations": (12, _BYTES),
    },
    "Time": {"seconds": (1, _INT)},
    "Pair": {"key": (1, _BYTES), "value": (2, _BYTES)},
    "NodeSpec": {"cidr": (1, _BYTES), "cidrs": (7, _BYTES)},
    "WatchEvent": {"type": (1, _BYTES), "object": (2, "RawExtension")},
    "RawExtension": {"raw": (1, _BYTES)},
    "Status": {"message": (3, _BYTES), "reason": (4, _BYTES), "details": (5, "Details"), "code": (6, _INT)},
    "Details": {"name": (1, _BYTES), "kind": (3, _BYTES)},
}
"""Each message's fields: name -> number, and type or message."""


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="overlay_kubernetes.proto", package="k", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            made = message.field.add(
                name=field, number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            )
            if isinstance(kind, str):
                made.type, made.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".k.{kind}"
            else:
                made.type = kind  # type: ignore[assignment]
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"k.{name}")) for name in _MESSAGES}


_CLASS = _classes()


def _parse(message: str, data: bytes) -> Any:
    try:
        return _CLASS[message].FromString(data)
    except DecodeError as error:
        raise ValueError(f"damaged protobuf of a {message}: {error}") from error


def _one(values: Sequence[_T], otherwise: _T) -> _T:
    """The only value. Raises ValueError where there are several."""
    if len(values) > 1:
        raise ValueError(f"{values[0]!r:.60} is followed by another")
    return values[0] if values else otherwise


def _text(values: Sequence[bytes]) -> str:
    return _one(values, b"").decode()


def unwrapped(data: bytes) -> bytes:
    """The object in runtime.Unknown, behind the four bytes. Raises ValueError."""
    if data[:4] != _MAGIC:
        raise ValueError(f"not a Kubernetes object in protobuf: {data[:20]!r}")
    raw: bytes = _one(_parse("Unknown", data[4:]).raw, b"")
    return raw


def page(data: bytes, interesting: Collection[str]) -> Page:
    """A list of Nodes, or of their metadata. Raises ValueError."""
    found = _parse("List", unwrapped(data))
    meta = _one(found.metadata, None)
    if meta is None or not _text(meta.version):
        raise ValueError("a list without a resourceVersion")
    items = [_named(_node(item, interesting)) for item in found.items]
    return Page(_text(meta.version), _text(meta.token), items)


def event(data: bytes, interesting: Collection[str]) -> Event:
    """WatchEvent: the kind, and the object as another answer would have it. Raises ValueError."""
    found = _parse("WatchEvent", data)
    kind, inner = _text(found.type), _object(found)
    if kind == "ERROR":
        status = _parse("Status", inner)
        return Event(kind, None, f"{_one(status.code, 0)} {_text(status.message)}")
    seen = _node(inner, interesting)
    return Event(kind, seen if kind == "BOOKMARK" else _named(seen), "")


def summary(data: bytes) -> Summary | None:
    """Of an event of a Node that changed, what shows whether anybody changed an annotation; None: of any other. Raises
    ValueError."""
    found = _parse("WatchEvent", data)
    if _one(found.type, b"") != b"MODIFIED":
        return None
    meta = _one(_parse("Node", _object(found)).metadata, None)
    if meta is None or not meta.annotations:
        return None
    return Summary(_text(meta.name), _text(meta.uid), _text(meta.version), hash(tuple(meta.annotations)))


def node(data: bytes, interesting: Collection[str]) -> NodeSeen:
    """A Node. Raises ValueError."""
    return _node(unwrapped(data), interesting)


def status(data: bytes) -> tuple[str, str]:
    """A Status: its message, and what it says was not found (`nodes/node1`). Raises ValueError."""
    found = _parse("Status", unwrapped(data))
    details = _one(found.details, None)
    missing = details is not None and _one(found.reason, b"") == b"NotFound"
    return _text(found.message), f"{_text(details.kind)}/{_text(details.name)}" if missing else ""


def _object(found: Any) -> bytes:
    extension = _one(found.object, None)
    return unwrapped(_one(extension.raw, b"")) if extension is not None else b""


def _node(data: bytes, interesting: Collection[str]) -> NodeSeen:
    """A Node; or PartialObjectMetadata, whose field 1 is the metadata as well."""
    found = _parse("Node", data)
    meta, spec = _one(found.metadata, None), _one(found.spec, None)
    if meta is None or not _text(meta.version):
        raise ValueError("an object without a resourceVersion")
    notes: dict[str, str] = {}
    for each in meta.annotations:
        pair = _parse("Pair", each)
        key = _one(pair.key, b"").decode("utf-8", "replace")  # as Go writes them in JSON
        if key in interesting:
            notes[key] = _one(pair.value, b"").decode("utf-8", "replace")
    created = _one(meta.created, None)
    cidrs = [each.decode() for each in (spec.cidrs or spec.cidr)] if spec is not None else []
    return NodeSeen(
        _text(meta.name),
        _text(meta.uid),
        _text(meta.version),
        NO_TIME if created is None else _one(created.seconds, NO_TIME),
        notes,
        [each for each in cidrs if each],
        hash(tuple(meta.annotations)) if meta.annotations else 0,
    )


def _named(seen: NodeSeen) -> NodeSeen:
    if not seen.name or not seen.uid:
        raise ValueError("a Node without a name or a uid")
    return seen
