"""What policies are made of, from the Kubernetes API: a connection and a thread for each resource.

ClusterNetworkPolicies and Contracts are of a CustomResourceDefinition, which may be there or not, or come later, in one of
some versions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lease.kube.changes import Listed, Resource
from lease.kube.client import KubeClient, KubeSettings
from lease.kube.watch import JSON, Objects, answers_of
from lease.store import Feed, StoreDown, StoreUnavailable
from overlay.policy.feeds import CLUSTER_WIDE, CONTRACTS, PODS, POLICIES, RESOURCES, Absent, Down
from overlay.policy.sharing import Sharing

_CUSTOM = {
    CLUSTER_WIDE: ("policy.networking.k8s.io", ("v1beta1", "v1alpha2")),
    CONTRACTS: ("overlay.network", ("v1alpha1",)),
}
"""By resource: its API group, and versions, of which the first that is served is asked for."""


LACKING_S = 10.0
"""It is believed that there is no such resource when the server has said so for so long."""


class CustomObjects(Objects):
    """Those of a CustomResourceDefinition, where the API server has it."""

    def __init__(self, client: KubeClient, name: str, post: Callable[[Any], None]) -> None:
        super().__init__(client, RESOURCES[name])
        self._name, self._post = name, post
        self._group, self._versions = _CUSTOM[name]
        self._lacking_since: float | None = None

    def read(self) -> Listed:
        """All of them. Raises StoreUnavailable, also where there is no such resource."""
        with answers_of(self._client.place):
            self._client.ask("/readyz", {}, JSON)  # one that starts names some of its groups only
            groups = json.loads(self._client.ask("/apis", {}, JSON).data)
            version = served(groups, self._group, self._versions)
        now = time.monotonic()
        self._lacking_since = None if version else self._lacking_since or now
        if self._lacking_since is not None:  # by the server's own word: a 404 could be a proxy's
            if now - self._lacking_since >= LACKING_S:
                self._post(Absent(self._name))
            what = f"{self._group} {' or '.join(self._versions)}"
            raise StoreUnavailable(
                f"{self._client.place}: no {what}: its CustomResourceDefinition is to be applied (docs/policy.md)"
            )
        self.move(f"/apis/{self._group}/{version}/{self._name}")
        return super().read()


def _sharing(resource: Resource) -> Resource:
    """Pods, or policies, that share what they have in common, as soon as they are read."""
    sharing, decode = Sharing(), resource.decode
    by_name: dict[str, Callable[[Any], Any]] = {PODS: sharing.shared, POLICIES: sharing.policy}
    shared = by_name.get(resource.name)
    return resource if shared is None else resource._replace(decode=lambda item: shared(decode(item)))


def served(groups: Mapping[str, Any], name: str, versions: Sequence[str]) -> str:
    """Which version of a group to ask for, by an APIGroupList; "": none."""
    found = [each for each in groups["groups"] if each["name"] == name]
    there = {each["version"] for group in found for each in group["versions"]}
    return next((version for version in versions if version in there), "")


class KubeFeeds:
    """Those of the API, each with a connection and a thread of its own, from when it is asked for."""

    def __init__(self, settings: KubeSettings, post: Callable[[Any], None]) -> None:
        self._settings, self._post = settings, post
        self._running: dict[str, tuple[Feed, Objects]] = {}

    def start(self, name: str) -> None:
        """Begin, where it has not begun."""
        if name in self._running:
            return
        objects: Objects

        def post(event: Any) -> None:
            running = self._running.get(name)
            if running is not None and running[1] is objects:  # not of one that was stopped while it read
                self._post(Down(name, event.reason, event.refused) if isinstance(event, StoreDown) else event)

        client = KubeClient(self._settings)
        objects = CustomObjects(client, name, post) if name in _CUSTOM else Objects(client, _sharing(RESOURCES[name]))
        feed = Feed(objects, post)
        self._running[name] = feed, objects
        feed.start()

    def stop(self, name: str) -> None:
        """End it; what it said is known no more."""
        if name in self._running:
            feed, objects = self._running.pop(name)
            feed.stop()
            objects.close()

    def read_now(self) -> None:
        """A watch says at once what changed."""

    def close(self) -> None:
        """End all."""
        for name in [*self._running]:
            self.stop(name)
