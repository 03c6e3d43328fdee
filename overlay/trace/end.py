"""One node's part of a trace: which points probes pass here, their counters, and what the look-ups say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lease.model import ip_text, prefix
from overlay.kernel import namespaces
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.nftables import program
from overlay.reach.foreign_rules import Reader
from overlay.trace import leftovers, pods
from overlay.trace import node as nodes
from overlay.trace import points as way
from overlay.trace.leftovers import TABLE_PREFIX
from overlay.trace.looks import Deltas, Looks
from overlay.trace.node import Peer, Pod, WrongEnds
from overlay.trace.points import OF_TUNNEL, Gap, Point
from overlay.trace.policies import denials
from overlay.trace.probe import Probe

_LEAVING = Gap.SENT, Gap.BRIDGE, Gap.PREROUTING, Gap.ROUTING
"""Where packets of a pod are missed that it sends to somebody else than the gateway."""
OVER_S = 120.0
"""No trace lasts so long."""


class Passed(NamedTuple):
    """What was counted at a point. counts: packets by how they were seen (points.PLAIN...)."""

    node: str
    point: Point
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Packets, however seen."""
        return sum(self.counts.values())


Part = tuple[Gap, bool]
"""Of the packet's way, or (True) of its answer's."""
Looked = dict[Part, list[str]]
_Look = Callable[[], Iterator[tuple[Gap, str]]]


def _nothing() -> Iterator[tuple[Gap, str]]:
    return iter(())


class End:
    """A node through which probes go. To be closed."""

    def __init__(self, found: Mapping[str, Any], probe: Probe) -> None:
        """found: the agent's status, as a view of the probe's family. Raises NotTraceable, KernelError."""
        family = probe.family
        self._requests = RequestSocket()
        self._probe, self._family = probe, family
        self._table = f"{TABLE_PREFIX}{int(time.time())}_{probe.ip_id:04x}"
        try:
            self.node = nodes.read(found, self._requests, family)
            self.source = self._pod(probe.source)
            self.destination = self._pod(probe.destination)
            self.namespace = self._namespace(self.source)
            """Of the source, where it is a pod of this node; None where it cannot be entered from here."""
            self._decide(found)
        except BaseException:
            self._requests.close()
            raise

    def _namespace(self, pod: Pod | None) -> str | None:
        if pod is None or not pod.mac:
            return None
        return namespaces.namespace_of(self._family, pod.address, pod.mac)

    def _pod(self, address: int) -> Pod | None:
        own = self.node.own.holds(address) and not self.node.is_own(address)
        return nodes.pod_of(self.node, self._requests, address, self._family) if own else None

    def _decide(self, found: Mapping[str, Any]) -> None:
        """Which way it is."""
        node, probe = self.node, self._probe
        ours = node.is_own(probe.source), node.is_own(probe.destination)
        self.peer: Peer | None = node.peer_of(probe.destination)
        self.there: list[Point]
        self.back: list[Point] = []
        self.arrives = False
        """The other end is this node's, the first another's."""
        reader = Reader(self._family)
        looks = Looks(node, self._requests, probe, reader, False, self._family)
        back = Looks(node, self._requests, probe, reader, True, self._family)
        local = self.source is not None, self.destination is not None
        self._policies: _Look = lambda: denials(found, probe, local)
        self._look: _Look
        self._look_back: _Look = _nothing
        if self.source is not None and self.source.link is None and self.namespace is None:
            raise WrongEnds(f"no pod of this node has {ip_text(probe.version, probe.source)}")
        if self.source is not None and self.destination is not None:
            self._between(looks)
        elif self.source is not None or ours[0]:
            if ours[1]:
                raise WrongEnds("that is this node itself, from itself or one of its pods: it needs no tunnel")
            if self.destination is not None:
                raise WrongEnds("from this node to its own pod no tunnel is needed: overlay check asks it")
            self._leaving(looks, back)
        elif self.destination is not None or ours[1]:
            self._arriving(looks, back)
        else:
            ends = (ip_text(probe.version, end) for end in (probe.source, probe.destination))
            raise WrongEnds(f"neither {' nor '.join(ends)} is of this node")

    def _between(self, looks: Looks) -> None:
        assert self.source is not None
        assert self.destination is not None
        one = self.node.names(self.source, direct=False)
        other = self.node.names(self.destination, direct=False)
        source, destination = self.source, self.destination
        if self.node.lifted:
            here = self.node.bridge
            one, other = (each._replace(tunnel="", underlay=here) for each in (one, other))
            self.there = [*way.from_pod(one), *way.to_pod(other)]
            self.back = [*way.answered(other), *way.to_veth(one, Gap.NEIGHBOUR, True)]
            self._look = lambda: _both(looks.forwarded(), _both(looks.given(source), looks.given(destination)))
            return
        self.there = [next(way.from_pod(one)), *way.to_veth(other, Gap.BRIDGE)] if one.veth else []
        self.back = [*list(way.answered(other))[: bool(other.veth)], *way.to_veth(one, Gap.BRIDGE, True)]
        self._look = lambda: _both(looks.given(source), ((Gap.BRIDGE, line) for _, line in looks.given(destination)))

    def _leaving(self, looks: Looks, back: Looks) -> None:
        node, source, peer = self.node, self.source, self.peer
        names = node.names(source, peer is not None and peer.direct, tunnel=peer is not None)
        if source is not None and self.namespace is None:  # this node sends in its name
            pod = source
            self.there = [*way.by_itself(names), *way.into_tunnel(names)]
            self.back = [*way.out_of_tunnel(names, True), *way.to_pod(names, True)] if peer is not None else []
            self._look = lambda: looks.leaving(pod, peer)
        elif source is not None:
            self.there = [*way.from_pod(names), *way.onward(names), *way.into_tunnel(names)]
            self.back = [*way.out_of_tunnel(names, True), *way.to_pod(names, True)] if peer is not None else []
            pod = source
            self._look = lambda: looks.leaving(pod, peer)
        else:
            self.there = [*way.by_itself(names), *way.into_tunnel(names)]
            self.back = list(way.out_of_tunnel(names, True)) if peer is not None else []
            self._look = lambda: looks.sent(peer)
        if peer is not None:
            self._look_back = lambda: back.arriving(source, peer)

    def _arriving(self, looks: Looks, back: Looks) -> None:
        node, pod = self.node, self.destination
        self.arrives, self.peer = True, node.peer_of(self._probe.source)
        peer = self.peer or self._by_public_ip()
        names = node.names(pod, peer is not None and peer.direct)
        last = way.to_pod(names) if pod is not None else way.to_node(names)
        self.there = [*way.out_of_tunnel(names), *last]
        self.back = list(way.answered(names)) if pod is not None else list(way.into_tunnel(names, True))
        self._look = lambda: looks.arriving(pod, peer)
        if pod is not None and peer is not None:
            self._look_back = lambda: back.leaving(pod, peer)

    def _by_public_ip(self) -> Peer | None:
        """Of packets that another node sends itself."""
        source = ip_text(self._family.number, self._probe.source)
        subnet = next((each["subnet"] for each in self.node.peers if each["public_ip"] == source), None)
        return None if subnet is None else self.node.peer_of(prefix(subnet).base)

    @property
    def inside(self) -> bool:
        """Both ends are pods of this node."""
        return self.source is not None and self.destination is not None

    @property
    def points(self) -> list[Point]:
        """All of this node: those of the packet, those of its answer."""
        return [*self.there, *self.back]

    # --- counting

    def begin(self) -> None:
        """Count from now on. Raises KernelError: what nft says."""
        sweep()
        made = way.objects(self.points, self._probe, self.node.port, self._table)
        for family, objects in made.items():
            table = {"table": {"family": family, "name": self._table}}
            program.load_table(family, self._table, [table, *objects])

    def passed(self) -> list[Passed]:
        """What was counted so far, by point. Raises KernelError."""
        counts: list[dict[str, int]] = [{} for _ in self.points]
        for family in self._tables():
            for place, seen, packets in way.counted(program.read_table(family, self._table)):
                counts[place][seen] = packets
        return [Passed(self.node.name, point, each) for point, each in zip(self.points, counts, strict=True)]

    def looked(self, after: Mapping[str, Any] | None = None) -> Looked:
        """What the look-ups say, by part of the way. after: the agent's status of now, for what was dropped meanwhile."""
        found: Looked = {}
        deltas = Deltas(dict(self.node.dropped), nodes.dropped(after)) if after is not None else Deltas({}, {})
        there = _both(self._policies(), _both(deltas.lines(), self._look()))
        for back, lines in ((False, there), (True, self._look_back())):
            for gap, line in lines:
                if line not in found.setdefault((gap, back), []):
                    found[gap, back].append(line)
        with suppress(OSError):  # the pod is gone
            for back, gap, line in self._inside_pods():
                found.setdefault((gap, back), []).append(line)
        for back in (False, True):
            of_tunnel = dict.fromkeys(line for gap in OF_TUNNEL for line in found.get((gap, back), ()))
            if of_tunnel and self.node.kind != "vxlan":
                found[Gap.TUNNEL, back] = [*of_tunnel]
        return found

    def _inside_pods(self) -> Iterator[tuple[bool, Gap, str]]:
        one, other = self._probe.source, self._probe.destination
        if self.source is not None:
            lines = pods.inside(self.node, self._family, one, other, self.namespace, _LEAVING)
            yield from ((False, *each) for each in lines)
        if self.destination is not None:
            there = self._namespace(self.destination)
            lines = pods.inside(self.node, self._family, other, one, there, (Gap.ANSWER, *_LEAVING[1:]))
            yield from ((True, *each) for each in lines)

    def _tables(self) -> set[str]:
        """nftables' families of those that count."""
        return {way.table_family(point, self._probe) for point in self.points}

    def close(self) -> None:
        """Take the counters away again."""
        try:
            for family in self._tables():
                with suppress(KernelError):
                    program.load_table(family, self._table, [])
        finally:
            self._requests.close()


def _both(one: Iterator[tuple[Gap, str]], other: Iterator[tuple[Gap, str]]) -> Iterator[tuple[Gap, str]]:
    yield from one
    yield from other


def sweep() -> None:
    """Take away the tables of those that were killed before they did: by the time in their names, since their processes may
    be of another container. Raises KernelError."""
    leftovers.sweep(lambda made: abs(time.time() - made) >= OVER_S)
