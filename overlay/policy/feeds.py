"""What policies are made of, from the files of a folder; kube.py brings the same events from the Kubernetes API."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lease.kube.changes import Listed, Resource, Unusable
from lease.kube.objects import MALFORMED
from lease.regular import content
from overlay.policy.cluster_wide import cluster_policy_of
from overlay.policy.groups import contract_of
from overlay.policy.resources import namespace_of, pod_of, policy_of

PODS, NAMESPACES, POLICIES, CLUSTER_WIDE = "pods", "namespaces", "networkpolicies", "clusternetworkpolicies"
CONTRACTS = "contracts"
RESOURCES = {
    PODS: Resource(PODS, "/api/v1/pods", pod_of),
    NAMESPACES: Resource(NAMESPACES, "/api/v1/namespaces", namespace_of),
    POLICIES: Resource(POLICIES, "/apis/networking.k8s.io/v1/networkpolicies", policy_of),
    CLUSTER_WIDE: Resource(CLUSTER_WIDE, "", cluster_policy_of),  # where depends on the API server: kube.py
    CONTRACTS: Resource(CONTRACTS, "", contract_of),
}
KINDS = {
    "Pod": PODS,
    "Namespace": NAMESPACES,
    "NetworkPolicy": POLICIES,
    "ClusterNetworkPolicy": CLUSTER_WIDE,
    "Contract": CONTRACTS,
}
_CLUSTERS = ("Namespace", "ClusterNetworkPolicy", "Contract")
"""Kinds that are of no namespace."""
FILES_EVERY_S, WRITTEN_S = 1.0, 0.1
"""How often files are looked at; those that changed are believed when they are the same a moment later."""
ENDINGS = (".yaml", ".yml", ".json")
LARGEST = 16 << 20
"""Bytes of a file that are read."""


class Down(NamedTuple):
    """A resource cannot be read just now: what it said before stays. refused: the API server answered that we may not."""

    resource: str
    reason: str
    refused: bool = False


class Absent(NamedTuple):
    """The API server knows no such resource: there are no objects of it."""

    resource: str


class FolderFeed(threading.Thread):
    """The objects in the YAML or JSON files of a folder: all of them whenever a file changed."""

    def __init__(self, folder: str, post: Callable[[Any], None]) -> None:
        super().__init__(name="policy-files", daemon=True)
        self._folder, self._post = folder, post
        self._seen: dict[str, bytes | str] | None = None
        self._once: dict[str, bytes | str] | None = None
        """What was seen once, and differs."""
        self._good: dict[str, list[Any]] = {}
        """Of each file the objects that could be read last."""
        self._ending, self._wake = threading.Event(), threading.Event()
        self._revision = 0

    def start(self, name: str = "") -> None:
        """Begin: with the first resource that is asked for, since files have all of them."""
        del name
        if not self.is_alive():
            super().start()

    def stop(self, name: str) -> None:
        """Files go on to be read."""

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self._wake.set()

    def read_now(self) -> None:
        """Do not wait for the time. May be called from a signal handler."""
        self._wake.set()

    def run(self) -> None:
        while not self._ending.is_set():
            self.look()
            self._wake.wait(FILES_EVERY_S if self._once is None else WRITTEN_S)
            self._wake.clear()

    def look(self) -> None:
        """Read all files; post what is in them if any changed."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(ENDINGS))
            texts = {name: text_of(os.path.join(self._folder, name)) for name in names}
        except OSError as error:
            self._post(Down(POLICIES, f"--policy-dir: {self._folder}: {error.strerror or error}"))
            return
        if texts == self._seen:
            self._once = None
            return
        if texts != self._once:  # somebody may be writing one just now
            self._once = texts
            return
        self._seen, self._once = texts, None
        self._revision += 1
        self._good = {name: documents for name, documents in self._good.items() if name in texts}
        items = read_all(texts, self._good)
        for name in (NAMESPACES, PODS, CLUSTER_WIDE, CONTRACTS, POLICIES):  # the last one completes the others
            self._post(Listed(name, self._revision, items[name]))


def text_of(path: str) -> bytes | str:
    """What is in a file, or why it cannot be read."""
    try:
        text = content(path, LARGEST + 1)
    except OSError as error:
        return str(error.strerror or error)
    return text if len(text) <= LARGEST else f"larger than {LARGEST >> 20} MiB"


def read_all(texts: Mapping[str, bytes | str], good: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """The objects of files, by resource and key. texts: what is in each, or why that cannot be read; good: what each said
    when it could be read last, and now.

    In place of an object that cannot be used an Unusable. A file that is no YAML is one of those, as a policy by the file's
    name. Namespaces that nobody describes have the label of their name alone."""
    items: dict[str, dict[str, Any]] = {name: {} for name in RESOURCES}
    for file, text in texts.items():
        try:
            if isinstance(text, str):
                raise ValueError(text)
            good[file] = _documents(text)
        except MALFORMED as error:
            items[POLICIES][file] = Unusable(f"{file}: {error}")
        for document in good.get(file, ()):
            kind = document.get("kind") if isinstance(document, Mapping) else None
            if not isinstance(kind, str) or kind not in KINDS:
                name = f"{file} ({kind})" if kind else file
                items[POLICIES][name] = Unusable(f"{file}: kind {kind!r} must be one of {', '.join(KINDS)}")
                continue
            resource = RESOURCES[KINDS[kind]]
            meta = document.get("metadata")
            meta = meta if isinstance(meta, Mapping) else {}
            space = "" if kind in _CLUSTERS else f"{meta.get('namespace') or 'default'}/"
            key = f"{space}{meta.get('name')}"
            try:
                if not isinstance(meta.get("name"), str):
                    raise ValueError("metadata.name: must be there")
                if key in items[resource.name]:
                    raise ValueError("another object has its name")
                items[resource.name][key] = resource.decode(document)
            except MALFORMED as error:
                items[resource.name][key] = Unusable(f"{file}: {error}")
    for pod in [*items[PODS].values(), *items[POLICIES].values()]:
        if not isinstance(pod, Unusable) and pod.namespace not in items[NAMESPACES]:
            items[NAMESPACES][pod.namespace] = namespace_of({"metadata": {"name": pod.namespace}})
    return items


def _documents(text: bytes) -> list[Any]:
    """Raises ValueError: no YAML."""
    import yaml  # only here: an agent without such a folder needs none

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        documents = [each for each in yaml.load_all(text, Loader=loader) if each is not None]
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())[:200]}") from error
    return [one for each in documents for one in _items(each)]


def _items(document: Any) -> list[Any]:
    """A List's own, as `kubectl get -o yaml` writes it."""
    listed = isinstance(document, Mapping) and str(document.get("kind", "")).endswith("List")
    return list(document.get("items") or ()) if listed else [document]
