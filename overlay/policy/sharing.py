"""One object for equal labels, ports and names: pods of one Deployment have the same, so that each takes little."""

from __future__ import annotations

from typing import Any

from overlay.policy.model import Labels, Pod

MOST = 20_000
"""Values that are known; then it begins anew: of pods that are gone nothing stays for good."""


class Sharing:
    """What was seen so far. Of one thread, that reads pods."""

    def __init__(self) -> None:
        self._labels: dict[int, Labels] = {}
        """By their hash."""
        self._kept: dict[Any, Any] = {}

    def shared(self, pod: Pod) -> Pod:
        """The same pod, of values that others have as well."""
        if len(self._labels) + len(self._kept) > MOST:
            self._labels, self._kept = {}, {}
        kept, number = self._kept, hash(frozenset(pod.labels.items()))
        labels = self._labels.get(number)
        if labels is None:
            labels = {kept.setdefault(key, key): kept.setdefault(value, value) for key, value in pod.labels.items()}
            self._labels[number] = labels
        return pod._replace(
            namespace=kept.setdefault(pod.namespace, pod.namespace),
            node=kept.setdefault(pod.node, pod.node),
            labels=labels if labels == pod.labels else pod.labels,  # two may have one number
            ports=kept.setdefault(pod.ports, pod.ports),
            owner=kept.setdefault(pod.owner, pod.owner),
        )
