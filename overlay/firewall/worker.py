"""A piece of work with the nft program, in a thread that lives so long: it takes seconds where a node has many rules, and no
peer waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from overlay.kernel.netlink import error_text


class Finished(NamedTuple):
    """A piece of work ended. name: whose; refused: why it could not be done, "" when it was."""

    name: str
    result: Any
    refused: str


class Worker:
    """One piece of work at a time."""

    def __init__(self, name: str, post: Callable[[Finished], None]) -> None:
        self._name, self._post = name, post
        self.busy = False

    def begin(self, work: Callable[[], Any]) -> None:
        """Begin it; a Finished is posted when it ends, and `ended` is to be called then."""
        assert not self.busy
        self.busy = True
        try:
            threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True).start()
        except RuntimeError as error:  # at the limit of what the container may have
            self._post(Finished(self._name, None, error_text(error)))

    def ended(self) -> None:
        """The loop knows that it ended."""
        self.busy = False

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._post(Finished(self._name, work(), ""))
        except Exception as error:  # a thread that ends without a word would never be asked again
            self._post(Finished(self._name, None, error_text(error)))
