"""Which resources policies are read from just now, which of them cannot be read, and whether a new pod would meet all
that they say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from overlay.policy.cluster import Cluster
from overlay.policy.feeds import NAMESPACES, PODS, POLICIES, Absent, Down

ALWAYS = (POLICIES, NAMESPACES)
"""What is read whatever the flags say."""
REFUSED_S = 10.0
"""A refusal is believed when it has lasted so long: an API server that starts refuses all until it has read its roles."""


class Feeds(Protocol):
    """Who brings policies and what they mean (feeds.py)."""

    def start(self, name: str) -> None:
        """Begin with a resource, where that has not begun."""

    def stop(self, name: str) -> None:
        """End it."""


class NoFeeds:
    """For who only withdraws."""

    def start(self, name: str) -> None:
        """Nothing comes."""

    def stop(self, name: str) -> None:
        """Nothing came."""


class Sources:
    """Of one agent, in the loop's thread."""

    def __init__(self, feeds: Feeds, cluster: Cluster, alone: bool, clock: Callable[[], float]) -> None:
        """alone: there is no API server; files bring all resources at once."""
        self._feeds, self._cluster, self._alone, self._clock = feeds, cluster, alone, clock
        self._custom: tuple[str, ...] = ()
        """Those wanted that not every API server has."""
        self._down: dict[str, Down] = {}
        """What cannot be read just now."""
        self._refused: dict[str, float] = {}
        """What is refused, and since when."""
        self.absent: set[str] = set()
        """What the API server does not know."""

    @property
    def unread(self) -> dict[str, str]:
        """By resource that cannot be read just now: why."""
        return {name: down.reason for name, down in self._down.items()}

    def came(self, resource: str) -> None:
        """A list or a change."""
        self._up(resource)
        self.absent.discard(resource)

    def down(self, event: Down) -> None:
        """It cannot be read."""
        self._down[event.resource] = event
        if event.refused:
            self._refused.setdefault(event.resource, self._clock())
        else:
            self._refused.pop(event.resource, None)

    def none(self, event: Absent) -> None:
        """There is no such resource."""
        self.absent.add(event.resource)

    def begin(self, custom: Mapping[str, bool]) -> None:
        """Read what is to be enforced, and nothing else. custom: by such a resource, whether it is wanted."""
        for name in ALWAYS:
            self._feeds.start(name)
        for name, wanted in custom.items():
            if wanted:
                self._feeds.start(name)
            elif not self._alone:
                self._end(name)
                self._cluster.forget(name)
        self._custom = tuple(name for name, wanted in custom.items() if wanted)

    def pods(self, needed: bool) -> None:
        """Whether pods are to be read: only while some policy exists."""
        if needed:
            self._feeds.start(PODS)
        elif not self._alone:
            self._end(PODS)
            self._cluster.forget_pods()

    def _end(self, name: str) -> None:
        self._feeds.stop(name)
        self._up(name)

    def _up(self, name: str) -> None:
        self._down.pop(name, None)
        self._refused.pop(name, None)

    def lacks(self, names: Collection[str]) -> set[str]:
        """Those that were not read yet."""
        return set(names) - self._cluster.listed

    @property
    def lacks_custom(self) -> set[str]:
        """Those wanted that not every API server has, and that were not read yet."""
        return self.lacks(self._custom)

    def all_unread(self, names: Collection[str]) -> bool:
        """Whether each of them cannot be read just now."""
        return set(names) <= self._down.keys()

    def settled(self, pods: bool) -> bool:
        """Whether a new pod need not wait: all was read, or is refused to this agent, which an operator is told of.
        pods: they are needed."""
        missing = self.lacks((*ALWAYS, *self._custom, *((PODS,) if pods else ())))
        believed = self._clock() - REFUSED_S
        return all(name in self._refused and self._refused[name] <= believed for name in missing)
