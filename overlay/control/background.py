"""Controllers whose work takes long (a program of the distribution, a question to the link): in a thread that lives so long,
so that no peer waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from overlay.control.controller import CannotReconcile, Controller, Handler
from overlay.control.health import Health
from overlay.kernel.events import Overrun
from overlay.kernel.netlink import error_text


class Finished(NamedTuple):
    """A piece of work ended. worker: whose (several families' controllers have one name); refused: why it could not be done,
    "" when it was."""

    worker: Worker
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
            self._post(Finished(self, None, error_text(error)))

    def ended(self) -> None:
        """The loop knows that it ended."""
        self.busy = False

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._post(Finished(self, work(), ""))
        except Exception as error:  # a thread that ends without a word would never be asked again
            self._post(Finished(self, None, error_text(error)))


class BackgroundController(Controller):
    """A controller whose work is done by a Worker; it learns the end by an event."""

    yields = True
    answers_later = True

    def __init__(self, post: Callable[[Any], None], health: Health) -> None:
        self._health = health
        self._worker = Worker(self.name, post)
        self._again = False
        """Something came while the work was under way."""
        self._refused = ""
        self._outdated = False
        """What is under way was begun before all was withdrawn."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """The end of the work."""
        return {Finished: self._on_finished, Overrun: lambda _event: True}

    def _on_finished(self, event: Finished) -> bool:
        if event.worker is not self._worker:
            return False
        self._worker.ended()
        if self._outdated:  # it may have made what was taken away meanwhile: once more
            self._outdated = self._again = False
            return True
        self._refused = event.refused
        self.completed = True  # pods are not kept from a node whose nft is broken, which is reported
        if not event.refused:
            self._health.solved(self.name)
            self._done(event.result)
        again, self._again = self._again, False
        return again or bool(event.refused)

    def reconcile(self, wants: Any) -> bool:
        """Begin, or say why what was begun was refused."""
        if self._refused:
            refused, self._refused = self._refused, ""
            raise CannotReconcile(refused)
        if self.busy:
            self._again = True
        else:
            self._worker.begin(lambda: self._work(wants))
        return False

    def withdraw(self) -> Iterator[str]:
        """What is under way says nothing any more, and what it makes is taken away when it ends."""
        self._outdated, self._refused = self.busy, ""
        return iter(())

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._worker.busy

    def _work(self, wants: Any) -> Any:
        """In the thread. Raises OSError, or anything: reported with its text."""
        raise NotImplementedError

    def _done(self, result: Any) -> None:
        """In the loop, when it was not refused."""
