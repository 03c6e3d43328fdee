"""Where probes are counted: points in the order in which a packet passes them, as nftables objects. Pure.

A point's counter says that the packet came there; what lies between the last point that counted and the next is what stopped
it. Source: libnftables-json(5); the hooks' order: https://wiki.nftables.org/wiki-nftables/index.php/Netfilter_hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from lease.model import ip_text
from overlay.trace.probe import ICMP, Probe

FIRST, LAST = -500, 500
"""Priorities before and behind those that others use (nft(8): raw -300 to srcnat 100, our guard 300)."""
_INNER = 8 + 8 + 14
"""Where the inner IP header is, in bytes behind the start of the outer UDP header: UDP, VXLAN, Ethernet (RFC 7348)."""
_MARK, _HEADER = {4: 4, 6: 2}, {4: 20, 6: 40}
"""By family, where the probe's mark is in an IP header, and how long that is."""
_ICMP_HEADER, _SYN = 8, 2
PLAIN, TO_ANOTHER, FROM_ANOTHER, ERROR = "plain", "to another", "from another", "error"
"""How a packet may be seen: as it was sent; its destination changed on the way; its source changed; in place of the answer
an ICMP error about it."""


class Gap(Enum):
    """What lies before a point, for the operator: what may have stopped a packet that did not come there."""

    SENT = "the pod's own network: its route, interface and firewall"
    SENT_BY_NODE = "this node's own output: route and filters"
    BRIDGE = "the bridge: pod anti-spoofing, bridge filters"
    PREROUTING = "prerouting chains (raw, mangle, nat)"
    ROUTING = "the routing decision: ip rule, routes, rp_filter, forwarding"
    FORWARD = "forward chains: firewalls, policies"
    POSTROUTING = "postrouting chains, NAT"
    DEVICE = "the tunnel's device: MTU, neighbour and FDB entry"
    OUTPUT = "output chains, for the tunnel's packets"
    NEXT_HOP = "the next hop on the underlay: ARP"
    UNDERLAY = "the underlay between the nodes"
    OUTER_ROUTING = "the routing decision for the tunnel's packets: is the address still this node's, rp_filter"
    INPUT = "input chains, for the tunnel's packets: firewalls, our VXLAN guard"
    DECAPSULATION = "the tunnel's device: VNI, port, MAC, whether it is up"
    TUNNEL = "the tunnel: its device on either node, filters of its packets, the underlay between the nodes"
    NODE_INPUT = "input chains"
    NEIGHBOUR = "the pod's bridge: ARP, FDB, the port"
    ANSWER = "the destination: it did not take the packet, or did not answer"
    TAKEN = "the pod's interface: its MAC, what is behind it"


class Point(NamedTuple):
    """hook: of nftables; family: its, ip (also of IPv6: table_family), bridge or netdev; priority; iif, oif: names of
    interfaces, "": any. outer: the packet is inside one of the tunnel's, of UDP port `port`. back: it is the answer."""

    what: str
    gap: Gap
    family: str
    hook: str
    priority: int = FIRST
    iif: str = ""
    oif: str = ""
    outer: bool = False
    back: bool = False


class Names(NamedTuple):
    """Interfaces of a node: veth: the node's end of the pod's; beyond: by which the other node is reached, `tunnel`, or the
    underlay where that is direct. port: the tunnel's. "" and 0 where there is none."""

    veth: str
    bridge: str
    tunnel: str
    underlay: str
    port: int
    seen_inside: bool = True
    """Packets can be counted inside of the tunnel's: VXLAN's. Else between two nodes all is one gap."""

    @property
    def beyond(self) -> str:
        """The interface of packets of pods to the other node."""
        return self.tunnel or self.underlay


OF_TUNNEL = (Gap.DEVICE, Gap.OUTPUT, Gap.NEXT_HOP, Gap.UNDERLAY, Gap.OUTER_ROUTING, Gap.INPUT, Gap.DECAPSULATION)
"""What is one gap where packets cannot be counted inside of the tunnel's."""


def from_pod(names: Names) -> Iterator[Point]:
    """A packet from the pod into this node."""
    if names.veth:
        yield Point(f"came from the pod by {names.veth}", Gap.SENT, "netdev", "ingress", iif=names.veth)
    yield Point(
        f"came to this node by {names.bridge}",
        Gap.BRIDGE if names.veth else Gap.SENT,
        "ip",
        "prerouting",
        FIRST,
        names.bridge,
    )
    yield Point("passed prerouting", Gap.PREROUTING, "ip", "prerouting", LAST, names.bridge)


def onward(names: Names) -> Iterator[Point]:
    """It is forwarded, out of this node."""
    where = names.beyond
    by = f" to {where}" if where else ""
    yield Point(f"routed{by}", Gap.ROUTING, "ip", "forward", FIRST, names.bridge, where)
    yield Point("passed the forward chains", Gap.FORWARD, "ip", "forward", LAST, names.bridge, where)
    yield Point("left the IP stack", Gap.POSTROUTING, "ip", "postrouting", LAST, "", where)


def by_itself(names: Names) -> Iterator[Point]:
    """This node sends it."""
    where = names.beyond
    yield Point(f"sent{f' to {where}' if where else ''}", Gap.SENT_BY_NODE, "ip", "output", FIRST, "", where)
    yield Point("left the IP stack", Gap.OUTPUT, "ip", "postrouting", LAST, "", where)


def into_tunnel(names: Names, back: bool = False) -> Iterator[Point]:
    """It is put into a packet of the tunnel."""
    if names.tunnel and names.seen_inside:
        yield Point(f"{names.tunnel} put it into VXLAN", Gap.DEVICE, "ip", "output", FIRST, outer=True, back=back)
        yield Point(
            f"left this node by {names.underlay}", Gap.OUTPUT, "ip", "postrouting", LAST, "", names.underlay, True, back
        )


def out_of_tunnel(names: Names, back: bool = False) -> Iterator[Point]:
    """It comes from the other node."""
    if names.tunnel and names.seen_inside:
        yield Point(
            f"came by {names.underlay}, in VXLAN",
            Gap.UNDERLAY,
            "ip",
            "prerouting",
            FIRST,
            names.underlay,
            "",
            True,
            back,
        )
        yield Point("is for this node", Gap.OUTER_ROUTING, "ip", "input", FIRST, outer=True, back=back)
        yield Point("passed the input chains", Gap.INPUT, "ip", "input", LAST, outer=True, back=back)
    gap = Gap.UNDERLAY if not names.tunnel else Gap.DECAPSULATION if names.seen_inside else Gap.TUNNEL
    out = "took it out of VXLAN" if names.seen_inside else "took it out of the tunnel"
    how = out if names.tunnel else "brought it, without the tunnel"
    yield Point(f"{names.beyond} {how}", gap, "ip", "prerouting", FIRST, names.beyond, back=back)
    yield Point("passed prerouting", Gap.PREROUTING, "ip", "prerouting", LAST, names.beyond, back=back)


def to_pod(names: Names, back: bool = False) -> Iterator[Point]:
    """It is forwarded to a pod of this node."""
    yield Point(f"routed to {names.bridge}", Gap.ROUTING, "ip", "forward", FIRST, names.beyond, names.bridge, back=back)
    yield Point("passed the forward chains", Gap.FORWARD, "ip", "forward", LAST, names.beyond, names.bridge, back=back)
    yield Point("left the IP stack", Gap.POSTROUTING, "ip", "postrouting", LAST, "", names.bridge, back=back)
    yield from to_veth(names, Gap.NEIGHBOUR, back)


def to_veth(names: Names, gap: Gap, back: bool = False) -> Iterator[Point]:
    """By the bridge to the pod's port, or to any where that is not known."""
    if not names.veth:
        yield Point(f"given to a port of {names.bridge}", gap, "bridge", "postrouting", LAST, back=back)
    else:
        yield Point(f"given to the pod by {names.veth}", gap, "bridge", "postrouting", LAST, "", names.veth, back=back)


def to_node(names: Names) -> Iterator[Point]:
    """It is for the node itself."""
    yield Point("is for this node itself", Gap.ROUTING, "ip", "input", FIRST, names.beyond)
    yield Point("given to this node", Gap.NODE_INPUT, "ip", "input", LAST, names.beyond)


def answered(names: Names) -> Iterator[Point]:
    """The pod's answer, until it leaves the node."""
    if names.veth:
        yield Point("the pod answered", Gap.ANSWER, "netdev", "ingress", iif=names.veth, back=True)
    yield Point("the answer was routed", Gap.ROUTING, "ip", "forward", FIRST, names.bridge, names.beyond, back=True)
    yield Point(
        "the answer passed the forward chains",
        Gap.FORWARD,
        "ip",
        "forward",
        LAST,
        names.bridge,
        names.beyond,
        back=True,
    )
    yield Point("the answer left the IP stack", Gap.POSTROUTING, "ip", "postrouting", LAST, "", names.beyond, back=True)
    yield from into_tunnel(names, True)


# --- as nftables objects


def objects(points: Iterable[Point], probe: Probe, port: int, table: str) -> dict[str, list[dict[str, Any]]]:
    """By nftables' family, what its table holds: a chain for each hook, a rule for each way of seeing the packet at a point,
    with the place of the point as comment."""
    made: dict[str, dict[tuple[str, int, str], str]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for place, point in enumerate(points):
        family = table_family(point, probe)
        device = point.iif if point.family == "netdev" else ""
        chains = made.setdefault(family, {})
        those = found.setdefault(family, [])
        key = point.hook, point.priority, device
        if key not in chains:
            chains[key] = name = f"c{len(chains)}"
            chain: dict[str, Any] = {
                "family": family, "table": table, "name": name, "type": "filter", "hook": point.hook,
                "prio": point.priority, "policy": "accept",
            }  # fmt: skip
            those.append({"chain": {**chain, "dev": device} if device else chain})
        for seen, match in _matches(point, probe, port):
            rule = {"family": family, "table": table, "chain": chains[key], "comment": f"{place} {seen}"}
            those.append(
                {"rule": {**rule, "expr": [*_interfaces(point), *match, {"counter": {"packets": 0, "bytes": 0}}]}}
            )
    return found


def table_family(point: Point, probe: Probe) -> str:
    """Of the table that counts a probe at a point."""
    return probe.family.nft if point.family == "ip" else point.family


def counted(listed: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, str, int]]:
    """Of a table as it was read: the place of a point, the way of seeing, and how many packets."""
    for item in listed:
        rule = item.get("rule")
        if rule is None or " " not in str(rule.get("comment", "")):
            continue
        place, _, seen = rule["comment"].partition(" ")
        packets = sum(each["counter"]["packets"] for each in rule["expr"] if "counter" in each)
        yield int(place), seen, packets


def _interfaces(point: Point) -> Iterator[dict[str, Any]]:
    for key, name in (("iifname", point.iif), ("oifname", point.oif)):
        if name and point.family != "netdev":
            yield _equal({"meta": {"key": key}}, name)


def _matches(point: Point, probe: Probe, port: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    yield from _matches_outer(point, probe, port) if point.outer else _matches_bare(point, probe)


def _matches_outer(point: Point, probe: Probe, port: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Inside of a packet of the tunnel."""
    size, ip = probe.family.size, probe.family
    head = [_equal(_field("udp", "dport"), port)]
    from_at, to_at = _INNER + ip.source_at, _INNER + ip.destination_at
    if point.back:
        ends = [*head, _raw(from_at, size, probe.destination), _raw(to_at, size, probe.source)]
        yield PLAIN, [*ends, *_answers(probe, True)]
        if probe.protocol != "icmp":
            at = _INNER + _HEADER[probe.version]
            quoted = at + _ICMP_HEADER + _MARK[probe.version]
            yield ERROR, [*ends, _raw(at, 1, ICMP[probe.version].unreachable), _raw(quoted, 2, probe.ip_id)]
        return
    marked = [*head, _raw(_INNER + _MARK[probe.version], 2, probe.ip_id)]
    from_it, to_it = _raw(from_at, size, probe.source), _raw(to_at, size, probe.destination)
    yield PLAIN, [*marked, from_it, to_it, *_kept(probe, True, True, True)]
    yield TO_ANOTHER, [*marked, from_it, _not(to_it), *_kept(probe, True, True, False)]
    yield FROM_ANOTHER, [*marked, _not(from_it), to_it, *_kept(probe, True, False, True)]


def _matches_bare(point: Point, probe: Probe) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    source, destination = (ip_text(probe.version, end) for end in (probe.source, probe.destination))
    ip = probe.family.nft
    protocol = _equal({"meta": {"key": "l4proto"}}, probe.name)
    if point.back:
        to_source = _equal(_field(ip, "daddr"), source)
        yield PLAIN, [to_source, protocol, *_answers(probe, False)]
        if probe.protocol != "icmp":
            quoted = _raw(_ICMP_HEADER + _MARK[probe.version], 2, probe.ip_id)
            icmp = "icmp" if probe.version == 4 else "icmpv6"
            yield ERROR, [to_source, _equal(_field(icmp, "type"), "destination-unreachable"), quoted]
        return
    from_it, to_it = _equal(_field(ip, "saddr"), source), _equal(_field(ip, "daddr"), destination)
    marked = [protocol, _raw(_MARK[probe.version], 2, probe.ip_id, base="nh")]
    yield PLAIN, [from_it, to_it, *marked, *_kept(probe, False, True, True)]
    yield TO_ANOTHER, [from_it, _not(to_it), *marked, *_kept(probe, False, True, False)]
    yield FROM_ANOTHER, [_not(from_it), to_it, *marked, *_kept(probe, False, False, True)]


def _kept(probe: Probe, outer: bool, source: bool, destination: bool) -> list[dict[str, Any]]:
    """What NAT leaves alone, by which packets of others that have the same mark are told apart (identifications of each
    socket count up through all): of TCP that it is a first SYN, of UDP its length, of ICMP (whose identifier NAT may change)
    the type. source, destination: those ends were not changed, nor their ports."""
    at = _INNER + _HEADER[probe.version] if outer else 0
    if probe.protocol == "icmp":
        kinds = [_raw(at, 1, ICMP[probe.version].request)]
        return [*kinds, _raw(at + 4, 2, probe.ident)] if source else kinds
    ports = [_raw(at, 2, probe.ident)] if source else []
    ports += [_raw(at + 2, 2, probe.port)] if destination else []
    if probe.protocol == "udp":
        return [*ports, _raw(at + 4, 2, probe.data + 8)]
    return [*ports, _raw(at + 8, 4, 0), _raw(at + 13, 1, _SYN)]


def _not(match: dict[str, Any]) -> dict[str, Any]:
    inner = match["match"]
    return {"match": {**inner, "op": "!="}}


def _answers(probe: Probe, outer: bool) -> list[dict[str, Any]]:
    """What says that a packet is an answer to the probe."""
    if outer:
        at = _INNER + _HEADER[probe.version]
        if probe.protocol == "icmp":
            return [_raw(at, 1, ICMP[probe.version].answer), _raw(at + 4, 2, probe.ident)]
        return [_raw(at, 2, probe.port), _raw(at + 2, 2, probe.ident)]
    if probe.protocol == "icmp":
        return [_equal(_field(probe.name, "type"), "echo-reply"), _equal(_field(probe.name, "id"), probe.ident)]
    return [_equal(_field(probe.protocol, "sport"), probe.port), _equal(_field(probe.protocol, "dport"), probe.ident)]


def _field(protocol: str, name: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": name}}


def _raw(at: int, size: int, value: int, base: str = "th") -> dict[str, Any]:
    """size: bytes. JSON has no numbers of an IPv6 address's size: nft reads them as text."""
    return _equal({"payload": {"base": base, "offset": at * 8, "len": size * 8}}, value if size < 8 else f"{value:#x}")


def _equal(left: dict[str, Any], right: Any, operator: str = "==") -> dict[str, Any]:
    return {"match": {"op": operator, "left": left, "right": right}}
