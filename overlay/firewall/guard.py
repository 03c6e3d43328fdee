"""Who may send VXLAN to this node, the addresses of peers, as a set in an nftables table of its own; and that nobody comes
into the pod network beside the tunnel.

The kernel asks the set before it decapsulates. The table is separate from the nat table, so that nobody pays for listing
20,000 addresses, and made and kept by netlink: it is in place before the first route of a peer. What is wanted is derived
from the peers; what the kernel has is believed as we wrote it, and read again at each check.

Belongs to the agent's owner thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from lease.families import Family
from lease.model import Endpoint, Lease, Prefix, ip_text, mask
from lease.records.packed import outer_source, unpack
from overlay.backends.base import Outer
from overlay.firewall.let_in import LetIn
from overlay.firewall.nat import TABLE_PREFIX
from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.process.log import log

MOST_INTERRUPTED = 5
"""So many checks in a row may be spoilt by others' changes of nftables (and our own) before one is made in one go."""
UNKNOWN_S, MOST_UNKNOWN = 600, 64
"""Of addresses that are refused so many are remembered, for so long, to be named to the operator."""
SUFFIX = "-guard"
VTEPS, DIRECT = "vteps", "direct_subnets"
POD_INTERFACES, POD_VETHS, ELSEWHERE = "pod_interfaces", "pod_veths", "elsewhere"
UNKNOWN_SENDERS, BESIDE_SOURCES = "unknown_senders", "beside_sources"
FROM_UNKNOWN, FROM_PODS, FORWARDED, BESIDE = "from_unknown_senders", "from_pods", "forwarded", "beside_the_tunnel"
_NF_INET_PRE_ROUTING, _NF_INET_LOCAL_IN, _NF_INET_FORWARD, _NF_INET_POST_ROUTING = 0, 1, 2, 4
_RAW, _AFTER_SRCNAT = -300, 300
_LOOPBACK = (1).to_bytes(4, sys.byteorder)
"""LOOPBACK_IFINDEX (include/net/flow.h): of each network namespace's lo."""
_IFNAMSIZ = 16
_REFUSE_SENDER, _REFUSE_BESIDE = nf_wire.goto("unknown"), nf_wire.goto("beside")
INTERFACES = (POD_INTERFACES, POD_VETHS, ELSEWHERE)
"""The sets of interfaces."""
MOST_KEYS = 4096
"""A peer's subnet that is larger than the network's are stands for so many of them at most."""


def table_name(number: int) -> str:
    """The table of a network."""
    return f"{TABLE_PREFIX}{number}{SUFFIX}"


class Where(NamedTuple):
    """What of this node the form of the table depends on. own: our subnet; tunnel: the device's name; nodes: prefixes inside
    the network that are the nodes', not pods'; alone: no other VXLAN device of this node uses the port; direct: the length
    of subnets where peers may be reached without the tunnel, 0 where none is."""

    network: Prefix
    own: Prefix
    tunnel: str
    nodes: tuple[Prefix, ...] = ()
    alone: bool = True
    direct: int = 0


@lru_cache(maxsize=4)  # half a millisecond, and it is wanted at each change of the inputs
def table(family: Family, number: int, outer: Outer, here: Where) -> nf_wire.Table:
    """The form of the table. number: of the network (Backend.network).

    A frame is known by its port; by its VNI as well (RFC 7348, 5: bytes 4 to 6 behind the UDP header) where another network
    uses the port, though that of the first frame says nothing of those behind it: with UDP segmentation offload a datagram
    has many (udp(7), UDP_SEGMENT), and the kernel takes them apart only when it decapsulates.
    """
    address, size = nf_wire.ADDRESS[family.number], family.size
    return nf_wire.Table(
        family.nft,
        table_name(number),
        (
            nf_wire.Set(VTEPS, address, size),
            *((nf_wire.Set(DIRECT, address, size),) if here.direct else ()),
            *(nf_wire.Set(name, nf_wire.IFACE_INDEX, 4) for name in INTERFACES),
            nf_wire.Set(UNKNOWN_SENDERS, address, size, UNKNOWN_S, MOST_UNKNOWN),
            nf_wire.Set(BESIDE_SOURCES, address, size, UNKNOWN_S, MOST_UNKNOWN),
        ),
        (FROM_UNKNOWN, FROM_PODS, FORWARDED, BESIDE),
        (
            nf_wire.Chain("prerouting", _NF_INET_PRE_ROUTING, _RAW),
            nf_wire.Chain("input", _NF_INET_LOCAL_IN, _RAW),
            nf_wire.Chain("forward", _NF_INET_FORWARD, _RAW),
            nf_wire.Chain("postrouting", _NF_INET_POST_ROUTING, _AFTER_SRCNAT),
            nf_wire.Chain("unknown"),
            nf_wire.Chain("beside"),
        ),
        _rules(family, outer, here),
    )


def _rules(family: Family, outer: Outer, here: Where) -> tuple[nf_wire.Rule, ...]:
    network = here.network
    port = outer.port.to_bytes(2, "big")
    by_protocol = (nf_wire.meta(nf_wire.META_L4PROTO), nf_wire.equal(bytes([outer.protocol])))
    to_port = (*by_protocol, *((nf_wire.load("transport", 2, 2), nf_wire.equal(port)) if outer.port else ()))
    from_port = (
        *by_protocol, nf_wire.load("transport", 0, 2), nf_wire.equal(port),
        nf_wire.load("transport", 2, 2), nf_wire.differ(port),
    )  # fmt: skip
    from_pod_interfaces = (nf_wire.meta(nf_wire.META_IIF), nf_wire.found_in(POD_INTERFACES))
    source, destination, size = family.source_at, family.destination_at, family.size
    to_peer = (nf_wire.load("network", destination, size), nf_wire.found_in(VTEPS))
    from_network, beyond = _in(family, source, network), _in(family, destination, network, nf_wire.differ)
    vni = (outer.vni or 0).to_bytes(3, "big")
    our_vni = () if here.alone or outer.vni is None else (nf_wire.load("transport", 12, 3), nf_wire.equal(vni))
    pods, forwarded = nf_wire.count(FROM_PODS), nf_wire.count(FORWARDED)
    to_us = (
        nf_wire.Rule("input", "pods to this node's VXLAN port", (*to_port, *from_pod_interfaces, pods, nf_wire.DROP)),
        nf_wire.Rule(
            "input",
            "VXLAN from no peer",
            (*to_port, *our_vni, nf_wire.load("network", source, size), nf_wire.absent_from(VTEPS), _REFUSE_SENDER),
        ),
    )
    through_us = (
        nf_wire.Rule("forward", "pods to a VXLAN port", (*to_port, *from_pod_interfaces, *beyond, pods, nf_wire.DROP)),
        nf_wire.Rule("forward", "pods to a VXLAN port", (*to_port, *from_network, *beyond, pods, nf_wire.DROP)),
        nf_wire.Rule("forward", "VXLAN of others to a peer", (*to_port, *to_peer, forwarded, nf_wire.DROP)),
    )
    from_our_port = nf_wire.Rule(
        "postrouting", "from VXLAN's port to a peer", (*from_port, *to_peer, forwarded, nf_wire.DROP)
    )
    return (
        *_beside_the_tunnel(family, here),
        *(() if outer.sealed else to_us),
        *_refusal("unknown", UNKNOWN_SENDERS, FROM_UNKNOWN, (source, size)),
        *_refusal("beside", BESIDE_SOURCES, BESIDE, (source, size)),
        *(() if outer.sealed else through_us),
        # behind whatever masquerades: conntrack would take the peer's frames for the answers
        *((from_our_port,) if outer.port and not outer.sealed else ()),
    )


def _refusal(chain: str, memory: str, counter: str, source: tuple[int, int]) -> tuple[nf_wire.Rule, nf_wire.Rule]:
    """The rules of a chain that refuses a packet, and remembers its source while the set has room: where it has none the
    rule ends, so that is one of its own."""
    remember = (nf_wire.load("network", *source), nf_wire.remember(memory, UNKNOWN_S))
    return (
        nf_wire.Rule(chain, "remember the sender", remember),
        nf_wire.Rule(chain, "refuse", (nf_wire.count(counter), nf_wire.DROP)),
    )


def _beside_the_tunnel(family: Family, here: Where) -> tuple[nf_wire.Rule, nf_wire.Rule]:
    """What comes in plain IP from addresses of pods to such: of other nodes' pods by no other way than the tunnel (or from
    peers that may be reached without it), of our own by no interface that they are not behind. A veth of a pod that another
    program attached counts as neither: its pod may have an address of a subnet that this node lost."""
    source, destination = family.source_at, family.destination_at
    within = (
        *_in(family, destination, here.network),
        *(
            part
            for nodes in here.nodes
            for at in (source, destination)
            for part in _in(family, at, nodes, nf_wire.differ)
        ),
    )
    direct = (
        nf_wire.load("network", source, family.size),
        nf_wire.masked(family.packed(mask(family.number, here.direct))), nf_wire.absent_from(DIRECT),
    ) if here.direct else ()  # fmt: skip
    name = here.tunnel.encode().ljust(_IFNAMSIZ, b"\0")
    others = (
        *_in(family, source, here.network), *_in(family, source, here.own, nf_wire.differ), *within,
        nf_wire.meta(nf_wire.META_IIFNAME), nf_wire.differ(name),
        nf_wire.meta(nf_wire.META_IIF), nf_wire.differ(_LOOPBACK), nf_wire.absent_from(POD_INTERFACES),
        nf_wire.absent_from(POD_VETHS), *direct, _REFUSE_BESIDE,
    )  # fmt: skip
    ours = (
        *_in(family, source, here.own), *within, nf_wire.meta(nf_wire.META_IIF), nf_wire.found_in(ELSEWHERE), _REFUSE_BESIDE,
    )  # fmt: skip
    return (
        nf_wire.Rule("prerouting", "other nodes' pods beside the tunnel", others),
        nf_wire.Rule("prerouting", "pods of this node from elsewhere", ours),
    )


def _in(
    family: Family, offset: int, there: Prefix, compare: Callable[[bytes], bytes] = nf_wire.equal
) -> tuple[bytes, bytes, bytes]:
    """An address of the packet lies in a prefix; with `differ`: it does not."""
    return (
        nf_wire.load("network", offset, family.size),
        nf_wire.masked(family.packed(mask(family.number, there.length))),
        compare(family.packed(there.base)),
    )


class Guard:
    """The table of this node's network."""

    def __init__(self, family: Family, sets: NetfilterSocket, clock: Callable[[], float]) -> None:
        self._family, self._socket = family, sets
        self._table: nf_wire.Table | None = None
        """What stands, or should stand; None until the network is known."""
        self._let_in = {VTEPS: LetIn(clock), DIRECT: LetIn(clock)}
        """By the set's name."""
        self._packed: Iterable[bytes] = ()
        """All peers, as they are at any time."""
        self._direct: tuple[int, tuple[Prefix, ...]] = (0, ())
        """The length of subnets, and the prefixes of those peers that may be reached without the tunnel."""
        self._interfaces: dict[str, frozenset[int]] = {}
        """By the set's name; none is known before `attached`."""
        self._interfaces_found: dict[str, frozenset[int]] = {}
        self._check: Iterator[None] | None = None
        self._interrupted = 0
        """How many checks in a row saw nftables change."""
        self.mended = 0
        """How often somebody else had altered the table."""

    # --- what is wanted

    def load(self, packed: Iterable[bytes]) -> None:
        """These are the peers: what is given shows them later, too."""
        self._packed = packed
        self._let_in[VTEPS].load(self._sources())
        self._load_direct()

    def _sources(self) -> Iterator[int]:
        """The addresses that frames of all peers come from."""
        family = self._family.number
        for each in self._packed:
            address = outer_source(each, family)
            if address is not None:
                yield address
            elif (end := unpack(each).endpoint(family)) is not None:
                yield from end.outer_sources()

    def peer_changed(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""
        before, after = (lease.endpoint(self._family.number) if lease is not None else None for lease in (was, now))
        if after is not None:
            self._let_in[VTEPS].use(after.outer_sources())
            self._let_in[DIRECT].use(self._direct_keys(after))
        if before is not None:
            self._let_in[VTEPS].leave(before.outer_sources())
            self._let_in[DIRECT].leave(self._direct_keys(before))

    def reached_directly(self, length: int, on_link: tuple[Prefix, ...]) -> None:
        """Peers with public IPs of these prefixes may be reached without the tunnel; the length of the network's subnets.
        0: none is."""
        direct = (length, on_link if length else ())
        if direct != self._direct:
            self._direct = direct
            self._load_direct()

    def lets_in_directly(self, table: nf_wire.Table) -> bool:
        """Whether an agent before us let peers in without the tunnel. Raises KernelError."""
        return bool(self._socket.elements(table, _set(table, DIRECT)))

    def _load_direct(self) -> None:
        ends = (unpack(each).endpoint(self._family.number) for each in (self._packed if self._direct[0] else ()))
        self._let_in[DIRECT].load(key for end in ends if end is not None for key in self._direct_keys(end))

    def _direct_keys(self, end: Endpoint) -> tuple[int, ...]:
        """What the rule looks for: the network's subnets that a peer's is, or is in, or is made of."""
        length, on_link = self._direct
        if not length or not any(there.holds(end.public_ip) for there in on_link):
            return ()
        first, step = end.subnet.base & mask(self._family.number, length), 1 << (self._family.bits - length)
        return tuple(range(first, max(end.subnet.last, first) + 1, step)[:MOST_KEYS])  # cut before it is made

    # --- making it so

    def attached(self, interfaces: Mapping[str, frozenset[int]]) -> None:
        """The interfaces by which packets of pods come (the tunnel, bridges), those by which such of other programs may, and
        those by which none of ours does: by the names in INTERFACES."""
        self._interfaces = dict(interfaces)

    def forget(self) -> None:
        """The table is gone."""
        self._table, self._check = None, None
        for each in self._let_in.values():
            each.forget()

    def shut(self, table: nf_wire.Table, interfaces: Mapping[str, frozenset[int]]) -> None:
        """The table without any peer in it; `ensure` lets them in. interfaces: as for `attached`: what comes by those goes
        on, also by the tunnel that stands, should the device to come be refused. Raises KernelError."""
        self._socket.replace(table, {name: _numbers(those) for name, those in interfaces.items()})

    def ensure(self, wanted: nf_wire.Table) -> None:
        """The table as it should be, read whole and compared. Raises KernelError."""
        before = self._table
        if before is not None and before.name != wanted.name:
            self._table = None
            self._socket.remove(before.family, before.name)
        if not self._socket.is_formed(wanted):
            self._make(wanted, before)
            return
        found = {name: self._read(wanted, name) for name in self._names(wanted)}
        interfaces = self._read_interfaces(wanted)
        if before == wanted:
            believed = {name: self._let_in[name].there for name in found}
            if found != believed or interfaces != self._interfaces_found:
                self.mended += 1
                pairs = [(believed[name], found[name]) for name in found]
                pairs += [({*self._interfaces_found.get(name, ())}, {*there}) for name, there in interfaces.items()]
                missing, more = sum(len(one - two) for one, two in pairs), sum(len(two - one) for one, two in pairs)
                log.warning("guard.mended", table=wanted.name, missing=missing, more=more)
        self._table, self._interfaces_found = wanted, interfaces
        self._forget_absent(wanted)
        for name, keys in found.items():
            self._let_in[name].found(keys)
        self.apply()

    def _make(self, wanted: nf_wire.Table, before: nf_wire.Table | None) -> None:
        keys = {name: self._let_in[name].wanted() for name in self._names(wanted)}
        interfaces = {name: self._interfaces.get(name, frozenset()) for name in INTERFACES}
        elements = {name: self._keys(those) for name, those in keys.items()}
        self._socket.replace(wanted, {**elements, **{name: _numbers(those) for name, those in interfaces.items()}})
        self._table, self._interfaces_found = wanted, interfaces
        self._forget_absent(wanted)
        for name, those in keys.items():
            self._let_in[name].made(those)
        if before == wanted:
            self.mended += 1
        write_log = log.warning if before == wanted else log.info
        write_log("guard.mended" if before == wanted else "guard", table=wanted.name, addresses=len(keys[VTEPS]))

    def _forget_absent(self, table: nf_wire.Table) -> None:
        """Of a set that a table does not have nothing is due."""
        for name in self._let_in.keys() - {*self._names(table)}:
            self._let_in[name].forget()

    def _names(self, table: nf_wire.Table) -> list[str]:
        """The sets of peers' keys that a table has."""
        return [each.name for each in table.sets if each.name in self._let_in]

    def _read(self, table: nf_wire.Table, name: str) -> set[int]:
        return {int.from_bytes(key, "big") for key in self._socket.elements(table, _set(table, name))}

    def _read_interfaces(self, table: nf_wire.Table) -> dict[str, frozenset[int]]:
        return {
            name: frozenset(
                int.from_bytes(key, sys.byteorder) for key in self._socket.elements(table, _set(table, name))
            )
            for name in INTERFACES
        }

    def begin_check(self, wanted: nf_wire.Table) -> None:
        """Begin to check whether the table is as we believe; `check_slice` goes on. Raises KernelError."""
        if (
            self._table != wanted
            or not self._socket.is_formed(wanted)
            or self._read_interfaces(wanted) != self._interfaces_found  # notified of others' changes anyway: rare
        ):
            self.ensure(wanted)
        elif self._check is None:
            for each in self._let_in.values():
                each.check_begins()
            self._check = self._checking(wanted)

    def has_changes(self) -> bool:
        """Whether `apply` has keys to let in at once."""
        return any(each.has_changes() for each in self._let_in.values())

    def checking(self) -> bool:
        """Whether a check is under way."""
        return self._check is not None

    def check_slice(self) -> bool:
        """Some 2,000 keys of a check that is under way; whether there is more of it. Raises KernelError."""
        if self._check is None:
            return False
        try:
            next(self._check)
        except StopIteration:
            self._check = None
        except BaseException:
            self._check = None
            raise
        return self.checking()

    def _checking(self, table: nf_wire.Table) -> Iterator[None]:
        found: dict[str, set[int]] = {name: set() for name in self._names(table)}
        interrupted = False
        asking = NetfilterSocket()  # its own, since peers change the set meanwhile
        try:
            for name, there in found.items():
                for keys, changed in asking.element_slices(table, _set(table, name)):
                    there.update([int.from_bytes(key, "big") for key in keys])
                    interrupted |= changed
                    yield
        finally:
            asking.close()
        if self._table != table:
            return
        self._interrupted = self._interrupted + 1 if interrupted else 0
        if self._interrupted > MOST_INTERRUPTED:  # then at once, for which an event waits
            self._interrupted = 0
            self.ensure(table)
        elif not interrupted:
            yield
            altered = [self._let_in[name].altered(there) for name, there in found.items()]  # each ends its check
            if any(altered):
                self.ensure(table)

    def apply(self) -> None:
        """Bring the sets to what they should be, by what changed. Raises KernelError."""
        table = self._table
        if table is None:
            for each in self._let_in.values():
                each.forget()
            return
        for name in self._names(table):
            add, take, gone = self._let_in[name].changes()
            if add or take:
                self._socket.change(table, {name: self._keys(add)}, {name: self._keys(take)})
            self._let_in[name].changed(add, take, gone)
        for name, wanted in self._interfaces.items():
            there = self._interfaces_found.get(name, frozenset())
            if wanted != there:
                self._socket.change(table, {name: _numbers(wanted - there)}, {name: _numbers(there - wanted)})
                self._interfaces_found[name] = wanted

    def next_change(self) -> float | None:
        """When a key leaves, None: none does."""
        return min((at for each in self._let_in.values() if (at := each.next_change()) is not None), default=None)

    def _keys(self, keys: Iterable[int]) -> list[bytes]:
        return [self._family.packed(key) for key in keys]

    # --- what is reported

    def dropped(self) -> Mapping[str, int]:
        """Packets that were refused, since the table was made, by the counter's name. Raises KernelError."""
        table = self._table
        return {} if table is None else {name: self._socket.counted(table, name) for name in table.counters}

    def unknown_senders(self) -> list[str]:
        """Who sent frames to our port in the last minutes, and is no peer now either. Raises KernelError."""
        uses = self._let_in[VTEPS].uses
        return [
            ip_text(self._family.number, address)
            for address in self._remembered(UNKNOWN_SENDERS)
            if address not in uses
        ]

    def sources_beside(self) -> list[str]:
        """The addresses of pods in whose name plain packets came beside the tunnel lately. Raises KernelError."""
        return [ip_text(self._family.number, address) for address in self._remembered(BESIDE_SOURCES)]

    def _remembered(self, name: str) -> list[int]:
        if self._table is None:
            return []
        return [
            int.from_bytes(key, "big") for key in sorted(self._socket.elements(self._table, _set(self._table, name)))
        ]


def _set(table: nf_wire.Table, name: str) -> nf_wire.Set:
    return next(each for each in table.sets if each.name == name)


def _numbers(indexes: Iterable[int]) -> list[bytes]:
    return [index.to_bytes(4, sys.byteorder) for index in indexes]
