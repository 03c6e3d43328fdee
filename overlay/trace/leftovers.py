"""Tables of traces that were killed before they took them away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables import program

TABLE_PREFIX = "overlay_trace_"
"""Not as the agent's own begin, which it reads again whenever one of them changes. Behind it stands when it was made."""


def sweep(over: Callable[[int], bool]) -> list[str]:
    """Take those away that are over; their names. over: by when one was made, in seconds since the epoch (0: its name does
    not say). Raises KernelError."""
    found = []
    for family, name in program.tables():
        if not name.startswith(TABLE_PREFIX):
            continue
        made = name.removeprefix(TABLE_PREFIX).partition("_")[0]
        if over(int(made) if made.isascii() and made.isdigit() else 0):
            with suppress(KernelError):
                program.load_table(family, name, [])
                found.append(f"table {family} {name}")
    return found
