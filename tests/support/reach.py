"""Who reaches whom, asked for by tests that wait for it."""

from __future__ import annotations

from collections.abc import Sequence

from overlay.lab.matrix import End, Wires
from tests.support.wait import PATIENCE

ANSWER_S = 0.3 * PATIENCE


def all_reach(ends: Sequence[End]) -> bool:
    """Whether each reaches every other now. The kernel checks IPv6 addresses of pods and bridges first whether they are
    another's, some seconds long."""
    with Wires(ends) as wires:
        return all(cell.ok for cell in wires.all(answer_s=ANSWER_S))
