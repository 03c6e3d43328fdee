"""Store on Node objects: a node's subnet is its podCIDR, what peers need are flannel's annotations.

One full list at the start, in small pages, each reduced before the next; then a metadata-only watch with bookmarks, and
metadata-only lists after a failure. podCIDR is not in the metadata, but fixed for the life of a uid: a new uid costs one
GET, many at once one list in pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lease.kube.client import ApiError, KubeClient, KubeSettings
from lease.kube.objects import MALFORMED, METADATA, METADATA_LIST, WHOLE, Answer, NodeSeen, Page, node_of_json
from lease.kube.watch import PROBE_S, Watch, answers_of, revision
from lease.model import Prefix, Refused
from lease.records.annotations import Hints, Names, decode_node, hints, node_subnets, seniority, uid_number
from lease.records.codec import BadRecord
from lease.records.packed import Leases, pack, unpack
from lease.regular import content
from lease.store import Change, Changes, Gone, RecordChanged, Snapshot, StoreUnavailable

NODES = "/api/v1/nodes"
FULL_PAGE, METADATA_PAGE = 50, 100
"""Small: what a page takes is never given back, and larger ones are no faster."""
TOO_EARLY = 504
"""What a server says whose memory is behind a resourceVersion."""
SINGLY = 16
"""So many unknown uids at once are asked for one by one; more by one list."""
UNAVAILABLE = "NetworkUnavailable"
ZONE = "topology.kubernetes.io/zone"


class NodeGone(RecordChanged):
    """There is no Node of our name."""


class NodeView(NamedTuple):
    """Our own Node. unavailable: the status of its NetworkUnavailable condition, "" where it has none; conditions: the types
    of all."""

    uid: str
    created: int
    subnets: dict[int, Prefix]
    fault: str
    annotations: dict[str, str]
    unavailable: str
    reason: str
    conditions: frozenset[str] = frozenset()


class _Node(NamedTuple):
    """What is kept of a Node, some 500 bytes. said: a hash of its annotations of interest, raw: of all, as NodeSeen has it;
    subnets: see `_subnets`; change: what it is to peers, a lease packed."""

    uid: str
    said: int
    raw: int
    subnets: bytes
    change: bytes | Refused | None


class NodeStore:
    """Nodes as leases, keyed by name. `read` and `watch` are the feed's, the others any thread's."""

    def __init__(self, settings: KubeSettings, names: Names, node_name: str, config_path: str) -> None:
        """Raises KubeSettingsError."""
        self._client = KubeClient(settings)
        self._names, self._interesting, self._own = names, names.read(), node_name
        self._config_path = config_path
        self._nodes: dict[str, _Node] = {}
        self._version = ""
        self._doubtful = False
        """Whether the next list must be a whole one, podCIDRs and all."""
        self._hints = Hints()
        self.zone = ""
        """Where our own Node is, by its label, as last read."""
        self._watch = Watch(self._client, NODES, self._probe)

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
            return content(self._config_path)
        except OSError:
            return None

    # --- list and watch ------------------------------------------------------------------------------------------------

    def read(self) -> Snapshot:
        with answers_of(self._client.place):
            return self._read()

    def _read(self) -> Snapshot:
        nodes: dict[str, _Node] = {}
        unknown: dict[str, NodeSeen] = {}
        first = not self._nodes or self._doubtful
        version = "0"
        for page in self._pages(full=first):
            version = page.version
            for seen in page.nodes:
                known = self._nodes.get(seen.name)
                if first:
                    nodes[seen.name] = self._keep(seen, *_subnets(seen.pod_cidrs))
                elif known is not None and known.uid == seen.uid and known.subnets:
                    same = known.said == self._said(seen) and seen.name != self._own
                    nodes[seen.name] = known._replace(raw=seen.raw) if same else self._keep(seen, known.subnets)
                elif self._asks(seen):
                    unknown[seen.name] = seen
                else:
                    nodes[seen.name] = self._keep(seen, b"")
        if not first and revision(version) < revision(self._version):
            self._doubtful = True  # etcd was restored from a backup: even what cannot change may have
            return self._read()
        nodes.update(self._resolve(unknown))
        self._nodes, self._version, self._doubtful = nodes, version, False
        return Snapshot(
            revision(version),
            self.config(),
            Leases({name: node.change for name, node in nodes.items() if isinstance(node.change, bytes)}),
            {name: node.change for name, node in nodes.items() if isinstance(node.change, Refused)},
            self._hints,
        )

    def watch(self, after: int) -> Iterator[Changes]:
        del after  # the list before says it, in the server's own words
        while True:
            try:
                for events in self._watch.events(self._version, METADATA):
                    if changes := self._take(events):
                        yield Changes(revision(self._version), tuple(changes))
            finally:
                self._doubtful = self._doubtful or self._watch.restored

    def reconnect(self) -> None:
        self._client.reconnect()
        self._watch.end()

    def close(self) -> None:
        self._client.close()
        self._watch.end()

    def _take(self, events: list[Answer]) -> list[Change]:
        """What some events change; later events of a node win over earlier ones."""
        changes: dict[str, Change] = {}
        unknown: dict[str, NodeSeen] = {}
        hints_before = self._hints
        for answer in events:
            try:
                if self._is_no_news(answer):
                    continue
                event = answer.event(self._interesting)
                if event.node is None:
                    raise StoreUnavailable(f"{event.error}; the list is read again")
                if event.kind != "BOOKMARK":
                    self._observe(event.kind, event.node, changes, unknown)
            except MALFORMED as error:
                raise StoreUnavailable(f"not a valid event ({error!r}); the list is read again") from error
            self._version = event.node.version
        with answers_of(self._client.place):
            for name, node in self._resolve(unknown).items():
                self._put(name, node, changes)
        reported: list[Change] = list(changes.values())
        if self._hints != hints_before or self._own in unknown:
            reported.append(self._hints)
        return reported

    def _is_no_news(self, answer: Answer) -> bool:
        """Whether an event says of a Node what we know: nearly all are heartbeats of kubelets."""
        seen = answer.summary()
        if seen is None:
            return False
        known = self._nodes.get(seen.name)
        if known is None or known.raw != seen.raw or not known.subnets or known.uid != seen.uid:
            return False
        self._version = seen.version
        return True

    def _observe(self, kind: str, seen: NodeSeen, changes: dict[str, Change], unknown: dict[str, NodeSeen]) -> None:
        name, known = seen.name, self._nodes.get(seen.name)
        if kind == "DELETED":
            if known is None or known.uid == seen.uid:
                unknown.pop(name, None)
                self._nodes.pop(name, None)
                changes[name] = Gone(name)
        elif known is not None and known.uid == seen.uid and known.subnets:
            if known.said != self._said(seen):
                self._put(name, self._keep(seen, known.subnets), changes)
            elif known.raw != seen.raw:
                self._nodes[name] = known._replace(raw=seen.raw)
        elif self._asks(seen):
            unknown[name] = seen
        else:
            unknown.pop(name, None)
            self._put(name, self._keep(seen, b""), changes)

    def _asks(self, seen: NodeSeen) -> bool:
        """Whether a Node's podCIDR is worth a request: one that nobody manages (yet, or ever) is no peer, and where the
        cluster gives no podCIDRs each heartbeat of each Node would cost each agent one."""
        return seen.annotations.get(self._names.managed) == "true" or seen.name == self._own

    def _put(self, name: str, node: _Node, changes: dict[str, Change]) -> None:
        was = self._nodes.get(name)
        self._nodes[name] = node
        if node.change is not None:
            changes[name] = unpack(node.change) if isinstance(node.change, bytes) else node.change
        elif was is not None and was.change is not None:
            changes[name] = Gone(name)

    def _resolve(self, unknown: Mapping[str, NodeSeen]) -> dict[str, _Node]:
        """The podCIDRs of Nodes whose uid is new to us. One that was made again meanwhile is left out: its own event
        is on its way."""
        found: dict[str, _Node] = {}
        if len(unknown) > SINGLY:
            for page in self._pages(full=True):
                for whole in page.nodes:
                    seen = unknown.get(whole.name)
                    if seen is not None and seen.uid == whole.uid:
                        found[whole.name] = self._keep(seen, *_subnets(whole.pod_cidrs))
            return found
        for name, seen in unknown.items():
            try:
                whole = self._whole(name, seen.version).node(self._interesting)
            except ApiError as error:
                if error.about == f"nodes/{name}":
                    continue
                raise
            if whole.uid == seen.uid:
                found[name] = self._keep(whole, *_subnets(whole.pod_cidrs))
        return found

    def _whole(self, name: str, version: str) -> Answer:
        """A Node as it was at a version or later: from the server's memory, in half the time that etcd takes. Another server
        than the one that sent the event may lag behind."""
        try:
            return self._client.ask(f"{NODES}/{name}", {"resourceVersion": version}, WHOLE)
        except ApiError as error:
            if error.code != TOO_EARLY:
                raise
            return self._client.ask(f"{NODES}/{name}", {}, WHOLE)

    def _pages(self, full: bool) -> Iterator[Page]:
        accept, limit = (WHOLE, FULL_PAGE) if full else (METADATA_LIST, METADATA_PAGE)
        return self._watch.pages(accept, limit, lambda answer: answer.page(self._interesting))

    def _keep(self, seen: NodeSeen, subnets: bytes, fault: str = "") -> _Node:
        made: bytes | Refused | None = None
        created, number = seniority(seen.created, seen.uid), uid_number(seen.uid)
        try:
            lease = decode_node(seen.name, seen.annotations, _prefixes(subnets), self._names, created, number)
            if lease is not None:
                made = Refused(seen.name, fault, 0) if fault else pack(lease)
        except BadRecord as error:
            made = Refused(seen.name, fault or str(error), 0)
        if seen.name == self._own:
            self._hints = hints(seen.annotations, self._names)
        return _Node(seen.uid, self._said(seen), seen.raw, subnets, made)

    def _said(self, seen: NodeSeen) -> int:
        """Python's hash of texts, which is keyed: nobody can make two equal ones."""
        return hash(tuple(seen.annotations.get(name) for name in self._interesting))

    def _probe(self) -> None:
        """Does the server answer? What it answers does not matter. Raises StoreUnavailable."""
        try:
            self._client.ask(f"{NODES}/{self._own}", {"resourceVersion": "0"}, METADATA, timeout_s=PROBE_S)
        except ApiError:
            return

    # --- our own Node --------------------------------------------------------------------------------------------------

    def known(self) -> Leases:
        """The other nodes' leases as last seen."""
        there = dict(self._nodes)  # the feed may change the other
        there.pop(self._own, None)
        return Leases({name: node.change for name, node in there.items() if isinstance(node.change, bytes)})

    def own(self) -> NodeView:
        """Our own Node, read now. Raises NodeGone, StoreUnavailable."""
        with answers_of(self._client.place):
            return self._view()

    def _view(self) -> NodeView:
        try:
            item = self._client.get(f"{NODES}/{self._own}")
        except ApiError as error:
            if error.about == f"nodes/{self._own}":
                raise NodeGone(f"there is no Node {self._own}") from error
            raise
        meta = item["metadata"]
        self.zone = str((meta.get("labels") or {}).get(ZONE) or "")
        conditions = (item.get("status") or {}).get("conditions") or []
        found: dict[str, str] = next((c for c in conditions if c.get("type") == UNAVAILABLE), {})
        seen = node_of_json(item, ())
        subnets, fault = _subnets(seen.pod_cidrs)
        return NodeView(
            seen.uid,
            seniority(seen.created, seen.uid),
            _prefixes(subnets),
            fault,
            meta.get("annotations") or {},
            found.get("status") or "",
            found.get("reason") or "",
            frozenset(str(each.get("type")) for each in conditions),
        )

    def tell(self, event: dict[str, Any]) -> None:
        """Create an Event. Raises ApiError, StoreUnavailable."""
        self._client.post(f"/api/v1/namespaces/{event['metadata']['namespace']}/events", event)

    def set_condition(self, condition: dict[str, str]) -> None:
        """Set a condition of our Node, where it does not say that already. Raises ApiError, StoreUnavailable."""
        item = self._client.get(f"{NODES}/{self._own}")
        for each in (item.get("status") or {}).get("conditions") or []:
            if all(each.get(name) == condition[name] for name in ("type", "status", "message")):
                return
        self._client.patch(f"{NODES}/{self._own}/status", {"status": {"conditions": [condition]}})

    def write(self, uid: str, annotations: Mapping[str, str | None], *conditions: dict[str, str]) -> None:
        """Annotations (None: away with it) and conditions, in one patch of nodes/status, if the Node is still that uid.

        Raises RecordChanged when it is not, StoreUnavailable.
        """
        body: dict[str, Any] = {"metadata": {"uid": uid, "annotations": dict(annotations)}}
        if conditions:
            body["status"] = {"conditions": list(conditions)}
        try:
            self._client.patch(f"{NODES}/{self._own}/status", body)
        except ApiError as error:
            if error.code in (404, 409, 422):
                raise RecordChanged(str(error)) from error
            raise


def _subnets(pod_cidrs: Any) -> tuple[bytes, str]:
    """podCIDRs by family: of each the family, the length and the base, in 18 bytes; and why they cannot be read ("" when
    they can)."""
    try:
        found = node_subnets(pod_cidrs)
    except BadRecord as error:
        return b"", str(error)
    return b"".join(bytes(there[::2]) + there.base.to_bytes(16, "big") for there in found.values()), ""


def _prefixes(subnets: bytes) -> dict[int, Prefix]:
    """The podCIDRs that `_subnets` packed."""
    return {
        subnets[at]: Prefix(subnets[at], int.from_bytes(subnets[at + 2 : at + 18], "big"), subnets[at + 1])
        for at in range(0, len(subnets), 18)
    }
