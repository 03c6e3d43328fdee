"""Store on Node objects: a node's subnet is its podCIDR, what peers need are flannel's annotations.

One full list at the start, in small pages, each reduced before the next; then a metadata-only watch with bookmarks, and
metadata-only lists after a failure. podCIDR is not in the metadata, but fixed for the life of a uid: a new uid costs one
GET, many at once one list in pages.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from lease.annotations import LONGEST, Hints, Names, decode_node, hints, node_subnets, seniority, uid_number
from lease.codec import BadRecord
from lease.kube_client import ApiError, KubeClient, KubeSettings, Stream
from lease.model import Lease, Prefix, Refused
from lease.packed import Leases
from lease.store import Change, Changes, Gone, RecordChanged, Snapshot, StoreUnavailable

NODES = "/api/v1/nodes"
ONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
MANY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
FULL_PAGE, METADATA_PAGE = 50, 100
"""Small, since a page is parsed whole: 500 of metadata cost 10 MiB that are never given back, and are no faster."""
SINGLY = 16
"""So many unknown uids at once are asked for one by one; more by one list."""
SILENT_S, PROBE_S = 8.0, 5.0
"""A watch silent for so long is doubted: is the server there at all? Together below 15 s."""
NO_BOOKMARK_S = 100.0
"""Bookmarks come every minute; without them (a restored etcd) the list is read again."""
LUMP, PAUSE_S = 8, 0.1
"""Under many events they are read in lumps: a wake for each would cost more than the events."""
UNAVAILABLE = "NetworkUnavailable"


class NodeGone(RecordChanged):
    """There is no Node of our name."""


class NodeView(NamedTuple):
    """Our own Node. unavailable: the status of its NetworkUnavailable condition, "" where it has none."""

    uid: str
    created: int
    subnets: dict[int, Prefix]
    fault: str
    annotations: dict[str, str]
    unavailable: str
    reason: str


class _Node(NamedTuple):
    """What is kept of a Node. said: its annotations of interest; change: what it is to peers."""

    uid: str
    subnets: dict[int, Prefix]
    fault: str
    said: tuple[str | None, ...]
    change: Lease | Refused | None


class NodeStore:
    """Nodes as leases, keyed by name. `read` and `watch` are the feed's, the others any thread's."""

    def __init__(self, settings: KubeSettings, names: Names, node_name: str, config_path: str) -> None:
        """Raises KubeSettingsError."""
        self._client = KubeClient(settings)
        self._names, self._interesting, self._own = names, names.read(), node_name
        self._config_path = config_path
        self._nodes: dict[str, _Node] = {}
        self._version = ""
        self._hints = Hints()
        self._stream: Stream | None = None

    @property
    def place(self) -> str:
        return f"Kubernetes {self._client.place}"

    @property
    def config_place(self) -> str:
        """Where the network config stands."""
        return self._config_path

    def config(self) -> bytes | None:
        """The network config as the file says it now, None where there is none."""
        try:
            with open(self._config_path, "rb") as file:
                return file.read()
        except OSError:
            return None

    # --- list and watch ------------------------------------------------------------------------------------------------

    def read(self) -> Snapshot:
        with _answers_of(self._client.place):
            return self._read()

    def _read(self) -> Snapshot:
        nodes: dict[str, _Node] = {}
        unknown: dict[str, dict[str, Any]] = {}
        first = not self._nodes
        version = "0"
        for page in self._pages(full=first):
            version = page["metadata"]["resourceVersion"]
            for item in page["items"]:
                meta = item["metadata"]
                name, known = meta["name"], self._nodes.get(meta["name"])
                if first:
                    nodes[name] = self._keep(meta, *_subnets(item.get("spec") or {}))
                elif known is not None and known.uid == meta["uid"] and known.subnets:
                    nodes[name] = known if known.said == self._said(meta) else self._keep(meta, known.subnets)
                elif self._asks(meta):
                    unknown[name] = _reduced(meta, self._interesting)
                else:
                    nodes[name] = self._keep(meta, {})
        nodes.update(self._resolve(unknown))
        self._nodes, self._version = nodes, version
        self._hints = self._own_hints()
        found = [node.change for node in nodes.values()]
        return Snapshot(
            _number(version),
            self.config(),
            Leases.of(item for item in found if isinstance(item, Lease)),
            {item.key: item for item in found if isinstance(item, Refused)},
            self._hints,
        )

    def watch(self, after: int) -> Iterator[Changes]:
        del after  # the list before says it, in the server's own words
        while True:
            query: dict[str, str | int] = {
                "watch": "true",
                "allowWatchBookmarks": "true",
                "resourceVersion": self._version,
                "timeoutSeconds": random.randint(300, 600),  # noqa: S311 (spreads load, guards nothing)
            }
            stream = self._client.watch(NODES, query, ONE)
            self._stream, opened = stream, time.monotonic()
            doubts = _Doubts(stream, self._probe)
            doubts.start()
            try:
                for lines in stream.lumps():
                    doubts.heard()
                    if changes := self._take(lines):
                        yield Changes(_number(self._version), tuple(changes))
                    if len(lines) >= LUMP:
                        time.sleep(PAUSE_S)
            except StoreUnavailable as error:
                raise StoreUnavailable(f"{self._client.place}: {doubts.why or error}") from error
            finally:
                doubts.stop()
                stream.close()
            if doubts.why:
                raise StoreUnavailable(f"{self._client.place}: {doubts.why}")
            if time.monotonic() - opened < 1.0:
                raise StoreUnavailable(f"{self._client.place}: ends the watch as soon as it is opened")

    def reconnect(self) -> None:
        self._client.reconnect()
        if self._stream is not None:
            self._stream.end()

    def close(self) -> None:
        self._client.close()
        if self._stream is not None:
            self._stream.end()

    def _take(self, lines: list[bytes]) -> list[Change]:
        """What a lump of events changes; later events of a node win over earlier ones."""
        changes: dict[str, Change] = {}
        unknown: dict[str, dict[str, Any]] = {}
        for line in lines:
            try:
                event = json.loads(line)
                kind, item = event["type"], event["object"]
                if kind == "ERROR":
                    raise StoreUnavailable(f"{item.get('code')} {item.get('message')}; the list is read again")
                meta = item["metadata"]
                version = meta["resourceVersion"]
                if kind != "BOOKMARK":
                    self._observe(kind, meta, changes, unknown)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise StoreUnavailable(f"an event that is none ({error!r}); the list is read again") from error
            self._version = version
        with _answers_of(self._client.place):
            for name, node in self._resolve(unknown).items():
                self._put(name, node, changes)
        own = self._own_hints()
        told: list[Change] = list(changes.values())
        if own != self._hints or self._own in unknown:
            self._hints = own
            told.append(own)
        return told

    def _observe(
        self, kind: str, meta: dict[str, Any], changes: dict[str, Change], unknown: dict[str, dict[str, Any]]
    ) -> None:
        name, known = meta["name"], self._nodes.get(meta["name"])
        if kind == "DELETED":
            if known is None or known.uid == meta["uid"]:
                unknown.pop(name, None)
                self._nodes.pop(name, None)
                changes[name] = Gone(name)
        elif known is not None and known.uid == meta["uid"] and known.subnets:
            if known.said != self._said(meta):
                self._put(name, self._keep(meta, known.subnets), changes)
        elif self._asks(meta):
            unknown[name] = _reduced(meta, self._interesting)
        else:
            unknown.pop(name, None)
            self._put(name, self._keep(meta, {}), changes)

    def _asks(self, meta: Mapping[str, Any]) -> bool:
        """Whether a Node's podCIDR is worth a request: one that nobody manages (yet, or ever) is no peer, and where the
        cluster gives no podCIDRs each heartbeat of each Node would cost each agent one."""
        managed = (meta.get("annotations") or {}).get(self._names.managed) == "true"
        return managed or meta["name"] == self._own

    def _put(self, name: str, node: _Node, changes: dict[str, Change]) -> None:
        was = self._nodes.get(name)
        self._nodes[name] = node
        if node.change is not None:
            changes[name] = node.change
        elif was is not None and was.change is not None:
            changes[name] = Gone(name)

    def _resolve(self, unknown: Mapping[str, dict[str, Any]]) -> dict[str, _Node]:
        """The podCIDRs of Nodes whose uid is new to us. One that was made again meanwhile is left out: its own event
        is on its way."""
        found: dict[str, _Node] = {}
        if len(unknown) > SINGLY:
            for page in self._pages(full=True):
                for item in page["items"]:
                    meta = item["metadata"]
                    if meta["name"] in unknown and unknown[meta["name"]]["uid"] == meta["uid"]:
                        found[meta["name"]] = self._keep(unknown[meta["name"]], *_subnets(item.get("spec") or {}))
            return found
        for name, meta in unknown.items():
            try:
                item = self._client.get(f"{NODES}/{name}", {})
            except ApiError as error:
                if error.about == f"nodes/{name}":
                    continue
                raise
            if item["metadata"]["uid"] == meta["uid"]:
                found[name] = self._keep(meta, *_subnets(item.get("spec") or {}))
        return found

    def _pages(self, full: bool) -> Iterator[Any]:
        """A list, page by page. Without a resourceVersion: with it, `limit` would be ignored."""
        query: dict[str, str | int] = {"limit": FULL_PAGE if full else METADATA_PAGE}
        while True:
            page = self._client.get(NODES, query, "application/json" if full else MANY)
            try:
                page["metadata"]["resourceVersion"], page["items"]
            except (KeyError, TypeError) as error:
                raise StoreUnavailable(f"{self._client.place}: a list that is none: {error!r}") from error
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    def _keep(self, meta: Mapping[str, Any], subnets: dict[int, Prefix], fault: str = "") -> _Node:
        name, uid = meta["name"], meta["uid"]
        notes = meta.get("annotations") or {}
        created, number = seniority(meta.get("creationTimestamp") or "", uid), uid_number(uid)
        change: Lease | Refused | None
        try:
            change = decode_node(name, notes, subnets, self._names, created, number)
            if change is not None and fault:
                change = Refused(name, fault, 0)
        except BadRecord as error:
            change = Refused(name, fault or str(error), 0)
        return _Node(uid, subnets, fault, self._said(meta), change)

    def _said(self, meta: Mapping[str, Any]) -> tuple[str | None, ...]:
        notes = meta.get("annotations") or {}
        return tuple(_bounded(notes.get(name)) for name in self._interesting)

    def _own_hints(self) -> Hints:
        node = self._nodes.get(self._own)
        if node is None:
            return self._hints
        said = {name: text for name, text in zip(self._interesting, node.said, strict=True) if text is not None}
        return hints(said, self._names)

    def _probe(self) -> None:
        """Does the server answer? What it answers does not matter. Raises StoreUnavailable."""
        try:
            self._client.get(f"{NODES}/{self._own}", {"resourceVersion": "0"}, ONE, timeout_s=PROBE_S)
        except ApiError:
            return

    # --- our own Node --------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Lease]:
        """The other nodes' leases as last seen."""
        there = dict(self._nodes)
        return {
            name: node.change for name, node in there.items() if isinstance(node.change, Lease) and name != self._own
        }

    def own(self) -> NodeView:
        """Our own Node, read now. Raises NodeGone, StoreUnavailable."""
        with _answers_of(self._client.place):
            return self._view()

    def _view(self) -> NodeView:
        try:
            item = self._client.get(f"{NODES}/{self._own}", {})
        except ApiError as error:
            if error.about == f"nodes/{self._own}":
                raise NodeGone(f"there is no Node {self._own}") from error
            raise
        meta = item["metadata"]
        conditions = (item.get("status") or {}).get("conditions") or []
        found: dict[str, str] = next((c for c in conditions if c.get("type") == UNAVAILABLE), {})
        subnets, fault = _subnets(item.get("spec") or {})
        return NodeView(
            meta["uid"],
            seniority(meta.get("creationTimestamp") or "", meta["uid"]),
            subnets,
            fault,
            meta.get("annotations") or {},
            found.get("status") or "",
            found.get("reason") or "",
        )

    def write(self, uid: str, annotations: Mapping[str, str | None], condition: dict[str, str] | None) -> None:
        """Annotations (None: away with it) and a condition, in one patch of nodes/status, if the Node is still that uid.

        Raises RecordChanged when it is not, StoreUnavailable.
        """
        body: dict[str, Any] = {"metadata": {"uid": uid, "annotations": dict(annotations)}}
        if condition is not None:
            body["status"] = {"conditions": [condition]}
        try:
            self._client.patch(f"{NODES}/{self._own}/status", body)
        except ApiError as error:
            if error.code in (404, 409, 422):
                raise RecordChanged(str(error)) from error
            raise


class _Doubts(threading.Thread):
    """Ends a watch whose server is gone: frozen, or silent for longer than bookmarks are apart."""

    def __init__(self, stream: Stream, probe: Callable[[], None]) -> None:
        super().__init__(name="watch-doubts", daemon=True)
        self._stream, self._probe = stream, probe
        self._heard = self._answered = time.monotonic()
        self._ending = threading.Event()
        self.why = ""

    def heard(self) -> None:
        """Something came."""
        self._heard = time.monotonic()

    def stop(self) -> None:
        """The watch ended."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(1.0):
            now = time.monotonic()
            if now - self._heard > NO_BOOKMARK_S:
                self.why = f"no event and no bookmark for {NO_BOOKMARK_S:.0f} s; the list is read again"
            elif now - max(self._heard, self._answered) > SILENT_S:
                try:
                    self._probe()
                    self._answered = time.monotonic()
                except StoreUnavailable as error:
                    self.why = f"the watch is silent and the server does not answer: {error}"
            if self.why:
                self._stream.end()
                return


def _subnets(spec: Mapping[str, Any]) -> tuple[dict[int, Prefix], str]:
    """podCIDRs by family, and why they cannot be read ("" when they can)."""
    texts = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    try:
        return node_subnets(texts), ""
    except BadRecord as error:
        return {}, str(error)


def _bounded(text: str | None) -> str | None:
    """An annotation as it is remembered: a huge one (256 KiB are allowed) by its hash."""
    if text is None or len(text) <= LONGEST:
        return text
    return f"{len(text)} bytes {hash(text)}"


@contextmanager
def _answers_of(place: str) -> Iterator[None]:
    """An answer that has not the form it must have (a proxy's, a broken server's) is no answer."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise StoreUnavailable(f"{place}: an answer that is none of this API's: {error!r}") from error


def _reduced(meta: Mapping[str, Any], interesting: tuple[str, ...]) -> dict[str, Any]:
    notes = meta.get("annotations") or {}
    return {
        "name": meta["name"],
        "uid": meta["uid"],
        "creationTimestamp": meta.get("creationTimestamp"),
        "annotations": {name: notes[name] for name in interesting if name in notes},
    }


def _number(version: str) -> int:
    """A resourceVersion for messages and order; it is opaque, though every server writes a number."""
    return int(version) if version.isdecimal() else 0
