"""What the peers shall be in the kernel, asked by peer or by entry. Pure: nothing is stored here, all is derived from the
table of peers and the plan, so that 20,000 peers cost one packed record each and no entries.

A peer is named by the number of its subnet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lease.model import mac_of
from overlay.backends.base import Entry
from overlay.kernel.route.entries import RTNH_F_ONLINK, TUNNEL, UNDERLAY, FoundRoute
from overlay.kernel.route.fast import DumpMatcher
from overlay.peers import plan
from overlay.peers.difference import WantedEntries
from overlay.peers.table import PeerTable

MOST_KEPT = 64


class Wanted:
    """The entries of all peers of a table, as seen from a node."""

    def __init__(self, node: plan.Node, table: PeerTable) -> None:
        self.node, self.table = node, table
        self._backend, self._view = node.backend, plan.view(node)
        self._bulk = self._backend.bulk(self._view)
        self.full, self._directly = self._backend.full, self._backend.reaches_directly
        """full: the tables in which it has entries at all, as bits."""
        self._route = len(self._backend.tables) - 1
        self._matcher: tuple[tuple[dict[int, int], tuple[int, ...]], DumpMatcher] | None = None
        """The last one, and what it was made of."""
        self._kept: dict[int, tuple[bytes, list[Entry]]] = {}
        """Of the peers asked for last, the record and the entries made of it: a change is asked about several times."""

    def peers(self) -> Collection[int]:
        """All peers."""
        return self.table.packed

    def bits(self, peer: int) -> int:
        """The tables in which a peer has an entry, as bits."""
        return 1 << self._route if self._directly and self._is_direct(peer) else self.full

    def bits_on(self, peer: int, role: int) -> int:
        """The same, of entries on the device of a role."""
        direct = self._directly and self._is_direct(peer)
        if role == TUNNEL:
            return 0 if direct else self.full
        return 1 << self._route if direct and role == UNDERLAY else 0

    def _is_direct(self, peer: int) -> bool:
        if self._bulk is not None:
            return self._bulk.direct(self.table.packed[peer])
        return plan.is_direct(self.entries(peer))

    def entries(self, peer: int) -> list[Entry]:
        """A peer's entries, in the order in which they are put in place; not to be changed."""
        packed = self.table.packed[peer]
        kept = self._kept.get(peer)
        if kept is not None and kept[0] is packed:
            return kept[1]
        made = plan.entries(self.node, self.table.peer(peer))
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[peer] = packed, made
        return made

    def owners(self, table: int, key: Any) -> tuple[int, ...]:
        """The peers that want an entry of a key: one, but for the FDB entry of a node that holds two subnets."""
        return tuple(
            peer for peer in self._candidates(table, key) if any(e[:2] == (table, key) for e in self.entries(peer))
        )

    def value(self, table: int, key: Any) -> Any:
        """What the entry of a key shall be, None where none is wanted."""
        for peer in self._candidates(table, key):
            for its_table, its_key, value in self.entries(peer):
                if (its_table, its_key) == (table, key):
                    return value
        return None

    def successor(self, table: int, key: Any) -> int:
        """The peer of exactly the subnet that a route leads to, 0 where there is none."""
        del table
        peer = key.base << 8 | key.length
        return peer if peer in self.table.packed else 0

    def uniform(self) -> int:
        """The bits that all peers surely have, by the tunnel; 0 where some may be reached directly."""
        return 0 if self._directly else self.full

    def messages(self, peer: int, bits: int, seq: int, oifs: Mapping[int, int]) -> bytes | None:
        """The messages that put a peer's entries of these tables at once; None: one by one."""
        if self._bulk is None:
            return None
        return self._bulk.messages(peer, self.table.packed[peer], bits, seq, oifs)

    def matcher(self, oifs: Mapping[int, int]) -> DumpMatcher | None:
        """For reading a dump at once; None: entry by entry. It is asked for with every few notifications, and stays the same
        while devices and the lengths of subnets do: peers are looked up when it is used."""
        if self._bulk is None:
            return None
        by = (dict(oifs), tuple(self.table.lengths))
        if self._matcher is None or by != self._matcher[0]:
            self._matcher = by, self._bulk.matcher(self.table, oifs)
        return self._matcher[1]

    def _candidates(self, table: int, key: Any) -> Iterable[int]:
        """The peers that may want an entry of a key. A MAC is found by the index, and so is a link-local address made of it;
        a route's or IPv4 neighbour's key has the subnet's base, which is all that a peer's entry can be of."""
        if table == self._route:
            peer = self.successor(table, key)
            return (peer,) if peer else ()
        if self._backend.tables[table].name == "fdb":
            return self.table.with_mac(key)
        if (mac := mac_of(key)) is not None:
            return self.table.with_mac(mac)
        return [peer for length in self.table.lengths if (peer := key << 8 | length) in self.table.packed]


def leads_as_ours(wanted: WantedEntries, table: int, found: FoundRoute, role: int | None) -> bool:
    """Whether a route leads where that of a peer of the same subnet does: flannel's of host-gw, DirectRouting, ipip. One of
    nobody's, or that leads elsewhere, is a stranger's. role: of its device."""
    peer = wanted.successor(table, found.key)
    if not peer or found.key.metric:
        return False
    _, _, value = wanted.entries(peer)[-1]
    return (role, found.via, bool(found.flags & RTNH_F_ONLINK)) == (value.role, value.via, value.onlink)


class NothingWanted:
    """Before there is a plan."""

    def peers(self) -> tuple[int, ...]:
        return ()

    def bits(self, peer: int) -> int:
        raise LookupError(peer)

    def bits_on(self, peer: int, role: int) -> int:
        raise LookupError(peer, role)

    def entries(self, peer: int) -> list[Entry]:
        raise LookupError(peer)

    def owners(self, table: int, key: Any) -> tuple[int, ...]:
        del table, key
        return ()

    def value(self, table: int, key: Any) -> None:
        del table, key

    def successor(self, table: int, key: Any) -> int:
        del table, key
        return 0

    def uniform(self) -> int:
        return 0b111

    def messages(self, peer: int, bits: int, seq: int, oifs: Mapping[int, int]) -> None:
        raise LookupError(peer, bits, seq, oifs)
