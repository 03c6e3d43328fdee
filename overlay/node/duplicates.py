"""Whether somebody else on the link answers for this node's underlay address: then that machine gets part of our traffic."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import ip_text, mac_text
from lease.tenure.claim import Answer
from overlay.control.background import BackgroundController
from overlay.control.controller import Waiting
from overlay.control.health import Health
from overlay.control.inputs import Inputs

CHECK_S, AGAIN_S = 120.0, 5.0
"""Three broadcasts a check: seldom on a link of many nodes; soon again after an answer, which must come twice to count."""


class _Wants(NamedTuple):
    interface: str
    mac: int
    address: int


class AddressController(BackgroundController):
    """Asks the link by ARP, and reports; changes nothing."""

    name = "address"
    reports = ("duplicate address",)
    rechecked = False

    def __init__(
        self,
        family: Family,
        post: Callable[[Any], None],
        health: Health,
        clock: Callable[[], float],
        ask: Callable[[int], Answer],
    ) -> None:
        """ask: who answers for an address on the link (main.prober)."""
        super().__init__(post, health)
        self._family, self._clock, self._ask_link = family, clock, ask
        self._next = clock()
        self._answered: tuple[_Wants, int | None] | None = None
        """What was asked last, and who answered."""

    def wants(self, inputs: Inputs) -> object:
        """What is asked for; None where nobody can be asked."""
        under = inputs.underlays.get(self._family.number)
        if under is None or not under.up or not under.carrier:
            return Waiting("for an underlay")
        return _Wants(under.name, under.mac, under.local) if under.arp and self._family.by_arp else None

    def reconcile(self, wants: Any) -> bool:
        """Begin to ask."""
        self._next = self._clock() + CHECK_S * random.uniform(0.8, 1.2)  # noqa: S311 (spreads broadcasts)
        return super().reconcile(wants)

    def _work(self, wants: _Wants) -> tuple[_Wants, int | None]:
        answer = self._ask_link(wants.address)
        return wants, answer.by if answer.conclusive else None

    def _done(self, result: tuple[_Wants, int | None]) -> None:
        asked, by = result
        twice, self._answered = by is not None and (asked, by) == self._answered, (asked, by)
        if by is not None:
            self._next = min(self._next, self._clock() + AGAIN_S)
        address = ip_text(self._family.number, asked.address)
        self._health.report(
            "duplicate address",
            ""
            if by is None or not twice
            else f"{mac_text(by)} on the link of {asked.interface} answers for {address}, our address too: that machine gets"
            " traffic meant for this node; give one of the two another address, or name the right one of ours:"
            " --iface=ADDRESS",
            outside=True,
        )

    def due(self) -> float | None:
        """Now and then."""
        return self._next

    def withdraw(self) -> Iterator[str]:
        """Nothing of it is anywhere but the report."""
        self._health.solved("duplicate address")
        return super().withdraw()
