"""Policies, their rules and what is odd about them, in words for an operator. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from lease.model import ip_text
from overlay.policy.compile import numbers_of
from overlay.policy.index import Index
from overlay.policy.model import (
    EGRESS,
    EXISTS,
    IN,
    INGRESS,
    LAST_PORT,
    NOT_IN,
    PROTOCOL_NAMES,
    Block,
    PodPeer,
    Policy,
    Port,
    Rule,
    Selector,
)


def address_text(address: bytes) -> str:
    """A packed address for people."""
    return ip_text(4 if len(address) == 4 else 6, int.from_bytes(address, "big")) if address else "?"


PREPOSITION = {INGRESS: "from", EGRESS: "to"}


def rule_words(policy: Policy, direction: str, place: int) -> str:
    """A rule: `ingress 0: from pods app=b of its own namespace, TCP 80`."""
    rule = (policy.rules(direction) or ())[place]
    peers = "anybody" if rule.peers is None else " or ".join(_peer_words(each) for each in rule.peers)
    ports = "any port" if rule.ports is None else ", ".join(port_words(each) for each in rule.ports)
    return f"{direction} {place}: {PREPOSITION[direction]} {peers}, {ports}"


def _peer_words(peer: PodPeer | Block) -> str:
    if isinstance(peer, Block):
        excepted = f" but {', '.join(map(str, peer.excepted))}" if peer.excepted else ""
        return f"{peer.cidr}{excepted}"
    pods = "all pods" if not peer.pods else f"pods {selector_words(peer.pods)}"
    if peer.namespaces is None:
        return f"{pods} of its own namespace"
    return f"{pods} of {f'namespaces {selector_words(peer.namespaces)}' if peer.namespaces else 'all namespaces'}"


def port_words(port: Port) -> str:
    """`TCP 80`, `UDP 5000-5010`, `TCP http`."""
    protocol = PROTOCOL_NAMES[port.protocol]
    if port.name:
        return f"{protocol} {port.name}"
    if (port.first, port.last) == (0, LAST_PORT):
        return f"{protocol}, any port"
    return f"{protocol} {port.first}" if port.first == port.last else f"{protocol} {port.first}-{port.last}"


def selector_words(selector: Selector) -> str:
    """As kubectl takes it: `app=b,tier in (x,y)`."""
    found = []
    for each in selector:
        values = ",".join(each.values)
        if each.operator in (IN, NOT_IN):
            one = {IN: "=", NOT_IN: "!="}[each.operator] if len(each.values) == 1 else ""
            many = {IN: "in", NOT_IN: "notin"}[each.operator]
            found.append(f"{each.key}{one}{values}" if one else f"{each.key} {many} ({values})")
        else:
            found.append(each.key if each.operator == EXISTS else f"!{each.key}")
    return ",".join(found)


def findings(index: Index, policies: tuple[Policy, ...]) -> Iterator[tuple[str, str]]:
    """What is odd about policies, each by its name: they select nothing, mean nobody, or a port that nobody has. Nothing of
    that is wrong by itself: pods may be yet to come."""
    for policy in policies:
        if not index.in_namespace(policy.namespace) & index.selected(policy.pods):
            words = selector_words(policy.pods)
            what = f"no pod of {policy.namespace} has labels {words}" if words else f"{policy.namespace} has no pods"
            yield policy.key, f"selects no pod: {what}"
        for direction in (INGRESS, EGRESS):
            for place, rule in enumerate(policy.rules(direction) or ()):
                for words in _odd(index, policy, rule):
                    yield policy.key, f"{rule_words(policy, direction, place)}: {words}"


def _odd(index: Index, policy: Policy, rule: Rule) -> Iterator[str]:
    for peer in rule.peers or ():
        if isinstance(peer, PodPeer) and not index.of_peer(peer, policy.namespace):
            yield f"no pod is {_peer_words(peer)}"
    for port in rule.ports or ():
        if port.name and not any(numbers_of(pod, port) for pod in index.members(index.selected(()))):
            yield f"no pod has a {PROTOCOL_NAMES[port.protocol]} port named {port.name}"
