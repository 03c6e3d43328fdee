"""Nodes of another backend: a mixed cluster is told of, by name. Between them and this node no pod's packet passes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from lease.families import Family
from lease.model import ip_text
from overlay.control.controller import Controller, Waiting
from overlay.control.health import Health, few
from overlay.control.inputs import Inputs
from overlay.peers.datapath import Datapath
from overlay.peers.plan import OTHER_BACKEND
from overlay.peers.status import node_name

CHECK_EVERY_S = 2.0
NAMED = 3
SUBJECT = "other backends"


class MixedController(Controller):
    """Says who they are, of one family."""

    name = "mixed"
    reports = (SUBJECT,)
    harmless = True
    rechecked = False
    yields = True

    def __init__(self, family: Family, path: Datapath, health: Health, clock: Callable[[], float]) -> None:
        self._family, self._path, self._health, self._clock = family, path, health, clock
        self._next = 0.0

    def wants(self, inputs: Inputs) -> object:
        """The backend that this node has."""
        if inputs.own is None:
            return Waiting("for a lease")
        return inputs.own.backend

    def reconcile(self, wants: str) -> bool:
        """Look at the refused records."""
        self._next = self._clock() + CHECK_EVERY_S
        others = [key for key, reason in self._path.table.refused.items() if reason.startswith(OTHER_BACKEND)]
        shown = few((self._named(key) for key in islice(others, NAMED)), len(others), NAMED)
        text = (
            f"{shown}: no packet passes between pods there and here, where it is {wants}; a network config reaches nodes one"
            " after the other, and flannel at its next start: restart it there"
        )
        self._health.report(SUBJECT, text if others else "", harmless=True, outside=True)
        return False

    def _named(self, key: str) -> str:
        lease = self._path.record(key)
        end = lease.endpoint(self._family.number) if lease is not None else None
        if lease is None or end is None:
            return key
        name = node_name(lease.node)
        address = ip_text(self._family.number, end.public_ip)
        return f"{name + ' ' if name else ''}{address} ({lease.backend[:20]!a})"

    def due(self) -> float | None:
        """Now and then: records say nothing of their coming here."""
        return self._next
