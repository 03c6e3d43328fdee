"""Work done inside another network namespace, by a thread that enters it; and which one has an address."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from lease.families import Family
from overlay.kernel.netlink import RequestSocket

_T = TypeVar("_T")
OWN = "/proc/self/ns/net"
FOLDERS = ("/run/netns", "/run/docker/netns")
CLONE_NEWNET = 0x40000000


def enter(path: str) -> None:
    """Move this thread into a namespace; threads it starts later are there too. Raises OSError."""
    import ctypes  # os.setns is Python 3.12's

    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(handle)


def inside(path: str, act: Callable[[], _T]) -> _T:
    """Do something in a namespace, in a thread of its own. Sockets made there stay there, whoever uses them later."""
    done: list[Any] = []

    def run() -> None:
        try:
            enter(path)
            done.append((True, act()))
        except BaseException as error:
            done.append((False, error))

    thread = threading.Thread(target=run, name=f"in {path}")
    thread.start()
    thread.join()
    succeeded, result = done[0]
    if not succeeded:
        raise result
    return result  # type: ignore[no-any-return]


def namespaces() -> Iterator[str]:
    """Paths to the namespaces that can be found from here, each once: those with names, and those of processes (which a
    container sees with hostPID alone)."""
    seen = {os.stat(OWN).st_ino}
    paths = [f"{folder}/{name}" for folder in FOLDERS if os.path.isdir(folder) for name in sorted(os.listdir(folder))]
    paths += [f"/proc/{name}/ns/net" for name in os.listdir("/proc") if name.isdigit()]
    for path in paths:
        with suppress(OSError):  # a process that ended, a file that is no namespace
            inode = os.stat(path).st_ino
            if inode not in seen:
                seen.add(inode)
                yield path


def namespace_of(family: Family, address: int, mac: int) -> str | None:
    """The namespace, other than this one, in which an interface with that MAC has an address; None where there is none.
    By the MAC it is the one at the other end of a veth: others may have the address as well."""

    def has() -> bool:
        requests = RequestSocket()
        try:
            links = {link.ifindex for link in requests.links() if link.mac == mac}
            return any(each.address == address and each.oif in links for each in requests.addresses(family))
        finally:
            requests.close()

    for path in namespaces():
        with suppress(OSError, socket.error):
            if inside(path, has):
                return path
    return None
