"""Who may send VXLAN to this node: the addresses of peers, as a set in an nftables table of its own.

The kernel asks the set before it decapsulates. The table is separate from the nat table, so that nobody pays for listing
20,000 addresses, and made and kept by netlink: it is in place before the first route of a peer. What is wanted is derived
from the peers; what the kernel has is believed as we wrote it, and read again at each check.

Belongs to the agent's owner thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile

from lease.families import Family
from lease.model import Lease, Prefix, ip_text, mask
from lease.records.packed import outer_source, unpack
from overlay.backends.base import Outer
from overlay.firewall.nat import TABLE_PREFIX
from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.process.log import log

GRACE_S = 60.0
"""An address that no peer has any more is still let in for so long: what is under way, a node that comes back."""
MOST_INTERRUPTED = 5
"""So many checks in a row may be spoilt by others' changes of nftables (and our own) before one is made in one go."""
UNKNOWN_S, MOST_UNKNOWN = 600, 64
"""Of senders that are refused so many are remembered, for so long, to be named to the operator."""
SUFFIX = "-guard"
VTEPS, POD_INTERFACES, UNKNOWN_SENDERS = "vteps", "pod_interfaces", "unknown_senders"
FROM_UNKNOWN, FROM_PODS = "from_unknown_senders", "from_pods"
_NF_INET_LOCAL_IN, _NF_INET_FORWARD = 1, 2
_RAW = -300
_UDP = b"\x11"


def table_name(number: int) -> str:
    """The table of a network."""
    return f"{TABLE_PREFIX}{number}{SUFFIX}"


def table(family: Family, number: int, outer: Outer, network: Prefix) -> nf_wire.Table:
    """The form of the table. number: of the network (Backend.network).

    A frame is known by its port and VNI (RFC 7348, 5: the VNI is bytes 4 to 6 behind the UDP header), since another network
    may use the port as well. Pods are known by the interface and by the network: nothing from them goes to the port of any
    node, whatever is in it; from pod to pod it may.
    """
    to_port = (
        nf_wire.meta(nf_wire.META_L4PROTO), nf_wire.equal(_UDP),
        nf_wire.load("transport", 2, 2), nf_wire.equal(outer.port.to_bytes(2, "big")),
    )  # fmt: skip
    from_pod_interfaces = (nf_wire.meta(nf_wire.META_IIF), nf_wire.found_in(POD_INTERFACES))
    base, size = family.packed(network.base), family.size
    from_network = (*_within(family, family.source_at, network), nf_wire.equal(base))
    beyond = (*_within(family, family.destination_at, network), nf_wire.differ(base))
    unknown_sender = (
        *to_port, nf_wire.load("transport", 12, 3), nf_wire.equal(outer.vni.to_bytes(3, "big")),
        nf_wire.load("network", family.source_at, size), nf_wire.absent_from(VTEPS),
    )  # fmt: skip
    pods = nf_wire.count(FROM_PODS)
    return nf_wire.Table(
        family.nft,
        table_name(number),
        (
            nf_wire.Set(VTEPS, nf_wire.ADDRESS[family.number], size),
            nf_wire.Set(POD_INTERFACES, nf_wire.IFACE_INDEX, 4),
            nf_wire.Set(UNKNOWN_SENDERS, nf_wire.ADDRESS[family.number], size, UNKNOWN_S, MOST_UNKNOWN),
        ),
        (FROM_UNKNOWN, FROM_PODS),
        (
            nf_wire.Chain("input", _NF_INET_LOCAL_IN, _RAW),
            nf_wire.Chain("forward", _NF_INET_FORWARD, _RAW),
        ),
        (
            nf_wire.Rule("input", "pods to this node's VXLAN port", (*to_port, *from_pod_interfaces, pods, nf_wire.DROP)),
            # a rule of its own: where the set is full it ends here
            nf_wire.Rule("input", "remember the sender", (*unknown_sender, nf_wire.remember(UNKNOWN_SENDERS, UNKNOWN_S))),
            nf_wire.Rule(
                "input", "VXLAN from no peer", (*unknown_sender, nf_wire.count(FROM_UNKNOWN), nf_wire.DROP)
            ),
            nf_wire.Rule("forward", "pods to a VXLAN port", (*to_port, *from_pod_interfaces, *beyond, pods, nf_wire.DROP)),
            nf_wire.Rule("forward", "pods to a VXLAN port", (*to_port, *from_network, *beyond, pods, nf_wire.DROP)),
        ),
    )  # fmt: skip


def _within(family: Family, offset: int, network: Prefix) -> tuple[bytes, bytes]:
    return (
        nf_wire.load("network", offset, family.size),
        nf_wire.masked(family.packed(mask(family.number, network.length))),
    )


class Guard:
    """The table of this node's network."""

    def __init__(self, family: Family, sets: NetfilterSocket, clock: Callable[[], float]) -> None:
        self._family, self._socket, self._clock = family, sets, clock
        self._table: nf_wire.Table | None = None
        """What stands, or should stand; None until the network is known."""
        self._uses: dict[int, int] = {}
        """Addresses of peers; by how many of them each is used."""
        self._inside: frozenset[int] | None = None
        """Interfaces of pods, None while nobody knows them: what was found stays."""
        self._there: set[int] = set()
        """What the set of the kernel has."""
        self._interfaces_found: frozenset[int] = frozenset()
        self._new: set[int] = set()
        self._leaving: dict[int, float] = {}
        """Addresses that no peer has any more, and until when they are let in; the first goes first."""
        self._check: Iterator[None] | None = None
        self._touched: set[int] = set()
        """Addresses that changed since the check under way began."""
        self._interrupted = 0
        """How many checks in a row saw nftables change."""
        self.mended = 0
        """How often somebody else had altered the table."""

    # --- what is wanted

    def load(self, packed: Iterable[bytes]) -> None:
        """These are the peers."""
        before, self._uses = self._uses, {}
        uses, family = self._uses, self._family.number
        for each in packed:
            address = outer_source(each, family)
            if address is not None:
                uses[address] = uses.get(address, 0) + 1
            else:
                self._use(unpack(each))
        if self._table is not None:
            self._new |= uses.keys() - self._there
        for address in before.keys() - uses.keys():
            self._leaves(address)

    def peer_changed(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""
        if now is not None:
            self._use(now)
        end = was.endpoint(self._family.number) if was is not None else None
        if end is None:
            return
        for address in end.outer_sources():
            left = self._uses.get(address, 0) - 1
            if left > 0:
                self._uses[address] = left
            elif self._uses.pop(address, None) is not None:
                self._leaves(address)

    def _leaves(self, address: int) -> None:
        if self._table is None:  # there is nobody to let go of; `ensure` begins with those of then
            return
        self._leaving.pop(address, None)
        self._leaving[address] = self._clock() + GRACE_S

    def _use(self, lease: Lease) -> None:
        end = lease.endpoint(self._family.number)
        if end is None:
            return
        for address in end.outer_sources():
            self._uses[address] = self._uses.get(address, 0) + 1
            if self._table is not None and address not in self._there:
                self._new.add(address)

    # --- making it so

    def pods_behind(self, interfaces: frozenset[int]) -> None:
        """The interfaces by which packets of pods come: the tunnel, bridges."""
        self._inside = interfaces

    def forget(self) -> None:
        """The table is gone."""
        self._table, self._check = None, None
        self._new.clear()
        self._leaving.clear()

    def ensure(self, wanted: nf_wire.Table) -> None:
        """The table as it should be, read whole and compared. Raises KernelError."""
        before = self._table
        if before is not None and before.name != wanted.name:
            self._table = None
            self._socket.remove(before.family, before.name)
        if not self._socket.is_formed(wanted):
            let_in, inside = self._let_in(), self._inside or frozenset()
            self._socket.replace(wanted, {VTEPS: self._keys(let_in), POD_INTERFACES: _numbers(inside)})
            self._table, self._there, self._interfaces_found = wanted, let_in, inside
            self._new.clear()
            if before == wanted:
                self.mended += 1
            write_log = log.warning if before == wanted else log.info
            write_log("guard.mended" if before == wanted else "guard", table=wanted.name, addresses=len(let_in))
            return
        there = {int.from_bytes(key, "big") for key in self._socket.elements(wanted, wanted.sets[0])}
        inside = self._read_interfaces(wanted)
        if before == wanted and (there, inside) != (self._there, self._interfaces_found):
            self.mended += 1
            missing = len(self._there - there) + len(self._interfaces_found - inside)
            more = len(there - self._there) + len(inside - self._interfaces_found)
            log.warning("guard.mended", table=wanted.name, missing=missing, more=more)
        self._table, self._there, self._interfaces_found = wanted, there, inside
        self._new = self._uses.keys() - there
        for address in there - self._uses.keys() - self._leaving.keys():
            self._leaves(address)
        self.apply()

    def _read_interfaces(self, table: nf_wire.Table) -> frozenset[int]:
        keys = self._socket.elements(table, table.sets[1])
        return frozenset(int.from_bytes(key, sys.byteorder) for key in keys)

    def begin_check(self, wanted: nf_wire.Table) -> None:
        """Begin to check whether the table is as we believe; `check_slice` goes on. Raises KernelError."""
        if (
            self._table != wanted
            or not self._socket.is_formed(wanted)
            or self._read_interfaces(wanted) != self._interfaces_found  # notified of others' changes anyway: rare
        ):
            self.ensure(wanted)
        elif self._check is None:
            self._touched.clear()
            self._check = self._checking(wanted)

    def has_changes(self) -> bool:
        """Whether `apply` has addresses to let in at once."""
        return bool(self._new)

    def checking(self) -> bool:
        """Whether a check is under way."""
        return self._check is not None

    def check_slice(self) -> bool:
        """Some 2,000 addresses of a check that is under way; whether there is more of it. Raises KernelError."""
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
        found: set[int] = set()
        interrupted = False
        asking = NetfilterSocket()  # its own, since peers change the set meanwhile
        try:
            for keys, changed in asking.element_slices(table, table.sets[0]):
                found.update([int.from_bytes(key, "big") for key in keys])
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
            missing, more = self._there - found - self._touched, found - self._there - self._touched
            if missing or more:
                self.ensure(table)

    def apply(self) -> None:
        """Bring the set to what it should be, by what changed. Raises KernelError."""
        table = self._table
        if table is None:
            self._new.clear()
            self._leaving.clear()
            return
        now = self._clock()
        gone = [address for address, _ in takewhile(lambda item: item[1] <= now, self._leaving.items())]
        take = [address for address in gone if address in self._there and address not in self._uses]
        add = [address for address in self._new if address in self._uses and address not in self._there]
        if add or take:  # with work in proportion to these alone
            self._socket.change(table, {VTEPS: self._keys(add)}, {VTEPS: self._keys(take)})
            self._there.update(add)
            self._there.difference_update(take)
            if self._check is not None:
                self._touched.update(add, take)
        self._new.clear()
        for address in gone:
            del self._leaving[address]
        if self._inside is not None and self._inside != self._interfaces_found:
            more, fewer = self._inside - self._interfaces_found, self._interfaces_found - self._inside
            self._socket.change(table, {POD_INTERFACES: _numbers(more)}, {POD_INTERFACES: _numbers(fewer)})
            self._interfaces_found = self._inside

    def next_change(self) -> float | None:
        """When an address leaves, None: none does."""
        return next(iter(self._leaving.values()), None)

    def _keys(self, addresses: Iterable[int]) -> list[bytes]:
        return [self._family.packed(address) for address in addresses]

    def _let_in(self) -> set[int]:
        now = self._clock()
        return self._uses.keys() | {address for address, until in self._leaving.items() if until > now}

    # --- what is reported

    def dropped(self) -> Mapping[str, int]:
        """Packets that were refused, since the table was made: from unknown senders, from pods. Raises KernelError."""
        table = self._table
        return {} if table is None else {name: self._socket.counted(table, name) for name in table.counters}

    def unknown_senders(self) -> list[str]:
        """Who sent frames of our VNI in the last minutes, and is no peer now either. Raises KernelError."""
        if self._table is None:
            return []
        keys = self._socket.elements(self._table, self._table.sets[2])
        senders = [int.from_bytes(key, "big") for key in sorted(keys)]
        return [ip_text(self._family.number, address) for address in senders if address not in self._uses]


def _numbers(indexes: Iterable[int]) -> list[bytes]:
    return [index.to_bytes(4, sys.byteorder) for index in indexes]
