"""A controller of probes whose network is a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from lease.families import V4
from lease.records.packed import number, pack
from overlay.probes import echo
from overlay.probes.controller import PeerOfPath, ProbesController
from tests.support.make import lease

Answers = Callable[[int, int], bool]
"""Whether an address answers a probe with so many bytes of data."""


class _Socket:
    """What came by one."""

    def __init__(self) -> None:
        self._came: list[echo.Seen] = []

    def seen(self, most: int):
        came, self._came = self._came[:most], self._came[most:]
        return iter(came)

    def close(self) -> None:
        pass


class Asking(_Socket):
    """The socket by which requests come."""

    def asks(self, address: int) -> None:
        self._came.append(echo.Seen(address, False, 1, 0))


class Network(_Socket):
    """In place of a raw socket: answers at once, or never."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers, self.sent = answers, []
        self.sources: set[tuple[int, int]] = set()
        self.refuses = 0
        self.asking = Asking()

    def send(self, address: int, sequence: int, size: int, source: int = 0) -> int:
        self.sent.append((address, size))
        self.sources.add((address, source))
        if self.refuses:
            return self.refuses
        if self.answers(address, size):
            self._came.append(echo.Seen(address, True, sequence, 10**18))
        return 0


class Probed:
    """A controller, its peers and their network."""

    def __init__(self, bench, count: int, answers: Answers = lambda _address, _size: True) -> None:
        self.bench, self.network = bench, Network(answers)
        bench.current.set(synced_families=frozenset({4}))
        self.peers: dict[int, PeerOfPath] = {}
        self.controller = ProbesController(V4, bench.health, bench.clock, self.some, self.peers.get, self.socket)
        self.leases = {}
        for place in range(count):
            self.join(place)
        self.controller.load({each: pack(one) for each, one in self.leases.items()}.values())

    def join(self, place: int, tell: bool = False) -> PeerOfPath:
        one = lease(
            f"10.{64 + (place >> 8)}.{place & 255}.0/24", f"192.{168 + (place >> 16)}.{place >> 8 & 255}.{place & 255}"
        )
        end = one.first
        self.leases[number(end.subnet)] = one
        peer = self.peers[number(end.subnet)] = PeerOfPath(end.subnet, end.public_ip, False, f"n{place}")
        if tell:
            self.controller.peer_changed(None, one)
        return peer

    def socket(self, _family, askers, length, place):
        self.place = place
        if askers is not None:
            self.askers = askers, length, place
        return self.network if askers is None else self.network.asking

    def some(self, place: int, count: int) -> list[PeerOfPath]:
        return list(self.peers.values())[place : place + count]

    def run(self, seconds: float) -> list[int]:
        """Tick by tick; how many packets were sent in each."""
        sent = []
        for _ in range(round(seconds)):
            before = len(self.network.sent)
            self.bench.reconcile(self.controller)
            sent.append(len(self.network.sent) - before)
            self.bench.clock.now += 1.0
        return sent

    def states(self) -> Counter[str]:
        return Counter(each["state"] for each in self.shown())

    def shown(self) -> list[dict[str, Any]]:
        """As the status has it."""
        found: Any = self.controller.status()["reachability"]
        return found.json()
