"""What is compiled, as the content of one nftables table, and which conntrack generation it is. Pure.

Each packet between pods is judged by its connection's tuples: the source of the original direction, the source of the
reply (the target after translation), protocol and port. Those are the same for requests, replies, fragments and ICMP errors,
so that one set of rules judges all of them, in the forward hook alone: a node may always talk to its own pods, which does
not pass there.

A connection that was let through is marked with the generation of the table, and not judged again in it
(generations.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lease.families import FAMILIES, V6
from lease.model import Prefix, mask
from overlay.kernel.nftables import expressions as nf
from overlay.kernel.nftables.content import (
    INTERVALS,
    PLAIN,
    RANGES,
    VERDICTS,
    Content,
    Elements,
    Form,
    Rules,
    Table,
    port_key,
)
from overlay.kernel.nftables.wire import (
    ADDRESS,
    DROP,
    META_NFPROTO,
    differ,
    equal,
    found_in,
    goto,
    load,
    masked,
    meta,
)
from overlay.policy.compile import ADDRESSES, NAMED, NETWORKS, Chain, Compiled, Judged, Members, drops
from overlay.policy.generations import DOUBTFUL, FORWARD, STRAYS, forward, slot_of
from overlay.policy.model import ACCEPT, DENY, EGRESS, INGRESS, NAMESPACED, PASS

SUFFIX = "-policy"
_FIRST_GROUP = 4789
LOGGED_BYTES, LOGS_PER_S, LOG_BURST = 96, 10, 20
"""Of a packet; of each chain."""
_STRAY_OUT, _STRAY_IN = "stray-out", "stray-in"
_INET_PROTO, _INET_SERVICE = 12, 13
_PORT_TYPE = _INET_PROTO << 6 | _INET_SERVICE
_OTHER = {INGRESS: nf.ORIGINAL, EGRESS: nf.REPLY}
"""In whose tuple the far end's address is the source."""
_OWN = {INGRESS: nf.REPLY, EGRESS: nf.ORIGINAL}
_NEXT_HEADER_AT, _ICMPV6_FROM_THE_LINK, _TYPE_AT, _SOLICIT_AND_ADVERT = 6, b"\x3a\xff", 40, (135, 136)
"""IPv6's next header and hop limit, ICMPv6 and 255; where that has its type (RFC 8200, RFC 4861)."""
BY_UNKNOWN = "a pod of this node that is not known yet"
ITSELF = "a pod to itself"
STRAY = "no connection's, and some rule denies"
DENIED, DENIES, PASSES = "no policy allows it", " denies", " passes"
BY_RULE = "/"
"""Behind the chain's name in what the log says: which of its rules denied."""


def table(network: int) -> Table:
    """Which table a network has."""
    return Table("inet", f"overlay-{network}{SUFFIX}")


def log_group(network: int) -> int:
    """The NFLOG group in which a network's denied packets are told to who listens (`overlay flows`)."""
    return _FIRST_GROUP + slot_of(network)


def map_name(direction: str, family: int) -> str:
    """The map that says which chain judges a pod of this node."""
    return f"{'in' if direction == INGRESS else 'out'}{family}"


class Maker:
    """Makes a table's content of what is compiled. What did not change is the same value again, so that a difference costs
    what changed."""

    def __init__(self, network: int = 1) -> None:
        self._slot, self._group = slot_of(network), log_group(network)
        self._elements: dict[str, tuple[Members, Elements]] = {}
        self._rules: dict[str, Rules] = {}
        """Of chains, whose names say what they are, in this form: families, logs."""
        self._form: tuple[int, ...] = ()

    def content(self, compiled: Compiled, subnets: Sequence[Prefix], generation: int, logs: bool = True) -> Content:
        """subnets: those of this node, whose pods it must know; logs: whether this kernel has NFLOG."""
        sets = {name: self._of(name, members) for name, members in compiled.sets.items()}
        self._elements = {name: self._elements[name] for name in sets}
        families = sorted({subnet.family for subnet in subnets})
        for family in families:
            size, kind = FAMILIES[family].size, ADDRESS[family]
            for direction in (INGRESS, EGRESS):
                judged = compiled.pods[direction].items()
                heads = {address: chain for address, chain in judged if len(address) == size}
                sets[map_name(direction, family)] = Elements(Form(kind, size, VERDICTS), chains=heads)
            alone = {address for those in compiled.pods.values() for address in those if len(address) == size}
            sets[f"self{family}"] = Elements(
                Form(kind << 6 | kind, 2 * size), frozenset(address * 2 for address in alone)
            )
        form = (*families, logs)
        known = self._rules if form == self._form else {}
        chains = {
            name: known.get(name) or Rules(tuple(_judging(name, chain, compiled, families, self._group if logs else 0)))
            for name, chain in compiled.chains.items()
        }
        self._form, self._rules = form, dict(chains)
        for direction in (EGRESS, INGRESS):
            chains[direction] = Rules(tuple(_known(direction, subnets, families)))
        chains[_STRAY_OUT] = Rules(tuple(_by_header(EGRESS, subnets, families)))
        chains[_STRAY_IN] = Rules(tuple(_by_header(INGRESS, subnets, families)))
        both = (nf.jump(_STRAY_OUT), ""), (nf.jump(_STRAY_IN), ""), (nf.ACCEPT, "")
        chains[STRAYS] = Rules((*(_neighbour_discovery() if 6 in families else ()), *both))
        chains[FORWARD] = forward(generation, self._slot)
        return Content(sets, chains)

    def _of(self, name: str, members: Members) -> Elements:
        known = self._elements.get(name)
        if known is not None and known[0] is members:
            return known[1]
        made = _elements(members)
        if known is not None and known[1] == made:
            made = known[1]
        self._elements[name] = members, made
        return made


def _elements(members: Members) -> Elements:
    if members.kind == ADDRESSES:
        return Elements(Form(ADDRESS[members.family], FAMILIES[members.family].size), members.addresses)
    if members.kind == NETWORKS:
        size = FAMILIES[members.family].size
        form = Form(ADDRESS[members.family], size, INTERVALS)
        return Elements(form, frozenset(_edges(members.ranges, size)))
    if members.kind == NAMED:
        size = FAMILIES[members.family].size
        form = Form((ADDRESS[members.family] << 6 | _INET_PROTO) << 6 | _INET_SERVICE, size + 8)
        return Elements(form, members.named)
    if all(first == last for _, first, last in members.ports):
        keys = (port_key(protocol, first) for protocol, first, _ in members.ports)
        return Elements(Form(_PORT_TYPE, 8, PLAIN), frozenset(keys))
    pairs = (port_key(protocol, first) + port_key(protocol, last) for protocol, first, last in members.ports)
    return Elements(Form(_PORT_TYPE, 8, RANGES, (1, 2)), frozenset(pairs))


def _edges(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[bytes]:
    """Where each range begins, and where what comes after it begins: nowhere behind the last address of all."""
    for first, last in ranges:
        yield first.to_bytes(size, "big") + b"\0"
        if last + 1 < 1 << 8 * size:
            yield (last + 1).to_bytes(size, "big") + b"\1"


def _judging(
    name: str, chain: Chain, compiled: Compiled, families: Sequence[int], group: int
) -> Iterator[tuple[bytes, str]]:
    """Returns what a rule accepts, drops what one denies, hands over what one passes; at its end a NetworkPolicy's drops the
    rest, any other hands it over."""
    then = goto(chain.then) if chain.then else nf.RETURN
    closed = chain.tier == NAMESPACED
    if drops(chain) and not closed:
        yield nf.ct(nf.STATE) + masked(DOUBTFUL) + differ(bytes(4)) + nf.COUNT + DROP, STRAY
        yield from _to_itself(families)
    for place, rule in enumerate(chain.rules):
        matching = _matching(rule, chain.direction, compiled)
        comment = f"{rule.policy} {chain.direction} {rule.place}"
        if rule.action == DENY and group:
            yield matching + _logged(group, f"{name}{BY_RULE}{place}"), ""
        verdict = {ACCEPT: nf.RETURN, DENY: DROP, PASS: then}[rule.action]
        ending = {ACCEPT: "", DENY: DENIES, PASS: PASSES}[rule.action]
        yield matching + nf.COUNT + verdict, f"{comment}{ending}"
    if not closed:
        yield then, ""
        return
    yield from _to_itself(families)
    if group:
        yield _logged(group, name), ""
    yield nf.COUNT + DROP, DENIED


def _matching(rule: Judged, direction: str, compiled: Compiled) -> bytes:
    expressions = b""
    if rule.peers:
        peers = compiled.sets[rule.peers]
        expressions += nf.ct(nf.SOURCE[peers.family], _OTHER[direction])
        expressions += found_in(rule.peers)
    if rule.ports:
        ports = compiled.sets[rule.ports]
        at = 0
        if ports.kind == NAMED:
            expressions += nf.ct(nf.SOURCE[ports.family], nf.REPLY)
            at += FAMILIES[ports.family].size // 4
        expressions += nf.ct(nf.L4PROTO, place=at) + nf.ct(nf.PROTO_SRC, nf.REPLY, at + 1)
        expressions += found_in(rule.ports)
    return expressions


def _to_itself(families: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    for family in families:
        second = FAMILIES[family].size // 4
        both = nf.ct(nf.SOURCE[family], nf.ORIGINAL) + nf.ct(nf.SOURCE[family], nf.REPLY, second)
        yield both + found_in(f"self{family}") + nf.RETURN, ITSELF


def _logged(group: int, prefix: str) -> bytes:
    return nf.limit(LOGS_PER_S, LOG_BURST) + nf.log_to(group, prefix, LOGGED_BYTES)


def _known(direction: str, subnets: Sequence[Prefix], families: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    """The pod of this node at one end: as its chain says, if it is known; if not, it waits."""
    for number in families:
        yield from _by_map(nf.ct(nf.SOURCE[number], _OWN[direction]), direction, number, subnets)


def _by_header(direction: str, subnets: Sequence[Prefix], families: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    """The same of a packet that no connection has, by its own addresses: what judges by connections lets none through."""
    for number in families:
        family = FAMILIES[number]
        at = family.source_at if direction == EGRESS else family.destination_at
        own = meta(META_NFPROTO) + equal(bytes([family.nft_number])) + load("network", at, family.size)
        yield from _by_map(own, direction, number, subnets)


def _by_map(own: bytes, direction: str, number: int, subnets: Sequence[Prefix]) -> Iterator[tuple[bytes, str]]:
    """own: what puts the pod's address into the registers."""
    yield own + nf.verdict_of(map_name(direction, number)), ""
    for subnet in subnets:
        if subnet.family == number:
            yield own + _within(subnet) + nf.COUNT + DROP, BY_UNKNOWN


def _neighbour_discovery() -> Iterator[tuple[bytes, str]]:
    """What is bridged, and seen here where br_netfilter is; conntrack leaves it out. A router has taken one off the hop
    limit of all else before this hook (RFC 4861, 7.1; net/ipv6/ip6_output.c)."""
    of_ipv6 = meta(META_NFPROTO) + equal(bytes([V6.nft_number]))
    of_ipv6 += load("network", _NEXT_HEADER_AT, 2) + equal(_ICMPV6_FROM_THE_LINK) + load("network", _TYPE_AT, 1)
    for kind in _SOLICIT_AND_ADVERT:
        yield of_ipv6 + equal(bytes([kind])) + nf.ACCEPT, "neighbours are found on the link"


def _within(subnet: Prefix) -> bytes:
    family = FAMILIES[subnet.family]
    return masked(family.packed(mask(subnet.family, subnet.length))) + equal(family.packed(subnet.base))
