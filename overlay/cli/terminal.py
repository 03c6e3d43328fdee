"""The terminal as the operator's command writes to it."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 150
"""Where the output is no terminal."""


def console(stderr: bool = False) -> Console:
    """A console that prints words as they are: no colours for numbers, no emoji, as which a part of a MAC can be read."""
    return Console(stderr=stderr, highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
