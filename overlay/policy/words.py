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
    NAMESPACED,
    NOT_IN,
    PROTOCOL_NAMES,
    Block,
    NodePeer,
    Peer,
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
    """A rule: `ingress 0: from pods app=b of its own namespace, TCP 80`; of a ClusterNetworkPolicy
    `ingress 0 (no-ssh): Deny from all pods of all namespaces, TCP 22`."""
    rule = (policy.rules(direction) or ())[place]
    peers = "anybody" if rule.peers is None else " or ".join(_peer_words(each) for each in rule.peers) or "nobody"
    ports = "any port" if rule.ports is None else ", ".join(map(port_words, rule.ports)) or "no port"
    action = f"{rule.action} " if policy.tier != NAMESPACED else ""
    name = f" ({rule.name})" if rule.name else ""
    return f"{direction} {place}{name}: {action}{PREPOSITION[direction]} {peers}, {ports}"


def _peer_words(peer: Peer) -> str:
    if isinstance(peer, NodePeer):
        return "nodes"
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
    """What is odd about policies, each by its name: they select nothing, mean nobody, or a port that nobody has; two of a
    tier have one priority. Nothing of that is wrong by itself: pods may be yet to come."""
    for policy in policies:
        for note in policy.notes:
            yield policy.key, note
        if not index.of_peer(policy.subject, policy.namespace):
            yield policy.key, f"selects no pod: {_nobody(policy)}"
        for direction in (INGRESS, EGRESS):
            for place, rule in enumerate(policy.rules(direction) or ()):
                for words in _odd(index, policy, rule):
                    yield policy.key, f"{rule_words(policy, direction, place)}: {words}"
    yield from _equals(index, policies)


def _nobody(policy: Policy) -> str:
    if policy.tier != NAMESPACED:
        return f"there are none of {_peer_words(policy.subject)}"
    words = selector_words(policy.subject.pods or ())
    return f"no pod of {policy.namespace} has labels {words}" if words else f"{policy.namespace} has no pods"


def _equals(index: Index, policies: tuple[Policy, ...]) -> Iterator[tuple[str, str]]:
    """Of a tier and of one priority, with pods that both select: the API leaves open which is asked first."""
    known: dict[tuple[str, int], list[tuple[Policy, int]]] = {}
    for policy in sorted((each for each in policies if each.tier != NAMESPACED), key=lambda each: each.order):
        bits = index.of_peer(policy.subject, "")
        before = known.setdefault((policy.tier, policy.priority), [])
        for other, its in before:
            if bits & its:
                why = "both select some pods, and which is asked first is open"
                yield policy.key, f"has the priority of {other.key}, {policy.priority}: {why}"
        before.append((policy, bits))


def _odd(index: Index, policy: Policy, rule: Rule) -> Iterator[str]:
    for peer in rule.peers or ():
        if isinstance(peer, PodPeer) and not index.of_peer(peer, policy.namespace):
            yield f"no pod is {_peer_words(peer)}"
    for port in rule.ports or ():
        if port.name and not any(numbers_of(pod, port) for pod in index.members(index.selected(()))):
            yield f"no pod has a {PROTOCOL_NAMES[port.protocol]} port named {port.name}"
