"""A whole trace: both ends count, probes are sent, what came of it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from lease.model import ip_text
from overlay.check.refused import refused_record
from overlay.trace import far as far_ends
from overlay.trace import probe as probes
from overlay.trace.end import End, Looked, Passed
from overlay.trace.far import AskedEnd
from overlay.trace.node import NotTraceable, WrongEnds
from overlay.trace.points import Gap
from overlay.trace.probe import Answer, Probe
from overlay.trace.send import Sender, numbers
from overlay.trace.verdict import Seen, State, Verdict, judge

WAIT_S = 1.0


class Request(NamedTuple):
    """What is to be traced. size: of the packets, None: small ones, then full-size ones; version: of the addresses."""

    source: int
    destination: int
    protocol: str
    port: int
    size: int | None
    flows: int = 1
    """So many are tried, each from a port of its own: of several ways between nodes each flow takes one."""
    version: int = 4

    def text(self, address: int) -> str:
        """An address of the request's family."""
        return ip_text(self.version, address)


class Traced(NamedTuple):
    """One size. notes: what kept the trace from being whole."""

    protocol: str
    size: int
    seen: Seen
    verdict: Verdict
    answers: list[tuple[Answer, int]]
    notes: tuple[str, ...]


def trace(found: Mapping[str, Any], request: Request, status: Callable[[], Mapping[str, Any]]) -> list[Traced]:
    """Each size that was tried, of each flow. found: the agent's status, as a view of the family; status: asks for that of
    now. Raises NotTraceable, OSError."""
    return [each for _ in range(request.flows) for each in _flow(found, request, status)]


def _flow(found: Mapping[str, Any], request: Request, status: Callable[[], Mapping[str, Any]]) -> list[Traced]:
    small = probes.least(request.protocol, request.version)
    traced = [_one(found, request, request.size or small, status)]
    mtu = found.get("pods_mtu") or (found["device"] or {}).get("mtu", 0)
    if (
        request.size is None
        and request.protocol != "tcp"
        and traced[0].verdict.state is State.DELIVERED
        and mtu > small
    ):
        traced.append(_with_mtu(_one(found, request, mtu, status), small))
    return traced


def _with_mtu(traced: Traced, small: int) -> Traced:
    """Where packets of full size alone are lost between the nodes it is the MTU, elsewhere their length or rate."""
    verdict = traced.verdict
    if verdict.state is State.DELIVERED:
        return traced
    if verdict.gap is Gap.UNDERLAY:
        what = "the path's MTU is too low: overlay check finds the largest that pass"
    else:
        what = "what stands there drops large ones alone"
    reason = f"packets of {small} bytes pass, so that {what}"
    return traced._replace(verdict=verdict._replace(reasons=(reason, *verdict.reasons)))


def _one(
    found: Mapping[str, Any],
    request: Request,
    size: int,
    status: Callable[[], Mapping[str, Any]],
) -> Traced:
    ends = request.source, request.destination
    probe = Probe(*ends, request.protocol, request.port, *numbers(), size, request.version)
    with closing(End(found, probe)) as end:
        if end.arrives:
            where = end.peer.name if end.peer is not None else "the node of the source"
            raise WrongEnds(f"{request.text(probe.source)} is not of this node: run it at {where}")
        notes = []
        if end.source is not None and end.namespace is None:
            notes.append(
                "the pod's network namespace cannot be entered from here, so this node sent in the pod's name: the"
                " pod's interface, its bridge and the forward chains were not tried"
            )
        far = None
        if end.peer is None and end.node.network.holds(probe.destination) and not end.inside:
            where = request.text(probe.destination)
            refused = refused_record(found, where)
            notes.append(
                refused or f"{where} is in Network {end.node.network}, but in no peer's subnet: no node holds it"
            )
        if end.peer is not None:
            try:
                addresses = request.text(end.peer.subnet.base), request.text(end.peer.public_ip)
                far = far_ends.ask_far(found, *addresses, end.peer.name, probe)
            except NotTraceable as error:
                notes.append(str(error))
        with closing(Sender(probe, end.namespace)) as sender:
            end.begin()
            sent = sender.send(WAIT_S)
        there, back, looked = _end(far, notes)
        passed, after = end.passed(), status()
        mine = {end.node.name: end.looked(after)}
        if sent.refused:
            notes.append(f"the kernel took no probe: {sent.refused}")
        beyond = end.peer.name if end.peer is not None else ""
        ours = len(end.there)
        seen = Seen(
            [*passed[:ours], *there],
            [*back, *passed[ours:]],
            {**mine, **({beyond: looked} if far is not None else {})},
            [each for each, _ in sent.answers],
            sent.probes,
            bool(there) or end.inside,
            beyond,
        )
    return Traced(request.protocol, size, seen, judge(seen), sent.answers, tuple(notes))


def _end(far: AskedEnd | None, notes: list[str]) -> tuple[list[Passed], list[Passed], Looked]:
    if far is not None:
        try:
            return far.end()
        except NotTraceable as error:
            notes.append(str(error))
    return [], [], {}
