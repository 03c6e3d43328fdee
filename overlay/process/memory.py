"""What the C library does with memory that Python has given back: it shall go to the system, and not stay as holes.

Decoding twenty thousand records, and reading as many entries of the kernel, takes large blocks for a moment. Of itself glibc
then raises its threshold for mapping a block alone (mallopt(3), M_MMAP_THRESHOLD), so that such blocks lie in its heap, of
which it makes one for each thread.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Source: malloc.h of glibc."""
LARGE = 128 << 10
"""Blocks of so many bytes are mapped, and unmapped when they are free: more than what one recv() asks for (64 KiB),
which would be mapped and unmapped each time."""
_NONE = (AttributeError, ImportError, OSError)
"""Another C library has no such functions: nothing is lost but memory."""


def _c_library() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def keep_little() -> None:
    """At the start of an agent, before its threads: one heap, from which large blocks stay away."""
    with suppress(*_NONE):
        mallopt = _c_library().mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE)):
            mallopt(parameter, value)


def give_back() -> None:
    """What is free within the heap as well. A millisecond or two: after a start, not on the way."""
    with suppress(*_NONE):
        _c_library().malloc_trim(0)
