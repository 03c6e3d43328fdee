"""The bridges that pods of this node are attached to, and the subnets that this node lost while pods run on it: those are
kept from their new owners until the last of those pods is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.config import Pool
from lease.families import V4, Family
from lease.model import Prefix
from lease.tenure.events import Held, Lost
from overlay.cni.lists import previous_subnet
from overlay.control.controller import Controller, Handler, Waiting
from overlay.control.inputs import AddressKey, CurrentInputs, Inputs, Underlay
from overlay.kernel.netlink import KernelError
from overlay.kernel.route.entries import Address, Link
from overlay.kernel.route.links import Links
from overlay.node.interfaces import bridges_with_gateway, lost_subnets, ports_of
from overlay.node.owned import Owned
from overlay.process.log import log


class _Wants(NamedTuple):
    pool: Pool
    own: Prefix
    any_place: bool
    links: Mapping[int, Link]
    addresses: Mapping[AddressKey, Address]
    underlay: Underlay
    tunnel: int
    bridges: frozenset[str]
    retained: tuple[Prefix, ...]


class BridgesController(Controller):
    """Bridges of one family's pods: those that have the gateway of a subnet of ours, and those that the network list names
    (`named`). Those that the list names, or named in an earlier life (cni0, cni1...), are ours to delete; others (docker0)
    never."""

    name = "bridge"
    harmless = True

    def __init__(
        self, current: CurrentInputs, family: Family, links: Links, owned: Owned, named: Iterable[str] = ()
    ) -> None:
        """named: bridges that a network list of ours named, where that list is gone already (uninstall)."""
        self._current, self._family, self._owned = current, family, owned
        self._io = links
        self._listed = frozenset(named)
        """Those that a network list of ours names, or named."""
        earlier = previous_subnet(current.inputs.settings.subnet_file, family.number)
        self._before = () if earlier is None else (earlier,)
        """The subnet of an earlier run."""
        self._refused: KernelError | None = None
        """What the kernel said to the last deletion that it refused, in the pass under way."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What becomes of our subnet."""
        return {Lost: self._on_lost, Held: self._on_held}

    def _on_lost(self, event: Lost) -> bool:
        end = event.lease.endpoint(self._family.number)
        if end is not None and end.subnet not in self._current.inputs.retained:
            self._current.set(retained=(*self._current.inputs.retained, end.subnet))
        return True

    def _on_held(self, event: Held) -> bool:
        end = event.lease.endpoint(self._family.number)
        if end is not None:
            self._current.set(retained=tuple(kept for kept in self._current.inputs.retained if kept != end.subnet))
        return True

    def named(self, names: Iterable[str]) -> None:
        """A network list attaches pods to these."""
        self._listed |= frozenset(names)
        self._attached(names)

    def _attached(self, names: Iterable[str]) -> None:
        self._current.set(bridges=self._current.inputs.bridges | frozenset(names))

    def _ours(self, name: str) -> bool:
        """Whether the bridge plugin made it by a list of ours, or of flannel's."""
        return name in self._listed or (name.startswith("cni") and name[3:].isdecimal())

    def wants(self, inputs: Inputs) -> object:
        """All from which it follows which bridges are ours, and which are used."""
        number = self._family.number
        pool, under, end = inputs.pool(number), inputs.underlays.get(number), inputs.end(number)
        if pool is None or under is None or end is None:
            return Waiting("for a lease")
        tunnel = inputs.tunnels.get(number)
        return _Wants(
            pool, end.subnet, inputs.settings.kube, inputs.links, inputs.addresses_of(number), under,
            tunnel.ifindex if tunnel is not None else 0, inputs.bridges, inputs.retained,
        )  # fmt: skip

    def reconcile(self, wants: Any) -> bool:
        """Find lost subnets, let go of those that no pod uses, remove bridges that nobody needs. Raises KernelError, of one
        bridge when all others are done."""
        self._refused = None
        self._attached(bridges_with_gateway(wants.own, wants.links, wants.addresses))
        self._find(wants)
        self._release_unused(wants)
        self._clear_unfinished(wants)
        if self._refused is not None:
            raise self._refused
        return False

    def _delete(self, link: Link, reason: str) -> bool:
        """Whether it is gone."""
        try:
            self._io.delete(link.ifindex)
        except KernelError as error:
            self._refused = error
            return False
        self._forget(link.ifindex)
        log.info("bridge.removed", bridge=link.name, reason=reason)
        return True

    def _find(self, wants: _Wants) -> None:
        """Those that an earlier run lost are on their bridges yet."""
        before = (*self._before, *self._current.inputs.settings.subnets)
        found = lost_subnets(
            wants.pool, wants.own, wants.any_place, wants.links, wants.addresses, wants.underlay, before
        )
        if not found:
            return
        self._attached(found)
        known = self._current.inputs.retained
        new = [subnet for subnets in found.values() for subnet in subnets if subnet not in known]
        for subnet in new:
            log.warning("subnet.retained", subnet=str(subnet), reason="a bridge of pods on this node has its gateway")
        self._current.set(retained=(*known, *new))

    def _release_unused(self, wants: _Wants) -> None:
        for subnet in self._current.inputs.retained:
            if subnet.family == self._family.number and not self._still_used(subnet, wants):
                self._current.set(retained=tuple(kept for kept in self._current.inputs.retained if kept != subnet))
                log.info("subnet.released", subnet=str(subnet), reason="no pod of this node uses it any more")

    def _still_used(self, subnet: Prefix, wants: _Wants) -> bool:
        """Whether pods of this node use a subnet that it lost: while an interface other than the tunnel has an address of
        it. A bridge of ours that lost its last port is removed: the bridge plugin never does that, and the connected route
        would keep the new owner's pods from us for ever."""
        used = False
        reason = f"no pod uses it, and {subnet} is another node's now"
        for index in {a.oif for a in wants.addresses.values() if subnet.holds(a.address) and a.oif != wants.tunnel}:
            link = wants.links.get(index)
            empty = link is not None and link.kind == "bridge" and not ports_of(wants.links, index)
            if link is None or not empty or not self._ours(link.name) or not self._delete(link, reason):
                used = True
        return used

    def _forget(self, index: int) -> None:
        """An interface that we deleted is not there, before the links are read again."""
        now = self._current.inputs
        self._current.set(
            links={number: link for number, link in now.links.items() if number != index},
            addresses={
                family: {key: a for key, a in there.items() if a.oif != index}
                for family, there in now.addresses.items()
            },
        )

    def _clear_unfinished(self, wants: _Wants) -> None:
        """A pod whose making failed at its address (subnet.env was not there) leaves the bridge without port and MAC, and
        the bridge plugin then fails for ever: "could not set bridge's mac: invalid argument" (1.1.1)."""
        for link in wants.links.values():
            ours = link.kind == "bridge" and link.name in wants.bridges and self._ours(link.name)
            if ours and not link.mac and not ports_of(wants.links, link.ifindex):
                self._delete(link, "left unfinished by a pod that could not be made")

    def withdraw(self) -> Iterator[str]:
        """Delete those that no pod uses; a bridge is of both families, and the first one's controller sees to it."""
        if self._owned.flannel_has_it() or self._family is not V4:
            return
        names = self._listed | self._current.inputs.bridges
        found = self._io.all()
        for link in found:
            ours = link.kind == "bridge" and link.name in names and self._ours(link.name)
            if ours and not any(p.master == link.ifindex for p in found):
                self._io.delete(link.ifindex)
                yield f"bridge {link.name}, which no pod uses"

    def status(self) -> Mapping[str, object]:
        """`retained_subnets`."""
        retained = self._current.inputs.retained
        return {"retained_subnets": [str(subnet) for subnet in retained if subnet.family == self._family.number]}
