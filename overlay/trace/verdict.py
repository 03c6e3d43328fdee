"""What became of a packet, from what was counted and what the look-ups say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from lease.model import ip_text
from overlay.trace.end import Looked, Passed
from overlay.trace.points import FROM_ANOTHER, TO_ANOTHER, Gap
from overlay.trace.probe import Answer


class State(Enum):
    """LOST_BACK: it was delivered, its answer was dropped. LEFT: it left this node, and what came of it there is not known,
    since the other node's agent was not asked."""

    DELIVERED = "delivered"
    DROPPED = "dropped"
    LOST_BACK = "answer dropped"
    LEFT = "left this node"


class Verdict(NamedTuple):
    """node, gap: where it was dropped, "" and None where it was not; reasons: why, the likeliest first; notes: what else
    was seen."""

    state: State
    text: str
    node: str
    gap: Gap | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


class Seen(NamedTuple):
    """All that is known. there, back: the points of the packet and of its answer, in order, of both nodes; complete: the
    other node counted as well; sent: probes; beyond: the name of the other node, "" where there is none."""

    there: Sequence[Passed]
    back: Sequence[Passed]
    looked: Mapping[str, Looked]
    answers: Sequence[Answer]
    sent: int
    complete: bool
    beyond: str


def judge(seen: Seen) -> Verdict:
    """The verdict."""
    notes = tuple(_notes(seen))
    good = next((each for each in seen.answers if each.good), None)
    counted = [place for place, each in enumerate(seen.there) if each.total]
    if good is not None:
        return Verdict(State.DELIVERED, f"delivered, and {good.text}", "", None, (), notes)
    if counted and counted[-1] == len(seen.there) - 1:
        if not seen.complete:
            where = f"what became of it at {seen.beyond}" if seen.beyond else "what became of it outside"
            last = seen.there[-1]
            beside = (
                line
                for gap in (Gap.DEVICE, Gap.OUTPUT)
                for line in seen.looked.get(last.node, {}).get((gap, False), ())
            )
            reasons = (*_errors(seen), *beside)
            return Verdict(State.LEFT, f"left this node; {where} is not known", seen.beyond, None, reasons, notes)
        return _answer(seen, notes)
    if not seen.there:
        return Verdict(State.LEFT, "nothing could be counted here", "", None, _errors(seen), notes)
    at = seen.there[counted[-1] + 1 if counted else 0]
    between = _between(seen.there[counted[-1]], at) if counted else f'before "{at.point.what}"'
    return _dropped(State.DROPPED, f"dropped at {at.node}, {between}", at, seen, notes)


def _between(last: Passed, at: Passed) -> str:
    return f'between "{last.point.what}" and "{at.point.what}"'


def _answer(seen: Seen, notes: tuple[str, ...]) -> Verdict:
    counted = [place for place, each in enumerate(seen.back) if each.total]
    if not seen.back:
        return Verdict(State.DELIVERED, "delivered; whether it was answered was not counted", "", None, (), notes)
    if not counted:
        node = seen.back[0].node
        reasons = _reasons(seen, seen.back[0]) or (Gap.ANSWER.value,)
        return Verdict(State.DELIVERED, "delivered; the destination did not answer", node, Gap.ANSWER, reasons, notes)
    if counted[-1] == len(seen.back) - 1:
        return Verdict(State.DELIVERED, "delivered, and the answer came back", "", None, (), notes)
    at, last = seen.back[counted[-1] + 1], seen.back[counted[-1]]
    text = f"delivered; its answer was dropped at {at.node}, {_between(last, at)}"
    return _dropped(State.LOST_BACK, text, at, seen, notes)


def _dropped(state: State, text: str, at: Passed, seen: Seen, notes: tuple[str, ...]) -> Verdict:
    gap = at.point.gap
    reasons = _errors(seen) + _reasons(seen, at)
    return Verdict(state, text, at.node, gap, reasons or (f"it is one of: {gap.value}",), notes)


def _reasons(seen: Seen, at: Passed) -> tuple[str, ...]:
    return tuple(seen.looked.get(at.node, {}).get((at.point.gap, at.point.back), ()))


def _errors(seen: Seen) -> tuple[str, ...]:
    """What somebody on the way answered instead."""
    bad = dict.fromkeys(f"{ip_text(4, each.source)} says: {each.text}" for each in seen.answers if not each.good)
    return tuple(bad)


def _notes(seen: Seen) -> list[str]:
    found = []
    for each in seen.there:
        if each.counts.get(FROM_ANOTHER):
            found.append(f"from {each.node} on ({each.point.what}) its source is another: it was masqueraded")
            break
    for each in seen.there:
        if each.counts.get(TO_ANOTHER):
            found.append(f"at {each.node} its destination was changed (a Service, or DNAT): {each.point.what}")
            break
    most = [each.total for each in seen.there if each.total]
    if most and min(most) < seen.sent and seen.there[-1].total:
        found.append(f"of {seen.sent} packets {seen.there[-1].total} came to the end")
    return found
