"""Pods, namespaces and policies as values: what is kept of them, and nothing else.

Source: Kubernetes API networking.k8s.io/v1 (NetworkPolicy), policy.networking.k8s.io/v1alpha2 and v1beta1
(ClusterNetworkPolicy), core/v1 (Pod, Namespace), meta/v1 (LabelSelector).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lease.model import Prefix

Labels = Mapping[str, str]
INGRESS, EGRESS = "ingress", "egress"
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
"""By the name in the API: the number in the IP header."""
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
LAST_PORT = 65535
ADMIN, NAMESPACED, BASELINE = "Admin", "NetworkPolicy", "Baseline"
TIERS = (ADMIN, NAMESPACED, BASELINE)
"""In the order in which they are asked; NetworkPolicies stand between those of a ClusterNetworkPolicy."""
ACCEPT, DENY, PASS = "Accept", "Deny", "Pass"
"""What a rule does; PASS: the next tier decides."""
CLUSTER_KIND = "ClusterNetworkPolicy"
IN, NOT_IN, EXISTS, DOES_NOT_EXIST = "In", "NotIn", "Exists", "DoesNotExist"


class Expression(NamedTuple):
    """One of a selector's matchExpressions."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Labels) -> bool:
        """Whether labels are so. An object without the key matches NotIn (k8s.io/apimachinery, labels.Requirement)."""
        if self.operator == IN:
            return self.key in labels and labels[self.key] in self.values
        if self.operator == NOT_IN:
            return self.key not in labels or labels[self.key] not in self.values
        return (self.key in labels) == (self.operator == EXISTS)


Selector = tuple[Expression, ...]
"""A LabelSelector: all must match; an empty one matches everything. matchLabels are expressions In of one value."""


def matches(selector: Selector, labels: Labels) -> bool:
    """Whether labels match a selector."""
    return all(each.matches(labels) for each in selector)


class ContainerPort(NamedTuple):
    """A port that a pod's container names. protocol: its number."""

    name: str
    protocol: int
    number: int


class Pod(NamedTuple):
    """A pod. key: `namespace/name`; addresses: packed, 4 bytes or 16, those first; alone: it has the node's network
    (host_network), or its containers have ended (phase Succeeded or Failed), and its addresses may be others' already: no
    policy and no peer means it."""

    key: str
    namespace: str
    node: str
    labels: Labels
    addresses: tuple[bytes, ...]
    ports: tuple[ContainerPort, ...] = ()
    alone: bool = False
    owner: str = ""
    """What controls it: `deployment/web`."""

    @property
    def name(self) -> str:
        """Its own."""
        return self.key[len(self.namespace) + 1 :]


def in_order(addresses: Iterable[bytes]) -> tuple[bytes, ...]:
    """A pod's addresses as it keeps them."""
    return tuple(sorted(addresses, key=lambda each: (len(each), each)))


class PodPeer(NamedTuple):
    """Pods of a rule. namespaces: None, those of the policy's own; pods: None, all of these."""

    namespaces: Selector | None
    pods: Selector | None


class Block(NamedTuple):
    """An ipBlock."""

    cidr: Prefix
    excepted: tuple[Prefix, ...] = ()


class NodePeer(NamedTuple):
    """Nodes, by their own addresses in the pod network."""

    nodes: bool = True


Peer = PodPeer | Block | NodePeer


class Port(NamedTuple):
    """A port of a rule. name: looked up among the receiving pod's, with the protocol; else first to last."""

    protocol: int
    first: int = 0
    last: int = LAST_PORT
    name: str = ""


class Rule(NamedTuple):
    """peers None: anybody; ports None: any port of any protocol, ICMP too. action, name: of a ClusterNetworkPolicy; one of a
    NetworkPolicy accepts."""

    peers: tuple[Peer, ...] | None
    ports: tuple[Port, ...] | None
    action: str = ACCEPT
    name: str = ""


class Policy(NamedTuple):
    """A NetworkPolicy, or of the whole cluster (kind says of which). subject: whom it selects; ingress, egress: its rules,
    None where it says nothing of that direction; tier, priority: the lower is asked first. notes: what is not done as it
    says."""

    namespace: str
    name: str
    subject: PodPeer
    ingress: tuple[Rule, ...] | None
    egress: tuple[Rule, ...] | None
    tier: str = NAMESPACED
    priority: int = 0
    notes: tuple[str, ...] = ()
    kind: str = ""

    @property
    def key(self) -> str:
        """`namespace/name`, `ClusterNetworkPolicy/name`: no namespace has capitals."""
        return f"{self.kind or self.namespace}/{self.name}"

    @property
    def order(self) -> tuple[int, int, str]:
        """By which policies are asked; among equals the API leaves it open."""
        return TIERS.index(self.tier), self.priority, self.key

    @property
    def has_blocks(self) -> bool:
        """Whether a rule means addresses."""
        rules = (*(self.ingress or ()), *(self.egress or ()))
        return any(not isinstance(peer, PodPeer) for rule in rules for peer in rule.peers or ())

    def rules(self, direction: str) -> tuple[Rule, ...] | None:
        """Those of a direction."""
        return self.ingress if direction == INGRESS else self.egress
