"""The interfaces of this node and their addresses, as inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lease.families import Family
from overlay.control.controller import Handler, Source
from overlay.control.inputs import CurrentInputs
from overlay.kernel import events, netlink


class LinksSource(Source):
    """Reads links and addresses whole whenever an event speaks of one: an event alone may be old."""

    name = "links"
    rechecked = True

    def __init__(self, current: CurrentInputs, families: Sequence[Family], requests: netlink.RequestSocket) -> None:
        self._current, self._families, self._requests = current, families, requests

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Any news of a link or an address."""
        return dict.fromkeys(
            (events.LinkSeen, events.AddressSeen, events.Overrun, events.DeviceUnknown), lambda _event: True
        )

    def reconcile(self, wants: Any) -> bool:
        """Read them. Raises KernelError."""
        del wants
        links = {link.ifindex: link for link in self._requests.links()}
        addresses = {
            family.number: {(a.oif, a.address, a.length): a for a in self._requests.addresses(family)}
            for family in self._families
        }
        self._current.set(links=links, addresses=addresses)
        return False
