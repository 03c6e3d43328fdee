"""One object for equal labels, ports, names, selectors and rules: pods of one Deployment have the same, and policies of one
template, so that each takes little."""

from __future__ import annotations

from typing import Any, TypeVar

from overlay.policy.model import Labels, Pod, Policy, Rule

T = TypeVar("T")
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

    def policy(self, policy: Policy) -> Policy:
        """The same policy, of values that others have as well."""
        if len(self._kept) > MOST:
            self._kept = {}
        once = self._once
        return policy._replace(
            namespace=once(policy.namespace),
            subject=once(policy.subject),
            ingress=self._rules(policy.ingress),
            egress=self._rules(policy.egress),
        )

    def _rules(self, rules: tuple[Rule, ...] | None) -> tuple[Rule, ...] | None:
        if rules is None:
            return None
        once = self._once
        return once(
            tuple(
                once(
                    rule._replace(
                        peers=None if rule.peers is None else once(tuple(map(once, rule.peers))),
                        ports=None if rule.ports is None else once(tuple(map(once, rule.ports))),
                    )
                )
                for rule in rules
            )
        )

    def _once(self, value: T) -> T:
        return self._kept.setdefault(value, value)  # type: ignore[no-any-return]
