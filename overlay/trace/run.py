"""A whole trace: both ends count, probes are sent, what came of it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple, Protocol

from lease.model import ip_text
from overlay.trace import probe as probes
from overlay.trace.end import End, Looked, Passed
from overlay.trace.node import NotTraceable
from overlay.trace.probe import Answer, Probe
from overlay.trace.send import Sender, numbers, place_of
from overlay.trace.verdict import Seen, State, Verdict, judge

WAIT_S = 1.0


class Request(NamedTuple):
    """What is to be traced. size: of the packets, None: small ones, then full-size ones."""

    source: int
    destination: int
    protocol: str
    port: int
    size: int | None


class FarEnd(Protocol):
    """The other node's part."""

    def end(self) -> tuple[list[Passed], list[Passed], Looked]:
        """What was counted, of the packet and of its answer, and what its look-ups say; it counts no more."""


class Traced(NamedTuple):
    """One size. notes: what kept the trace from being whole."""

    size: int
    seen: Seen
    verdict: Verdict
    answers: list[tuple[Answer, int]]
    notes: tuple[str, ...]


AskFar = Callable[[Mapping[str, Any], str, Probe], FarEnd]
"""Has another node's agent count: by this one's status, and that node's public IP. Raises NotTraceable: why it does not."""


def trace(
    found: Mapping[str, Any], request: Request, status: Callable[[], Mapping[str, Any]], ask_far: AskFar | None = None
) -> list[Traced]:
    """Each size that was tried. found: the agent's status; status: asks for that of now. Raises NotTraceable, OSError."""
    small = probes.least(request.protocol)
    traced = [_one(found, request, request.size or small, status, ask_far)]
    mtu = (found["device"] or {}).get("mtu", 0)
    if (
        request.size is None
        and request.protocol != "tcp"
        and traced[0].verdict.state is State.DELIVERED
        and mtu > small
    ):
        traced.append(_one(found, request, mtu, status, ask_far))
    return traced


def _one(
    found: Mapping[str, Any],
    request: Request,
    size: int,
    status: Callable[[], Mapping[str, Any]],
    ask_far: AskFar | None,
) -> Traced:
    probe = Probe(request.source, request.destination, request.protocol, request.port, *numbers(), size)
    with closing(End(found, probe)) as end:
        if end.arrives:
            where = end.peer.name if end.peer is not None else "the node of the source"
            raise NotTraceable(f"{ip_text(4, probe.source)} is not of this node: run it at {where}")
        notes = []
        namespace = None
        if end.source is not None:
            namespace = place_of(probe.source)
            if namespace is None:
                notes.append(
                    "the pod's network namespace cannot be entered from here, so this node sent in the pod's name: the"
                    " pod's interface, its bridge and the forward chains were not tried"
                )
        far, why = _far(found, end, probe, ask_far)
        notes += [why] if why else []
        with closing(Sender(probe, namespace)) as sender:
            end.begin()
            sent = sender.send(WAIT_S)
        there, back, looked = far.end() if far is not None else ([], [], {})
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
            far is not None or not beyond,
            beyond,
        )
    return Traced(size, seen, judge(seen), sent.answers, tuple(notes))


def _far(found: Mapping[str, Any], end: End, probe: Probe, ask_far: AskFar | None) -> tuple[FarEnd | None, str]:
    peer = end.peer
    if peer is None:
        return None, ""
    if ask_far is None:
        return None, f"{peer.name} was not asked, since agents do not ask each other here (--ask-secret-file)"
    try:
        return ask_far(found, ip_text(4, peer.public_ip), probe), ""
    except NotTraceable as error:
        return None, str(error)
