"""Says when a pod was attached or detached: when the runtime's library writes or removes what CNI gave it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

AGAIN_S = 2.0
"""How often a folder that is not there is looked for."""
_CLOSE_WRITE, _MOVED, _DELETE, _SELF = 0x8, 0x40 | 0x80, 0x200, 0x400 | 0x800
"""inotify(7): IN_CLOSE_WRITE, IN_MOVED_FROM and IN_MOVED_TO, IN_DELETE, IN_DELETE_SELF and IN_MOVE_SELF."""


class PodsAttached(NamedTuple):
    """What CNI gave to pods may be another than before."""


class ResultsThread(threading.Thread):
    """Posts it, at the start too."""

    def __init__(self, folder: str, post: Callable[[Any], None]) -> None:
        super().__init__(name="cni-results", daemon=True)
        self._folder, self._post = folder, post
        self._ending = threading.Event()

    def run(self) -> None:
        while not self._ending.is_set():
            if os.path.isdir(self._folder):
                self._follow()
                self._post(PodsAttached())  # where it cannot be watched: now and then
            self._ending.wait(AGAIN_S)

    def stop(self) -> None:
        """End, at the next word of the folder."""
        self._ending.set()

    def _follow(self) -> None:
        from pyroute2.inotify.inotify_fd import Inotify

        with_it = Inotify(path=())
        try:
            with_it.bind()
            with_it.register_path(self._folder, _CLOSE_WRITE | _MOVED | _DELETE | _SELF)
            if min(with_it.wd, default=-1) < 0:
                raise OSError("inotify_add_watch")
            self._post(PodsAttached())  # what came before it was watched
            while not self._ending.is_set():
                events = [each for each in with_it.get() if each is not None]
                self._post(PodsAttached())
                if any(each["mask"] & _SELF for each in events):
                    return
        except (OSError, ValueError, LookupError):
            return  # it went, or the limits of inotify are reached, or events were lost: looked at again
        finally:
            with_it.close()
