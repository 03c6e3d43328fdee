"""The contract of a controller: the owner of one thing in the kernel, in a file, or of one part of the inputs.

A controller says purely what it wants from the inputs, and makes it so in slices; when it is asked is the scheduler's
(schedule.py). A new feature is a new controller and a line in compose.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from lease.families import Family
from overlay.control.inputs import Inputs

Handler = Callable[[Any], bool]
"""Takes an event; whether the controller is to be asked to reconcile for it."""


class Waiting(NamedTuple):
    """What a controller wants while it cannot act: nothing of its own is touched. reason: `for a lease`..."""

    reason: str


class NotYet(Exception):
    """What is asked for has to wait."""


class CannotReconcile(Exception):
    """It cannot be done now, for a reason that is not the kernel's: one line for the operator. Tried again later."""


class Controller:
    """The owner of one thing. Subclasses say their name, what they want, and how it is made so."""

    name: ClassVar[str]
    """The subject of its problems, and its name in the log."""
    after: ClassVar[tuple[str, ...]] = ()
    """Controllers that must have reconciled once (or be switched off) before this one does."""
    yields: ClassVar[bool] = False
    """In the first seconds of a start it waits while a controller before it has more to do: peers come first."""
    rechecked: ClassVar[bool] = True
    """Asked once a minute whatever events came: a lost event costs so long at most. False: `due` says when."""
    harmless: ClassVar[bool] = False
    """With a problem of it pods' traffic is as it should be: an operator should see it, readiness does not wait for it."""
    answers_later: ClassVar[bool] = False
    """`reconcile` only begins; the end is an event, and the controller itself then says `completed` and clears its
    problem."""

    reports: ClassVar[tuple[str, ...]] = ()
    """Other subjects of its problems: what it found before says nothing any more once it waits, or is switched off."""

    family: Family | None = None
    """Which family's it is, None: of no one. Set by compose.py. It is switched off while the network has no such family."""
    used: bool = False
    """An earlier run had that family here, so that there may be something to take away. Set by compose.py."""

    completed: bool = False
    """It has reconciled once. Set by the scheduler, but where it answers later."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Events that are its own."""
        return {}

    def wants(self, inputs: Inputs) -> object | Waiting | None:
        """What should be, as a value that can be compared. None: switched off. Pure."""
        raise NotImplementedError

    def reconcile(self, wants: Any) -> bool:
        """Make it so: one bounded slice. Whether there is more to do at once.

        Raises OSError (KernelError is one) or CannotReconcile: reported as a problem of its name, and retried with
        back-off.
        """
        raise NotImplementedError

    def due(self) -> float | None:
        """When to be asked without an event, by the scheduler's clock; None: not."""
        return None

    def unready(self) -> str:
        """Why the node is not ready, as far as that is this controller's: `for the kernel to be read`... "": it is."""
        return ""

    def withdraw(self) -> Iterator[str]:
        """Take away all that is ours, whoever made it; each thing removed, as a line. Switching a feature off, and
        uninstalling, are this. Raises OSError."""
        return iter(())

    def leave(self, network: int) -> Iterator[str]:
        """Take away what was made for a network that this node is not in any more, by its number (backends: `network`);
        each thing removed, as a line. Raises OSError; NotYet where what stands in its place is not made yet, or something
        is under way: to be asked again."""
        del network
        return iter(())

    def status(self) -> Mapping[str, object]:
        """Its sections of the status, by name (api/status.py)."""
        return {}

    def counters(self) -> Mapping[str, int]:
        """Its counters, by name."""
        return {}


class Source(Controller):
    """A controller that only turns events into inputs."""

    rechecked = False

    def wants(self, inputs: Inputs) -> object:
        """Nothing of the inputs."""
        del inputs
        return ()

    def reconcile(self, wants: object) -> bool:
        """Nothing to do."""
        del wants
        return False
