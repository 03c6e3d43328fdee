"""The controllers of the two tables that are kept by netlink: who may send VXLAN to this node, and what pods may send."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lease.families import FAMILIES, Family
from lease.model import Prefix
from overlay.backends.base import Backend
from overlay.backends.choose import backend_of
from overlay.cni.watch import PodsAttached
from overlay.control.controller import Controller, Handler, NotYet, Waiting
from overlay.control.health import Health, few
from overlay.control.inputs import Inputs
from overlay.control.schedule import RECHECK_S, Cadence
from overlay.firewall import antispoof, guard, pods_table
from overlay.firewall import lift as lifting
from overlay.firewall.lift import Lift
from overlay.kernel.events import NftSeen, Overrun
from overlay.kernel.netlink import KernelError, error_text
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.nftables.wire import Table
from overlay.kernel.route.entries import Link
from overlay.node.interfaces import interfaces_elsewhere, interfaces_within, pod_veths, subnets_of, without_bridge
from overlay.node.owned import Owned
from overlay.node.standing import backend_in_force, network_in_force
from overlay.peers.plan import nodes_within
from overlay.process.log import log

DIRECT_S = 3600.0
"""Peers may come without the tunnel for so long after the network config says so no more: it reaches nodes one by one, and
one whose agent does not run sends as it did."""
LOOK_AGAIN_S = 5.0
"""After an unknown sender was seen: is his record here now?"""
NAMED = 3
"""So many interfaces are named in a problem."""


class _TableController(Controller):
    """A table of ours that somebody may alter: read whole after each word of it, and now and then."""

    harmless = True
    rechecked = False
    suffix: str

    def __init__(self, sets: NetfilterSocket, owned: Owned, clock: Callable[[], float]) -> None:
        self._sets, self._owned, self._clock = sets, owned, clock
        self._cadence = Cadence(clock)
        self._read_whole = True
        self._wanted: Table | None = None

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Somebody touched it, or may have."""
        return {NftSeen: self._on_nft, Overrun: lambda _event: self._doubt()}

    def _on_nft(self, event: NftSeen) -> bool:
        return self._doubt() if not event.table or event.table.endswith(self.suffix) else False

    def _doubt(self) -> bool:
        self._read_whole = True
        return True

    def reconcile(self, wants: Any) -> bool:
        """One slice. Raises KernelError; after any the kernel may have done what it did not answer to, or a check under way
        is broken off, so the table is read whole."""
        try:
            return self._reconcile(wants)
        except OSError:
            self._read_whole = True
            raise

    def _reconcile(self, wants: Any) -> bool:
        raise NotImplementedError

    def _table_of(self, network: int) -> tuple[str, str]:
        """Family and name of a network's table."""
        raise NotImplementedError

    def leave(self, network: int) -> Iterator[str]:
        """No table of a network. Raises KernelError."""
        yield from self._remove(network)

    def _remove(self, network: int) -> Iterator[str]:
        family, name = self._table_of(network)
        if self._sets.remove(family, name):
            yield f"nft table {family} {name}"

    def withdraw(self) -> Iterator[str]:
        """Delete it."""
        self._read_whole, wanted = True, self._wanted
        if wanted is not None and self._sets.remove(wanted.family, wanted.name):
            yield f"nft table {wanted.family} {wanted.name}"
        self._wanted = None
        for network in self._owned.networks():
            yield from self._remove(network)


class _GuardWants(NamedTuple):
    """table, direct_table: while peers come by the tunnel alone, and while some may come without it; direct: they may, by
    the network config; length: of the network's subnets; interfaces: of the guard's sets, by number; on_link: where peers
    may be reached without the tunnel; shared: the other VXLAN devices on our port."""

    table: Table
    direct_table: Table
    interfaces: Mapping[str, frozenset[int]]
    on_link: tuple[Prefix, ...]
    direct: bool
    length: int
    shared: tuple[str, ...]


class GuardController(_TableController):
    """Who may send VXLAN to this node over one family, before the first route of a peer: its answer may be quick."""

    name = "guard"
    suffix = guard.SUFFIX
    reports = ("shared port", "unknown senders", "beside the tunnel")

    def __init__(
        self,
        family: Family,
        table: guard.Guard,
        sets: NetfilterSocket,
        owned: Owned,
        health: Health,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(sets, owned, clock)
        self._family, self.guard, self._health = family, table, health
        self._name_senders_at = 0.0
        self._suspects: frozenset[str] = frozenset()
        """Unknown senders of the last look."""
        self._direct_until: float | None = None
        """Peers may come without the tunnel; None: not known yet."""

    def _table_of(self, network: int) -> tuple[str, str]:
        return self._family.nft, guard.table_name(network)

    def wants(self, inputs: Inputs) -> object:
        """The table's form, and the interfaces by which packets of pods come; its addresses are the peers'."""
        if not inputs.settings.vxlan_guard:
            return None
        tunnel = inputs.tunnels.get(self._family.number)
        if tunnel is None:
            return Waiting("for a lease")
        return self._wants(inputs, tunnel.name, backend_in_force(inputs, self._family))

    def shut(self, inputs: Inputs, tunnel: str) -> None:
        """Before a device takes frames: where there is no table that says from whom, by its port, from nobody. Where none
        can be made (no nftables) pods' traffic goes on without, as it does when the table is lost later; this controller
        says so."""
        if inputs.config is None or not inputs.settings.vxlan_guard:
            return
        wanted = self._wants(inputs, tunnel, backend_of(inputs.config.backend, self._family))  # of the device to come
        if not isinstance(wanted, _GuardWants):
            return
        try:
            if not any(self._sets.is_formed(table) for table in (wanted.table, wanted.direct_table)):
                self._read_whole = True
                self.guard.shut(wanted.table, wanted.interfaces)
        except KernelError as error:
            log.warning("guard.not_made", table=wanted.table.name, reason=error_text(error), effect="tried again")

    def open_again(self, network: int) -> None:
        """The device that it was shut for was refused: its table would judge what comes by the one that stands."""
        try:
            list(self._remove(network))
        except KernelError as error:
            log.warning("guard.not_removed", network=network, reason=error_text(error), effect="tried again")

    def _wants(self, inputs: Inputs, tunnel: str, backend: Backend | None) -> object:
        number = self._family.number
        pool, under, end = inputs.pool(number), inputs.underlays.get(number), inputs.end(number)
        if backend is None or pool is None or end is None:
            return Waiting("for a lease")
        outer = backend.outer()
        if outer is None:
            return None
        addresses = inputs.addresses_of(number).values()
        inside, veths = interfaces_within(pool.network, addresses, under), pod_veths(inputs.links, addresses, under)
        elsewhere = interfaces_elsewhere(inputs.links, inside | veths, inputs.bridges, under, tunnel)
        interfaces = {guard.POD_INTERFACES: inside, guard.POD_VETHS: veths, guard.ELSEWHERE: elsewhere}
        on_link = (*(under.on_link if under is not None else ()), *inputs.settings.underlay_cidrs_of(number))
        nodes = nodes_within(pool.network, under, inputs.settings.underlay_cidrs_of(number))
        links = inputs.links.values()
        listening = (link for link in links if link.port == outer.port and link.over in (0, number))
        others = (link.name for link in listening if link.name != tunnel and outer.vni is not None)
        shared = tuple(sorted(others))
        here = guard.Where(pool.network, end.subnet, tunnel, nodes, not shared)
        tunnel_only = guard.table(self._family, backend.network, outer, here)
        with_direct = guard.table(self._family, backend.network, outer, here._replace(direct=pool.length))
        direct = backend.reaches_directly
        return _GuardWants(tunnel_only, with_direct, interfaces, on_link, direct, pool.length, shared)

    def _reconcile(self, wants: Any) -> bool:
        """Whole after a doubt, else what changed, and a slice of a check that is under way. Raises KernelError."""
        now = self._clock()
        if wants.direct or (self._direct_until is None and self.guard.lets_in_directly(wants.direct_table)):
            self._direct_until = now + DIRECT_S
        self._direct_until = self._direct_until or now
        directly = now < self._direct_until
        table = wants.direct_table if directly else wants.table
        self.guard.attached(wants.interfaces)
        self.guard.reached_directly(wants.length if directly else 0, wants.on_link)
        self._health.report("shared port", _shared(wants.shared), harmless=True)
        if self._read_whole or table != self._wanted:
            self.guard.ensure(table)
            self._read_whole, self._wanted = False, table
        elif self._clock() >= self._cadence.at:
            self._cadence.began()
            self.guard.begin_check(table)
        if self.guard.checking():
            began = time.thread_time()
            more = self.guard.check_slice()
            self._cadence.spent(time.thread_time() - began)
            if not more:
                self._cadence.ended()
        self.guard.apply()
        if self._clock() >= self._name_senders_at:
            self._name_senders(wants.direct)
        return self.guard.checking()

    def _name_senders(self, direct: bool) -> None:
        """Those that a look before saw as well: the frames of who just joined may be faster than his record."""
        found = self.guard.unknown_senders()
        there = ", ".join(each for each in found if each in self._suspects)
        self._suspects = frozenset(found)
        self._name_senders_at = self._clock() + (LOOK_AGAIN_S if found else RECHECK_S)
        self._health.report(
            "unknown senders",
            there
            and f"VXLAN of our VNI comes from {there}, an address that no peer's record has: it is dropped. If those are"
            " nodes of this network whose frames leave by another address than their PublicIP: --public-ip there, or"
            " --vxlan-guard=false here",
            harmless=True,
        )
        self._health.report("beside the tunnel", _beside(self.guard.sources_beside(), direct), harmless=True)

    def due(self) -> float | None:
        """When a peer came, or an address leaves."""
        if self.guard.has_changes():
            return 0.0
        until = self._direct_until
        direct_ends = until if until is not None and until > self._clock() else None
        asked = (self.guard.next_change(), self._cadence.at, self._name_senders_at, direct_ends)
        return min(at for at in asked if at is not None)

    def withdraw(self) -> Iterator[str]:
        """Delete it, and forget what it had."""
        yield from super().withdraw()
        self.guard.forget()
        for subject in self.reports:
            self._health.solved(subject)

    def status(self) -> Mapping[str, object]:
        """`guard`: whether it is in force."""
        return {"guard": {"on": self._wanted is not None}}

    def counters(self) -> Mapping[str, int]:
        """How often it was put back; what was dropped, {} where the kernel does not say."""
        mended = {"mended_guard": self.guard.mended}
        try:
            return {**mended, **{f"dropped_{who}": count for who, count in self.guard.dropped().items()}}
        except OSError:
            return mended


def _beside(sources: Sequence[str], direct: bool) -> str:
    if not sources:
        return ""
    named = few(sources, len(sources), NAMED)
    why = (
        "the nodes' addresses on the link may have prefixes of different length, so that one sends directly to another that"
        " sees no neighbour in it: give all one length, or name all their addresses by --underlay-cidr here"
        if direct
        else "a node may have DirectRouting on, which this network config does not say"
    )
    return (
        f"packets of pods' addresses ({named}) come beside the tunnel, and are dropped: somebody forges them, or {why};"
        " or --vxlan-guard=false here"
    )


def _shared(devices: tuple[str, ...]) -> str:
    if not devices:
        return ""
    return (
        f"{', '.join(devices)} uses the tunnel's UDP port as well, so that its frames must be let through, and who sends one"
        " with a frame of ours behind it in one datagram (UDP_SEGMENT) gets that one through: give each network its own Port"
    )


class _PodsWants(NamedTuple):
    """subnets: of interfaces, by number; beside: interfaces by which pods are attached, but by no bridge."""

    table: Table
    networks: tuple[Prefix, ...]
    links: Mapping[int, Link]
    bridges: frozenset[str]
    subnets: Mapping[int, tuple[Prefix, ...]]
    own_addresses: frozenset[int]
    beside: tuple[str, ...]
    isolated: frozenset[bytes]
    """Addresses of pods that a policy isolates."""


class PodsController(_TableController):
    """That each pod sends from its own addresses."""

    name = "pods"
    reports = ("unprotected", "pod addresses")
    yields = True
    suffix = pods_table.SUFFIX

    def __init__(
        self,
        pods: antispoof.AntiSpoof,
        sets: NetfilterSocket,
        owned: Owned,
        health: Health,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(sets, owned, clock)
        self._pods, self._health = pods, health
        self._ports: tuple[Any, ...] = ()
        self._on = True
        """It is wanted, as far as is known."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """And what CNI gave to pods."""
        return {**super().handles, PodsAttached: self._on_attached}

    def _on_attached(self, _event: PodsAttached) -> bool:
        self._pods.look_again()
        return False  # it is due then

    def _table_of(self, network: int) -> tuple[str, str]:
        return "bridge", pods_table.table_name(network)

    def wants(self, inputs: Inputs) -> object:
        """The table's form, and where pods' ports are."""
        settings = inputs.settings
        if not inputs.policies_known and settings.network_policy and settings.knows_policies:
            return Waiting(
                "for the policies"
            )  # what is lifted for an agent before us stays so: no packet goes past them
        lifts = self._lifts(inputs)
        if not settings.pod_antispoof and not lifts:
            return None
        pools = inputs.config.pools if inputs.config is not None else {}
        number = network_in_force(inputs)
        if number is None or inputs.own is None or not pools.keys() & inputs.tunnels.keys():
            return Waiting("for a lease")
        every = [each for family in FAMILIES for each in inputs.addresses_of(family).values()]
        subnets, networks = subnets_of(every), tuple(pool.network for pool in pools.values())
        on = [inputs.links[index] for index in subnets if index in inputs.links]
        lifted = (*networks, *(inputs.policed.former if inputs.policed is not None else ()))
        bridges = sorted(
            (subnet, link.mac)
            for link in on
            if link.name in inputs.bridges
            for subnet in subnets[link.ifindex]
            if any(there.family == subnet.family and there.holds(subnet.base) for there in lifted)
        )
        lift = Lift(tuple(bridges), inputs.policed is not None) if lifts else None
        table = pods_table.table(number, inputs.settings.pod_antispoof, lift)
        beside: set[str] = set()
        for family, pool in pools.items():
            if (tunnel := inputs.tunnels.get(family)) is not None:
                there, under = inputs.addresses_of(family), inputs.underlays.get(family)
                beside.update(without_bridge(pool.network, inputs.links, there, under, inputs.bridges, tunnel.name))
        own = frozenset(each.address for each in every)
        isolated = inputs.policed.isolated if inputs.policed is not None else frozenset()
        return _PodsWants(
            table, networks, inputs.links, inputs.bridges, subnets, own, tuple(sorted(beside)), isolated
        )  # fmt: skip

    @staticmethod
    def _lifts(inputs: Inputs) -> bool:
        """Whether frames between pods of this node are given to it: where policies must see them, or Services must and the
        kernel does not show them (no br_netfilter); as --pod-lift says."""
        asked = inputs.settings.pod_lift
        needed = inputs.policed is not None or (inputs.settings.kube and inputs.bridge_filtered is False)
        return asked == "on" or (asked == "auto" and needed) or inputs.policed is not None

    def _reconcile(self, wants: Any) -> bool:
        """Whole after a doubt, else the ports that are new. Raises KernelError."""
        self._on = True
        ports = (wants.links, wants.bridges, wants.own_addresses, wants.subnets)
        if ports != self._ports:
            self._ports = ports
            self._pods.ports(wants.links.values(), wants.bridges, wants.own_addresses, wants.subnets)
        self._pods.within(wants.networks)
        self._pods.isolate(wants.isolated)
        self._health.report("unprotected", self._unprotected(wants), harmless=True)
        if self._read_whole or wants.table != self._wanted or self._clock() >= self._cadence.at:
            self._cadence.began()
            began = time.thread_time()
            self._pods.ensure(wants.table)
            self._cadence.spent(time.thread_time() - began)
            self._cadence.ended()
            self._read_whole, self._wanted = False, wants.table
        elif (at := self._pods.next_bind()) is not None and at <= self._clock():
            self._pods.bind()
        told = self._pods.disputes()
        more = f"; and {len(told) - NAMED} more" if len(told) > NAMED else ""
        self._health.report("pod addresses", "; ".join(told[:NAMED]) + more, harmless=True)
        return False

    def _unprotected(self, wants: _PodsWants) -> str:
        """Pods that are not kept to their own addresses."""
        ports = self._pods.unbindable()
        found = [f"behind {', '.join(wants.beside[:NAMED])} (no bridge)"] if wants.beside else []
        found += [f"behind {', '.join(ports[:NAMED])} (no veth into another network namespace)"] if ports else []
        if not found:
            return ""
        return f"pods {' and '.join(found)} may send from any address: anti-spoofing knows ports of bridges"

    def status(self) -> Mapping[str, object]:
        """`antispoof`: the bridges whose ports are bound to their pods' addresses, and how many; whether frames between pods
        are given to the node."""
        bridges, ports = self._pods.covered()
        wanted = self._wanted
        on = wanted is not None and any(rule.comment == pods_table.BY_MAC for rule in wanted.rules)
        return {"antispoof": {"on": on, "bridges": bridges, "bound_ports": ports, "lifted": self._lifted}}

    @property
    def lifts(self) -> bool:
        """Whether the kernel took the table by which what pods of this node send each other passes the node, where policies
        are: those behind a bridge that comes later as soon as it is there."""
        return self._lifted and not self._read_whole

    @property
    def _lifted(self) -> bool:
        return self._wanted is not None and any(chain.name == lifting.BETWEEN for chain in self._wanted.chains)

    def due(self) -> float | None:
        """When a pod is to be checked again."""
        at = self._pods.next_bind()
        return self._cadence.at if at is None else min(at, self._cadence.at)

    def leave(self, network: int) -> Iterator[str]:
        """Once the one in its place stands, which lifts what policies are to see. Raises KernelError, NotYet."""
        stands = self._wanted is not None and self._wanted.name != self._table_of(network)[1]
        if self._on and not stands:
            raise NotYet
        yield from super().leave(network)

    def withdraw(self) -> Iterator[str]:
        """Delete it, and forget what is bound: switched on again, it begins anew."""
        self._on = False
        yield from super().withdraw()
        self._pods.forget()
        for subject in self.reports:
            self._health.solved(subject)

    def counters(self) -> Mapping[str, int]:
        """How often it was put back; what was dropped, {} where the kernel does not say."""
        mended = {"mended_pods": self._pods.mended}
        try:
            return {**mended, "dropped_spoofed": self._pods.dropped()}
        except OSError:
            return mended
