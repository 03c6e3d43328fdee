"""Probes on request, a few of each in two seconds, of one peer or of many at once. For the operator's command."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Sequence
from typing import NamedTuple

from lease.families import Family
from overlay.probes.echo import SMALL, EchoSocket, data_of, refusal_text
from overlay.probes.verdict import Outcome

ROUNDS, GAP_S, WAIT_S = 3, 0.2, 1.0
MOST_AT_ONCE = 64
MTUS = (9000, 8950, 1500, 1492, 1480, 1450, 1430, 1420, 1410, 1400, 1380, 1350, 1300, 1280, 1200, 1000, 576)


class Rung(NamedTuple):
    """What is asked. mtu: the size of the packet, 0: a small one; source: from which address, 0: the kernel's choice."""

    name: str
    address: int
    mtu: int = 0
    source: int = 0


class Asked(NamedTuple):
    """What came of it. rtt_us: of the fastest answer, None: there was none."""

    outcome: Outcome
    rtt_us: int | None


def ask(family: Family, rungs: Sequence[Rung], rounds: int = ROUNDS, wait_s: float = WAIT_S) -> list[Asked]:
    """Ask each so often; in their order. Raises OSError: no raw socket (root?)."""
    sent: dict[int, tuple[int, int]] = {}
    count, refused = [0] * len(rungs), [""] * len(rungs)
    fastest: list[int | None] = [None] * len(rungs)
    with contextlib.closing(EchoSocket(family)) as echoes:
        for turn in range(rounds):
            for place, rung in enumerate(rungs):
                sequence = (turn * len(rungs) + place) & 0xFFFF
                sent[sequence] = (place, time.time_ns())
                code = echoes.send(
                    rung.address, sequence, data_of(family, rung.mtu) if rung.mtu else SMALL, rung.source
                )
                refused[place] = refusal_text(code) if code else refused[place]
                if place % MOST_AT_ONCE == MOST_AT_ONCE - 1:
                    _take(echoes, rungs, sent, count, fastest, 0.0)
            _take(echoes, rungs, sent, count, fastest, GAP_S)
        end = time.monotonic() + wait_s
        while sent and (left := end - time.monotonic()) > 0:
            _take(echoes, rungs, sent, count, fastest, left)
    return [
        Asked(Outcome(rounds, count[place], "" if count[place] else refused[place]), fastest[place])
        for place in range(len(rungs))
    ]


def _take(
    echoes: EchoSocket, rungs: Sequence[Rung], sent: dict[int, tuple[int, int]], count: list[int],
    fastest: list[int | None], wait_s: float,
) -> None:  # fmt: skip
    if not select.select([echoes], [], [], wait_s)[0]:
        return
    for seen in echoes.seen(4096):
        found = sent.get(seen.sequence)
        if found is None or not seen.answer or seen.source != rungs[found[0]].address:
            continue
        del sent[seen.sequence]
        place, at_ns = found
        took = max(1, (seen.at_ns - at_ns) // 1000)
        count[place] += 1
        before = fastest[place]
        fastest[place] = took if before is None else min(before, took)


def largest(family: Family, address: int, mtu: int) -> int | None:
    """The size of the largest packets below an MTU that are answered; None where none is. Raises OSError."""
    low, high = 0, mtu
    tried = [size for size in MTUS if size < mtu]
    for _ in range(3):
        found = ask(family, [Rung("", address, size) for size in tried], 2, 0.5)
        passed = [size for size, each in zip(tried, found, strict=True) if each.outcome.ok]
        if not passed and not low:
            return None
        low = max([low, *passed])
        high = min([size for size in (*tried, high) if size > low], default=high)
        step = max(1, (high - low) // 12)
        tried = list(range(low + step, high, step))
        if not tried:
            break
    return low
