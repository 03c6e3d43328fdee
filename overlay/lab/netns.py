"""Network namespaces by name, and work done inside them by threads that enter them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2 import config as _config
from pyroute2 import netns as _netns

from overlay.kernel.wireguard import userspace

_T = TypeVar("_T")
FOLDER = Path("/run/netns")
CLONE_NEWNET = 0x40000000
_config.default_communicate_timeout = 30
"""Seconds for the process that makes a namespace: pyroute2's two are too few on an emulated or crowded machine."""


def path(name: str) -> str:
    """The file that names a namespace; one without a name is named by its file (/proc/PID/ns/net)."""
    return str(FOLDER / name)


def create(name: str) -> None:
    """Make a namespace, its loopback up; one that is there is an error. Raises OSError."""
    FOLDER.mkdir(exist_ok=True)
    # The first of a boot mounts the folder on itself; two at once would hide each other's names. iproute2 takes this
    # lock for the same reason.
    folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _netns.create(name)
    finally:
        os.close(folder)
    inside(name, _loopback_up)


def delete(name: str) -> None:
    """Remove a namespace with all that is in it; one that is gone is no error."""
    if (FOLDER / name).exists():
        _end_programs(name)
        _netns.remove(name)


def _end_programs(name: str) -> None:
    """End what keeps devices of a namespace there (wireguard-go), and the namespace by that."""
    ours = (FOLDER / name).stat()
    for program in userspace.running():
        with suppress(OSError):
            there = os.stat(f"/proc/{program}/ns/net")
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                os.kill(program, signal.SIGTERM)


def existing(prefix: str) -> list[str]:
    """The namespaces whose names start so."""
    return sorted(entry.name for entry in FOLDER.iterdir() if entry.name.startswith(prefix)) if FOLDER.is_dir() else []


def enter(name: str) -> None:
    """Move this thread into a namespace; threads it starts later are there too. Raises OSError."""
    handle = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)
    finally:
        os.close(handle)


def inside(name: str, act: Callable[[], _T]) -> _T:
    """Do something in a namespace, in a thread of its own. Sockets made there stay there, whoever uses them later."""
    done: list[Any] = []

    def run() -> None:
        try:
            enter(name)
            done.append((True, act()))
        except BaseException as error:
            done.append((False, error))

    thread = threading.Thread(target=run, name=f"in {name}")
    thread.start()
    thread.join()
    succeeded, result = done[0]
    if not succeeded:
        raise result
    return result  # type: ignore[no-any-return]


def _loopback_up() -> None:
    with IPRoute() as ipr:
        ipr.link("set", index=1, state="up")
