"""All that an agent knows of pods, namespaces and policies, as JSON and back: the operator's command compiles the same of it
that the agent does. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lease.model import Prefix, prefix
from overlay.policy.index import Index
from overlay.policy.model import (
    EGRESS,
    INGRESS,
    Block,
    ContainerPort,
    Expression,
    Labels,
    NodePeer,
    Peer,
    Pod,
    PodPeer,
    Policy,
    Port,
    Rule,
)


class Snapshot(NamedTuple):
    """network: its number; node: whose agent it is; known: whether all that is to be enforced was read; enforced: whether
    its kernel has a table of them; refused: policies that cannot be used, and why."""

    network: int
    node: str
    known: bool
    enforced: bool
    pods: tuple[Pod, ...]
    namespaces: Mapping[str, Labels]
    policies: tuple[Policy, ...]
    refused: Mapping[str, str]
    nodes: Mapping[int, tuple[tuple[int, int], ...]] = {}
    """As of compile.NodeAddresses; empty where no policy has an ipBlock."""

    @property
    def names(self) -> dict[bytes, str]:
        """Whose an address is: by it, the key of its pod."""
        return {address: pod.key for pod in self.pods if not pod.alone for address in pod.addresses}

    def indexed(self) -> Index:
        """Of its pods."""
        return Index(self.pods, self.namespaces)


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """Plain values."""
    return {
        **snapshot._asdict(),
        "pods": [{**pod._asdict(), "addresses": [each.hex() for each in pod.addresses]} for pod in snapshot.pods],
        "policies": [_policy_json(policy) for policy in snapshot.policies],
    }


def from_json(said: Mapping[str, Any]) -> Snapshot:
    """What `as_json` gave. Raises LookupError, TypeError or ValueError: it is of another version."""
    pods = [
        Pod(**{
            **pod,
            "addresses": tuple(bytes.fromhex(each) for each in pod["addresses"]),
            "ports": tuple(ContainerPort(*each) for each in pod["ports"]),
        })
        for pod in said["pods"]
    ]  # fmt: skip
    return Snapshot(
        said["network"],
        said["node"],
        said["known"],
        said["enforced"],
        tuple(pods),
        said["namespaces"],
        tuple(map(_policy, said["policies"])),
        said["refused"],
        {int(family): tuple((outer, inside) for outer, inside in those) for family, those in said["nodes"].items()},
    )


def _policy_json(policy: Policy) -> dict[str, Any]:
    rules = {
        name: None if (found := policy.rules(name)) is None else [_rule_json(each) for each in found] for name in _BOTH
    }
    return {**policy._asdict(), **rules}


_BOTH = (INGRESS, EGRESS)


def _rule_json(rule: Rule) -> dict[str, Any]:
    peers = rule.peers
    return {**rule._asdict(), "peers": peers and [_peer_json(each) for each in peers]}


def _peer_json(peer: Peer) -> Any:
    if isinstance(peer, Block):
        return {"cidr": str(peer.cidr), "excepted": [str(each) for each in peer.excepted]}
    return peer._asdict() if isinstance(peer, NodePeer) else peer


def _policy(said: Mapping[str, Any]) -> Policy:
    rules = {name: None if said[name] is None else tuple(map(_rule, said[name])) for name in _BOTH}
    return Policy(**{**said, **rules, "subject": _pods(said["subject"]), "notes": tuple(said["notes"])})


def _rule(said: Mapping[str, Any]) -> Rule:
    peers = None if said["peers"] is None else tuple(map(_peer, said["peers"]))
    ports = None if said["ports"] is None else tuple(Port(*each) for each in said["ports"])
    return Rule(**{**said, "peers": peers, "ports": ports})


def _peer(said: Any) -> Peer:
    if isinstance(said, Mapping) and "nodes" in said:
        return NodePeer()
    if isinstance(said, Mapping):
        excepted: tuple[Prefix, ...] = tuple(map(prefix, said["excepted"]))
        return Block(prefix(said["cidr"]), excepted)
    return _pods(said)


def _pods(said: Any) -> PodPeer:
    return PodPeer(*(None if each is None else _selector(each) for each in said))


def _selector(said: Any) -> tuple[Expression, ...]:
    return tuple(Expression(key, operator, tuple(values)) for key, operator, values in said)
