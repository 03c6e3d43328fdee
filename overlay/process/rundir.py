"""One agent for each run directory, and one for each device of a node: both held by locks that end with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import TextIO


class RunDirError(Exception):
    """It cannot be locked: says who has it, or what is wrong with it."""


def hold(run_dir: str) -> TextIO:
    """Make the directory where it is missing, and take its lock; closing the file gives it back.

    Raises:
        RunDirError: another process has it (its pid is named), or the directory cannot be made.
    """
    try:
        os.makedirs(run_dir, mode=0o755, exist_ok=True)
        file = open(f"{run_dir}/lock", "a+", encoding="ascii", errors="replace")  # noqa: SIM115 (its life is the lock's)
    except OSError as error:
        raise RunDirError(f"--run-dir: {error.filename}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        pid = file.read(20).strip() or "?"
        file.close()
        raise RunDirError(f"--run-dir: {run_dir} is in use by overlayd (pid {pid})") from None
    with suppress(OSError):  # a full disk: the lock holds, it only does not say whose it is
        file.truncate(0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file


class DeviceLock:
    """Who keeps a device of this network namespace: an abstract Unix socket of its name (unix(7)), which the kernel keeps
    for each network namespace, as it does the device."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._others: dict[str, socket.socket] = {}
        """To those who have what we want, kept: nobody takes connections up, so that there can be but a few."""

    def take(self, device: str) -> int | None:
        """Take it for good: None; or the pid of who has it (0: not known). Raises OSError."""
        if device in self._held:
            return None
        name = f"\0overlayd/{device}"
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.bind(name)
            made.listen(8)
        except OSError as error:
            made.close()
            if error.errno == errno.EADDRINUSE:
                return self._pid_behind(name)
            raise
        if (asked := self._others.pop(name, None)) is not None:
            asked.close()
        self._held[device] = made
        return None

    def close(self) -> None:
        """Give all back."""
        for one in (*self._held.values(), *self._others.values()):
            one.close()
        self._held, self._others = {}, {}

    def _pid_behind(self, name: str) -> int:
        asking = self._others.get(name)
        if asking is not None and _is_open(asking):
            return _pid(asking)
        if asking is not None:  # that one ended, and another has it
            asking.close()
        asking = self._others[name] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        asking.setblocking(False)
        try:
            asking.connect(name)
        except OSError:
            return 0
        return _pid(asking)


def _pid(connection: socket.socket) -> int:
    size = struct.calcsize("=iII")
    return int(struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
