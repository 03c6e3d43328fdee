"""What policies are made of, from the Kubernetes API: a connection and a thread for each resource.

ClusterNetworkPolicies are of a CustomResourceDefinition, which may be there or not, or come later, in one of two versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lease.kube.changes import Listed
from lease.kube.client import KubeClient, KubeSettings
from lease.kube.watch import JSON, Objects, answers_of
from lease.store import Feed, StoreDown, StoreUnavailable
from overlay.policy.feeds import CLUSTER_WIDE, RESOURCES, Absent, Down

GROUP, VERSIONS = "policy.networking.k8s.io", ("v1beta1", "v1alpha2")
"""Of ClusterNetworkPolicies; the first one that is served."""


class ClusterPolicies(Objects):
    """ClusterNetworkPolicies, where the API server has them."""

    def __init__(self, client: KubeClient, post: Callable[[Any], None]) -> None:
        super().__init__(client, RESOURCES[CLUSTER_WIDE])
        self._post = post

    def read(self) -> Listed:
        """All of them. Raises StoreUnavailable, also where there is no such resource."""
        with answers_of(self._client.place):
            version = served(json.loads(self._client.ask("/apis", {}, JSON).data))
        if not version:  # the server's own word: a 404 could be a proxy's
            self._post(Absent(CLUSTER_WIDE))
            raise StoreUnavailable(
                f"{self._client.place}: no {GROUP} {' or '.join(VERSIONS)}: its CustomResourceDefinition is to be applied"
            )
        self.move(f"/apis/{GROUP}/{version}/{CLUSTER_WIDE}")
        return super().read()


def served(groups: Mapping[str, Any]) -> str:
    """The version to ask for, of an APIGroupList; "": none."""
    found = [each for each in groups["groups"] if each["name"] == GROUP]
    there = {each["version"] for group in found for each in group["versions"]}
    return next((version for version in VERSIONS if version in there), "")


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
                self._post(Down(name, event.reason) if isinstance(event, StoreDown) else event)

        client = KubeClient(self._settings)
        objects = ClusterPolicies(client, post) if name == CLUSTER_WIDE else Objects(client, RESOURCES[name])
        feed = Feed(objects, post)
        self._running[name] = feed, objects
        feed.start()

    def stop(self, name: str) -> None:
        """End it; what it said is known no more."""
        if name in self._running:
            feed, objects = self._running.pop(name)
            feed.stop()
            objects.reconnect()

    def read_now(self) -> None:
        """A watch says at once what changed."""

    def close(self) -> None:
        """End all."""
        for name in [*self._running]:
            self.stop(name)
