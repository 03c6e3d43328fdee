"""The terminal as the operator's command writes to it."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 400
"""Where the output is no terminal: lines are not cut, nor folded."""


def console(stderr: bool = False) -> Console:
    """A console that prints words as they are: no colours for numbers, no emoji, as which a part of a MAC can be read. On a
    terminal it has that one's width."""
    return Console(stderr=stderr, highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)


def table(to: Console, *columns: str, title: str, **more: Any) -> Table:
    """With frames on a terminal; plain columns where the output is piped, for grep and awk."""
    frame = {} if to.is_terminal else {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    return Table(*columns, title=title, title_justify="left", **{**frame, **more})
