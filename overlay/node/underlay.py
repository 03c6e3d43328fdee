"""Which interface and address carry the tunnel, why, and whether that still holds. The kernel is asked by `Lookup`.

Source of the order of choice: flannel pkg/ipmatch/match.go; the difference is the default: the interface that routes
to the store, which is the one that surely reaches the other nodes' world, instead of the first default route.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from lease.families import Family
from lease.model import Prefix, around, ip_number, ip_text
from overlay.control.controller import CannotReconcile
from overlay.control.inputs import Underlay
from overlay.kernel.route.entries import Address, Link
from overlay.kernel.route.lookup import Way
from overlay.settings.settings import Settings


class Lookup(Protocol):
    """By which way the kernel reaches an address, None: by none. source: with that as sender's; oif: by that interface."""

    def __call__(self, address: int, source: int = 0, oif: int = 0) -> Way | None: ...


ANYWHERE = {4: ip_number("192.0.2.1", 4), 6: 0x20010DB8 << 96 | 1}
"""By family, an address that only the default route reaches (RFC 5737, RFC 3849); nothing is sent."""


LINK = 253
"""RT_SCOPE_LINK (include/uapi/linux/rtnetlink.h)."""
_BESIDE = "the other family's underlay is there"


class UnderlayError(CannotReconcile):
    """No interface can be chosen: says what was looked for, what there is, and which flag decides."""


class Interfaces:
    """Links, and their addresses of one family, as last seen."""

    def __init__(self, family: Family, links: Iterable[Link], addresses: Iterable[Address]) -> None:
        self.family = family
        self.links = {link.ifindex: link for link in links}
        self.addresses = list(addresses)

    def of(self, index: int) -> list[Address]:
        """An interface's addresses, the best first: global before link scope, those with a prefix before those alone beside
        them (a virtual IP that moves between machines is /32), lasting before temporary. Of IPv6 none of link scope: every
        interface has one, and peers behind a router cannot use it."""
        mine = [
            address
            for address in self.addresses
            if address.oif == index and not address.deprecated and (self.family.has_broadcast or address.scope < LINK)
        ]
        return sorted(mine, key=lambda a: (a.scope, a.length == self.family.bits, a.secondary, not a.permanent))

    def has(self, index: int, address: int) -> bool:
        """Whether an interface has an address."""
        return any(item.address == address for item in self.of(index))

    def is_alone(self, index: int, address: int) -> bool:
        """Whether an address of an interface has no prefix: it may be a virtual one, and says nothing of the link."""
        return all(item.length == self.family.bits for item in self.of(index) if item.address == address)

    @staticmethod
    def carries(link: Link) -> bool:
        """Whether packets can leave by the interface that has an address: by none of the node's inner ones."""
        return not link.loopback and link.kind != "dummy"

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


class _Found(NamedTuple):
    """What flags or routes say. local: the address, 0: one of `among`, which are addresses of the interface, or () for all.
    source: that by which the kernel sends to what was looked for, 0: unknown. fixed: an operator named the address."""

    link: Link
    reason: str
    local: int = 0
    among: tuple[int, ...] = ()
    source: int = 0
    fixed: bool = False


class Choice(NamedTuple):
    """underlay: the choice. lasting: it is the one that this node is known by from now on; else another is looked for at
    each change (a /32 that no flag names: the interface's own address may come yet)."""

    underlay: Underlay
    lasting: bool


def choose(
    settings: Settings,
    there: Interfaces,
    lookup: Lookup,
    store_hosts: Mapping[str, int | None],
    recorded: int = 0,
    beside: str = "",
) -> Choice:
    """The underlay by flags, else by the route to the store.

    store_hosts: the store's addresses by the name they were given under; None: it does not resolve yet. recorded: the
    address that this node had last, which it keeps where several would do; 0: none. beside: the interface of the other
    family's underlay: of two families both leave by one, as flannel's do; "": it is not chosen, or there is none.

    Raises:
        UnderlayError: nothing matches.
    """
    found = _chosen(settings, there, lookup, store_hosts, beside)
    index, fixed = found.link.ifindex, found.fixed
    wanted = settings.public_ip_of(there.family.number)
    if wanted and there.has(index, wanted):
        local, fixed = wanted, True  # several addresses: the one we advertise is the one we send from
    elif found.local:
        local = found.local
    else:
        source = found.source or _source(there, lookup, store_hosts, index)
        local = _best(there, found, recorded, source)
    if not local:
        raise UnderlayError(
            f"interface {found.link.name} ({found.reason}) has no {there.family.text} address; there is: {there.listed()}"
        )
    made = _underlay(settings, there, found.link, local, found.reason, lookup, _targets(there, store_hosts))
    holder = there.holder(local)
    lasting = fixed or holder is None or not there.is_alone(holder.ifindex, local)
    return Choice(made, lasting)


def refresh(
    settings: Settings, current: Underlay, there: Interfaces, lookup: Lookup, store_hosts: Mapping[str, int | None]
) -> Underlay | None:
    """The same choice with today's MTU, number and prefixes; None when its interface or address is gone."""
    link, holder = there.named(current.name), there.holder(current.local)
    if link is None or holder is None or not there.has(holder.ifindex, current.local):
        return None
    if holder.ifindex != link.ifindex and there.carries(holder):
        return None  # it moved to another interface
    return _underlay(settings, there, holder, current.local, current.reason, lookup, _targets(there, store_hosts))


def _targets(there: Interfaces, store_hosts: Mapping[str, int | None]) -> tuple[int, ...]:
    """Addresses by whose routes it is seen how this node sends: the store's, where it is elsewhere, and any."""
    local = {item.address for item in there.addresses}
    known = (address for address in store_hosts.values() if address is not None and address not in local)
    return (*known, ANYWHERE[there.family.number])


def _source(there: Interfaces, lookup: Lookup, store_hosts: Mapping[str, int | None], index: int) -> int:
    """The address of an interface from which the kernel sends by it; 0 where no route says."""
    for target in _targets(there, store_hosts):
        way = lookup(target, oif=index)
        if way is not None and way.table and there.has(index, way.source):
            return way.source
    return 0


def _best(there: Interfaces, found: _Found, recorded: int, source: int) -> int:
    """Of an interface's addresses that may be taken: the recorded one, else the kernel's source, else the first; but a
    recorded one without a prefix does not stand before one with it. 0: there is none."""
    index = found.link.ifindex
    able = [item.address for item in there.of(index) if not found.among or item.address in found.among]
    if not able:
        return 0
    wide = any(not there.is_alone(index, address) for address in able)
    if recorded in able and not (wide and there.is_alone(index, recorded)):
        return recorded
    return source if source in able else able[0]


def underlay_text(family: Family, underlay: Underlay | None) -> str:
    """For the log."""
    if underlay is None:
        return ""
    address, public_ip = ip_text(family.number, underlay.local), ip_text(family.number, underlay.public_ip)
    advertised = "" if public_ip == address else f", advertised as {public_ip}"
    return f"{underlay.name} {address} (MTU {underlay.mtu}){advertised}: {underlay.reason}"


def _underlay(
    settings: Settings,
    there: Interfaces,
    holder: Link,
    local: int,
    reason: str,
    lookup: Lookup,
    targets: tuple[int, ...],
) -> Underlay:
    link = _sends_by(there, holder, local, lookup, targets)
    on_link = tuple(sorted({around(item.family, item.address, item.length) for item in there.of(link.ifindex)}))
    return Underlay(
        link.name,
        link.ifindex,
        link.mtu,
        link.mac,
        local,
        settings.public_ip_of(there.family.number) or local,
        on_link,
        link.arp,
        reason,
        link.up,
        link.carrier,
        tuple(prefix for prefix in on_link if _asked_by_arp(there, link, prefix, lookup)),
        _vrf(there, link),
    )


def _sends_by(there: Interfaces, holder: Link, local: int, lookup: Lookup, targets: tuple[int, ...]) -> Link:
    """The interface by which the kernel sends from an address: of one that stands on the loopback or on a dummy the routes
    say that. Its MTU and its state are those that count."""
    if there.carries(holder):
        return holder
    for target in targets:
        way = lookup(target, source=local)
        link = there.links.get(way.oif) if way is not None else None
        if link is not None and not link.loopback:
            return link
    return holder


def _asked_by_arp(there: Interfaces, link: Link, on_link: Prefix, lookup: Lookup) -> bool:
    """Whether hosts of a prefix are neighbours: the interface resolves addresses, and the kernel sends there without a
    gateway."""
    if not link.arp or on_link.length >= there.family.bits - 1:
        return False
    if not link.up:
        return True  # its routes come back with it
    local = {item.address for item in there.addresses}
    able = [a for a in range(on_link.base + 1, min(on_link.base + 9, on_link.last)) if a not in local][:1]
    able += [a for a in ((on_link.base + on_link.last) // 2, on_link.last - 1) if a not in local and a not in able]
    by = link.ifindex if _vrf(there, link) else 0  # a VRF's routes are in a table of its own
    found = [lookup(address, oif=by) for address in able]
    # one of them, the gateway's most likely, may have a route of its own
    neighbours = [w for w in found if w is not None and w.oif == link.ifindex and not w.via and w.table != 0]
    return bool(found) and 2 * len(neighbours) > len(found)


def _vrf(there: Interfaces, link: Link) -> int:
    master = there.links.get(link.master)
    return master.ifindex if master is not None and master.kind == "vrf" else 0


def _chosen(
    settings: Settings, there: Interfaces, lookup: Lookup, store_hosts: Mapping[str, int | None], beside: str
) -> _Found:
    """Interface and reason, and what they say of the address."""
    companion = there.named(beside) if beside else None
    if settings.iface or settings.iface_regex or settings.iface_can_reach:
        found = _by_flags(settings, there, lookup)
        if found is None and companion is not None:  # the flags speak of the other family
            found = _Found(companion, _BESIDE)
        if found is None:
            raise UnderlayError(f"no interface matches {_flags_text(settings)}; there is: {there.listed()}")
        return found
    wanted = settings.public_ip_of(there.family.number)
    if wanted and (holder := there.holder(wanted)) is not None:
        flag = "--public-ip" if there.family.number == 4 else "--public-ipv6"
        return _Found(holder, f"it holds {flag}", wanted, fixed=True)
    if companion is not None:
        return _Found(companion, _BESIDE)
    for name, address in store_hosts.items():
        way = lookup(address) if address is not None else None
        if way is not None and (link := there.links.get(way.oif)) is not None and not link.loopback:
            return _by_route(there, link, way, f"it routes to the store {name}")
    if unresolved := [name for name, address in store_hosts.items() if address is None]:
        raise UnderlayError(
            f"the store's name {', '.join(unresolved)} does not resolve yet, so no route to it says which interface to"
            f" use; trying again (--iface says it at once); there is: {there.listed()}"
        )
    way = lookup(ANYWHERE[there.family.number])
    if way is not None and (link := there.links.get(way.oif)) is not None and not link.loopback:
        return _by_route(there, link, way, "the default route leaves by it (the store is on this machine)")
    able = [
        link
        for link in there.links.values()
        if link.arp and link.kind not in ("vxlan", "bridge") and any(a.scope == 0 for a in there.of(link.ifindex))
    ]
    if len(able) == 1:
        return _Found(able[0], "the only interface with an address (no route to the store, no default route)")
    raise UnderlayError(
        f"no route to the store ({', '.join(store_hosts)}) nor a default route says which"
        f" interface to use; say --iface; there is: {there.listed()}"
    )


def _by_route(there: Interfaces, link: Link, way: Way, reason: str) -> _Found:
    """By a route: its source may be an address of another interface (one on the loopback)."""
    if there.has(link.ifindex, way.source):
        return _Found(link, reason, source=way.source)
    holder = there.holder(way.source)
    return _Found(link, reason) if holder is None else _Found(holder, reason, way.source)


def _by_flags(settings: Settings, there: Interfaces, lookup: Lookup) -> _Found | None:
    """flannel's order: every --iface, then every --iface-regex, then --iface-can-reach; None where none matches."""
    for wanted in settings.iface:
        reason = f"--iface {wanted}"
        try:
            address = ip_number(wanted, there.family.number)
        except ValueError:
            if (link := there.named(wanted)) is not None:
                return _Found(link, reason)
            continue
        if (link := there.holder(address)) is not None:
            return _Found(link, reason, address, fixed=True)
    for pattern in settings.iface_regex:
        expression = re.compile(pattern)
        reason = f"--iface-regex {pattern}"
        for link in there.links.values():
            texts = {item.address: ip_text(item.family, item.address) for item in there.of(link.ifindex)}
            if among := tuple(address for address, text in texts.items() if expression.search(text)):
                return _Found(link, reason, among=among)
        for link in there.links.values():
            if expression.search(link.name):
                return _Found(link, reason)
    if settings.iface_can_reach is not None and settings.iface_can_reach[0] == there.family.number:
        target = settings.iface_can_reach[1]
        way = lookup(target)
        if way is not None and (by := there.links.get(way.oif)) is not None:
            return _by_route(there, by, way, f"--iface-can-reach {ip_text(there.family.number, target)}")
    return None


def _flags_text(settings: Settings) -> str:
    asked = [f"--iface {name}" for name in settings.iface] + [f"--iface-regex {p}" for p in settings.iface_regex]
    if settings.iface_can_reach is not None:
        asked.append(f"--iface-can-reach {ip_text(*settings.iface_can_reach)}")
    return ", ".join(asked)


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
