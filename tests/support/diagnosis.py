"""The table of docs/diagnosis.md: what is said of each planted fault. `make diagnosis` writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

LONGEST = 220
"""Characters of a line that are shown."""
PAGE = Path(__file__).parents[2] / "docs/diagnosis.md"
BEGIN, END = "<!-- made by `make diagnosis`: begin -->", "<!-- made by `make diagnosis`: end -->"


class Row(NamedTuple):
    """said: problems, by node; check: its verdict on node1, of a pod of node2; trace: of packets
    between their pods; seconds: until all of that was said."""

    fault: str
    said: dict[str, dict[str, str]]
    check: str
    trace: str
    seconds: float


def write(rows: Iterable[Row]) -> None:
    """Into the page, between its marks, in their order."""
    lines = [
        "| fault | `overlay status` says | `overlay check POD` of node2, on node1 | `overlay trace` of their pods | after |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        by_text: dict[str, list[str]] = {}
        for node, problems in sorted(row.said.items()):
            for subject, text in sorted(problems.items()):
                by_text.setdefault(f"`{subject}`: {text}", []).append(node)
        said = "<br>".join(f"{', '.join(nodes)}: {_cell(text)}" for text, nodes in by_text.items())
        lines.append(f"| {row.fault} | {said} | {_cell(row.check)} | {_cell(row.trace)} | {row.seconds:.0f} s |")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.partition(END)[2]}")


def _cell(text: str) -> str:
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return shown.replace("|", "\\|")


def asked_for() -> bool:
    """Whether the page is to be written."""
    return bool(os.environ.get("OVERLAY_DIAGNOSIS_TABLE"))
