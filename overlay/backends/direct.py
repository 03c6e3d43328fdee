"""Direct routing: a backend around another, which reaches peers on the underlay's own link by plain routes. Pure.

Source: flannel pkg/backend/vxlan (DirectRouting): a route via the peer's public IP on the underlay, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lease.model import Endpoint, Prefix
from lease.records.packed import HEAD_FAMILY
from overlay.backends.base import Backend, Bulk, Entry, Outer, PackedPeers, TunnelDevice, View
from overlay.kernel.route import fast
from overlay.kernel.route.entries import PROTOCOL, UNDERLAY, RouteKey, RouteValue
from overlay.kernel.table import Table


class Direct(NamedTuple):
    """`inner` for all peers that are not on the link."""

    inner: Backend

    @property
    def type(self) -> str:
        """As the inner one's."""
        return self.inner.type

    @property
    def network(self) -> int:
        """As the inner one's."""
        return self.inner.network

    @property
    def tunnel(self) -> TunnelDevice | None:
        """The inner one's."""
        return self.inner.tunnel

    @property
    def tables(self) -> tuple[Table, ...]:
        """As the inner one's; its last is that of routes."""
        return self.inner.tables

    @property
    def full(self) -> int:
        """As the inner one's."""
        return self.inner.full

    @property
    def reaches_directly(self) -> bool:
        """Yes."""
        return True

    @property
    def overhead(self) -> int:
        """As the inner one's."""
        return self.inner.overhead

    @property
    def has_vteps(self) -> bool:
        """As the inner one's."""
        return self.inner.has_vteps

    def fault_of_own(self, public_ip: int, addresses: frozenset[int]) -> str | None:
        """As the inner one's."""
        return self.inner.fault_of_own(public_ip, addresses)

    def fault(self, view: View, own: Endpoint, peer: Endpoint) -> str | None:
        """As the inner one's."""
        return self.inner.fault(view, own, peer)

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """A plain route where the peer is a neighbour on the underlay's link."""
        if not any(there.holds(peer.public_ip) for there in view.neighbours):
            return self.inner.entries(view, peer)
        value = RouteValue(UNDERLAY, peer.public_ip, False, PROTOCOL)
        return [(len(self.tables) - 1, self.route_key(view, peer.subnet), value)]

    def route_key(self, view: View, subnet: Prefix) -> RouteKey:
        """The same for both ways: a peer changes from one to the other by one replace."""
        return self.inner.route_key(view, subnet)

    def outer(self) -> Outer | None:
        """As the inner one's."""
        return self.inner.outer()

    def bulk(self, view: View) -> Bulk | None:
        """The inner one's, and plain routes beside it; of IPv4."""
        inner = self.inner.bulk(view) if view.network.family == HEAD_FAMILY else None
        return None if inner is None else _DirectBulk(inner, self, view)


class _DirectBulk:
    def __init__(self, inner: Bulk, backend: Direct, view: View) -> None:
        self._inner, self._backend, self._view = inner, backend, view
        self._ranges = [(there.base, there.last) for there in view.neighbours]
        self._route = len(backend.tables) - 1

    def usable(self, own: Endpoint) -> Callable[[int, bytes], bool]:
        """As the inner one."""
        return self._inner.usable(own)

    def direct(self, packed: bytes) -> bool:
        """By its public IP."""
        public_ip = int.from_bytes(packed[fast.PUBLIC_IP], "big")
        for first, last in self._ranges:  # noqa: SIM110 (any() of a generator takes three times as long)
            if first <= public_ip <= last:
                return True
        return False

    def messages(self, number: int, packed: bytes, bits: int, seq: int, oifs: Mapping[int, int]) -> bytes | None:
        """A route alone, by the underlay, where it is direct."""
        if not self.direct(packed):
            return self._inner.messages(number, packed, bits, seq, oifs)
        oif = oifs.get(UNDERLAY)
        if oif is None or bits != 1 << self._route:
            return None
        metric = self._backend.route_key(self._view, Prefix(4, number >> 8, number & 255)).metric
        return fast.direct_message(seq + self._route, packed[:4], number & 255, packed[fast.PUBLIC_IP], metric, oif)

    def matcher(self, peers: PackedPeers, oifs: Mapping[int, int]) -> fast.DumpMatcher:
        """The inner one's, which then knows the peers that are direct."""
        made = self._inner.matcher(peers, oifs)
        made.set_direct(self.direct, oifs.get(UNDERLAY, -1))
        return made
