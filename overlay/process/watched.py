"""Files that an operator changes while we run (a mounted ConfigMap): read every second or two, posted when they differ.

A ConfigMap mounted as a directory changes by the rename of a link (kubelet's AtomicWriter), so files are read by path
each time and compared by content; a subPath mount never changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from overlay.process.files import read

CHECK_EVERY_S = 1.5


class FileText(NamedTuple):
    """What a file says now, None where it is not there. what: its meaning to the agent."""

    what: str
    path: str
    text: bytes | None


class FileThread(threading.Thread):
    """Posts a FileText for each file at the start, and whenever one changed."""

    def __init__(self, files: Mapping[str, str], post: Callable[[FileText], None]) -> None:
        """files: what -> path."""
        super().__init__(name="files", daemon=True)
        self._files, self._post = files, post
        self._posted: dict[str, bytes | None] = {}
        self._wake = threading.Event()

    def any(self) -> bool:
        """Whether there is a file to read."""
        return bool(self._files)

    def read_all(self) -> None:
        """Read all of them once."""
        for what, path in self._files.items():
            text = read(path)
            if what not in self._posted or self._posted[what] != text:
                self._posted[what] = text
                self._post(FileText(what, path, text))

    def run(self) -> None:
        while True:
            self._wake.wait(CHECK_EVERY_S)
            self._wake.clear()
            self.read_all()

    def paths(self) -> list[str]:
        """The files that it reads."""
        return list(self._files.values())

    def read_now(self) -> None:
        """Do not wait for the time. May be called from a signal handler."""
        self._wake.set()
