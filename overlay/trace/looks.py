"""What the kernel and the agent say of each part of a packet's way: why it may not get on from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lease.families import V4, Family
from lease.model import ip_text
from overlay.kernel.netlink import KernelError, RequestSocket, error_text
from overlay.kernel.route.entries import Link
from overlay.kernel.route.links import client_ports
from overlay.kernel.route.lookup import Packet
from overlay.reach import foreign_rules, ways
from overlay.reach.causes import Causes
from overlay.reach.filters import Flow
from overlay.trace import pods
from overlay.trace.node import Node, Peer, Pod
from overlay.trace.points import Gap
from overlay.trace.probe import Probe

_INNER = {
    "ingress": Gap.BRIDGE, "prerouting": Gap.PREROUTING, "forward": Gap.FORWARD, "postrouting": Gap.POSTROUTING,
    "egress": Gap.DEVICE, "input": Gap.NODE_INPUT,
}  # fmt: skip
"""By hook, where packets are missed that a rule there drops; of those that arrive: _ARRIVING."""
_ARRIVING = {**_INNER, "ingress": Gap.DECAPSULATION, "egress": Gap.NEIGHBOUR}
_OUTER = {
    "output": Gap.OUTPUT, "postrouting": Gap.OUTPUT, "egress": Gap.OUTPUT, "ingress": Gap.UNDERLAY,
    "prerouting": Gap.OUTER_ROUTING, "input": Gap.INPUT,
}  # fmt: skip
Found = Iterator[tuple[Gap, str]]


class Looks:
    """Of one node, about one probe's way through it."""

    def __init__(
        self,
        node: Node,
        requests: RequestSocket,
        probe: Probe,
        reader: foreign_rules.Reader,
        back: bool = False,
        family: Family = V4,
    ) -> None:
        """reader: of the rules of others; back: about the probe's answer."""
        if back:
            port = 0 if probe.protocol == "icmp" else probe.ident
            probe = probe._replace(source=probe.destination, destination=probe.source, port=port)
        self._node, self._requests, self._probe, self._family = node, requests, probe, family
        self._back, self._reader = back, reader
        names = {index: link.name for index, link in node.links.items()}
        self._causes = Causes(family, requests, node.network, names)

    def leaving(self, pod: Pod, peer: Peer | None) -> Found:
        """From a pod of this node to another node, or (peer None) to somewhere else."""
        for gap, line in pods.port(self._node, pod, Gap.BRIDGE, self._requests):
            yield gap, line
            yield Gap.SENT, line  # a pod that finds no gateway sends nothing
        yield from self._below(self._flow(pod.link.name if pod.link is not None else "", ""), Gap.BRIDGE)
        bridge = self._node.number_of(self._node.bridge)
        oif, via = self._beyond(peer)
        yield from self._routing(Packet(self._probe.destination, self._probe.source, bridge), oif, via)
        beyond = "" if peer is None else self._node.underlay if peer.direct else self._node.tunnel
        yield from self._filters(self._flow(self._node.bridge, beyond), _INNER)
        if peer is not None:
            yield from self._tunnel(peer)

    def sent(self, peer: Peer | None) -> Found:
        """From this node itself."""
        oif, via = self._beyond(peer)
        yield from ((Gap.SENT_BY_NODE, line) for _, line in self._routing(Packet(self._probe.destination), oif, via))
        beyond = "" if peer is None else self._node.underlay if peer.direct else self._node.tunnel
        yield from self._filters(self._flow("", beyond), {**_OUTER})
        if peer is not None:
            yield from self._tunnel(peer)

    def _beyond(self, peer: Peer | None) -> tuple[int, int | None]:
        if peer is None:
            return 0, None
        if peer.direct:
            return self._node.number_of(self._node.underlay), peer.public_ip
        return self._node.number_of(self._node.tunnel), None

    def _tunnel(self, peer: Peer) -> Found:
        """What carries it to the peer."""
        node = self._node
        if peer.missing:
            yield Gap.DEVICE, f"this node lacks {', '.join(peer.missing)} of {peer.name}: overlay status says why"
        for name, gaps in ((node.tunnel, (Gap.DEVICE,)), (node.underlay, (Gap.OUTPUT, Gap.NEXT_HOP))):
            if line := _link_fault(name, node.link(name)):
                yield from ((gap, line) for gap in gaps)
        yield from self._next_hop(peer)
        if peer.direct:
            return
        udp = 17 if node.port else 0
        outer = Packet(peer.public_ip, node.local, 0, node.number_of(node.underlay), 0, udp, node.port)
        yield from ((Gap.OUTPUT, line) for _, line in self._routing(outer, 0, None, ways.OUTER))
        if node.port:
            flow = Flow(self._family.nft, "", node.underlay, node.local, peer.public_ip, "udp", node.port, "the tunnel")
            yield from self._filters(flow._replace(sports=self._sports()), _OUTER)
        lines = pods.queues(node, (node.tunnel, node.underlay), self._requests)
        yield from ((gap, line) for line in lines for gap in (Gap.OUTPUT, Gap.UNDERLAY))

    def _next_hop(self, peer: Peer) -> Found:
        """Whether anybody answers ARP where the underlay's packets to the peer go."""
        node = self._node
        way = self._requests.way(self._family, Packet(peer.public_ip))
        if way.oif != node.number_of(node.underlay):
            return
        hop = way.via or peer.public_ip
        if not _link_fault(node.underlay, node.link(node.underlay)) and pods.is_silent(
            self._requests, self._family, way.oif, hop
        ):
            asks, text = "ARP" if self._family.by_arp else "neighbour discovery", ip_text(self._family.number, hop)
            line = f"nobody answers {asks} for {text} on {node.underlay}: is that node up, and its link?"
            yield Gap.NEXT_HOP, line
            yield Gap.UNDERLAY, line

    def arriving(self, pod: Pod | None, peer: Peer | None) -> Found:
        """From another node to a pod of this one, or (None) to the node itself."""
        node = self._node
        if peer is None:
            yield (
                Gap.INPUT,
                f"no peer is known here whose pods have {ip_text(self._probe.version, self._probe.source)}: overlay status",
            )
        direct = peer is not None and peer.direct
        beyond = node.underlay if direct else node.tunnel
        link = node.link(beyond)
        if link is None or not link.up:
            yield Gap.DECAPSULATION, f"{beyond} is {'not there' if link is None else 'down'}: overlay status says why"
        if peer is not None and not direct:
            flow = Flow(self._family.nft, node.underlay, "", peer.public_ip, node.local, "udp", node.port, "the tunnel")
            if node.port:
                yield from self._below(flow, Gap.UNDERLAY)
            underlay = node.number_of(node.underlay)
            question = ways.incoming(node.local, peer.public_ip, underlay, 17 if node.port else 0, node.port)
            yield from ((Gap.OUTER_ROUTING, line) for _, line in self._routing(question.packet, 0, None, ways.INCOMING))
            if node.port:
                yield from self._filters(flow._replace(sports=self._sports()), _OUTER)
        if direct:
            yield from self._below(self._flow(beyond, ""), Gap.UNDERLAY)
        packet = Packet(self._probe.destination, self._probe.source, node.number_of(beyond))
        if pod is None:
            yield from self._filters(self._flow(beyond, ""), _ARRIVING)
            return
        bridge = node.link(node.bridge)
        if bridge is not None and not bridge.up:
            yield Gap.ROUTING, f"{bridge.name} is down: ip link set {bridge.name} up"
        yield from self._routing(packet, node.number_of(node.bridge), None)
        yield from self._filters(self._flow(beyond, node.bridge), _ARRIVING)
        yield from self.given(pod)

    def forwarded(self) -> Found:
        """From a pod of this node to another of it, which the node forwards."""
        here = self._node.bridge
        packet = Packet(self._probe.destination, self._probe.source, self._node.number_of(here))
        yield from self._routing(packet, self._node.number_of(here), None)
        yield from self._filters(self._flow(here, here), _INNER)

    def _sports(self) -> tuple[int, int]:
        """The ports that the tunnel's packets come from: VXLAN takes one for each flow, WireGuard the one it listens on."""
        return client_ports() if self._node.kind == "vxlan" else (self._node.port, self._node.port)

    def given(self, pod: Pod) -> Found:
        """By the bridge to a pod of this node."""
        yield from pods.port(self._node, pod, Gap.NEIGHBOUR, self._requests)
        yield from self._below(self._flow("", pod.link.name if pod.link is not None else ""), Gap.NEIGHBOUR)
        yield from pods.given(self._node, pod, self._requests, self._family)

    def _below(self, flow: Flow, gap: Gap) -> Found:
        try:
            yield from ((gap, line) for line in foreign_rules.findings_below(self._family, flow, self._reader))
        except KernelError as error:
            yield gap, f"rules of other programs below IP could not be read: {error_text(error)}"

    def _flow(self, iif: str, oif: str) -> Flow:
        probe = self._probe
        return Flow(
            self._family.nft, iif, oif, probe.source, probe.destination, probe.name, probe.port, "these packets",
            self._back, size=probe.size,
        )  # fmt: skip

    def _filters(self, flow: Flow, gaps: dict[str, Gap]) -> Found:
        try:
            for hook, subject, line, what in foreign_rules.findings(self._family, [flow], self._reader):
                if hook in gaps and subject != foreign_rules.MASQUERADES:
                    yield gaps[hook], line.replace("{these}", what)
        except KernelError as error:
            yield next(iter(gaps.values())), f"rules of other programs could not be read: {error_text(error)}"

    def _routing(self, packet: Packet, oif: int, via: int | None, what: str = "") -> Found:
        packet = packet._replace(protocol=packet.protocol or self._probe.number, port=packet.port or self._probe.port)
        question = ways.Question(packet, oif, via, what)
        way = self._requests.way(self._family, packet)
        if (oif and not ways.is_as_asked(question, way)) or way.error:
            yield (
                Gap.ROUTING,
                f"these packets {self._causes.happens(question, way)}: {self._causes.cause(question, way)}",
            )


def _link_fault(name: str, link: Link | None) -> str:
    if link is None:
        return f"{name} is not there"
    if not link.up:
        return f"{name} is down: ip link set {name} up"
    return "" if link.carrier else f"{name} has no carrier"


class Deltas(NamedTuple):
    """What our own tables dropped meanwhile: of packets of any sender."""

    before: dict[str, int]
    after: dict[str, int]

    def lines(self) -> Found:
        """What it may have been."""
        for name, count in self.after.items():
            more = count - self.before.get(name, 0)
            if more > 0:
                gap = _OURS.get(name)
                where = "guard" if gap is not Gap.BRIDGE else "pod anti-spoofing"
                what = name.removeprefix("dropped_").replace("_", " ")
                if gap is not None:
                    yield gap, f"our {where} dropped {more} packets meanwhile ({what})"


_OURS = {
    "dropped_from_unknown_senders": Gap.INPUT,
    "dropped_from_pods": Gap.INPUT,
    "dropped_beside_the_tunnel": Gap.PREROUTING,
    "dropped_forwarded": Gap.FORWARD,
    "dropped_spoofed": Gap.BRIDGE,
}
