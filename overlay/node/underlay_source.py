"""The underlay as an input: chosen once and kept while its address is there; while it is not, another stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import ip_text, mac_text
from overlay.control.controller import Handler, Source, Waiting
from overlay.control.inputs import AddressKey, CurrentInputs, Inputs, Underlay
from overlay.kernel.events import RouteSeen, RoutingSeen
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.entries import Address, Link
from overlay.node import underlay as choice
from overlay.process.log import log
from overlay.settings.settings import Settings


class _Wants(NamedTuple):
    settings: Settings
    links: Mapping[int, Link]
    addresses: Mapping[AddressKey, Address]
    beside: str
    """The interface of the first family's, of the second; "" of the first."""


class UnderlaySource(Source):
    """The underlay of one family."""

    name = "underlay"
    rechecked = True

    def __init__(
        self,
        current: CurrentInputs,
        family: Family,
        requests: RequestSocket,
        store_hosts: Callable[[int], dict[str, int | None]],
        moved: Callable[[], None],
        recorded: Callable[[Settings], int] = lambda _settings: 0,
    ) -> None:
        """store_hosts: of a family, as for underlay.choose. moved: called when our own address changed, for the store's
        connection. recorded: the public IP that an earlier run left on record, 0: none."""
        self._current, self._family, self._requests = current, family, requests
        self._store_hosts, self._moved = store_hosts, moved
        self._recorded_by = recorded
        self._chosen_by: Settings | None = None
        self._lasting: Underlay | None = None
        """The choice that this node is known by: back to it as soon as its address is there again."""
        self._recorded: int | None = None
        """Its address, or that of the first choice while none is lasting. None: not asked yet."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """News of routes by which it is seen how this node sends."""
        return {RouteSeen: lambda event: event.route.key.length == 0, RoutingSeen: lambda _event: True}

    def wants(self, inputs: Inputs) -> object:
        """What it is chosen from."""
        first = inputs.underlays.get(4) if self._family.number == 6 else None
        beside = first.name if first is not None else ""
        if self._family.number == 6 and inputs.pool(4) is not None and first is None:
            return Waiting("for the underlay of IPv4, beside which this one is")
        return _Wants(inputs.settings, inputs.links, inputs.addresses_of(self._family.number), beside)

    def reconcile(self, wants: Any) -> bool:
        """Choose it. Raises UnderlayError, KernelError."""
        there = choice.Interfaces(self._family, wants.links.values(), wants.addresses.values())
        number = self._family.number
        before = self._current.inputs.underlays.get(number)
        lookup, hosts = partial(self._requests.lookup, self._family), self._store_hosts(number)
        if self._chosen_by is None or self._chosen_by.public_ip_of(number) != wants.settings.public_ip_of(number):
            self._lasting = None
        if self._recorded is None:
            self._recorded = self._recorded_by(wants.settings)
        lasting = self._lasting
        found = choice.refresh(wants.settings, lasting, there, lookup, hosts) if lasting is not None else None
        if found is None:
            try:
                chosen = choice.choose(wants.settings, there, lookup, hosts, self._recorded, wants.beside)
            except choice.UnderlayError as error:
                if lasting is None:
                    raise
                address = ip_text(number, lasting.local)
                raise choice.UnderlayError(f"{address} is not on {lasting.name} any more: {error}") from error
            found = chosen.underlay
            self._recorded = self._recorded or found.local
            if chosen.lasting and lasting is None:
                self._lasting, self._recorded = found, found.local
        self._chosen_by = wants.settings
        if found == before:
            return False
        if before is None or found._replace(up=before.up, carrier=before.carrier) != before:
            log.info(
                "underlay",
                chosen=choice.underlay_text(self._family, found),
                was=choice.underlay_text(self._family, before) or None,
            )
        self._current.set_family("underlays", number, found)
        if before is not None and before.local != found.local:
            self._moved()
        return False

    def withdraw(self) -> Iterator[str]:
        """Nothing of a family that is switched off counts: not its MTU either."""
        self._current.set_family("underlays", self._family.number, None)
        return iter(())

    def status(self) -> Mapping[str, object]:
        """`underlay`."""
        under = self._current.inputs.underlays.get(self._family.number)
        if under is None:
            return {"underlay": None}
        number = self._family.number
        return {
            "underlay": {
                "interface": under.name,
                "index": under.ifindex,
                "address": ip_text(number, under.local),
                "public_ip": ip_text(number, under.public_ip),
                "mac": mac_text(under.mac),
                "mtu": under.mtu,
                "up": under.up,
                "carrier": under.carrier,
                "neighbours": [str(there) for there in under.neighbours],
                "reason": under.reason,
            }
        }
