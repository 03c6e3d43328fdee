"""Files of others, read so that none of them can hold us up."""

from __future__ import annotations

import errno
import os
import stat

LONGEST = 1 << 20
"""Bytes; a ConfigMap holds 1 MiB at most, and no file of ours comes near."""


Stamp = tuple[int, int, int]
"""Inode, time and size."""


def stamp(path: str) -> Stamp | None:
    """What differs when a file was written or replaced, or an entry of a folder came or went; None where there is none."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns, there.st_size


def content(path: str, longest: int = LONGEST) -> bytes:
    """What a regular file holds, at most its first `longest` bytes. A pipe would keep its reader waiting, and a device never
    ends.

    Raises OSError: it cannot be read, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(longest)
    finally:
        os.close(handle)
