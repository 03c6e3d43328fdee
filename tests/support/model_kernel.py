"""A kernel in memory that answers a reconciler's messages, and what is wanted of it."""

import errno
import random

from lease.families import V4
from overlay.kernel.netlink import Refusal
from overlay.kernel.route import wire
from overlay.kernel.route.entries import (
    PROTOCOL,
    TUNNEL,
    FdbValue,
    FoundNeighbour,
    NeighbourValue,
    RouteKey,
    RouteValue,
)
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.route.tables import TABLES
from overlay.peers.difference import Device
from overlay.peers.reconcile import Reconciler
from tests.support.clock import Clock

IFINDEX = 7


class Killed(Exception):
    """In the middle of what it did."""


class ModelKernel:
    """Takes our real messages apart and keeps what a kernel would keep, with the refusals a kernel has."""

    def __init__(self) -> None:
        self.tables: tuple[dict, dict, dict] = ({}, {}, {})
        self.foreign: set[RouteKey] = set()
        self.refuse: dict[tuple[int, object], int] = {}
        self.gone, self.refuse_drops = False, errno.ESRCH
        """Its device, and what is said to removals then."""
        self.log: list[tuple[str, int, object]] = []
        self.left: int | None = None
        """So many messages more until whoever sends them is killed."""
        self._seq = 0

    def take_seqs(self, count: int) -> int:
        first, self._seq = self._seq + 1, self._seq + count
        return first

    def execute(self, messages: list[bytes], first: int, count: int) -> dict[int, Refusal]:
        refused = {}
        before = first - 1
        for message in wire.split(b"".join(messages)):
            assert before < message.seq < first + count, "numbered in order, from `first`"
            before = message.seq
            if self.left is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
            code = self._do(message)
            if code:
                refused[message.seq - first] = Refusal(code, "")
        return refused

    def _do(self, message: wire.Message) -> int:
        add = message.kind in (wire.RTM_NEWROUTE, wire.RTM_NEWNEIGH)
        kind, key, value = parse(message)
        self.log.append(("put" if add else "drop", kind, key))
        if self.gone:
            return errno.ENODEV if add else self.refuse_drops
        if (kind, key) in self.refuse:
            return self.refuse[kind, key]
        table = self.tables[kind]
        if not add:
            if key not in table:
                return errno.ESRCH if kind == ROUTES else errno.ENOENT
            del table[key]
            return 0
        if kind == ROUTES and message.flags & wire.NLM_F_EXCL and (key in table or key in self.foreign):
            return errno.EEXIST
        assert kind != ROUTES or key not in self.foreign, "a foreign route was replaced"
        table[key] = value
        return 0


def parse(message: wire.Message):
    if message.kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
        route = wire.parse_route(V4, message.body)
        assert route is not None
        return ROUTES, route.key, RouteValue(TUNNEL, route.via, bool(route.flags & 4), route.protocol, route.unexpected)
    entry = wire.parse_fdb(V4, message.body)
    if entry is not None:
        return FDB, entry.mac, FdbValue(entry.dst or 0)
    found = wire.parse_neighbour(V4, message.body)
    assert isinstance(found, FoundNeighbour)
    return NEIGHBOURS, found.address, NeighbourValue(found.mac or 0)


class Wished:
    """What is wanted, as plainly as can be: entries by peer."""

    def __init__(self) -> None:
        self.of: dict[int, list] = {}

    def peers(self):
        return self.of

    def bits(self, peer: int) -> int:
        return sum(1 << kind for kind, _, _ in self.of[peer])

    def entries(self, peer: int):
        return self.of[peer]

    def owners(self, kind, key):
        return tuple(n for n, entries in self.of.items() if any(e[:2] == (kind, key) for e in entries))

    def value(self, kind, key):
        return next((e[2] for entries in self.of.values() for e in entries if e[:2] == (kind, key)), None)

    def successor(self, table, key):
        return next(
            (n for n, entries in self.of.items() if any(e[0] == table and e[1][:2] == key[:2] for e in entries)), 0
        )

    def uniform(self):
        return 0b111 if all(len(entries) == 3 for entries in self.of.values()) else 0

    def bits_on(self, peer: int, role: int) -> int:
        return sum(1 << table for table, _, value in self.of[peer] if TABLES[4][table].role(value) == role)

    def messages(self, peer, bits, seq, oifs):
        """As the quick way does, where all peers have all three."""
        if not self.uniform() or TUNNEL not in oifs:
            return None
        neighbour, fdb, route = self.of[peer]
        oif = oifs[TUNNEL]
        made = (
            wire.neighbour_add(V4, seq, neighbour[1], neighbour[2], oif), wire.fdb_add(V4, seq + 1, fdb[1], fdb[2], oif),
            wire.route_add(V4, seq + 2, route[1], route[2], oif, replace=False),
        )  # fmt: skip
        return b"".join(message for kind, message in enumerate(made) if bits >> kind & 1)


class It(Reconciler):
    """The reconciler with its table beside it, changed as the datapath does."""

    def __init__(self, kernel: ModelKernel, clock: Clock) -> None:
        self.wished = Wished()
        super().__init__(TABLES[4], self.wished, kernel, clock, random.Random(3))
        self.devices[TUNNEL] = Device(IFINDEX, True)

    def join(self, n: int, entries: list) -> None:
        self.leave(n)
        self.wished.of[n] = entries
        self.want(n, entries)

    def leave(self, n: int) -> None:
        if (was := self.wished.of.pop(n, None)) is not None:
            self.unwant(n, was)

    def dump(self, kind: int, found: dict, again: dict | None = None) -> None:
        """A look through the kernel; an absence counts only if the second look agrees."""
        for key, value in found.items():
            self.find(kind, key, value)
        again = found if again is None else again
        for n in self.believed(kind, self.wished.of):
            for its, key, _ in self.wanted.entries(n):
                if its is kind and key not in found and key not in again:
                    self.lose(kind, key)
        for key in [key for key in self.extra[kind] if key not in found and key not in again]:
            self.lose(kind, key)

    def found(self, kind: int) -> dict:
        """What it believes that the kernel has."""
        right = {
            e[1]: e[2] for n in self.believed(kind, self.wished.of) for e in self.wanted.entries(n) if e[0] is kind
        }
        return right | self.extra[kind]


def peer(n: int, mac: int | None = None):
    base = (10 << 24) | (244 << 16) | (n << 8)
    mac = mac if mac is not None else (0x0A << 40) | n
    return [
        (NEIGHBOURS, base, NeighbourValue(mac)),
        (FDB, mac, FdbValue((192 << 24) | n)),
        (ROUTES, RouteKey(base, 24, n + 1), RouteValue(TUNNEL, base, True, PROTOCOL)),
    ]


def settle(rec: Reconciler, clock: Clock, rounds: int = 60) -> None:
    for _ in range(rounds):
        while rec.apply()[0]:
            pass
        if not rec.differing():
            return
        clock.now += 40


def one(kind: int, key: int, value: int):
    """An entry of the simplest kind."""
    return (kind, key, NeighbourValue(value))


def world():
    kernel, clock = ModelKernel(), Clock()
    return kernel, clock, It(kernel, clock)
