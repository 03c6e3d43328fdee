"""What it means which probes of a peer are answered: one line, and what to do. Pure.

Four probes separate the causes (measured, docs/diagnosis.md): pings of a peer's underlay address and of its VTEP (the first
address of its subnet, through the tunnel), each small and of full size with don't fragment. The peer's kernel answers, so
that peers that run flannel do as well. Where peers have no VTEP (host-gw), their pods' gateway is asked in its place, the
second address of the subnet: it is there once a pod was made, and before it answered once its silence says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """A probe: where to, and of which size. VTEP: or the pods' gateway, where there is none."""

    UNDERLAY = 0
    UNDERLAY_FULL = 1
    VTEP = 2
    VTEP_FULL = 3

    @property
    def full(self) -> bool:
        """Whether it is of the largest size that the interface takes."""
        return self in (Kind.UNDERLAY_FULL, Kind.VTEP_FULL)

    @property
    def by_tunnel(self) -> bool:
        """Whether it goes to the VTEP."""
        return self >= Kind.VTEP


class Outcome(NamedTuple):
    """What became of a kind of probe. answered: of `sent`; refused: the kernel's word where it did not even send one, ""
    else."""

    sent: int
    answered: int
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Whether any was answered."""
        return self.answered > 0


class State(IntEnum):
    """How a peer is. UNTRIED: not known yet; SILENT: it has not answered since this agent started, nor did anybody at its
    underlay address: a record whose node is gone, or not up yet."""

    UNTRIED = 0
    OK = 1
    PATH_MTU = 2
    UNREACHABLE = 3
    REFUSED = 4
    SILENT = 5


NO_GATEWAY = (
    "its underlay address answers, its pods' gateway has not yet: no pod was made there, or pods' packets are lost on the"
    " way"
)


class Verdict(NamedTuple):
    """state; text: what was found, for the operator; remedy: what to do, "" where nothing."""

    state: State
    text: str
    remedy: str = ""
    path_mtu: int = 0
    """The size of the largest packets that pass where full-size ones do not, 0: not known."""


class Peer(NamedTuple):
    """What else is known of a peer. direct: it is reached without the tunnel; gateway: its pods' gateway is asked in the
    VTEP's place; heard: it asked us in the meantime, so that the way from it is whole; proven: it answered there, or asked,
    before; ever: so did it, or its underlay address."""

    direct: bool = False
    gateway: bool = False
    heard: bool = False
    proven: bool = True
    ever: bool = True

    @property
    def inner(self) -> str:
        """What is asked behind its underlay address."""
        return "its pods' gateway" if self.gateway else "its VTEP"


ONE_MTU = "give the underlay's interfaces of all nodes one MTU (pods have that of their node's), or mend the link"


def judge(outcomes: Mapping[Kind, Outcome], port: int, peer: Peer = Peer()) -> Verdict:  # noqa: B008 (it never changes)
    """What the outcomes mean. port: the tunnel's UDP port, 0: none. A kind that is missing was not tried."""
    small, full = outcomes.get(Kind.VTEP), outcomes.get(Kind.VTEP_FULL)
    under, under_full = outcomes.get(Kind.UNDERLAY), outcomes.get(Kind.UNDERLAY_FULL)
    tried = [each for each in (small, full) if each is not None]
    if not tried:
        return Verdict(State.UNTRIED, "not tried yet")
    if full is not None and full.ok:
        return Verdict(State.OK, "answers")
    if small is not None and small.ok:
        return _small_alone(small, full, under_full, peer)
    if refused := next((each.refused for each in tried if each.refused), ""):
        return Verdict(
            State.REFUSED,
            f"this node's kernel does not send there: {refused}",
            "look at the other problems of this node: routing rules, routes and filters of others; else ip xfrm policy",
        )
    if under is None:
        return Verdict(State.UNREACHABLE, f"{peer.inner} does not answer")
    if not under.ok and not under.refused and not peer.ever:
        return Verdict(State.SILENT, "has never answered, nor does anybody at its public IP")
    if not under.ok and peer.heard:
        return Verdict(
            State.UNREACHABLE,
            f"it answers neither at its underlay address nor at {peer.inner}, though packets from it come: all that is"
            " sent to it is lost, or it answers no pings",
            "overlay check one of its pods; there: sysctl net.ipv4.icmp_echo_ignore_all, filters of ICMP",
        )
    if not under.ok:
        why = f": {under.refused}" if under.refused else ""
        return Verdict(
            State.UNREACHABLE,
            f"neither its underlay address nor {peer.inner} answers{why}",
            "is that node up, and its link? A filter on the way may drop both",
        )
    if peer.gateway:
        return _gateway_silent(peer)
    return _tunnel_silent(port, peer.direct, peer.heard)


def of_size(verdict: Verdict, mtu: int, gateway: bool = False) -> Verdict:
    """What it says once the size is known of the largest packets that pass; 0: it is not. gateway: nothing encapsulates."""
    if not mtu:
        return verdict
    remedy = f"set Backend.MTU so that pods get {mtu} or less (flannel.N: {mtu}), or mend the link"
    remedy = ONE_MTU if gateway else remedy
    return Verdict(verdict.state, f"{verdict.text}; the largest that pass have {mtu} bytes", remedy, mtu)


def _small_alone(small: Outcome, full: Outcome | None, under_full: Outcome | None, peer: Peer) -> Verdict:
    if full is None:
        return Verdict(State.OK, "answers small packets; full-size ones were not tried")
    if small.answered < small.sent and not full.refused:
        return Verdict(
            State.UNREACHABLE,
            f"packets are lost on the way, small ones as well: {small.answered} of {small.sent} were answered, of full-size"
            " ones none",
            "tc -s qdisc show; ip -s link, on both nodes and on the way between them",
        )
    if full.refused:
        return Verdict(
            State.PATH_MTU,
            f"full-size packets are not sent: {full.refused}",
            f"the MTU of the device and of the route to that peer differ: ip route get, of {peer.inner}",
        )
    cause = (
        "the path's MTU is below the underlay interface's"
        if under_full is not None and not under_full.ok
        else f"something on the way drops large packets {'to its pods' if peer.gateway else 'of the tunnel'}"
    )
    return Verdict(
        State.PATH_MTU,
        f"small packets pass, full-size ones are lost: {cause}",
        ONE_MTU if peer.gateway else "set Backend.MTU in the network config to what passes, or mend the link",
    )


def _gateway_silent(peer: Peer) -> Verdict:
    if not peer.proven:
        return Verdict(
            State.UNTRIED, NO_GATEWAY, "once that node has a pod: overlay check that pod; on that node: overlay status"
        )
    heard = ", though packets from it come" if peer.heard else ""
    return Verdict(
        State.UNREACHABLE,
        f"its underlay address answers, its pods' gateway, which did, does not{heard}: something on the way drops packets"
        " with pods' addresses, or that node has lost its bridge",
        "let packets of the pod network pass on the underlay (a router's or a cloud's source check); on that node: overlay"
        " status, ip route",
    )


def _tunnel_silent(port: int, direct: bool, heard: bool) -> Verdict:
    if direct:
        return Verdict(
            State.UNREACHABLE,
            "its underlay address answers, its pods' network by the direct route does not",
            "does that node forward, and let packets from this node's subnet in (its guard, rp_filter)?",
        )
    what = f"UDP {port}" if port else "IP protocol 4 (ipip)"
    if heard:
        return Verdict(
            State.UNREACHABLE,
            "its underlay address answers, its VTEP does not, though packets from it come: the way there is broken, not the"
            " way back",
            f"{what} from this node to that one is filtered, or that node does not take our frames: look at its status",
        )
    return Verdict(
        State.UNREACHABLE,
        f"its underlay address answers, its VTEP does not: {what} is filtered on the way, or that node's device does not"
        " take our packets",
        f"let {what} pass in both directions; on that node: overlay status (a routing rule may drop its answers), ip link",
    )
