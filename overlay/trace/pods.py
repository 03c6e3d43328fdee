"""What may hold packets at a pod: its port of the bridge, what it and its node believe of each other's MAC, its route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from lease.families import Family
from lease.model import ip_text, mac_text
from overlay.kernel import namespaces
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route import ports
from overlay.kernel.route.entries import FoundNeighbour
from overlay.kernel.route.lookup import Packet
from overlay.reach import explain
from overlay.trace.node import Node, Pod
from overlay.trace.points import Gap

_INCOMPLETE, _FAILED = 1, 32
Found = Iterator[tuple[Gap, str]]


def port(node: Node, pod: Pod, gap: Gap, requests: RequestSocket) -> Found:
    """The pod's place on its bridge."""
    address = ip_text(node.own.family, pod.address)
    if pod.link is None:
        yield gap, f"no veth of this node leads to {address}: no pod here has that address now"
        return
    name, bridge = pod.link.name, node.link(node.bridge)
    if bridge is None:
        yield gap, f"no interface has the gateway of {node.own}: the CNI plugin makes it with the first pod"
    elif not bridge.up:
        yield gap, f"{bridge.name} is down: ip link set {bridge.name} up"
    elif pod.link.master != bridge.ifindex:
        yield gap, f"{name}, the pod's, is no port of {bridge.name}: ip link set {name} master {bridge.name}"
    if not pod.link.up:
        yield gap, f"{name}, the pod's, is down: ip link set {name} up"
    elif pod.up is False:
        yield gap, "the pod's own interface is down: ip link set eth0 up, inside the pod"
    elif not pod.link.carrier:
        yield gap, f"{name}, the pod's, has no carrier"
    else:
        state = ports.port_state(requests, name)
        if state not in (None, ports.FORWARDING):
            word = ports.STATES[state] if state is not None and state < len(ports.STATES) else str(state)
            yield gap, f"{name}, the pod's port of {node.bridge}, is {word}: bridge link set dev {name} state 3"
    yield from ((gap, line) for line in queues(node, (name, node.bridge), requests))


def queues(node: Node, names: tuple[str, ...], requests: RequestSocket) -> Iterator[str]:
    """Disciplines that somebody set on interfaces: they may hold packets, or drop them."""
    numbers = {node.number_of(name): name for name in names if name}
    for index, kinds in ports.disciplines(requests).items():
        odd = [kind for kind in kinds if kind not in ports.HARMLESS]
        if index in numbers and odd:
            name = numbers[index]
            yield f"{name} has a queueing discipline of others ({', '.join(odd)}): tc -s qdisc show dev {name}"


def given(node: Node, pod: Pod, requests: RequestSocket, family: Family) -> Found:
    """What the node believes of the pod's MAC. The frame of a wrong one is given to the port, and taken by nobody."""
    bridge, address = node.number_of(node.bridge), ip_text(family.number, pod.address)
    there = _neighbour(requests, family, bridge, pod.address) if bridge else None
    if there is None:
        return
    if is_silent(requests, family, bridge, pod.address):
        asks = "ARP" if family.by_arp else "neighbour discovery"
        yield Gap.NEIGHBOUR, f"nobody on {node.bridge} answers {asks} for {address}: ip neigh show {address}"
    elif pod.mac and there.mac not in (None, pod.mac):
        text = (
            f"{node.bridge}'s neighbour entry of {address} has {mac_text(there.mac or 0)}, the pod {mac_text(pod.mac)}:"
            f" ip neigh del {address} dev {node.bridge}"
        )
        yield Gap.NEIGHBOUR, text
        yield Gap.ANSWER, text


def is_silent(requests: RequestSocket, family: Family, oif: int, address: int) -> bool:
    """Whether a neighbour was asked for, and does not answer."""
    there = _neighbour(requests, family, oif, address)
    return there is not None and bool(there.state & (_FAILED | _INCOMPLETE))


def _neighbour(requests: RequestSocket, family: Family, oif: int, address: int) -> FoundNeighbour | None:
    return next((each for each in requests.neighbours(family, oif) if each.address == address), None)


def inside(node: Node, family: Family, pod: int, other: int, namespace: str | None, gaps: tuple[Gap, ...]) -> Found:
    """The pod's own way to another address. namespace: its, None: it cannot be entered from here; gaps: where its packets
    would be missed. Raises OSError."""
    if namespace is None:
        return
    gateway, bridge = node.own.base + 1, node.link(node.bridge)

    def asked() -> list[str]:
        requests = RequestSocket()
        try:
            way = requests.way(family, Packet(other, pod))
            if way.error:
                text = f"inside the pod packets to {ip_text(family.number, other)} {explain.refusal_text(way)}"
                return [f"{text}: the pod's routes are its CNI plugin's (isDefaultGateway); make the pod anew"]
            lines = []
            if way.via and way.via != gateway:
                lines.append(
                    f"inside the pod packets to {ip_text(family.number, other)} go by {ip_text(family.number, way.via)}, not"
                    f" by this node's gateway {ip_text(family.number, gateway)}: ip route, inside the pod"
                )
            there = _neighbour(requests, family, way.oif, way.via or other)
            if there is not None and way.via == gateway and bridge is not None and there.mac not in (None, bridge.mac):
                lines.append(
                    f"inside the pod the gateway's neighbour entry has {mac_text(there.mac or 0)}, {bridge.name} has"
                    f" {mac_text(bridge.mac)}: ip neigh del {ip_text(family.number, gateway)}, inside the pod"
                )
            numbers = {link.ifindex: link.name for link in requests.links()}
            for index, kinds in ports.disciplines(requests).items():
                odd = [kind for kind in kinds if kind not in ports.HARMLESS]
                if index == way.oif and odd:
                    lines.append(
                        f"inside the pod {numbers.get(index, index)} has a queueing discipline: {', '.join(odd)}"
                    )
            return lines
        finally:
            requests.close()

    with suppress(KernelError):
        for line in namespaces.inside(namespace, asked):
            yield from ((gap, line) for gap in gaps)
