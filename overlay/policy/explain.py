"""Why two may talk or not, read from the same compiled form that the kernel has. Pure."""

from __future__ import annotations

from typing import NamedTuple

from overlay.kernel.nftables.content import port_key
from overlay.policy.compile import ADDRESSES, NAMED, NETWORKS, PORTS, Compiled, Judged
from overlay.policy.model import ACCEPT, INGRESS, NAMESPACED, PASS


class Flow(NamedTuple):
    """A connection as its first packet has it, after translation. Addresses packed; protocol: its number; port: 0 where the
    protocol has none."""

    source: bytes
    target: bytes
    protocol: int
    port: int


class Verdict(NamedTuple):
    """Of one direction at one node. known: whether the pod is one of the node's, one that is not is held; policies: those
    that select it, in the order in which they are asked; rules: those that decide, by policy and place, with passes before
    it; none: no policy selects it, or (denied) no NetworkPolicy allows it, or (allowed) no rule is about it; itself: a pod
    talks to itself."""

    known: bool
    policies: tuple[str, ...]
    rules: tuple[Judged, ...]
    allowed: bool
    itself: bool = False


def judge(compiled: Compiled, direction: str, flow: Flow) -> Verdict:
    """What a node's table does with a flow of one of its pods in a direction."""
    own, other = (flow.target, flow.source) if direction == INGRESS else (flow.source, flow.target)
    chains = compiled.pods[direction]
    if own not in chains:
        return Verdict(False, (), (), False)
    line = tuple(compiled.line(chains[own]))
    policies = tuple(policy for chain in line for policy in chain.policies)
    if line and flow.source == flow.target:
        return Verdict(True, policies, (), True, itself=True)
    passed: list[Judged] = []
    for chain in line:
        matching = [rule for rule in chain.rules if _matches(compiled, rule, other, flow)]
        if chain.tier == NAMESPACED:  # all of these say the same
            once = {(rule.policy, rule.place): rule for rule in matching}
            return Verdict(True, policies, (*passed, *once.values()), bool(matching))
        if matching:
            if matching[0].action != PASS:
                return Verdict(True, policies, (*passed, matching[0]), matching[0].action == ACCEPT)
            passed.append(matching[0])
    return Verdict(True, policies, tuple(passed), True)


def _matches(compiled: Compiled, rule: Judged, other: bytes, flow: Flow) -> bool:
    return (not rule.peers or _has_peer(compiled, rule.peers, other)) and (
        not rule.ports or _has_port(compiled, rule.ports, flow)
    )


def _has_peer(compiled: Compiled, name: str, address: bytes) -> bool:
    members = compiled.sets[name]
    if members.kind == ADDRESSES:
        return address in members.addresses
    assert members.kind == NETWORKS
    if (members.family == 4) != (len(address) == 4):
        return False
    number = int.from_bytes(address, "big")
    return any(first <= number <= last for first, last in members.ranges)


def _has_port(compiled: Compiled, name: str, flow: Flow) -> bool:
    members = compiled.sets[name]
    if members.kind == NAMED:
        return flow.target + port_key(flow.protocol, flow.port) in members.named
    assert members.kind == PORTS
    return any(protocol == flow.protocol and first <= flow.port <= last for protocol, first, last in members.ports)
