"""The controller that takes away what traces which were killed left in the kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from overlay.control.background import BackgroundController
from overlay.control.health import Health
from overlay.control.inputs import Inputs
from overlay.kernel.netlink import KernelError
from overlay.trace.leftovers import sweep

EVERY_S, OVER_S = 300.0, 120.0


class TracesController(BackgroundController):
    """Looks soon after a start, and every five minutes."""

    name = "traces"
    harmless = True
    rechecked = False

    def __init__(self, post: Callable[[Any], None], health: Health, clock: Callable[[], float]) -> None:
        super().__init__(post, health)
        self._clock = clock
        self._next = 0.0

    def wants(self, inputs: Inputs) -> object:
        """Always the same."""
        del inputs
        return OVER_S

    def reconcile(self, wants: Any) -> bool:
        """Look, where it is time."""
        if self._clock() < self._next:
            return False
        self._next = self._clock() + EVERY_S
        return super().reconcile(wants)

    def _work(self, wants: float) -> list[str]:
        with suppress(KernelError):  # without nft there are none
            return sweep(lambda made: time.time() - made >= wants)
        return []

    def due(self) -> float | None:
        """When it looks next."""
        return self._next

    def withdraw(self) -> Iterator[str]:
        """All of them, also of a trace that runs."""
        with suppress(KernelError):
            yield from sweep(lambda _made: True)
