"""What the kernel would do with packets of our pods, as far as routes decide that which are not ours to put back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import Lease, Prefix, ip_text
from overlay.control.controller import Controller, Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import AddressKey, Inputs, Underlay
from overlay.control.schedule import RECHECK_S
from overlay.kernel.events import SELDOM_S, Overrun, RouteSeen, RoutingSeen, SysctlSeen
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.entries import PROTOCOL, RT_TABLE_MAIN, Address, Link
from overlay.kernel.route.lookup import Way
from overlay.node.interfaces import gateway_holders, ports_of
from overlay.reach import explain, ways
from overlay.reach.causes import Causes

ASKED_AT_ONCE = 256
"""Peers a check: all where there are not more, else others each time."""
AGAIN_S, SOON_S, MOMENT_S = 1.0, SELDOM_S + 0.2, 0.5
"""A fault is reported when it is there again a moment later; after an event others may follow, of which we do not hear."""
SHARE = 50
"""Events make a check no more often than that it takes a fiftieth of the time."""
OWN_TABLES = (254, 255)
"""main and local: where another one decides, that is what is reported (`ways`)."""
NAMED = 3
"""So many peers are named, and the others counted."""


class _Wants(NamedTuple):
    """carrier: what is wrong with the underlay's link, "" where nothing; synced: peers' entries are in the kernel; bridges:
    those that pods are attached to, by name."""

    network: Prefix
    here: ways.Here
    links: Mapping[int, Link]
    addresses: Mapping[AddressKey, Address]
    carrier: str
    synced: bool
    retained: tuple[Prefix, ...]
    bridges: frozenset[str]


class _Fault(NamedTuple):
    """What is wrong with the way of one packet."""

    question: ways.Question
    way: Way
    peer: ways.Peer


class ReachController(Controller):
    """Reports what pods of one family suffer from; changes nothing."""

    name = "reach"
    reports = ("carrier", "routes", "retained", "ways", "ways to single peers", "marks")
    yields = True
    harmless = True

    def __init__(
        self,
        family: Family,
        requests: RequestSocket,
        health: Health,
        clock: Callable[[], float],
        some_peers: Callable[[int, int], list[ways.Peer]],
        refused: Callable[[], Iterable[Lease]],
    ) -> None:
        """some_peers: so many peers whose entries stand, from a place in their order on; refused: the records that are not
        peers."""
        self._family, self._requests, self._health, self._clock = family, requests, health, clock
        self._some_peers, self._refused = some_peers, refused
        self._place = 0
        self._seen: frozenset[tuple[object, ...]] = frozenset()
        """Faults that the last check found."""
        self._causes: dict[tuple[str, int, int, int], str] = {}
        """By kind of fault, since the last news of routes: looking for one reads whole tables."""
        self._asked_from: ways.Here | None = None
        """What this node was when it was asked last."""
        self._check_at = self._not_before = clock()
        self._forget_at = clock()
        self._missing_since: float | None = None
        """Since when the node's own routes lack something."""
        self._said_missing = False
        self._synced = False
        self.checked = 0
        """Peers asked about so far."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Routes and rules of others, and what forwards."""
        return {
            RouteSeen: lambda event: event.route.protocol != PROTOCOL and self._soon(),
            RoutingSeen: lambda _event: self._soon(),
            SysctlSeen: lambda _event: self._soon(),
            Overrun: lambda _event: self._soon(),
        }

    def _soon(self) -> bool:
        self._causes.clear()
        self._check_at = min(self._check_at, max(self._clock() + SOON_S, self._not_before))
        return False

    def wants(self, inputs: Inputs) -> object:
        """What it is checked against."""
        number = self._family.number
        here, pool = ways.here_of(inputs, number), inputs.pool(number)
        if here is None or pool is None:
            return Waiting("for a lease")
        under, addresses = inputs.underlays[number], inputs.addresses_of(number)
        synced = number in inputs.synced_families and inputs.tunnels[number].up and under.up
        return _Wants(
            pool.network, here, inputs.links, addresses, _carrier(under), synced, inputs.retained, inputs.bridges
        )

    def reconcile(self, wants: Any) -> bool:
        """Ask the kernel, and report. Raises KernelError."""
        self._synced = wants.synced
        self._health.report("carrier", wants.carrier, outside=True)
        self._health.report("routes", self._lasting(self._missing(wants)), outside=True)
        retained = retained_text(wants.retained, self._refused(), _idle(wants)) if wants.retained else ""
        self._health.report("retained", retained, harmless=True)
        if wants.synced and (wants.here != self._asked_from or self._clock() >= self._check_at):
            began = time.thread_time()
            if wants.here != self._asked_from or self._clock() >= self._forget_at:
                self._causes.clear()
                self._forget_at = self._clock() + RECHECK_S
            self._asked_from = wants.here
            self._check_ways(wants)
            spent = (time.thread_time() - began) * SHARE
            self._not_before = self._clock() + spent
            self._check_at = self._clock() + (max(AGAIN_S, spent) if self._seen else RECHECK_S)
        return False

    def due(self) -> float | None:
        """Now and then, after an event, and to look a second time; never while there is nothing to ask about."""
        times = [self._check_at] if self._synced else []
        if self._missing_since is not None and not self._said_missing:
            times.append(self._missing_since + MOMENT_S)
        return min(times, default=None)

    # --- the bridge of pods

    def _lasting(self, missing: str) -> str:
        """What has been so for a moment: a CNI plugin makes a bridge first, and gives it its address then."""
        now = self._clock()
        if not missing:
            self._missing_since, self._said_missing = None, False
            return ""
        if self._missing_since is None:
            self._missing_since = now
        self._said_missing = now - self._missing_since >= MOMENT_S
        return missing if self._said_missing else ""

    def _missing(self, wants: _Wants) -> str:
        """What of the node's own routes is missing, with what to do: the bridge's comes with its address."""
        found: list[str] = []
        own, number = wants.here.own, self._family.number
        holders = gateway_holders(own, wants.addresses.values()) if own.length < 31 else frozenset()
        if own.length < 31 and not holders:
            found += self._without_gateway(wants)
        for index in holders:
            link = wants.links.get(index)
            if link is None or link.kind != "bridge":
                continue
            way = self._requests.lookup(self._family, own.base + 2)
            if not link.up:
                found.append(
                    f"{link.name} is down, so nobody reaches the pods of this node: ip link set {link.name} up"
                )
            elif link.carrier and (way is None or (way.oif not in holders and way.table in OWN_TABLES)):
                if way is None and self._has_route(own, index):
                    continue  # something else stands before it: `ways` says what
                gateway = ip_text(number, own.base + 1)
                found.append(
                    f"no route leads {own} to {link.name}, so nobody reaches the pods of this node:"
                    f" ip route replace {own} dev {link.name} proto kernel scope link src {gateway}"
                )
        return "; ".join(found)

    def _without_gateway(self, wants: _Wants) -> Iterator[str]:
        """Bridges with pods on them that have lost their address, and with it the route."""
        own, number = wants.here.own, self._family.number
        gateway = f"{ip_text(number, own.base + 1)}/{own.length}"
        for link in wants.links.values():
            if link.kind != "bridge" or link.name not in wants.bridges or not ports_of(wants.links, link.ifindex):
                continue
            mine = [each for each in wants.addresses.values() if each.oif == link.ifindex]
            if not any(wants.network.holds(each.address) for each in mine):
                yield (
                    f"{link.name}, which pods are attached to, has not their gateway's address {gateway}, so nobody reaches"
                    f" the pods of this node: ip addr add {gateway} dev {link.name}"
                )

    def _has_route(self, own: Prefix, index: int) -> bool:
        """Whether the main table leads our subnet to an interface, whatever is asked before it."""
        main = self._requests.routes_of(self._family, RT_TABLE_MAIN)
        return any((route.base, route.length, route.oif) == (own.base, own.length, index) for route in main)

    # --- ways to and from peers

    def _check_ways(self, wants: _Wants) -> None:
        """Report faults that the last check of the same peers found, too: one alone may be a moment of somebody's change.
        Other peers are asked about once these are well."""
        here = wants.here
        peers = self._some_peers(self._place, ASKED_AT_ONCE)
        self.checked += len(peers)
        faults = [
            _Fault(question, way, peer)
            for peer in peers
            for question in ways.questions(here, peer)
            if not ways.is_as_asked(question, way := self._requests.way(self._family, question.packet))
        ]
        lasting = [fault for fault in faults if _same(fault) in self._seen]
        self._seen = frozenset(map(_same, faults))
        names = {number: link.name for number, link in wants.links.items()}
        causes = Causes(self._family, self._requests, wants.network, names)
        if lasting or not faults:
            self._report(lasting, causes, len(peers))
        self._health.report("marks", self._marked(here, peers, names, causes) if peers else "", harmless=True)
        if not faults:
            more = len(peers) == ASKED_AT_ONCE or bool(self._some_peers(self._place + ASKED_AT_ONCE, 1))
            self._place = self._place + ASKED_AT_ONCE if more else 0

    def _report(self, faults: list[_Fault], causes: Causes, asked: int) -> None:
        groups: dict[tuple[str, int, int, int], list[_Fault]] = {}
        for fault in faults:
            groups.setdefault(_kind(fault), []).append(fault)
        all_peers: dict[str, list[str]] = {}
        single: dict[str, list[str]] = {}
        for group in groups.values():
            # an underlay address is what a record says: one that no route leads to is that peer's trouble alone
            some = group[0].question.what in ways.OF_ONE_PEER and len({fault.peer for fault in group}) < asked
            happens, cause = self._about(group, causes, asked)
            (single if some else all_peers).setdefault(cause, []).append(happens)
        self._health.report("ways", _by_cause(all_peers), outside=True)
        self._health.report("ways to single peers", _by_cause(single), harmless=True)

    def _about(self, group: list[_Fault], causes: Causes, asked: int) -> tuple[str, str]:
        """What happens, and why."""
        question, way, _ = group[0]
        subnets = list(dict.fromkeys(str(fault.peer.subnet) for fault in group))
        peer = ", ".join(subnets[:NAMED])
        if len(subnets) > NAMED:
            peer += f" and {len(subnets) - NAMED} more of the {asked} peers asked about"
        what = question.what.format(peer=peer)
        kind = _kind(group[0])
        if kind not in self._causes:
            self._causes[kind] = causes.cause(question, way)
        return f"{what} {causes.happens(question, way)}", self._causes[kind]

    def _marked(self, here: ways.Here, peers: list[ways.Peer], names: Mapping[int, str], causes: Causes) -> str:
        """Rules that lead marked packets elsewhere: whether a pod's packets get that mark is not known."""
        peer, found = peers[0], []
        marks = {rule.mark: rule for rule in self._requests.rules(self._family) if rule.mask and not rule.invert}
        sound = [  # without a mark
            question
            for question in (ways.questions(here, peer) if marks else ())
            if question.what in (ways.OUT, ways.FORWARDED)
            and ways.is_as_asked(question, self._requests.way(self._family, question.packet))
        ]
        for mark in marks:
            for question in sorted(sound, key=lambda one: one.what != ways.FORWARDED):  # pods' first
                asked = question._replace(packet=question.packet._replace(mark=mark))
                way = self._requests.way(self._family, asked.packet)
                if ways.is_as_asked(asked, way) or names.get(way.oif) == "lo":  # a proxy of this node takes them
                    continue
                what = asked.what.format(peer=f"{peer.subnet} with mark {mark:#x}")
                happens = explain.refusal_text(way) if way.error else f"leave by {names.get(way.oif, way.oif)}"
                found.append(f"{what} {happens}: {causes.cause(asked, way)}")
                break
        return "; ".join(found)

    def status(self) -> Mapping[str, object]:
        """`ways`: how many peers' ways were asked for since the start."""
        return {"ways": {"peers_asked": self.checked}}


def _same(fault: _Fault) -> tuple[object, ...]:
    """What makes two faults of two checks the same."""
    return (*_kind(fault), fault.peer)


def _kind(fault: _Fault) -> tuple[str, int, int, int]:
    """Faults of one kind have one cause, as far as can be seen without looking for it."""
    return fault.question.what, fault.way.oif, fault.way.table, fault.way.error


def _by_cause(found: Mapping[str, list[str]]) -> str:
    """One cause after the other, each once."""
    return "; ".join(f"{', '.join(happens)}: {cause}" for cause, happens in found.items())


def _carrier(underlay: Underlay) -> str:
    if not underlay.up:
        return f"{underlay.name}, which leads to peers, is down: ip link set {underlay.name} up"
    if not underlay.carrier:
        return f"{underlay.name}, which leads to peers, has no carrier: its cable, switch port or virtual network"
    return ""


def _idle(wants: _Wants) -> dict[Prefix, str]:
    """The bridges without a pod that have the gateway of a retained subnet."""
    found = {}
    for address in wants.addresses.values():
        link = wants.links.get(address.oif)
        for subnet in wants.retained:
            holds = link is not None and link.kind == "bridge" and subnet.holds(address.address)
            if link is not None and holds and not ports_of(wants.links, link.ifindex):
                found[subnet] = f"{ip_text(address.family, address.address)}/{address.length} dev {link.name}"
    return found


def retained_text(subnets: Iterable[Prefix], refused: Iterable[Lease], idle: Mapping[Prefix, str]) -> str:
    """What pods on retained subnets suffer from, for the operator. refused: records, among them those of their owners;
    idle: bridges of others that hold such a subnet though no pod uses it: address and device."""
    records = list(refused)
    return "; ".join(_about(subnet, records, idle.get(subnet, "")) for subnet in subnets)


def _about(subnet: Prefix, refused: Iterable[Lease], idle: str) -> str:
    whose = "nobody holds it now"
    for lease in refused:
        end = lease.endpoint(subnet.family)
        if end is not None and end.subnet.overlaps(subnet):
            whose = f"{lease.key} is {ip_text(subnet.family, end.public_ip)}'s"
            break
    if idle:
        return (
            f"{subnet} is not ours any more ({whose}), and a bridge that is not ours to delete has its gateway, which keeps"
            f" the pods of its owner from this node: ip addr del {idle} (docker0: restart docker with the new subnet)"
        )
    return (
        f"{subnet} is not ours any more ({whose}), and pods of this node run on it: no other node reaches them;"
        " make them again (kubectl delete pod, or detach and attach)"
    )
