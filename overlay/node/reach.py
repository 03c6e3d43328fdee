"""What the kernel would do with packets of our pods, as far as routes decide that which are not ours to put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import Lease, Prefix, ip_text
from overlay.control.controller import Controller, Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import AddressKey, Inputs
from overlay.kernel.events import Overrun, RouteSeen
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.entries import PROTOCOL, Address, Link


class _Wants(NamedTuple):
    own: Prefix
    links: Mapping[int, Link]
    addresses: Mapping[AddressKey, Address]
    underlay: str
    retained: tuple[Prefix, ...]


class ReachController(Controller):
    """Reports what pods of one family suffer from; changes nothing."""

    name = "reach"
    yields = True
    harmless = True

    def __init__(
        self,
        family: Family,
        requests: RequestSocket,
        health: Health,
        a_peer: Callable[[], int | None],
        refused: Callable[[], Iterable[Lease]],
    ) -> None:
        """a_peer: the public IP of some peer, None where there is none; refused: the records that are not peers."""
        self._family, self._requests, self._health = family, requests, health
        self._a_peer, self._refused = a_peer, refused

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Routes of others."""
        return {RouteSeen: lambda event: event.route.protocol != PROTOCOL, Overrun: lambda _event: True}

    def wants(self, inputs: Inputs) -> object:
        """What it is checked against."""
        number = self._family.number
        end, under = inputs.end(number), inputs.underlays.get(number)
        if end is None or number not in inputs.tunnels:
            return Waiting("for a lease")
        name = under.name if under is not None else "the underlay"
        return _Wants(end.subnet, inputs.links, inputs.addresses_of(number), name, inputs.retained)

    def reconcile(self, wants: Any) -> bool:
        """Ask the kernel, and report. Raises KernelError."""
        self._health.report("routes", self._missing(wants), harmless=True)
        retained = retained_text(wants.retained, self._refused()) if wants.retained else ""
        self._health.report("retained", retained, harmless=True)
        return False

    def _missing(self, wants: _Wants) -> str:
        """What of the node's own routes is missing, with what to do: the bridge's comes with its address, the underlay's
        with the interface's."""
        found, own, number = [], wants.own, self._family.number
        for index in {a.oif for a in wants.addresses.values() if a.address == own.base + 1 and own.length < 31}:
            link = wants.links.get(index)
            if link is None or link.kind != "bridge":
                continue
            way = self._requests.lookup(self._family, own.base + 2)
            if not link.up:
                found.append(
                    f"{link.name} is down, so nobody reaches the pods of this node: ip link set {link.name} up"
                )
            elif way is None or way[0] != index:
                gateway = ip_text(number, own.base + 1)
                found.append(
                    f"no route leads {own} to {link.name}, so nobody reaches the pods of this node:"
                    f" ip route replace {own} dev {link.name} proto kernel scope link src {gateway}"
                )
        peer = self._a_peer()
        if peer is not None and self._requests.lookup(self._family, peer) is None:
            text = ip_text(number, peer)
            found.append(f"no route leads to {text}, a peer: the routes of {wants.underlay} are gone (ip route)")
        return "; ".join(found)


def retained_text(subnets: Iterable[Prefix], refused: Iterable[Lease]) -> str:
    """What pods on retained subnets suffer from, for the operator. refused: records, among them those of their owners."""
    records = list(refused)
    return "; ".join(_about(subnet, records) for subnet in subnets)


def _about(subnet: Prefix, refused: Iterable[Lease]) -> str:
    whose = "nobody holds it now"
    for lease in refused:
        end = lease.endpoint(subnet.family)
        if end is not None and end.subnet.overlaps(subnet):
            whose = f"{lease.key} is {ip_text(subnet.family, end.public_ip)}'s"
            break
    return (
        f"{subnet} is not ours any more ({whose}), and pods of this node run on it: no other node reaches them;"
        " make them again (kubectl delete pod, or detach and attach)"
    )
