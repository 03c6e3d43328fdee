"""The underlay as an input: chosen once, kept while its address is there, chosen again when it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import ip_text, mac_text
from overlay.control.controller import Source
from overlay.control.inputs import AddressKey, CurrentInputs, Inputs
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.entries import Address, Link
from overlay.node import underlay as choice
from overlay.process.log import log
from overlay.settings.settings import Settings


class _Wants(NamedTuple):
    settings: Settings
    links: Mapping[int, Link]
    addresses: Mapping[AddressKey, Address]


class UnderlaySource(Source):
    """The underlay of one family."""

    name = "underlay"
    rechecked = True

    def __init__(
        self,
        current: CurrentInputs,
        family: Family,
        requests: RequestSocket,
        store_hosts: Callable[[], dict[str, int | None]],
        moved: Callable[[], None],
    ) -> None:
        """store_hosts: as for underlay.choose. moved: called when our own address changed, for the store's connection."""
        self._current, self._family, self._requests = current, family, requests
        self._store_hosts, self._moved = store_hosts, moved
        self._chosen_by: Settings | None = None

    def wants(self, inputs: Inputs) -> object:
        """What it is chosen from."""
        return _Wants(inputs.settings, inputs.links, inputs.addresses_of(self._family.number))

    def reconcile(self, wants: Any) -> bool:
        """Choose it. Raises UnderlayError, KernelError."""
        there = choice.Interfaces(self._family, wants.links.values(), wants.addresses.values())
        number = self._family.number
        before = self._current.inputs.underlays.get(number)
        same_flags = self._chosen_by is not None and self._chosen_by.public_ip == wants.settings.public_ip
        found = choice.refresh(wants.settings, before, there) if before is not None and same_flags else None
        if found is None:
            found = choice.choose(
                wants.settings, there, partial(self._requests.lookup, self._family), self._store_hosts()
            )
        self._chosen_by = wants.settings
        if found == before:
            return False
        if before is None or found._replace(up=before.up) != before:
            log.info(
                "underlay",
                chosen=choice.underlay_text(self._family, found),
                was=choice.underlay_text(self._family, before) or None,
            )
        self._current.set_family("underlays", number, found)
        if before is not None and before.local != found.local:
            self._moved()
        return False

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
                "reason": under.reason,
            }
        }
