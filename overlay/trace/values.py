"""A trace as JSON values: what `overlay trace --json` writes and the page draws. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lease.model import ip_text
from overlay.trace.run import Request, Traced
from overlay.trace.verdict import State


def as_values(request: Request, traced: Sequence[Traced]) -> dict[str, Any]:
    """As JSON values. The verdict is that of the first size that does not come through, else of the last."""
    shown = worst(traced)
    return {
        "source": request.text(request.source),
        "destination": request.text(request.destination),
        "protocol": request.protocol,
        "port": request.port or None,
        "verdict": shown.verdict.state.value,
        "text": text_of(shown),
        "node": shown.verdict.node,
        "step": shown.verdict.gap.name.lower() if shown.verdict.gap is not None else "",
        "because": list(shown.verdict.reasons),
        "notes": [*shown.verdict.notes, *shown.notes],
        "flows": flows_text(request, traced),
        "rounds": [_round(each) for each in traced],
    }


def worst(traced: Sequence[Traced]) -> Traced:
    """The first size that does not come through, else the last."""
    return next((each for each in traced if not came_through(each)), traced[-1])


def came_through(traced: Traced) -> bool:
    """Whether it is as it should be: it was delivered and, where the protocol demands one, answered."""
    state = traced.verdict.state
    return state is State.DELIVERED or (state is State.UNANSWERED and traced.protocol == "udp")


def flows_text(request: Request, traced: Sequence[Traced]) -> str:
    """How many of several flows came through, "" of one. A flow begins with its smallest packets."""
    if request.flows == 1:
        return ""
    first = traced[0].size
    starts = [place for place, each in enumerate(traced) if each.size == first]
    flows = [traced[start:end] for start, end in zip(starts, [*starts[1:], len(traced)], strict=True)]
    whole = sum(all(map(came_through, flow)) for flow in flows)
    if whole in (0, len(flows)):
        return f"{whole} of {len(flows)} flows came through"
    return (
        f"{whole} of {len(flows)} flows came through: one of several ways (ECMP, a bond, a queue), or a filter that goes by"
        " the tunnel's source port"
    )


def text_of(traced: Traced) -> str:
    """The verdict, in one line."""
    took = [rtt for answer, rtt in traced.answers if answer.good]
    after = f" after {min(took) / 1000:.2f} ms" if took else ""
    return f"packets of {traced.size} bytes: {traced.verdict.text}{after}"


def _round(traced: Traced) -> dict[str, Any]:
    return {
        "packet_bytes": traced.size,
        "sent": traced.seen.sent,
        "verdict": traced.verdict.state.value,
        "answers": [
            {"text": each.text, "from": ip_text(each.version, each.source), "rtt_us": took}
            for each, took in traced.answers
        ],
        "steps": [
            {
                "node": each.node,
                "step": each.point.what,
                "counted": each.total,
                "counts": dict(each.counts),
                "of_the_answer": each.point.back,
                "look_ups": traced.seen.looked.get(each.node, {}).get((each.point.gap, each.point.back), []),
            }
            for each in (*traced.seen.there, *traced.seen.back)
        ],
    }
