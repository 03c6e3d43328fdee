"""Groups of pods, and contracts between them: within a group all may talk, between groups what a contract says. Pure.

A label names a pod's group; a pod without it is in one that --groups says: one for all, one for each namespace, or one for
each Deployment. Each group becomes a policy of the Baseline tier, behind all others: it accepts from its own group and what
contracts say, and denies the rest of the pod network but for nodes: a pod that is not known yet is none of its own. Other
addresses are not its business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.model import Prefix
from overlay.policy.cluster_wide import LAST_PRIORITY
from overlay.policy.model import (
    BASELINE,
    DENY,
    IN,
    Block,
    Expression,
    NodePeer,
    Pod,
    PodPeer,
    Policy,
    Port,
    Rule,
)
from overlay.policy.resources import mapping, ports_of, shown

OFF, ONE, BY_NAMESPACE, BY_DEPLOYMENT = "off", "one", "namespace", "deployment"
MODES = (OFF, ONE, BY_NAMESPACE, BY_DEPLOYMENT)
LABEL = "overlay.network/group"
KIND = "Group"
EVERYBODY = "*"
_MADE = ":"
"""In the names of groups that no label says; no label's value has one."""
_ALL = PodPeer((), None)


class Contract(NamedTuple):
    """provider, consumer: groups; EVERYBODY: any pod. ports: the provider's; None: any."""

    name: str
    provider: str
    consumer: str
    ports: tuple[Port, ...] | None


def contract_of(item: Mapping[str, Any]) -> Contract:
    """A Contract (manifests/contracts.yaml). Raises ValueError."""
    spec = mapping(item.get("spec"), "spec")
    provider, consumer = (_group(spec.get(name), f"spec.{name}") for name in ("provider", "consumer"))
    return Contract(str(item["metadata"]["name"]), provider, consumer, ports_of(spec.get("ports"), "spec.ports"))


def _group(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(
            f'{where}: {shown(value)} must be a group: a label\'s value, "namespace:x", "deployment:x/y", or "*"'
        )
    return value


def grouped(pod: Pod, mode: str) -> Pod:
    """With the label of its group, where a mode gives it one."""
    own = pod.labels.get(LABEL, "")
    if own and _MADE not in own:
        return pod
    labels = {key: value for key, value in pod.labels.items() if key != LABEL}
    if made := _made(pod, mode):
        labels[LABEL] = made
    return pod if labels == pod.labels else pod._replace(labels=labels)


def _made(pod: Pod, mode: str) -> str:
    if mode == ONE:
        return f"all{_MADE}"
    if mode == BY_NAMESPACE:
        return f"namespace{_MADE}{pod.namespace}"
    kind, _, name = (pod.owner or f"pod/{pod.name}").partition("/")
    return f"{kind}{_MADE}{pod.namespace}/{name}" if mode == BY_DEPLOYMENT else ""


def group_policies(
    groups: Iterable[str], contracts: Iterable[Contract], networks: Iterable[Prefix]
) -> Iterator[Policy]:
    """One for each group. networks: of all pods."""
    provided: dict[str, list[Contract]] = {}
    consumed: dict[str, list[Contract]] = {}
    for contract in sorted(contracts):
        provided.setdefault(contract.provider, []).append(contract)
        consumed.setdefault(contract.consumer, []).append(contract)
    nodes = Rule((NodePeer(),), None, name="nodes")
    deny = Rule(tuple(Block(network) for network in networks), None, DENY, "no contract")
    for name in sorted(groups):
        within = Rule((_members(name),), None, name="its own group")
        ways = [
            tuple(
                Rule((_members(other(each)),), each.ports, name=f"contract {each.name}")
                for each in (*those.get(name, ()), *those.get(EVERYBODY, ()))
            )
            for those, other in ((provided, _consumer), (consumed, _provider))
        ]
        ingress, egress = ((within, *some, nodes, deny) for some in ways)
        yield Policy("", name, _members(name), ingress, egress, BASELINE, LAST_PRIORITY + 1, kind=KIND)


def _consumer(contract: Contract) -> str:
    return contract.consumer


def _provider(contract: Contract) -> str:
    return contract.provider


def _members(group: str) -> PodPeer:
    return _ALL if group == EVERYBODY else PodPeer((), (Expression(LABEL, IN, (group,)),))
