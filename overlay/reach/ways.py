"""Which packets the kernel is asked about, and what it should answer. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lease.families import FAMILIES
from lease.model import Prefix
from overlay.control.inputs import AddressKey, Inputs
from overlay.kernel.route.entries import Address, Link
from overlay.kernel.route.lookup import Packet, Way
from overlay.node.interfaces import gateway_holders
from overlay.node.standing import backend_in_force


class Peer(NamedTuple):
    """A peer as far as ways to it go. direct: by a plain route on the underlay, not by the tunnel."""

    subnet: Prefix
    public_ip: int
    direct: bool


class Here(NamedTuple):
    """This node. tunnel, underlay: numbers of the interfaces; local: the tunnel's source; bridges: numbers of the
    interfaces that have the gateway of our subnet, where packets of pods come from; port: the tunnel's UDP port, 0: none."""

    own: Prefix
    tunnel: int
    underlay: int
    local: int
    bridges: tuple[int, ...]
    port: int = 0


class Question(NamedTuple):
    """packet: what is asked about. oif: by which interface it must go; 0: any that has a route. via: its gateway, None: any.
    what: for the operator, with {peer} for the peer's subnet."""

    packet: Packet
    oif: int
    via: int | None
    what: str


OUT, FORWARDED, BACK, OUTER, INCOMING = (
    "packets of this node to {peer}",
    "packets of pods here to {peer}",
    "packets from {peer} to pods here",
    "packets of the tunnel to {peer}",
    "packets of the tunnel from {peer}",
)
OF_ONE_PEER = (OUTER, INCOMING)
"""Those that depend on what one peer's record says."""


def a_pod(subnet: Prefix) -> int:
    """An address that a pod of a subnet can have: behind the gateway's."""
    return min(subnet.base + 2, subnet.last)


def bridges_of(own: Prefix, links: Mapping[int, Link], addresses: Mapping[AddressKey, Address]) -> tuple[int, ...]:
    """The interfaces that have the gateway of a subnet and a pod behind them: with none, routes by it may count as dead."""
    if own.length >= 31 and own.family == 4:
        return ()
    holders = gateway_holders(own, addresses.values())
    return tuple(sorted(n for n in holders if n in links and links[n].up and links[n].carrier))


def here_of(inputs: Inputs, family: int) -> Here | None:
    """This node, for a family; None while that is not known."""
    end, under, tunnel = inputs.end(family), inputs.underlays.get(family), inputs.tunnels.get(family)
    if inputs.pool(family) is None or end is None or tunnel is None or under is None:
        return None
    bridges = bridges_of(end.subnet, inputs.links, inputs.addresses_of(family))
    backend = backend_in_force(inputs, FAMILIES[family])
    outer = backend.outer() if backend is not None else None
    port = outer.port if outer is not None else 0
    return Here(end.subnet, tunnel.ifindex, under.ifindex, under.local, bridges, port)


def questions(here: Here, peer: Peer) -> Iterator[Question]:
    """What is asked about a peer: both directions, as the node sends and as it forwards, and what carries them."""
    there, us = a_pod(peer.subnet), a_pod(here.own)
    oif, via = (here.underlay, peer.public_ip) if peer.direct else (here.tunnel, None)
    yield Question(Packet(there), oif, via, OUT)
    for bridge in here.bridges:
        yield Question(Packet(there, us, iif=bridge), oif, via, FORWARDED)
        yield Question(Packet(us, there, iif=oif), bridge, None, BACK)
    if not peer.direct:
        udp = 17 if here.port else 0
        yield Question(Packet(peer.public_ip, here.local, 0, here.underlay, 0, udp, here.port), 0, None, OUTER)
        yield incoming(here.local, peer.public_ip, here.underlay, udp, here.port)


def incoming(local: int, public_ip: int, underlay: int, udp: int, port: int) -> Question:
    """Whether the kernel takes a peer's packets of the tunnel (rp_filter, an address that is lost)."""
    return Question(Packet(local, public_ip, underlay, 0, 0, udp, port), 0, None, INCOMING)


def is_as_asked(question: Question, way: Way) -> bool:
    """Whether the kernel does what it should."""
    if way.error:
        return False
    if not question.oif:
        return way.table != 0
    return way.oif == question.oif and question.via in (None, way.via)
