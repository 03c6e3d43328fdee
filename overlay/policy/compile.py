"""Policies into sets, chains and maps for the pods of one node: what table.py makes an nftables table of, and explain.py
reads. Pure.

A pod's map says which chain judges it in a direction: one chain for each distinct list of policies, so that a packet's cost
does not depend on how many policies there are. Where ClusterNetworkPolicies of the Admin tier select it their chain comes
first, and says which is asked where none of its rules decides: that of the NetworkPolicies, or of the Baseline tier. Sets
of addresses are one for each distinct list of peers, and have the pods of the whole cluster; names are made of what a thing
means, so that what stays keeps its name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lease.families import FAMILIES
from overlay.kernel.nftables.content import port_key
from overlay.policy.index import Index
from overlay.policy.model import (
    ACCEPT,
    BASELINE,
    DENY,
    EGRESS,
    INGRESS,
    NAMESPACED,
    TIERS,
    Block,
    NodePeer,
    Pod,
    PodPeer,
    Policy,
    Port,
    Rule,
    matches,
)
from overlay.process.sha256 import sha256

DIRECTIONS = (INGRESS, EGRESS)
ADDRESSES, NETWORKS, PORTS, NAMED = "pods", "net", "ports", "named"
"""Kinds of sets, by which their names begin."""
Range = tuple[int, int]
"""First and last."""
PortRange = tuple[int, int, int]
"""Protocol, first port, last port."""


class Members(NamedTuple):
    """A set. family: of its addresses, 0: it has none. addresses: of ADDRESSES; ranges: of NETWORKS, apart and in order;
    ports: of PORTS, apart and in order; named: of NAMED, who has such a port, as nftables keys: address,
    protocol, port."""

    kind: str
    family: int
    addresses: frozenset[bytes] = frozenset()
    ranges: tuple[Range, ...] = ()
    ports: tuple[PortRange, ...] = ()
    named: frozenset[bytes] = frozenset()
    peers: tuple[tuple[str, PodPeer], ...] = ()
    """Of ADDRESSES: whose, each with the namespace of its policy."""
    port: Port | None = None
    """Of NAMED: which."""


class Judged(NamedTuple):
    """One rule of a chain: what it does with peers in a set ("": anybody) and ports in a set ("": any). policy: its key;
    place: of the rule in its policy."""

    policy: str
    place: int
    peers: str
    ports: str
    action: str = ACCEPT


class Chain(NamedTuple):
    """What judges pods that the same policies of a tier select: the first rule that matches decides. then: the chain that
    does where none decides, or one passes; "": all may pass. A NetworkPolicy's lets nothing pass at its end."""

    direction: str
    policies: tuple[str, ...]
    rules: tuple[Judged, ...]
    tier: str = NAMESPACED
    then: str = ""


class Compiled(NamedTuple):
    """For one node. sets, chains: by name; pods: by direction and address, the chain that judges a pod of this node, "":
    none does."""

    sets: Mapping[str, Members]
    chains: Mapping[str, Chain]
    pods: Mapping[str, Mapping[bytes, str]]

    @property
    def isolated(self) -> frozenset[bytes]:
        """The addresses of pods of which some chain drops something."""
        those = {name for name in self.chains if any(map(drops, self.line(name)))}
        return frozenset(address for heads in self.pods.values() for address, chain in heads.items() if chain in those)

    @property
    def turned(self) -> frozenset[str]:
        """Sets in which who comes may be let through no more: those of rules that deny or pass."""
        rules = (rule for chain in self.chains.values() for rule in chain.rules if rule.action != ACCEPT)
        return frozenset(name for rule in rules for name in (rule.peers, rule.ports) if name)

    def line(self, name: str) -> Iterator[Chain]:
        """A chain and those that it hands over to."""
        while name:
            yield (chain := self.chains[name])
            name = chain.then


def drops(chain: Chain) -> bool:
    """Whether a chain drops something itself."""
    return chain.tier == NAMESPACED or any(rule.action == DENY for rule in chain.rules)


NOTHING = Compiled({}, {}, {direction: {} for direction in DIRECTIONS})


NodeAddresses = Mapping[int, Iterable[tuple[int, int]]]
"""By family, of each node its underlay address and its address in the pod network."""


def compile_node(
    index: Index,
    policies: Iterable[Policy],
    node: str,
    families: Sequence[int] = (4, 6),
    nodes: NodeAddresses | None = None,
) -> Compiled:
    """All that is wanted of a node, from nothing. node: the name by which pods say that they are its own."""
    means = _Means(index, families, nodes or {})
    local = index.on_node(node)
    selecting: dict[tuple[str, str], list[Policy]] = {}
    rules: dict[tuple[str, str], tuple[Judged, ...]] = {}
    for policy in sorted(policies, key=lambda each: each.order):
        mine = local & means.bits(policy.subject, policy.namespace)
        if not mine:
            continue
        for direction in DIRECTIONS:
            if policy.rules(direction) is not None:
                rules[direction, policy.key] = tuple(_rules(means, policy, direction))
                for pod in index.members(mine):
                    selecting.setdefault((direction, pod.key), []).append(policy)
    chains: dict[str, Chain] = {}
    pods: dict[str, dict[bytes, str]] = {direction: {} for direction in DIRECTIONS}
    for pod in sorted(index.members(local), key=lambda each: each.key):
        for direction in DIRECTIONS:
            head = ""
            for chain in _line(direction, selecting.get((direction, pod.key), ()), rules):
                made = chain._replace(then=head)
                head = _name("in" if direction == INGRESS else "out", made)
                chains[head] = made
            pods[direction].update(dict.fromkeys(pod.addresses, head))
    used = {name for chain in chains.values() for rule in chain.rules for name in (rule.peers, rule.ports)}
    return Compiled({name: those for name, those in means.sets.items() if name in used}, chains, pods)


def _line(
    direction: str, policies: Iterable[Policy], rules: Mapping[tuple[str, str], tuple[Judged, ...]]
) -> Iterator[Chain]:
    """The chains of a pod that these policies select, the last one first."""
    tiers: dict[str, list[Policy]] = {tier: [] for tier in TIERS}
    for policy in policies:
        tiers[policy.tier].append(policy)
    if tiers[NAMESPACED]:
        tiers[BASELINE] = []  # what a NetworkPolicy selects it decides
    for tier, those in reversed(tiers.items()):
        if those:
            judged = tuple(rule for policy in those for rule in rules[direction, policy.key])
            yield Chain(direction, tuple(policy.key for policy in those), judged, tier)


class PodChange(NamedTuple):
    """A pod of another node that came (was: None), went (now: None) or changed, whose addresses no other pod has."""

    was: Pod | None
    now: Pod | None


def with_pods(compiled: Compiled, index: Index, changes: Iterable[PodChange]) -> Compiled:
    """The same after pods of other nodes changed, with work in proportion to these: what compile_node would make anew."""
    sets = dict(compiled.sets)
    for change in changes:
        for name, members in sets.items():
            if members.kind == ADDRESSES:
                less, more = (_in_addresses(pod, members, index) for pod in change)
                if less != more:
                    sets[name] = members._replace(addresses=members.addresses - less | more)
            elif members.kind == NAMED:
                gone, come = (_in_named(pod, members) for pod in change)
                if gone != come:
                    sets[name] = members._replace(named=members.named - gone | come)
    return compiled._replace(sets=sets)


def _in_addresses(pod: Pod | None, members: Members, index: Index) -> frozenset[bytes]:
    if pod is None or pod.alone or not any(is_peer(pod, peer, space, index) for space, peer in members.peers):
        return frozenset()
    return frozenset(addresses_of(pod, members.family))


def is_peer(pod: Pod, peer: PodPeer, namespace: str, index: Index) -> bool:
    """Whether a rule of a policy in that namespace means a pod."""
    if peer.namespaces is None:
        if pod.namespace != namespace:
            return False
    elif peer.namespaces and not (
        (labels := index.namespaces.get(pod.namespace)) is not None and matches(peer.namespaces, labels)
    ):
        return False
    return peer.pods is None or matches(peer.pods, pod.labels)


def _in_named(pod: Pod | None, members: Members) -> frozenset[bytes]:
    if pod is None or pod.alone or members.port is None:
        return frozenset()
    return frozenset(_having(pod, members.port, members.family))


class _Means:
    """What rules are compiled with: each peer and each named port is looked up once, for all policies."""

    def __init__(self, index: Index, families: Sequence[int], nodes: NodeAddresses) -> None:
        self.index, self.families, self.nodes = index, families, nodes
        self.sets: dict[str, Members] = {}
        """Those made so far."""
        self._bits: dict[tuple[str, PodPeer], int] = {}
        self._named: dict[tuple[str, int], dict[int, list[int]]] | None = None
        self._addresses: dict[int, tuple[bytes, ...]] = {}
        """Of each pod that is in some set, so that all sets have the same objects."""

    def bits(self, peer: PodPeer, namespace: str) -> int:
        """The pods that a rule of a policy in that namespace means."""
        key = namespace if peer.namespaces is None else "", peer
        if (found := self._bits.get(key)) is None:
            found = self._bits[key] = self.index.of_peer(peer, namespace)
        return found

    def having(self, port: Port) -> Mapping[int, list[int]]:
        """By number, the places of pods that have a named port."""
        if self._named is None:
            self._named = self.index.named_ports()
        return self._named.get((port.name, port.protocol), {})

    def addresses(self, place: int, family: int) -> Iterator[bytes]:
        """A pod's addresses of a family."""
        if (found := self._addresses.get(place)) is None:
            found = self._addresses[place] = self.index.addresses(place)
        size = FAMILIES[family].size
        return (address for address in found if len(address) == size)


def _rules(means: _Means, policy: Policy, direction: str) -> Iterator[Judged]:
    for place, rule in enumerate(policy.rules(direction) or ()):
        for ports in _port_sets(means, rule):
            for peers in _peer_sets(means, rule, policy.namespace):
                yield Judged(policy.key, place, peers, ports, rule.action)


def _peer_sets(means: _Means, rule: Rule, namespace: str) -> Iterator[str]:
    if rule.peers is None:
        yield ""
        return
    sets = means.sets
    pods = [peer for peer in rule.peers if isinstance(peer, PodPeer)]
    if pods:
        own = (None if peer.namespaces is not None else namespace for peer in pods)
        meaning = sorted({repr(each) for each in zip(own, pods, strict=True)})
        names = {family: _name(f"{ADDRESSES}{family}", meaning) for family in means.families}
        if any(name not in sets for name in names.values()):
            bits = 0
            for peer in pods:
                bits |= means.bits(peer, namespace)
            members = list(means.index.places(bits))
            whose = tuple((namespace, peer) for peer in pods)
            for family, name in names.items():
                addresses = frozenset(each for place in members for each in means.addresses(place, family))
                sets[name] = Members(ADDRESSES, family, addresses=addresses, peers=whose)
        yield from names.values()
    for family in means.families:
        blocks = [peer for peer in rule.peers if isinstance(peer, Block) and peer.cidr.family == family]
        nodes = means.nodes.get(family, ())
        ranges = with_nodes(ranges_of(blocks), nodes) if blocks else ()
        if any(isinstance(peer, NodePeer) for peer in rule.peers):
            ranges = _joined([*ranges, *((inside, inside) for _, inside in nodes)])
        if ranges or blocks:
            name = _name(f"{NETWORKS}{family}", ranges)
            sets.setdefault(name, Members(NETWORKS, family, ranges=ranges))
            yield name


def with_nodes(ranges: tuple[Range, ...], nodes: Iterable[tuple[int, int]]) -> tuple[Range, ...]:
    """And the addresses in the pod network of nodes whose underlay addresses these have."""
    firsts = [first for first, _ in ranges]

    def there(address: int) -> bool:
        place = bisect_right(firsts, address) - 1
        return place >= 0 and address <= ranges[place][1]

    more = [(inside, inside) for outer, inside in nodes if there(outer) and not there(inside)]
    return _joined([*ranges, *more]) if more else ranges


def addresses_of(pod: Pod, family: int) -> Iterator[bytes]:
    """A pod's addresses of a family."""
    size = FAMILIES[family].size
    return (address for address in pod.addresses if len(address) == size)


def _having(pod: Pod, port: Port, family: int) -> Iterator[bytes]:
    """By which a pod is reached at a named port."""
    for number in numbers_of(pod, port):
        for address in addresses_of(pod, family):
            yield address + port_key(port.protocol, number)


def _port_sets(means: _Means, rule: Rule) -> Iterator[str]:
    if rule.ports is None:
        yield ""
        return
    sets = means.sets
    fixed = [port for port in rule.ports if not port.name]
    if fixed:
        ports = _merged(fixed)
        name = _name(PORTS, ports)
        sets.setdefault(name, Members(PORTS, 0, ports=ports))
        yield name
    for port in sorted({port for port in rule.ports if port.name}):
        for family in means.families:
            name = _name(f"{NAMED}{family}", (port.name, port.protocol))
            if name not in sets:
                named = frozenset(
                    address + port_key(port.protocol, number)
                    for number, places in means.having(port).items()
                    for place in places
                    for address in means.addresses(place, family)
                )
                sets[name] = Members(NAMED, family, named=named, port=port)
            yield name


def numbers_of(pod: Pod, port: Port) -> list[int]:
    """The numbers that a port of a rule means at a pod, by its name."""
    return [each.number for each in pod.ports if (each.name, each.protocol) == (port.name, port.protocol)]


def _merged(ports: Iterable[Port]) -> tuple[PortRange, ...]:
    found: list[PortRange] = []
    for protocol, first, last in sorted((port.protocol, port.first, port.last) for port in ports):
        if found and found[-1][0] == protocol and first <= found[-1][2] + 1:
            found[-1] = protocol, found[-1][1], max(last, found[-1][2])
        else:
            found.append((protocol, first, last))
    return tuple(found)


def ranges_of(blocks: Iterable[Block]) -> tuple[Range, ...]:
    """The addresses of blocks, each without what it excepts, apart from each other and in order."""
    found: list[Range] = []
    for block in blocks:
        parts: list[Range] = [(block.cidr.base, block.cidr.last)]
        for each in block.excepted:
            parts = [rest for part in parts for rest in _without(part, (each.base, each.last))]
        found += parts
    return _joined(found)


def _joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def _without(part: Range, hole: Range) -> list[Range]:
    if hole[1] < part[0] or hole[0] > part[1]:
        return [part]
    before, after = (part[0], hole[0] - 1), (hole[1] + 1, part[1])
    return [each for each in (before, after) if each[0] <= each[1]]


def _name(kind: str, meaning: object) -> str:
    """Long enough that nobody finds two meanings of one name: they are made of what users write."""
    return f"{kind}-{sha256(repr(meaning).encode())[:32]}"
