"""What became of a packet, from what was counted and what the look-ups say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from lease.model import ip_text
from overlay.trace.end import Looked, Passed
from overlay.trace.points import FROM_ANOTHER, PLAIN, TO_ANOTHER, Gap
from overlay.trace.probe import Answer


class State(Enum):
    """UNANSWERED: it was given to the destination, which nobody saw take it, and no answer came. LOST_BACK: it was
    delivered, its answer was dropped. LEFT: it left this node, and what came of it there is not known,
    since the other node's agent was not asked."""

    DELIVERED = "delivered"
    UNANSWERED = "unanswered"
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
    arrived = not seen.complete or not seen.there or (counted and counted[-1] == len(seen.there) - 1)
    if good is not None and (arrived or not good.forgeable):
        return Verdict(State.DELIVERED, f"delivered, and {good.text}", "", None, (), notes)
    if good is not None:
        notes += (f"somebody on the way {good.text.partition(' ')[0]} in the destination's name: it never came there",)
    if counted and counted[-1] == len(seen.there) - 1:
        if not seen.complete:
            where = f"what became of it at {seen.beyond}" if seen.beyond else "what became of it outside"
            last = seen.there[-1]
            if silent := seen.looked.get(last.node, {}).get((Gap.NEXT_HOP, False), ()):
                text = f'dropped at {last.node}, behind "{last.point.what}"'
                return Verdict(State.DROPPED, text, last.node, Gap.NEXT_HOP, (*_errors(seen), *silent), notes)
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
    return _dropped(State.DROPPED, "dropped", between, at, seen, notes)


def _between(last: Passed, at: Passed) -> str:
    return f'between "{last.point.what}" and "{at.point.what}"'


def _answer(seen: Seen, notes: tuple[str, ...]) -> Verdict:
    counted = [place for place, each in enumerate(seen.back) if each.total]
    if not seen.back:
        return Verdict(State.DELIVERED, "delivered; whether it was answered was not counted", "", None, (), notes)
    if not counted:
        node = seen.back[0].node
        near = (line for line in seen.looked.get(node, {}).get((seen.there[-1].point.gap, False), ()))
        reasons = tuple(dict.fromkeys((*_reasons(seen, seen.back[0]), *near))) or (Gap.ANSWER.value,)
        text = f"{seen.there[-1].point.what} at {node}; whether that took it is not seen, and no answer came"
        return Verdict(State.UNANSWERED, text, node, Gap.ANSWER, reasons, notes)
    if counted[-1] == len(seen.back) - 1:
        last = seen.back[-1]
        reasons = _reasons(seen, last) or (Gap.TAKEN.value,)
        text = f"delivered; its answer was {last.point.what} at {last.node}, and did not come to who asked"
        return Verdict(State.LOST_BACK, text, last.node, Gap.TAKEN, reasons, notes)
    at, last = seen.back[counted[-1] + 1], seen.back[counted[-1]]
    return _dropped(State.LOST_BACK, "delivered; its answer was dropped", _between(last, at), at, seen, notes)


def _dropped(state: State, what: str, between: str, at: Passed, seen: Seen, notes: tuple[str, ...]) -> Verdict:
    """between: the points it was lost between, for people. Where these are of two nodes, and what lies between them cannot
    be counted, it is the node that has a reason, or neither."""
    gap, node = at.point.gap, at.node
    reasons = _errors(seen) + _changed(seen) + _reasons(seen, at)
    if gap is Gap.TUNNEL:
        having = [name for name, looked in seen.looked.items() if any(place is gap for place, _ in looked)]
        node = having[0] if len(having) == 1 else ""
    where = f"at {node}" if node else f"between {' and '.join(seen.looked) if len(seen.looked) > 1 else 'the nodes'}"
    return Verdict(state, f"{what} {where}, {between}", node, gap, reasons or (f"it is one of: {gap.value}",), notes)


def _reasons(seen: Seen, at: Passed) -> tuple[str, ...]:
    if (
        at.point.gap is Gap.TUNNEL
    ):  # which begins at one node and ends at the other: of each what goes out, and what comes in
        there = (f"{node}: {line}" for node, looked in seen.looked.items() for back in (False, True)
                 for line in looked.get((Gap.TUNNEL, back), ()))  # fmt: skip
        return tuple(dict.fromkeys(there))
    return tuple(seen.looked.get(at.node, {}).get((at.point.gap, at.point.back), ()))


def _changed(seen: Seen) -> tuple[str, ...]:
    """Who sent the packet to another address: it is looked for there."""
    for each in seen.there:
        if each.counts.get(TO_ANOTHER) and not each.counts.get(PLAIN):
            why = seen.looked.get(each.node, {}).get((Gap.PREROUTING, False), ())
            return (f"its destination was changed at {each.node} before it {each.point.what}", *why)
    return ()


def _errors(seen: Seen) -> tuple[str, ...]:
    """What somebody on the way answered instead."""
    bad = dict.fromkeys(
        f"{ip_text(each.version, each.source)} says: {each.text}" for each in seen.answers if not each.good
    )
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
    for way, whose in ((seen.there, "packets"), (seen.back, "answers")):
        found += _thinned(seen, [each for each in way if each.total], whose)
    return found


def _thinned(seen: Seen, counted: Sequence[Passed], whose: str) -> list[str]:
    """Where some of several packets were lost, and not all."""
    for last, at in pairwise(counted):
        if at.total < last.total:
            why = _reasons(seen, at)
            line = f"of {last.total} {whose} {at.total} got on at {at.node}, {_between(last, at)}"
            return [f"{line}: {why[0]}" if why else line]
    return []
