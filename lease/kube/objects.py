"""What an API server says of Nodes, in the two forms it has: JSON, and protobuf at a fifth of the CPU. Pure.

Protobuf (protobuf.py) is asked for first; a server, or something before one, that knows only JSON may answer so.
tests/unit/test_node_forms.py compares the two forms, and real recordings of both.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

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
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading something else than we asked for may raise."""


class NodeSeen(NamedTuple):
    """A Node as far as it concerns us. version: its resourceVersion; created: seconds since the epoch; annotations: those
    that were asked for; pod_cidrs: as they stand there, in whatever form (empty where only metadata was asked for); raw: a
    hash of all annotations as they were written, to compare with a Summary's; 0 where there are none, and in JSON."""

    name: str
    uid: str
    version: str
    created: int
    annotations: dict[str, Any]
    pod_cidrs: Any
    raw: int = 0


class Summary(NamedTuple):
    """What shows of most events that nobody changed an annotation of that Node. Fields as NodeSeen's."""

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
        return _forms().page(self.data, interesting) if self.protobuf else _page_of_json(self.data, interesting)

    def event(self, interesting: Collection[str]) -> Event:
        """As one event of a watch. Raises as `page`."""
        return _forms().event(self.data, interesting) if self.protobuf else _event_of_json(self.data, interesting)

    def summary(self) -> Summary | None:
        """What shows most events to be irrelevant, at a third of the cost; None: ask `event`. Raises as `page`."""
        return _forms().summary(self.data) if self.protobuf else None

    def node(self, interesting: Collection[str]) -> NodeSeen:
        """As a Node. Raises as `page`."""
        if self.protobuf:
            seen: NodeSeen = _forms().node(self.data, interesting)
            return seen
        return node_of_json(json.loads(self.data), interesting)

    def refusal(self) -> tuple[str, str]:
        """As a Status: its message, and what it says was not found (`nodes/node1`). Raises as `page`."""
        return _forms().status(self.data) if self.protobuf else _status_of_json(json.loads(self.data))


def _forms() -> Any:
    """The module protobuf, when the first such answer comes."""
    from lease.kube import protobuf

    return protobuf


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
        raise TypeError(f"{value!r:.60} is not text")
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
