"""Why two may talk or not, read from the same compiled form that the kernel has. Pure."""

from __future__ import annotations

from typing import NamedTuple

from overlay.policy.compile import ADDRESSES, NAMED, NETWORKS, PORTS, Chain, Compiled
from overlay.policy.model import INGRESS


class Flow(NamedTuple):
    """A connection as its first packet has it, after translation. Addresses packed; protocol: its number; port: 0 where the
    protocol has none."""

    source: bytes
    target: bytes
    protocol: int
    port: int


class Verdict(NamedTuple):
    """Of one direction at one node. known: whether the pod is one of the node's; chain: "" where no policy selects it;
    rules: those that allow it, `namespace/name` and place; itself: a pod talks to itself."""

    known: bool
    chain: str
    policies: tuple[str, ...]
    rules: tuple[tuple[str, int], ...]
    itself: bool

    @property
    def allowed(self) -> bool:
        """Whether it may pass."""
        return not self.chain or bool(self.rules) or self.itself


def judge(compiled: Compiled, direction: str, flow: Flow) -> Verdict:
    """What a node's table does with a flow of one of its pods in a direction."""
    own, other = (flow.target, flow.source) if direction == INGRESS else (flow.source, flow.target)
    chains = compiled.pods[direction]
    name = chains.get(own, "")
    if not name:
        return Verdict(own in chains, "", (), (), False)
    chain = compiled.chains[name]
    return Verdict(
        True, name, chain.policies, tuple(_allowing(compiled, chain, other, flow)), flow.source == flow.target
    )


def _allowing(compiled: Compiled, chain: Chain, other: bytes, flow: Flow) -> list[tuple[str, int]]:
    found = [
        (rule.policy, rule.place)
        for rule in chain.rules
        if (not rule.peers or _has_peer(compiled, rule.peers, other))
        and (not rule.ports or _has_port(compiled, rule.ports, flow))
    ]
    return list(dict.fromkeys(found))


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
        return (flow.target, flow.protocol, flow.port) in members.named
    assert members.kind == PORTS
    return any(protocol == flow.protocol and first <= flow.port <= last for protocol, first, last in members.ports)
