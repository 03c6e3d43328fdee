"""What is known of pods, namespaces and policies, from lists and changes as they come, and of this node's pods from what CNI
gave them: put together for the compiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lease.families import FAMILIES
from lease.kube.changes import Changed, Listed, Unusable
from lease.model import Prefix
from overlay.cni.results import CniResult
from overlay.policy.compile import PodChange
from overlay.policy.feeds import CLUSTER_WIDE, CONTRACTS, NAMESPACES, PODS, POLICIES
from overlay.policy.groups import LABEL, OFF, group_policies, grouped
from overlay.policy.index import Index
from overlay.policy.model import CLUSTER_KIND, Labels, Pod, Policy, in_order

MOST_ALONE = 32
"""More changes are taken in by compiling all anew, which costs no more."""
MOST_KEPT = 20_000


class Cluster:
    """It, in the loop's thread."""

    def __init__(self, node: str, alone: bool) -> None:
        """node: this one's name in pods; alone: there is no API server: a pod that CNI attached is known by that."""
        self._node, self._alone = node, alone
        self.index = Index()
        self._policies: dict[str, dict[str, Any]] = {POLICIES: {}, CLUSTER_WIDE: {}, CONTRACTS: {}}
        self._refused: dict[str, dict[str, str]] = {name: {} for name in self._policies}
        self.wide, self.groups = False, OFF
        """Whether ClusterNetworkPolicies are enforced; how pods are grouped (groups.py)."""
        self.networks: tuple[Prefix, ...] = ()
        """Of all pods."""
        self._grouped: dict[tuple[int, str], tuple[Labels, Labels]] = {}
        """Labels with those of a group, by which and which: pods that share their own share these."""
        self.unusable: dict[str, str] = {}
        """Pods that cannot be used, and why: those of this node are held."""
        self.listed: set[str] = set()
        """Resources whose list is in."""
        self._pods: dict[str, Pod] = {}
        """As the API has them, of this node; of others the index has the same."""
        self._given: dict[str, tuple[bytes, ...]] = {}
        """What CNI gave this node's pods, by key."""
        self.whole = True
        """What is compiled is to be compiled anew."""
        self.changes: list[PodChange] = []
        """Otherwise: what changed since."""

    @property
    def policies(self) -> list[Policy]:
        """Those to be enforced, as far as pods are known: each group of pods has one."""
        if self.groups == OFF:
            return self.written
        contracts = self._policies[CONTRACTS].values()
        return [*self.written, *group_policies(self.index.values_of(LABEL), contracts, self.networks)]

    @property
    def written(self) -> list[Policy]:
        """Those of them that somebody wrote."""
        wide = self._policies[CLUSTER_WIDE].values() if self.wide else ()
        return [*self._policies[POLICIES].values(), *wide]

    @property
    def any(self) -> bool:
        """Whether there is something to enforce."""
        return self.groups != OFF or bool(self.written)

    @property
    def left_out(self) -> int:
        """How many ClusterNetworkPolicies there are that are not enforced."""
        return 0 if self.wide else len(self._policies[CLUSTER_WIDE])

    @property
    def refused(self) -> dict[str, str]:
        """Policies that cannot be used, or not as they say, and why."""
        notes = {policy.key: "; ".join(policy.notes) for policy in self.written if policy.notes}
        counts = ((CLUSTER_WIDE, CLUSTER_KIND, self.wide), (CONTRACTS, "Contract", self.groups != OFF))
        others = {
            f"{kind}/{name}": why
            for resource, kind, count in counts
            if count
            for name, why in self._refused[resource].items()
        }
        return {**self._refused[POLICIES], **others, **notes}

    def enforce(self, wide: bool, groups: str, networks: tuple[Prefix, ...] = ()) -> None:
        """Whether ClusterNetworkPolicies count; how pods are grouped; the networks of all pods."""
        self.whole |= (wide, groups, networks) != (self.wide, self.groups, self.networks)
        self.wide, self.networks = wide, networks
        if groups != self.groups:
            self.groups = groups
            self._pods = {key: self._in_group(pod) for key, pod in self._pods.items()}
            for pod in [*self.index]:
                self.index.put(self._in_group(pod))

    def _in_group(self, pod: Pod) -> Pod:
        made = grouped(pod, self.groups)
        if made is pod:
            return pod
        if len(self._grouped) > MOST_KEPT:
            self._grouped.clear()
        key = id(pod.labels), made.labels.get(LABEL, "")
        own, shared = self._grouped.setdefault(key, (pod.labels, made.labels))
        return made._replace(labels=shared) if own is pod.labels else made

    def take(self, event: Listed | Changed) -> bool:
        """A list or a change; whether anything is another now."""
        if event.resource == PODS:
            return self._take_pods(event)
        changed = self._take_policies(event) if event.resource in self._policies else self._take_namespaces(event)
        self.whole |= changed
        return changed

    def forget(self, resource: str) -> None:
        """Nobody watches these policies any more."""
        self.listed.discard(resource)
        self._policies[resource], self._refused[resource] = {}, {}

    def forget_pods(self) -> None:
        """Nobody watches them any more."""
        self.listed.discard(PODS)
        self.index, self._pods = Index(namespaces=self.index.namespaces), {}
        self.whole, self.changes = True, []

    def results(self, results: Iterable[CniResult]) -> bool:
        """What CNI gave to this node's pods now; whether that is another."""
        given: dict[str, tuple[bytes, ...]] = {}
        for each in results:
            packed = tuple(
                sorted(FAMILIES[family].packed(one) for family, those in each.addresses.items() for one in those)
            )
            if each.pod or (self._alone and packed):
                key = each.pod or f"/{packed[0].hex()}"
                given[key] = in_order({*given.get(key, ()), *packed})
        if given == self._given:
            return False
        changed = {key for key in given.keys() | self._given.keys() if given.get(key) != self._given.get(key)}
        self._given = given
        for key in {*changed, *self._pods}:  # who had an address that is another's now has it no more
            self._place(key)
        self.whole = True
        return True

    # --- one resource each

    def _take_policies(self, event: Listed | Changed) -> bool:
        policies, refused = self._policies[event.resource], self._refused[event.resource]
        before = old, _ = dict(policies), dict(refused)
        new = event.resource not in self.listed
        if isinstance(event, Listed):
            policies.clear()
            refused.clear()
            self.listed.add(event.resource)
        for key, policy in event.items.items():
            policies.pop(key, None)
            refused.pop(key, None)
            if isinstance(policy, Unusable):
                refused[key] = policy.reason
                if key in old:  # what was enforced of it stays, rather than nothing
                    policies[key] = old[key]
            elif policy is not None:
                policies[key] = policy
        return before != (policies, refused) or (new and isinstance(event, Listed))

    def _take_namespaces(self, event: Listed | Changed) -> bool:
        before, new = dict(self.index.namespaces), NAMESPACES not in self.listed
        if isinstance(event, Listed):
            self.index.namespaces.clear()
            self.listed.add(NAMESPACES)
        for name, labels in event.items.items():
            if labels is None or isinstance(labels, Unusable):
                self.index.namespaces.pop(name, None)
            else:
                self.index.namespaces[name] = labels
        return before != self.index.namespaces or (new and isinstance(event, Listed))

    def _take_pods(self, event: Listed | Changed) -> bool:
        if isinstance(event, Listed):
            self.listed.add(PODS)
            self._pods.clear()
            self.unusable = {key: pod.reason for key, pod in event.items.items() if isinstance(pod, Unusable)}
            pods = {key: self._in_group(pod) for key, pod in event.items.items() if isinstance(pod, Pod)}
            self._pods = {key: pod for key, pod in pods.items() if self._is_local(pod)}
            self.index = Index((pod for key, pod in pods.items() if key not in self._pods), self.index.namespaces)
            for key in [*self._pods, *(self._given if self._alone else ())]:
                self._place(key)
            self.whole = True
            return True
        for key, pod in event.items.items():
            self.unusable.pop(key, None)
            if isinstance(pod, Unusable):
                self.unusable[key] = pod.reason
            pod = self._in_group(pod) if isinstance(pod, Pod) else None  # noqa: PLW2901
            if pod is not None and self._is_local(pod):
                self.whole |= self._pods.get(key) != pod
                self._pods[key] = pod
                self._place(key)
                continue
            self.whole |= self._pods.pop(key, None) is not None
            was = self.index.remove(key) if pod is None else self.index.put(pod)
            if was != pod:
                self._note(PodChange(was, pod))
        return self.whole or bool(self.changes)

    def _note(self, change: PodChange) -> None:
        """What can be taken in alone, unless an address is in doubt."""
        self.changes.append(change)
        self.whole |= len(self.changes) > MOST_ALONE
        mine: dict[bytes, int] = {}
        for pod in change:
            if pod is not None:
                mine.update(dict.fromkeys(pod.addresses, 0))
        if change.now is not None and not change.now.alone:
            mine.update(dict.fromkeys(change.now.addresses, 1))
        self.whole |= any(self.index.holders(address) > own for address, own in mine.items())

    def taken(self) -> None:
        """All is compiled."""
        self.whole, self.changes = False, []

    def _is_local(self, pod: Pod) -> bool:
        return pod.node == self._node or (self._alone and pod.key in self._given)

    def _place(self, key: str) -> None:
        """A pod of this node as it is by both. What CNI says of its addresses counts for more than what the API does: that
        may be of before, or not know of them yet."""
        pod, given = self._pods.get(key), self._given.get(key, ())
        if pod is None and self._alone and given and key not in self.unusable:
            pod = self._in_group(Pod(key, key.partition("/")[0], self._node, {}, ()))
        if pod is None:
            there = self.index.get(key)
            if there is not None and there.node == self._node:
                self.index.remove(key)
            return
        others = {address for other, those in self._given.items() if other != key for address in those}
        own = given or tuple(address for address in pod.addresses if address not in others)
        self.index.put(pod._replace(addresses=own, node=self._node))
