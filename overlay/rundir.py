"""The run directory: one agent each, held by a lock that ends with its process."""

from __future__ import annotations

import fcntl
import os
from typing import TextIO


class RunDirError(Exception):
    """It cannot be had: says who has it, or what is wrong with it."""


def hold(run_dir: str) -> TextIO:
    """Make the directory where it is missing, and take its lock; closing the file gives it back.

    Raises:
        RunDirError: another process has it (its pid is named), or the directory cannot be made.
    """
    try:
        os.makedirs(run_dir, mode=0o755, exist_ok=True)
        file = open(f"{run_dir}/lock", "a+")  # noqa: SIM115 (its life is the lock's)
    except OSError as error:
        raise RunDirError(f"--run-dir: {error.filename}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        pid = file.read().strip() or "?"
        file.close()
        raise RunDirError(f"--run-dir: {run_dir} is in use by another overlayd (pid {pid})") from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
