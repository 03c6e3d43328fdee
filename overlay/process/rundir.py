"""One agent for each run directory, and one for each device of a node: both held by locks that end with their process, and
that root alone can hold."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from overlay.kernel.unix_sockets import listener_uid

LOCK_NAME = "lock"
MODE = 0o600
"""Whoever may open a file, if only to read it, may lock it (flock(2))."""


class RunDirError(Exception):
    """It cannot be locked: says who has it, or what is wrong with it."""


class RunDir:
    """A run directory, ours alone until it is closed."""

    def __init__(self, path: str) -> None:
        """Make the directory where it is missing, and take its lock.

        Raises:
            RunDirError: another process has it (its pid is named), or the directory cannot be made.
        """
        self.path = path
        self._handle = self._take()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self) -> bool:
        """Take the lock again where its file was removed or replaced; whether it was. Raises RunDirError."""
        held = os.fstat(self._handle)
        with suppress(OSError):
            there = os.stat(f"{self.path}/{LOCK_NAME}")
            if (there.st_ino, there.st_dev) == (held.st_ino, held.st_dev):
                return False
        handle = self._take()
        os.close(self._handle)
        self._handle = handle
        return True

    def close(self) -> None:
        """Give it back."""
        os.close(self._handle)

    def _take(self) -> int:
        try:
            os.makedirs(self.path, mode=0o755, exist_ok=True)
            handle = os.open(f"{self.path}/{LOCK_NAME}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise RunDirError(f"--run-dir: {error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "?"
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunDirError(f"--run-dir: {self.path}/{LOCK_NAME}: {error.strerror}") from None
            raise RunDirError(f"--run-dir: {self.path} is in use by overlayd (pid {pid})") from None
        with suppress(OSError):  # a full disk: the lock holds, it only does not say whose it is
            os.fchmod(handle, MODE)  # earlier versions left one that anybody could open
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return handle


class Holder(NamedTuple):
    """Who listens at a name. pid, uid: 0 and -1 where that cannot be asked."""

    pid: int
    uid: int


class DeviceLock:
    """Who keeps a device of this network namespace: an abstract Unix socket of its name (unix(7)), which the kernel keeps
    for each network namespace, as it does the device.

    Anybody may bind such a name. Only a holder that is root's counts (by SO_PEERCRED, the kernel's word), and there is more
    than one name: who takes one then asks at all of them, so of two agents at most one goes on.
    """

    NAMES = 4

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._others: dict[str, socket.socket] = {}
        """To agents that have what we want, kept: nobody takes connections up, so that there can be but a few."""
        self.squatters: dict[str, Holder] = {}
        """By device: who, not being root, has all its names, so that no lock can be had."""

    def take(self, device: str) -> int | None:
        """Take it for good: None (or none could be had: `squatters`); or the pid of the agent that has it (0: not known).
        Raises OSError."""
        if device in self._held:
            return None
        names = [f"\0overlayd/{device}", *(f"\0overlayd/{device}/{number}" for number in range(1, self.NAMES))]
        self.squatters.pop(device, None)
        for name in names:
            mine, found = self._bind(name)
            if found is not None and _is_agent(found):
                return found.pid
            if mine is None:
                self.squatters[device] = found or Holder(0, -1)
                continue
            for other in names:
                if other != name and (found := self._holder(other)) is not None and _is_agent(found):
                    mine.close()
                    return found.pid
            self.squatters.pop(device, None)
            self._held[device] = mine
            return None
        return None

    def give_back(self, device: str) -> None:
        """Another agent may have it."""
        if (mine := self._held.pop(device, None)) is not None:
            mine.close()

    def close(self) -> None:
        """Give all back."""
        for one in (*self._held.values(), *self._others.values()):
            one.close()
        self._held, self._others = {}, {}

    def _bind(self, name: str) -> tuple[socket.socket | None, Holder | None]:
        """A socket of that name, or who has it."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.bind(name)
            made.listen(8)
        except OSError as error:
            made.close()
            if error.errno == errno.EADDRINUSE:
                return None, self._holder(name) or Holder(0, -1)  # it listens to nobody, as no agent does
            raise
        if (asked := self._others.pop(name, None)) is not None:
            asked.close()
        return made, None

    def _holder(self, name: str) -> Holder | None:
        """Who listens there, None where nobody does."""
        asking = self._others.get(name)
        if asking is not None and _is_open(asking):
            return _peer(asking)
        if asking is not None:  # that one ended
            asking.close()
            del self._others[name]
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        asking.setblocking(False)
        try:
            asking.connect(name)
        except OSError as error:
            asking.close()
            return _holder_unasked(name) if error.errno == errno.EAGAIN else None
        found = _peer(asking)
        if _is_agent(found):
            self._others[name] = asking
        else:
            asking.close()
        return found


def _holder_unasked(name: str) -> Holder:
    """Who listens where no connection can be had: anybody may have filled an agent's backlog."""
    try:
        uid = listener_uid(name)
    except OSError:
        uid = None
    return Holder(0, -1 if uid is None else uid)


def _is_agent(holder: Holder) -> bool:
    """Whether an agent may be behind it: agents are root's, or of the same user as this one."""
    return holder.uid in (0, os.geteuid())


def _peer(connection: socket.socket) -> Holder:
    size = struct.calcsize("=iII")
    pid, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Holder(pid, uid)


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
