"""The terminal as the operator's command writes to it."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100_000
"""Where the output is no terminal: lines are not folded."""


class _Plain(Console):
    """For a pipe: nothing is filled up to a width."""

    def print(self, *objects: Any, **more: Any) -> None:
        with self.capture() as captured:
            super().print(*objects, **more)
        for line in captured.get().splitlines():
            self.file.write(line.rstrip() + "\n")


def console(stderr: bool = False) -> Console:
    """A console that prints words as they are: no colours for numbers, no emoji, as which a part of a MAC can be read. On a
    terminal it has that one's width."""
    if (sys.stderr if stderr else sys.stdout).isatty():
        return Console(stderr=stderr, highlight=False, emoji=False)
    return _Plain(stderr=stderr, highlight=False, emoji=False, width=WIDTH)


def table(to: Console, *columns: str, title: str, **more: Any) -> Table:
    """With frames on a terminal; plain columns where the output is piped, for grep and awk."""
    frame = {} if to.is_terminal else {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    return Table(*columns, title=Text(title, "italic"), title_justify="left", **{**frame, **more})
