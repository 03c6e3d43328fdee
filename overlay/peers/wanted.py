"""What the peers shall be in the kernel, asked by peer or by entry. Pure: nothing is stored here, all is derived from the
table of peers and the plan, so that 20,000 peers cost one packed record each and no entries.

A peer is named by the number of its subnet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from lease.model import Prefix
from overlay.backends import vxlan
from overlay.kernel.route import fast
from overlay.kernel.route.entries import Kind, RouteKey
from overlay.peers import plan
from overlay.peers.reconcile import ALL, ROUTE_ALONE, Entry
from overlay.peers.table import PeerTable


class Wanted:
    """The entries of all peers of a table, as seen from a node."""

    def __init__(self, node: plan.Node, table: PeerTable) -> None:
        self.node, self.table = node, table

    def peers(self) -> Collection[int]:
        """All peers."""
        return self.table.packed

    def bits(self, peer: int) -> int:
        """The kinds of entries that a peer has, as bits."""
        return ROUTE_ALONE if self.node.backend.direct_routing and len(self.entries(peer)) == 1 else ALL

    def entries(self, peer: int) -> list[Entry]:
        """A peer's entries, in the order in which they are put in place."""
        return flat(plan.entries(self.node, self.table.peer(peer)))

    def owners(self, kind: Kind, key: Any) -> tuple[int, ...]:
        """The peers that want an entry of a key: one, but for the FDB entry of a node that holds two subnets."""
        return tuple(
            peer for peer in self._candidates(kind, key) if any(e[:2] == (kind, key) for e in self.entries(peer))
        )

    def value(self, kind: Kind, key: Any) -> Any:
        """What the entry of a key shall be, None where none is wanted."""
        for peer in self._candidates(kind, key):
            for its_kind, its_key, value in self.entries(peer):
                if (its_kind, its_key) == (kind, key):
                    return value
        return None

    def serves(self, key: RouteKey) -> int:
        """The peer of exactly the subnet that a route leads to, 0 where there is none."""
        peer = key.base << 8 | key.length
        return peer if peer in self.table.packed else 0

    def alike(self) -> bool:
        """Whether all peers surely have all three entries, by the tunnel."""
        return not self.node.backend.direct_routing

    def messages(self, peer: int, bits: int, seq: int, oif: int) -> bytes | None:
        """The messages that put a peer's entries of these kinds, numbered `seq` + kind, at once; None where it may be
        reached without the tunnel."""
        if self.node.backend.direct_routing:
            return None
        packed = self.table.packed[peer]
        metric = vxlan.metric(self.node.network, Prefix(4, peer >> 8, peer & 255))
        made = fast.peer_messages(seq, packed[:4], peer & 255, packed[9:15], packed[5:9], metric, oif)
        return made if bits == ALL else fast.some_of(made, bits)

    def sieve(self, oif: int) -> fast.Sieve:
        """For the look through a dump; where routes go directly, the plain way sees to all of them."""
        if self.node.backend.direct_routing:
            return fast.Sieve({}, {}, (), 0, oif)
        table = self.table
        return fast.Sieve(table.packed, table.by_mac, tuple(table.lengths), self.node.network.base, oif)

    def _candidates(self, kind: Kind, key: Any) -> Iterator[int]:
        if kind is Kind.FDB:
            yield from self.table.with_mac(key)
        elif kind is Kind.ROUTE:
            if peer := self.serves(key):
                yield peer
        else:
            for length in self.table.lengths:
                if (peer := key << 8 | length) in self.table.packed:
                    yield peer


def flat(entries: vxlan.Entries) -> list[Entry]:
    """Entries in the order in which they are put in place."""
    found: list[Entry] = []
    if entries.neighbour is not None:
        found.append((Kind.NEIGHBOUR, *entries.neighbour))
    if entries.fdb is not None:
        found.append((Kind.FDB, *entries.fdb))
    found.append((Kind.ROUTE, *entries.route))
    return found
