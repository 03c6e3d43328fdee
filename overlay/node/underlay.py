"""Which interface and address carry the tunnel, why, and whether that still holds. The kernel is asked by the caller.

Source of the order of choice: flannel pkg/ipmatch/match.go; the difference is the default: the interface that routes
to the store, which is the one that surely reaches the other nodes' world, instead of the first default route.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from lease.families import Family
from lease.model import around, ip_number, ip_text
from overlay.control.controller import CannotReconcile
from overlay.control.inputs import Underlay
from overlay.kernel.route.entries import Address, Link
from overlay.settings.settings import Settings

Lookup = Callable[[int], tuple[int, int, int] | None]
"""Interface, source address and gateway by which the kernel reaches an address."""
ANYWHERE = {4: ip_number("192.0.2.1", 4), 6: 0x20010DB8 << 96 | 1}
"""By family, an address that only the default route reaches (RFC 5737, RFC 3849); nothing is sent."""


class UnderlayError(CannotReconcile):
    """No interface can be chosen: says what was looked for, what there is, and which flag decides."""


class Interfaces:
    """Links, and their addresses of one family, as last seen."""

    def __init__(self, family: Family, links: Iterable[Link], addresses: Iterable[Address]) -> None:
        self.family = family
        self.links = {link.ifindex: link for link in links}
        self.addresses = list(addresses)

    def of(self, index: int) -> list[Address]:
        """An interface's addresses, the best first: global before link scope, lasting before temporary."""
        mine = [address for address in self.addresses if address.oif == index and not address.deprecated]
        return sorted(mine, key=lambda a: (a.scope, a.secondary, not a.permanent))

    def holder(self, address: int) -> Link | None:
        """The interface that has an address."""
        for item in self.addresses:
            if item.address == address and item.oif in self.links:
                return self.links[item.oif]
        return None

    def named(self, name: str) -> Link | None:
        """The interface of a name."""
        return next((link for link in self.links.values() if link.name == name), None)

    def listed(self) -> str:
        """For a message: what there is."""
        parts = [
            f"{link.name} {ip_text(address.family, address.address)}"
            for link in self.links.values()
            for address in self.of(link.ifindex)
            if not link.loopback
        ]
        return ", ".join(parts) or f"no interface with an {self.family.text} address"


def choose(settings: Settings, there: Interfaces, lookup: Lookup, store_hosts: Mapping[str, int | None]) -> Underlay:
    """The underlay by flags, else by the route to the store.

    store_hosts: the store's addresses by the name they were given under; None: it does not resolve yet.

    Raises:
        UnderlayError: nothing matches.
    """
    link, local, reason = _chosen(settings, there, lookup, store_hosts)
    if settings.public_ip and any(item.address == settings.public_ip for item in there.of(link.ifindex)):
        local = settings.public_ip  # several addresses: the one we advertise is the one we send from
    if not local:
        addresses = there.of(link.ifindex)
        if not addresses:
            raise UnderlayError(
                f"interface {link.name} ({reason}) has no {there.family.text} address; there is: {there.listed()}"
            )
        local = addresses[0].address
    return _underlay(settings, there, link, local, reason)


def refresh(settings: Settings, current: Underlay, there: Interfaces) -> Underlay | None:
    """The same choice with today's MTU, number and prefixes; None when its interface or address is gone."""
    link = there.named(current.name)
    if link is None or all(item.address != current.local for item in there.of(link.ifindex)):
        return None
    return _underlay(settings, there, link, current.local, current.reason)


def underlay_text(family: Family, underlay: Underlay | None) -> str:
    """For the log."""
    if underlay is None:
        return ""
    address, public_ip = ip_text(family.number, underlay.local), ip_text(family.number, underlay.public_ip)
    advertised = "" if public_ip == address else f", advertised as {public_ip}"
    return f"{underlay.name} {address} (MTU {underlay.mtu}){advertised}: {underlay.reason}"


def _underlay(settings: Settings, there: Interfaces, link: Link, local: int, reason: str) -> Underlay:
    on_link = {around(item.family, item.address, item.length) for item in there.of(link.ifindex)}
    return Underlay(
        link.name,
        link.ifindex,
        link.mtu,
        link.mac,
        local,
        settings.public_ip or local,
        tuple(sorted(on_link)),
        link.arp,
        reason,
        link.up,
    )


def _chosen(
    settings: Settings, there: Interfaces, lookup: Lookup, store_hosts: Mapping[str, int | None]
) -> tuple[Link, int, str]:
    """Interface, address (0: its best) and the reason."""
    if settings.iface or settings.iface_regex or settings.iface_can_reach:
        return _by_flags(settings, there, lookup)
    if settings.public_ip and (holder := there.holder(settings.public_ip)) is not None:
        return holder, settings.public_ip, "it holds --public-ip"
    for name, address in store_hosts.items():
        found = lookup(address) if address is not None else None
        if found is not None and (link := there.links.get(found[0])) is not None and not link.loopback:
            return link, found[1], f"it routes to the store {name}"
    if unresolved := [name for name, address in store_hosts.items() if address is None]:
        raise UnderlayError(
            f"the store's name {', '.join(unresolved)} does not resolve yet, so no route to it says which interface to"
            f" use; trying again (--iface says it at once); there is: {there.listed()}"
        )
    found = lookup(ANYWHERE[there.family.number])
    if found is not None and (link := there.links.get(found[0])) is not None and not link.loopback:
        return link, found[1], "the default route leaves by it (the store is on this machine)"
    able = [
        link
        for link in there.links.values()
        if link.arp and link.kind not in ("vxlan", "bridge") and any(a.scope == 0 for a in there.of(link.ifindex))
    ]
    if len(able) == 1:
        return able[0], 0, "the only interface with an address (no route to the store, no default route)"
    raise UnderlayError(
        f"no route to the store ({', '.join(store_hosts)}) nor a default route says which"
        f" interface to use; say --iface; there is: {there.listed()}"
    )


def _by_flags(settings: Settings, there: Interfaces, lookup: Lookup) -> tuple[Link, int, str]:
    """flannel's order: every --iface, then every --iface-regex, then --iface-can-reach."""
    for wanted in settings.iface:
        reason = f"--iface {wanted}"
        try:
            address = ip_number(wanted, there.family.number)
        except ValueError:
            if (link := there.named(wanted)) is not None:
                return link, 0, reason
            continue
        if (link := there.holder(address)) is not None:
            return link, address, reason
    for pattern in settings.iface_regex:
        expression = re.compile(pattern)
        reason = f"--iface-regex {pattern}"
        for link in there.links.values():
            for item in there.of(link.ifindex):
                if expression.search(ip_text(item.family, item.address)):
                    return link, item.address, reason
        for link in there.links.values():
            if expression.search(link.name):
                return link, 0, reason
    if settings.iface_can_reach:
        target = ip_text(there.family.number, settings.iface_can_reach)
        found = lookup(settings.iface_can_reach)
        if found is not None and (by := there.links.get(found[0])) is not None:
            return by, found[1], f"--iface-can-reach {target}"
    asked = [f"--iface {name}" for name in settings.iface] + [f"--iface-regex {p}" for p in settings.iface_regex]
    if settings.iface_can_reach:
        asked.append(f"--iface-can-reach {ip_text(there.family.number, settings.iface_can_reach)}")
    raise UnderlayError(f"no interface matches {', '.join(asked)}; there is: {there.listed()}")


def on_link_interface(family: Family, address: int, links: Iterable[Link], addresses: Iterable[Address]) -> str | None:
    """The interface on whose link an address can be asked for by ARP: its own, else one whose prefix holds it."""
    there = Interfaces(family, links, addresses)
    best: tuple[bool, int, str] | None = None
    for item in there.addresses:
        link = there.links.get(item.oif)
        if link is None or not link.arp or not link.up or not link.carrier or item.length > there.family.bits - 2:
            continue
        if around(item.family, item.address, item.length).holds(address):
            candidate = (item.address == address, item.length, link.name)
            best = max(best, candidate) if best is not None else candidate
    return best[2] if best is not None else None
