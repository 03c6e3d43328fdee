"""What policies are made of, from the Kubernetes API: a connection and a thread for each resource."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lease.kube.client import KubeClient, KubeSettings
from lease.kube.watch import Objects
from lease.store import Feed, StoreDown
from overlay.policy.feeds import RESOURCES, Down


class KubeFeeds:
    """Those of the API, each with a connection and a thread of its own, from when it is asked for."""

    def __init__(self, settings: KubeSettings, post: Callable[[Any], None]) -> None:
        self._settings, self._post = settings, post
        self._running: dict[str, tuple[Feed, Objects]] = {}

    def start(self, name: str) -> None:
        """Begin, where it has not begun."""
        if name in self._running:
            return
        objects = Objects(KubeClient(self._settings), RESOURCES[name])

        def post(event: Any) -> None:
            running = self._running.get(name)
            if running is not None and running[1] is objects:  # not of one that was stopped while it read
                self._post(Down(name, event.reason) if isinstance(event, StoreDown) else event)

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
