"""Which peers a WireGuard device is to have: the records of all families, by public key. Pure.

A subnet has one owner in the tables of peers, and a key one public IP, so no prefix is wanted of two keys: WireGuard would
give it to the last one written, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lease.families import Family
from lease.model import WIDTH, Endpoint, Lease, Prefix
from lease.records.packed import may_have_key, number, unpack
from overlay.backends.wireguard import endpoint_of
from overlay.kernel.wireguard.device import NO_KEY, Place, WgPeer


class Of(NamedTuple):
    """What peers of one device are made by. families: whose subnets go by it; able: of which this node has an underlay."""

    mode: str
    families: tuple[int, ...]
    able: tuple[int, ...]
    psk: bytes = NO_KEY
    keepalive_s: int = 0

    def __repr__(self) -> str:
        return f"Of({self.mode}, {self.families}, {self.able}, keepalive_s={self.keepalive_s})"  # no secret


class Keyed:
    """The peers of one family, by public key; a watcher of its table (peers.report.PeerWatcher)."""

    def __init__(self, family: Family) -> None:
        self.family = family.number
        self._ends: dict[bytes, dict[int, tuple[str, Endpoint]]] = {}
        """By public key and subnet: of which record, and what it says."""
        self.all_stale = True
        """They were loaded anew."""
        self.stale: set[bytes] = set()
        """Keys whose peers changed since they were taken."""

        self._at: dict[int, set[bytes]] = {}
        """By public IP, the keys there: several behind one NAT."""

    def load(self, packed: Iterable[bytes]) -> None:
        """These are all peers."""
        self._ends, self._at, self.all_stale = {}, {}, True
        self.stale.clear()
        for each in packed:
            if may_have_key(each):
                self._enter(unpack(each))

    def peer_changed(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""
        before, after = (lease.endpoint(self.family) if lease is not None else None for lease in (was, now))
        if before is not None and before.key:
            there = self._ends.get(before.key, {})
            there.pop(number(before.subnet), None)
            if not there:
                self._ends.pop(before.key, None)
            self.stale |= self._at.get(before.public_ip, set())
            if all(end.public_ip != before.public_ip for _, end in there.values()):
                self._at.get(before.public_ip, set()).discard(before.key)
                if not self._at.get(before.public_ip):
                    self._at.pop(before.public_ip, None)
        self._enter(now)
        if after is not None and after.key:
            self.stale |= self._at[after.public_ip]

    def _enter(self, lease: Lease | None) -> None:
        end = lease.endpoint(self.family) if lease is not None else None
        if lease is not None and end is not None and end.key:
            self._ends.setdefault(end.key, {})[number(end.subnet)] = lease.key, end
            self._at.setdefault(end.public_ip, set()).add(end.key)

    @property
    def keys(self) -> Iterable[bytes]:
        """All."""
        return self._ends.keys()

    def ends(self, key: bytes) -> Iterable[tuple[str, Endpoint]]:
        """Of a key, each with that of its record: several where its node holds several subnets."""
        return self._ends.get(key, {}).values()

    def own_address(self, end: Endpoint) -> bool:
        """Whether nobody else has a peer's public IP."""
        return len(self._at.get(end.public_ip, ())) == 1


def wanted(of: Of, tables: Iterable[Keyed], key: bytes) -> WgPeer | None:
    """The peer of a key; None: there is none, or no underlay of this node leads to it. It may send from its subnets, and
    from its public IP, by which its node answers pods that come there without masquerade (flannel: from subnets alone)."""
    tables = list(tables)
    found = [(record, table, end) for table in tables for record, end in table.ends(key)]
    able = of.families if of.mode == "separate" else of.able
    outer = endpoint_of(of.mode, (end for _, _, end in found), able)
    if outer is None:
        return None
    # each family settles by itself who has a key: a part of another record than the outer address's is somebody else's
    records = {record for record, _, end in found if end.subnet.family == outer.subnet.family}
    found = [each for each in found if each[0] in records]
    ends = [end for _, _, end in found]
    nodes = (end for _, table, end in found if table.own_address(end))
    addresses = {Prefix(end.subnet.family, end.public_ip, WIDTH[end.subnet.family]) for end in nodes}
    allowed = frozenset({*(end.subnet for end in ends), *addresses})
    place = Place(outer.subnet.family, outer.public_ip, outer.port)
    return WgPeer(allowed, place, of.psk, of.keepalive_s)


def differing(found: WgPeer | None, want: WgPeer | None, sent: Place | None) -> WgPeer | bool | None:
    """What is to be put of a peer: False where it is as it should be. sent: the place that we gave it last, None: none. A
    place that is another is no difference once we gave it: the peer was heard from there since (roaming)."""
    if found is None or want is None:
        return want if found is not want else False
    same = found.allowed == want.allowed and found.psk == want.psk and found.keepalive_s == want.keepalive_s
    placed = want.place in (sent, found.place)
    if same and placed:
        return False
    want = want._replace(adds=found.allowed <= want.allowed)
    return want._replace(place=None) if placed else want
