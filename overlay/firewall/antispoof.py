"""Pods send from their own addresses alone: each port of a pod's bridge is bound to what its pod had when it was first seen.

IPv4, ARP, IPv6, neighbour discovery and the MAC, in an nftables table of the bridge family. A pod's addresses are asked of
the kernel, at the other end of its veth, before its containers start; what it gives itself later is not its own. A port is
known by the number and the name of its interface and the MAC of the end that the node has, which no pod can change: a veth
that comes by the number of one that is gone (it was made in a pod's namespace, as old plugins do) is another port. The
table remembers: a new agent keeps what it finds there.

A port that is not (yet) bound is let through: pods made while no agent runs must have their network, and a sandbox that
takes its addresses away to have them for itself (gVisor) shows none.

Belongs to the agent's owner thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from lease.families import FAMILIES
from lease.model import Prefix, ip_text
from overlay.cni.results import CniResult, Lookup
from overlay.firewall.lift import CLOSED
from overlay.firewall.pods_table import ENDS, MACS, SETS, SPOOFED
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.entries import Link, PodEnd
from overlay.process.log import log

SETTLED_S = 5.0
"""After so long an interface has its link-local IPv6 address, too: it makes it when its link comes up, before it is given an
IPv4 address, but for one whose other end comes up later."""
FIRST_LOOKS_S, LATER_LOOKS_S = 0.1, 5.0
"""A pod gets its address some 10 ms after its veth; what has none for half a minute is no pod (yet)."""
HURRIED_S = 30.0
SECOND_S = 10.0
"""So long a new pod's address of the second family is waited for: the kernel checks it for others that have it first."""
MOST = 4
"""Addresses of a family that a pod may show: CNI's result says which it was given, where that can be read."""
_OF_ADDRESS = 0x0A58 << 32
"""Older bridge plugins give an interface this MAC, with its IPv4 address behind (hwaddr.PrivateMACPrefix)."""
_NAME = 16
"""IFNAMSIZ."""


class Bound(NamedTuple):
    """What a port is bound to. name: of its interface. end: the MAC of the node's end; None where an agent before us did not
    say. addresses: by family; one that is missing is not bound (yet)."""

    name: str
    end: int | None
    macs: frozenset[int]
    addresses: Mapping[int, frozenset[int]]

    def is_of(self, link: Link) -> bool:
        """Whether that is the port, and not another of the same number."""
        return self.end is None or self.end == link.mac

    def of(self, family: int) -> frozenset[int]:
        """Its addresses of a family, none where it is not bound."""
        return self.addresses.get(family, frozenset())

    def with_addresses(self, family: int, addresses: frozenset[int]) -> Bound:
        """The same with other addresses of a family."""
        return self._replace(addresses={**self.addresses, family: addresses})

    def port(self, port: int) -> bytes:
        """The port itself as a key: its number and its name."""
        return port.to_bytes(4, sys.byteorder) + self.name.encode().ljust(_NAME, b"\0")

    def keys(self, port: int) -> dict[str, list[bytes]]:
        """Its elements, by set."""
        at = port.to_bytes(4, sys.byteorder)
        found = {
            MACS: [at + mac.to_bytes(6, "big") + bytes(2) for mac in self.macs],
            ENDS: [] if self.end is None else [at + self.end.to_bytes(6, "big") + bytes(2)],
        }
        for number, sets in SETS.items():
            found[sets.ports] = [self.port(port)] if number in self.addresses else []
            found[sets.addresses] = [at + FAMILIES[number].packed(address) for address in self.of(number)]
        return found


class AntiSpoof:
    """The table of this node's pods."""

    def __init__(
        self,
        sets: NetfilterSocket,
        requests: RequestSocket,
        clock: Callable[[], float],
        results: Callable[[], Lookup] = lambda: _nothing_said,
    ) -> None:
        """results: what CNI gave to pods, as it is now."""
        self._sets, self._requests, self._clock, self._results_now = sets, requests, clock, results
        self._results: Lookup = _nothing_said
        """Of the bindings under way."""
        self._table: nf_wire.Table | None = None
        self._bridges: set[int] = set()
        self._nodes: set[int] = set()
        """MACs of the bridges: no pod's."""
        self._node_has: frozenset[int] = frozenset()
        """The node's own addresses: no pod's either."""
        self._subnets: Mapping[int, tuple[Prefix, ...]] = {}
        """Of bridges, by number: pods have addresses of these alone."""
        self._disputes: dict[int, dict[tuple[int, int], str]] = {}
        """By port: what its pod has that is not taken for its own, by family and address (0: more than a few)."""
        self._bridge_names: set[str] = set()
        self._other_ports: list[str] = []
        self._veths: list[Link] = []
        """The node's ends of all that are on a bridge."""
        self._ports: dict[int, Link] = {}
        """The node's ends of veths on our bridges, by number."""
        self._seen: dict[tuple[int, int], float] = {}
        """When each was first seen, by number and MAC."""
        self._bound: dict[int, Bound] = {}
        self._promised: dict[int, Bound] = {}
        """What CNI gave to the pods of ports that are not bound yet: nobody else's, whichever port is looked at first."""
        self._later: dict[int, bool] = {}
        """Ports that are checked once more, and whether their pods had no link-local IPv6 address yet."""
        self._there: dict[str, set[bytes]] = {}
        """What the kernel's sets have."""
        self._networks: dict[int, Prefix] = {}
        """The pod networks, by family."""
        self._isolated: frozenset[bytes] = frozenset()
        """Addresses of pods that a policy isolates."""
        self._known = False
        """Whether the bridges are."""
        self._next: float | None = None
        self.mended = 0

    def ports(
        self,
        links: Iterable[Link],
        bridges: Iterable[str],
        addresses: Iterable[int] = (),
        subnets: Mapping[int, tuple[Prefix, ...]] | None = None,
    ) -> None:
        """The links of this node, the names of the bridges that pods are attached to, the node's own addresses, and the
        prefixes of these by the number of their interface; while nobody knows those bridges, all stays as it was found.
        What is bound stays so on another bridge, too: that of a subnet which this node lost."""
        every, names = list(links), set(bridges)
        if not names:
            return
        self._known = True
        self._node_has, self._subnets = frozenset(addresses), subnets or {}
        bridges_of = [link for link in every if link.kind == "bridge" and link.name in names]
        self._bridges, self._nodes = {link.ifindex for link in bridges_of}, {link.mac for link in bridges_of}
        self._bridge_names = {link.name for link in bridges_of}
        self._veths = [link for link in every if link.master and link.netnsid >= 0]
        others = (link for link in every if link.master in self._bridges and link.netnsid < 0)
        self._other_ports = sorted(link.name for link in others)
        self._choose()
        there = {(index, link.name, link.mac) for index, link in self._ports.items()}
        if there != {(index, bound.name, bound.end) for index, bound in self._bound.items()}:
            self._next = self._clock()

    def _choose(self) -> None:
        """The ports that are ours to bind, of the links that there are."""
        self._ports = {
            link.ifindex: link
            for link in self._veths
            if link.master in self._bridges or self._binding(link) is not None
        }
        now = self._clock()
        self._seen = {key: self._seen.get(key, now) for key in map(_key, self._ports.values())}
        self._later = {index: value for index, value in self._later.items() if index in self._ports}
        self._disputes = {index: lines for index, lines in self._disputes.items() if index in self._ports}

    def _binding(self, link: Link) -> Bound | None:
        bound = self._bound.get(link.ifindex)
        return bound if bound is not None and bound.is_of(link) else None

    def look_again(self) -> None:
        """What CNI gave to pods may be another."""
        self._next = self._clock()

    def isolate(self, addresses: frozenset[bytes]) -> None:
        """The addresses (packed) of pods whose ports are closed to what layer 3 does not see."""
        if addresses != self._isolated:
            self._isolated = addresses
            self._next = self._clock()

    def covered(self) -> tuple[list[str], int]:
        """The bridges whose ports are bound, by name, and how many ports are."""
        return sorted(self._bridge_names), len(self._bound)

    def disputes(self) -> list[str]:
        """Pods that have what is not taken for their own, a line each."""
        return [line for lines in self._disputes.values() for line in lines.values()]

    def unbindable(self) -> list[str]:
        """Ports of pods' bridges that are no veth into another namespace: whose they are cannot be seen."""
        return self._other_ports

    def next_bind(self) -> float | None:
        """When `bind` has something to do, None: it has not."""
        return self._next if self._binds else None

    @property
    def _binds(self) -> bool:
        """Whether there is a table, and it is known where pods are and which addresses they may have."""
        return self._table is not None and self._known and bool(self._networks)

    def dropped(self) -> int:
        """Frames that were refused, since the table was made. Raises KernelError."""
        return 0 if self._table is None else self._sets.counted(self._table, SPOOFED)

    def forget(self) -> None:
        """The table is gone, and nothing is bound: switched on again, it begins anew."""
        self._table, self._next = None, None
        self._bound.clear()
        self._later.clear()

    def within(self, networks: Iterable[Prefix]) -> None:
        """The pod networks, one of a family: pods have addresses of these alone."""
        found = {network.family: network for network in networks}
        if found != self._networks:
            self._networks = found
            self._next = self._clock()

    def ensure(self, wanted: nf_wire.Table) -> None:
        """The table as it should be, read whole and compared. Raises KernelError."""
        before = self._table
        formed = self._sets.is_formed(wanted)
        if formed or before is None:
            # in a table of another form, which an agent of another version made, keys may be, too
            every = {one: self._sets.elements(wanted, one) for one in wanted.sets}
            there = {one.name: {key for key in keys if len(key) == one.key_size} for one, keys in every.items()}
            if before is None:
                self._believe(there)
            elif before == wanted and there != self._there:
                self._somebody_altered(wanted)
            self._there = there
        if not formed:
            has = {one.name for one in wanted.sets}
            elements = {name: keys for name, keys in self._elements().items() if name in has}
            self._sets.replace_judging(wanted, elements)
            self._there = elements
            if before == wanted:
                self._somebody_altered(wanted)
            else:
                log.info("pods", table=wanted.name, ports=len(self._bound))
        self._sets.drop_beside(wanted)
        self._table = wanted
        self.bind()
        if before is not None and before.name != wanted.name:  # last: what is bound and lifted stays so meanwhile
            self._sets.remove(before.family, before.name)

    def _somebody_altered(self, table: nf_wire.Table) -> None:
        self.mended += 1
        log.warning("pods.mended", table=table.name, effect="somebody altered what pods' ports are bound to")

    def _believe(self, there: dict[str, set[bytes]]) -> None:
        """What an agent before us bound."""

        def of(name: str, port: bytes, size: int) -> frozenset[int]:
            return frozenset(int.from_bytes(key[4 : 4 + size], "big") for key in there[name] if key[:4] == port)

        for key in there[SETS[4].ports]:
            port, name = key[:4], key[4:].rstrip(b"\0").decode("utf-8", "replace")
            addresses = {
                number: of(sets.addresses, port, FAMILIES[number].size)
                for number, sets in SETS.items()
                if key in there[sets.ports]
            }
            end = next(iter(of(ENDS, port, 6)), None)
            bound = Bound(name, end, of(MACS, port, 6), addresses)
            self._bound[int.from_bytes(port, sys.byteorder)] = bound
        self._choose()

    def bind(self) -> None:
        """Bind what is new, let go of what is gone. Raises KernelError, of one port when all others are done."""
        if self._table is None or not self._binds:
            return
        self._results = self._results_now()
        for index, bound in list(self._bound.items()):
            link = self._ports.get(index)
            if link is None or not bound.is_of(link):
                del self._bound[index]
            elif (bound.name, bound.end) != (link.name, link.mac):  # renamed, or not said
                self._bound[index] = bound._replace(name=link.name, end=link.mac)
        self._promised = {
            index: promised
            for index, link in self._ports.items()
            if index not in self._bound and (promised := self._given(link)) is not None
        }
        waiting, refused = [], None
        for _, link in sorted(self._ports.items()):
            try:
                again = self._bind_one(link)
            except KernelError as error:
                refused = error
                again = self._clock() + LATER_LOOKS_S
            if again is not None:
                waiting.append(again)
        self._next = min(waiting, default=None)
        self._apply(self._table)
        if refused is not None:
            raise refused

    def _given(self, link: Link) -> Bound | None:
        """A port as CNI's result says it is; None where nothing says."""
        given = self._results(link.name, link.mac)
        if given is None:
            return None
        made = frozenset(map(_link_local_of, given.inside))
        return Bound(link.name, link.mac, given.inside, {4: given.addresses[4], 6: given.addresses[6] | made})

    def _bind_one(self, link: Link) -> float | None:
        """Bind one port, as far as its pod is known. When it is to be checked again, None: it is bound for good. Raises
        KernelError."""
        index, now, seen = link.ifindex, self._clock(), self._seen[_key(link)]
        settled, bound, first = seen + SETTLED_S, self._bound.get(index), min(self._networks)
        known = bound is not None and bound.of(first) and 6 in bound.addresses
        if bound is not None and known and not (self._lacks(link, bound, now - seen) or self._macs_said(link, bound)):
            if index not in self._later:
                return None
            if now < settled:
                return settled
        end = self._requests.pod_end(link)
        if end is None:
            return None
        others = [other for port, other in {**self._promised, **self._bound}.items() if port != index]
        if bound is None:
            own = self._own(link, end, first)
            if not own:
                return now + (FIRST_LOOKS_S if now - seen < HURRIED_S else LATER_LOOKS_S)
            bound = self._first(link, end, own, others)
        elif not bound.of(first):  # all it had was another port's: is it still?
            bound = bound.with_addresses(first, self._free(first, self._own(link, end, first), others))
            if bound.of(first):
                self._disputes.pop(index, None)
        if index not in self._bound and first == 6:
            bound = bound.with_addresses(4, self._free(4, self._shown(link, end, 4), others))
        if 6 not in bound.addresses or (index not in self._bound and first == 6):
            # and those that its interface makes of its MAC (RFC 4291, appendix A)
            made = map(_link_local_of, bound.macs)
            shown = self._shown(link, end, 6)
            bound = bound.with_addresses(6, bound.of(6) | self._free(6, (*shown, *made), others))
            self._later[index] = not any(map(_is_link_local, end.addresses[6]))
        elif index in self._later and now >= settled:
            # a plugin behind the bridge's may have given it another MAC (tuning)
            bound = bound._replace(macs=bound.macs | self._free_macs({end.mac}, others))
            if self._later.pop(index):
                more = self._free(6, self._a_few(link, 6, filter(_is_link_local, end.addresses[6])), others)
                bound = bound.with_addresses(6, bound.of(6) | more)
            if self._results(link.name, link.mac) is not None:  # written when all plugins are done
                bound = bound.with_addresses(4, self._free(4, self._own(link, end, 4), others))
        if self._lacks(link, bound, now - seen):  # the kernel gives it after the first one
            bound = bound.with_addresses(6, bound.of(6) | self._free(6, self._own(link, end, 6), others))
        if said := self._macs_said(link, bound):  # by a plugin behind the bridge's (tuning), however late
            bound = bound._replace(macs=bound.macs | self._free_macs(said, others))
        self._bound[index] = bound
        if not bound.of(first):
            return now + LATER_LOOKS_S
        if now - seen < SECOND_S and self._lacks(link, bound, now - seen):
            return now + FIRST_LOOKS_S
        return settled if index in self._later and now < settled else None

    def _macs_said(self, link: Link, bound: Bound) -> frozenset[int]:
        """MACs that CNI's result gives a pod, and it is not bound to."""
        given = self._results(link.name, link.mac)
        return given.inside - bound.macs if given is not None else frozenset()

    def _lacks(self, link: Link, bound: Bound, age_s: float) -> bool:
        """Whether a pod of two families is not known by its address of the second: one that CNI gave such an address,
        however long ago; where nothing says, one that was made a moment ago."""
        network = self._networks.get(6) if len(self._networks) > 1 else None
        if network is None or any(map(network.holds, bound.of(6))):
            return False
        given = self._results(link.name, link.mac)
        return age_s < SECOND_S if given is None else any(map(network.holds, given.addresses[6]))

    def _first(self, link: Link, end: PodEnd, own: frozenset[int], others: list[Bound]) -> Bound:
        """What a port is bound to when its pod is seen first: the rest is another's."""
        first = min(self._networks)
        free = self._free(first, own, others)
        for address in own - free:
            whose = next((f"{other.name}'s" for other in others if address in other.of(first)), "the node's")
            text = ip_text(first, address)
            log.warning(
                "pods.address_taken",
                interface=link.name,
                address=text,
                whose=whose,
                effect="this one may not send from it",
            )
            self._disputes.setdefault(link.ifindex, {})[first, address] = (
                f"{self._pod(link)} has {text}, which is {whose}, and may not send from it"
            )
        given = self._promised.get(link.ifindex)
        inside = given.macs if given is not None else ()
        macs = self._free_macs((end.mac, *inside, *(_OF_ADDRESS | each for each in self._own(link, end, 4))), others)
        return Bound(link.name, link.mac, macs, {first: free})

    def _free(self, family: int, addresses: Iterable[int], others: list[Bound]) -> frozenset[int]:
        """Those that are neither another pod's nor the node's."""
        made = map(_link_local_of, self._nodes) if family == 6 else ()
        return frozenset(addresses).difference(self._node_has, made, *(other.of(family) for other in others))

    def _free_macs(self, macs: Iterable[int], others: list[Bound]) -> frozenset[int]:
        return frozenset(macs).difference(self._nodes, *(other.macs for other in others))

    def _own(self, link: Link, end: PodEnd, family: int) -> frozenset[int]:
        """The addresses of a pod that are of a family's network: those that CNI gave it; where nothing says, a few that it
        shows, of its bridge's subnets."""
        network = self._networks.get(family)
        if network is None:
            return frozenset()
        given = self._results(link.name, link.mac)
        if given is not None and any(given.addresses.values()):
            return frozenset(filter(network.holds, given.addresses[family]))
        subnets = [there for there in self._subnets.get(link.master, ()) if there.family == family]
        shown = [
            address
            for address in end.addresses[family]
            if network.holds(address) and (not subnets or any(there.holds(address) for there in subnets))
        ]
        return frozenset(self._a_few(link, family, shown))

    def _shown(self, link: Link, end: PodEnd, family: int) -> frozenset[int]:
        """What a pod has of a family when it is seen first: its own of the pod network, and what it shows beside that."""
        network = self._networks.get(family)
        beside = (each for each in end.addresses[family] if network is None or not network.holds(each))
        return self._own(link, end, family) | frozenset(self._a_few(link, family, beside))

    def _a_few(self, link: Link, family: int, addresses: Iterable[int]) -> list[int]:
        """What is believed of what a pod shows: it may have given itself any number."""
        shown = sorted(addresses)
        lines = self._disputes.get(link.ifindex, {})
        if len(shown) > MOST and (family, 0) not in lines:
            log.warning("pods.too_many_addresses", interface=link.name, shown=len(shown), taken=MOST)
            self._disputes[link.ifindex] = lines
            lines[family, 0] = (
                f"{self._pod(link)} shows {len(shown)} addresses of {FAMILIES[family].text}, of which {MOST} are taken for"
                " its own: what runs in it that gives itself addresses?"
            )
        return shown[:MOST]

    def _pod(self, link: Link) -> str:
        given = self._results(link.name, link.mac)
        return (
            f"the pod {given.pod} ({link.name})" if given is not None and given.pod else f"the pod behind {link.name}"
        )

    def _elements(self) -> dict[str, set[bytes]]:
        names = (MACS, ENDS, CLOSED, *(name for sets in SETS.values() for name in sets[:2]))
        found: dict[str, set[bytes]] = {name: set() for name in names}
        for index, bound in self._bound.items():
            for name, keys in bound.keys(index).items():
                found[name].update(keys)
            if any(FAMILIES[family].packed(one) in self._isolated for family in SETS for one in bound.of(family)):
                found[CLOSED].add(bound.port(index))
        return found

    def _apply(self, table: nf_wire.Table) -> None:
        has = {one.name for one in table.sets}
        wanted = {name: keys for name, keys in self._elements().items() if name in has}
        there = {name: self._there.get(name, set()) for name in wanted}
        more = {name: keys - there[name] for name, keys in wanted.items()}
        self._sets.change(table, more, {name: keys - wanted[name] for name, keys in there.items()})
        self._there = wanted


def _nothing_said(_interface: str, _mac: int) -> CniResult | None:
    return None


def _key(link: Link) -> tuple[int, int]:
    return link.ifindex, link.mac


def _is_link_local(address: int) -> bool:
    return address >> 118 == 0xFE80 >> 6


def _link_local_of(mac: int) -> int:
    """RFC 4291, appendix A: the modified EUI-64."""
    return 0xFE80 << 112 | (mac >> 24 ^ 0x020000) << 40 | 0xFFFE << 24 | mac & 0xFFFFFF
