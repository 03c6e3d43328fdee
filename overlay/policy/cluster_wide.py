"""A ClusterNetworkPolicy of the Kubernetes API, as JSON or YAML was read, into a Policy of model.py. Pure.

Source: sigs.k8s.io/network-policy-api, apis/v1beta1/clusternetworkpolicy_types.go; v1alpha2 has the same fields. What this
version does not know (a kind of peer or protocol) fails closed as the API demands: an Accept rule accepts nothing, a Deny
or Pass rule denies everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overlay.policy.model import (
    ACCEPT,
    ADMIN,
    BASELINE,
    CLUSTER_KIND,
    DENY,
    LAST_PORT,
    PASS,
    PROTOCOLS,
    Block,
    PodPeer,
    Policy,
    Port,
    Rule,
)
from overlay.policy.resources import listed, mapping, port_number, prefix_of, selector_of, shown, text_of

_ACTIONS, _TIERS = (ACCEPT, DENY, PASS), (ADMIN, BASELINE)
LAST_PRIORITY = 1000


class _Unknown(Exception):
    """Something that this version does not know: what."""


def cluster_policy_of(item: Mapping[str, Any]) -> Policy:
    """A ClusterNetworkPolicy. Raises ValueError."""
    spec = mapping(item.get("spec"), "spec")
    tier, priority = spec.get("tier"), spec.get("priority")
    if tier not in _TIERS:
        raise ValueError(f"spec.tier: {shown(tier)} must be Admin or Baseline")
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= LAST_PRIORITY:
        raise ValueError(f"spec.priority: {shown(priority)} must be a number, 0 to {LAST_PRIORITY}")
    try:
        subject = _pods(spec.get("subject"), "spec.subject")
    except _Unknown as error:
        raise ValueError(f"{error}; it must be namespaces or pods") from error
    notes: list[str] = []
    ingress = _rules(spec, "ingress", "from", notes)
    egress = _rules(spec, "egress", "to", notes)
    return Policy(
        "", str(item["metadata"]["name"]), subject, ingress, egress, tier, priority, tuple(notes), CLUSTER_KIND
    )


def _rules(spec: Mapping[str, Any], direction: str, ends: str, notes: list[str]) -> tuple[Rule, ...] | None:
    """None, where there are none: "CNPs with no ingress rules do not affect ingress traffic"."""
    where = f"spec.{direction}"
    found = enumerate(listed(spec.get(direction), where))
    return tuple(_rule(each, f"{where}[{place}]", ends, notes) for place, each in found) or None


def _rule(item: Any, where: str, ends: str, notes: list[str]) -> Rule:
    item = mapping(item, where)
    action, name = item.get("action"), text_of(item.get("name") or "", f"{where}.name")
    if action not in _ACTIONS:
        raise ValueError(f"{where}.action: {shown(action)} must be Accept, Deny or Pass")
    if not (items := listed(item.get(ends), f"{where}.{ends}")):
        raise ValueError(f"{where}.{ends}: must name at least one")
    protocols = item.get("protocols")
    if protocols is not None and not listed(protocols, f"{where}.protocols"):
        raise ValueError(f"{where}.protocols: must name at least one, or be left out")
    unknown: list[str] = []
    peers: list[PodPeer | Block] = []
    for place, each in enumerate(items):
        try:
            peers += _peers(each, f"{where}.{ends}[{place}]", ends)
        except _Unknown as error:
            unknown.append(str(error))
    ports: list[Port] = []
    for place, each in enumerate(protocols or ()):
        try:
            ports += _ports(each, f"{where}.protocols[{place}]")
        except _Unknown as error:
            unknown.append(str(error))
    if unknown and action != ACCEPT:
        notes.append(f"{', '.join(unknown)}: the rule denies everything")
        return Rule(None, None, DENY, name)
    if unknown:
        notes.append(f"{', '.join(unknown)}: the rule accepts nothing")
        return Rule((), None, ACCEPT, name)
    return Rule(tuple(peers), tuple(ports) if protocols is not None else None, action, name)


def _peers(item: Any, where: str, ends: str) -> list[PodPeer | Block]:
    item = mapping(item, where)
    if ends == "to" and item.get("networks") is not None:
        _alone(item, where)
        networks = listed(item["networks"], f"{where}.networks")
        return [Block(prefix_of(each, f"{where}.networks[{place}]")) for place, each in enumerate(networks)]
    return [_pods(item, where)]


def _pods(item: Any, where: str) -> PodPeer:
    """Raises _Unknown: it is something else."""
    item = mapping(item, where)
    _alone(item, where)
    if (namespaces := item.get("namespaces")) is not None:
        return PodPeer(selector_of(namespaces, f"{where}.namespaces"), None)
    if (pods := item.get("pods")) is not None:
        pods = mapping(pods, f"{where}.pods")
        return PodPeer(
            selector_of(pods.get("namespaceSelector"), f"{where}.pods.namespaceSelector"),
            selector_of(pods.get("podSelector"), f"{where}.pods.podSelector"),
        )
    raise _Unknown(f"{where}: {', '.join(item) or 'a peer of no kind'} is not known here")


def _alone(item: Mapping[str, Any], where: str) -> None:
    there = [name for name, value in item.items() if value is not None]
    if len(there) > 1:
        raise ValueError(f"{where}: must have one of {', '.join(there)} alone")


def _ports(item: Any, where: str) -> list[Port]:
    item = mapping(item, where)
    _alone(item, where)
    if name := item.get("destinationNamedPort"):
        named = text_of(name, f"{where}.destinationNamedPort")
        return [Port(protocol, name=named) for protocol in PROTOCOLS.values()]
    for name, protocol in PROTOCOLS.items():
        if (said := item.get(name.lower())) is not None:
            return [_port(mapping(said, f"{where}.{name.lower()}"), protocol, f"{where}.{name.lower()}")]
    raise _Unknown(f"{where}: {', '.join(item) or 'a protocol of no kind'} is not known here")


def _port(said: Mapping[str, Any], protocol: int, where: str) -> Port:
    where = f"{where}.destinationPort"
    port = said.get("destinationPort")
    if port is None:
        return Port(protocol, 0, LAST_PORT)
    port = mapping(port, where)
    _alone(port, where)
    if (number := port.get("number")) is not None:
        first = port_number(number, f"{where}.number")
        return Port(protocol, first, first)
    if (span := port.get("range")) is None:
        raise _Unknown(f"{where}: {', '.join(port) or 'a port of no kind'} is not known here")
    span = mapping(span, f"{where}.range")
    first, last = (
        port_number(span.get("start"), f"{where}.range.start"),
        port_number(span.get("end"), f"{where}.range.end"),
    )
    if last <= first:
        raise ValueError(f"{where}.range.end: {last} must be above the start, {first}")
    return Port(protocol, first, last)
