"""The addresses by which nodes' own packets come to pods of other nodes: an ipBlock that means a node's underlay address
means the node's address in the pod network as well, from which the kernel sends by the tunnel. A watcher of one family's
table of peers (peers.report.PeerWatcher)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lease.families import Family
from lease.model import Lease
from lease.records.packed import outer_source, quick_number, unpack


class Nodes:
    """Of a family."""

    def __init__(self, family: Family) -> None:
        self._family = family.number
        self._packed: Iterable[bytes] = ()
        """All peers, as they are at any time."""
        self.version = 0
        """Another after each change."""

    def load(self, packed: Iterable[bytes]) -> None:
        """These are the peers: what is given shows them later, too."""
        self._packed = packed
        self.version += 1

    def peer_changed(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""
        ends = (lease.endpoint(self._family) if lease is not None else None for lease in (was, now))
        before, after = ((end.public_ip, end.subnet.base) if end is not None else None for end in ends)
        self.version += before != after

    def addresses(self) -> Iterator[tuple[int, int]]:
        """Of each peer its underlay address, and its address in the pod network."""
        for each in self._packed:
            outer, subnet = outer_source(each, self._family), quick_number(each, self._family)
            if outer is not None and subnet is not None:
                yield outer, subnet >> 8
            elif (end := unpack(each).endpoint(self._family)) is not None:
                yield end.public_ip, end.subnet.base
