"""Who reaches whom: small datagrams and full-size ones, there and back between every two ends, with the source that the far
side saw.

All sockets belong to this process; each was made inside the namespace of its end and stays there. So no program runs in
the pods, and the time measured is the kernel's. All pairs are tried at once; what does not come back costs one wait. Packets
are never fragmented (DF): one that is too large for its way fails, as TCP does.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from overlay.lab import netns

TRIES, ANSWER_S = 3, 1.0
AT_ONCE = 200
"""Pairs under way at once: each has a socket."""
IP_PMTUDISC_DO = 2
UDP = 8
TOKEN = 8


class _Form(NamedTuple):
    """What sockets of a family are. level, discover, mtu: options (include/uapi/linux/{in,in6}.h); header: bytes."""

    af: int
    level: int
    discover: int
    mtu: int
    header: int


_FORMS = {
    4: _Form(socket.AF_INET, socket.IPPROTO_IP, 10, 14, 20),
    6: _Form(socket.AF_INET6, socket.IPPROTO_IPV6, 23, 24, 40),
}


@dataclass(frozen=True, slots=True)
class End:
    """One end: a pod or a node, by one of its addresses, where others reach it."""

    name: str
    kind: str
    namespace: str
    address: str
    node: str

    @property
    def family(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4


@dataclass(frozen=True, slots=True)
class Cell:
    """What happened between two ends. rtt_us: None when nothing came back; seen: the source the far side saw; own: the
    source the near side sent from; ok: it came back and nobody had rewritten the source."""

    source: str
    target: str
    kinds: str
    rtt_us: float | None
    seen: str
    own: str
    ok: bool
    why: str = ""
    size: int = 0


Expected = Callable[[End, End, str], str]
"""The source that the far side must see, of (from, to, the near side's own address)."""


def no_nat(_source: End, _target: End, own: str) -> str:
    """Everybody sees the sender's own address."""
    return own


class Wires:
    """A listening socket in each end's namespace, and one to send from."""

    def __init__(self, ends: Iterable[End]) -> None:
        self.ends = list(ends)
        self._listening: dict[str, socket.socket] = {}
        self._broken: dict[str, str] = {}
        """Ends that cannot listen, and why: every pair with them fails, the others are measured."""
        for end in self.ends:
            try:
                self._listening[end.name] = netns.inside(end.namespace, lambda end=end: _listen(end))  # type: ignore[misc]
            except OSError as error:
                self._broken[end.name] = f"{end.name} has no {end.address}: {error.strerror}"

    def close(self) -> None:
        """Close all sockets."""
        for listening in self._listening.values():
            listening.close()

    def __enter__(self) -> Wires:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, source: End, target: End, expected: Expected = no_nat, answer_s: float = ANSWER_S) -> Cell:
        """One pair; the best of three round trips."""
        return self.measure_all([(source, target)], expected, answer_s)[0]

    def all(self, expected: Expected = no_nat, answer_s: float = ANSWER_S) -> list[Cell]:
        """Every pair of which at least one is a pod."""
        pairs = [
            (source, target)
            for source in self.ends
            for target in self.ends
            if source is not target and source.family == target.family and "pod" in (source.kind, target.kind)
        ]
        return self.measure_all(pairs, expected, answer_s)

    def measure_all(self, pairs: list[tuple[End, End]], expected: Expected, answer_s: float) -> list[Cell]:
        """Pairs, in their order."""
        cells: list[Cell] = []
        for start in range(0, len(pairs), AT_ONCE):
            cells += self._at_once(pairs[start : start + AT_ONCE], expected, answer_s)
        return cells

    def _at_once(self, pairs: list[tuple[End, End]], expected: Expected, answer_s: float) -> list[Cell]:
        attempts = [_Attempt(source, target) for source, target in pairs]
        try:
            for attempt in attempts:
                self._prepare(attempt)
            ready = [attempt for attempt in attempts if attempt.sending is not None]
            _send_and_answer(ready, list(self._listening.values()), answer_s)
            for attempt in ready:
                if attempt.came_back == {False, True}:
                    attempt.rtt_us = self._best(attempt, answer_s)
            return [attempt.cell(expected) for attempt in attempts]
        finally:
            for attempt in attempts:
                if attempt.sending is not None:
                    attempt.sending.close()

    def _prepare(self, attempt: _Attempt) -> None:
        for end in (attempt.target, attempt.source):
            if end.name in self._broken:
                attempt.why = self._broken[end.name]
                return
        port = self._listening[attempt.target.name].getsockname()[1]
        try:
            attempt.sending = netns.inside(attempt.source.namespace, lambda: _connect(attempt.target, port))
        except OSError as error:
            attempt.why = f"no route: {error.strerror}"

    def _best(self, attempt: _Attempt, answer_s: float) -> float | None:
        """Round trips of a pair that surely reach, one behind the other."""
        assert attempt.sending is not None
        took = [_round_trip(attempt.sending, self._listening[attempt.target.name], answer_s)[0] for _ in range(TRIES)]
        return min((each for each in took if each is not None), default=None)


class _Attempt:
    """A pair that is tried. Of the sets, False stands for the small datagram and True for the one of full size."""

    def __init__(self, source: End, target: End) -> None:
        self.source, self.target = source, target
        self.sending: socket.socket | None = None
        self.tokens = {False: os.urandom(TOKEN), True: os.urandom(TOKEN)}
        self.arrived: set[bool] = set()
        self.came_back: set[bool] = set()
        self.refused = ""
        self.size = 0
        self.seen = self.why = ""
        self.rtt_us: float | None = None

    def send(self, full: bool) -> None:
        """One datagram, with DF; of full size, it fills the MTU that the sender knows."""
        assert self.sending is not None
        data = self.tokens[full]
        try:
            if full:
                form = _FORMS[self.target.family]
                self.size = self.sending.getsockopt(form.level, form.mtu)
                data = data.ljust(self.size - form.header - UDP, b"\0")
            self.sending.send(data)
        except OSError as error:
            self.refused = error.strerror or str(error)

    def cell(self, expected: Expected) -> Cell:
        """What came of it."""
        kinds = f"{self.source.kind}-{self.target.kind}"
        own = self.sending.getsockname()[0] if self.sending is not None else ""
        wanted = expected(self.source, self.target, own)
        if not self.why and self.came_back != {False, True}:
            self.why = self._failure()
        if not self.why and self.seen != wanted:
            self.why = f"source rewritten: {wanted} became {self.seen}"
        return Cell(
            self.source.name, self.target.name, kinds, self.rtt_us, self.seen, own, not self.why, self.why, self.size
        )

    def _failure(self) -> str:
        if False in self.came_back:
            way = "arrive" if True not in self.arrived else "come back"
            return f"full-size packets ({self.size} bytes, DF) do not {way}: an MTU on the way is smaller"
        if self.arrived:
            return "no way back"
        return f"nothing arrived{f' ({self.refused})' if self.refused else ''}"


def _send_and_answer(attempts: list[_Attempt], listening: list[socket.socket], answer_s: float) -> None:
    """Send both datagrams of all, once more at half time where they did not come back, and answer what arrives."""
    by_token = {token: (attempt, full) for attempt in attempts for full, token in attempt.tokens.items()}
    poll, sockets = select.poll(), {}
    for each in (*listening, *(attempt.sending for attempt in attempts if attempt.sending is not None)):
        sockets[each.fileno()] = each
        poll.register(each, select.POLLIN)
    answering = set(listening)
    began = time.monotonic()
    for until in (began + answer_s / 2, began + answer_s):
        open_ones = [attempt for attempt in attempts if attempt.came_back != {False, True}]
        for attempt in open_ones:
            for full in {False, True} - attempt.came_back:
                attempt.send(full)
        while (left := until - time.monotonic()) > 0 and any(a.came_back != {False, True} for a in open_ones):
            for number, _ in poll.poll(left * 1000):
                _take(sockets[number], by_token, sockets[number] in answering)


def _take(on: socket.socket, by_token: dict[bytes, tuple[_Attempt, bool]], answers: bool) -> None:
    try:
        data, source = on.recvfrom(65535, socket.MSG_DONTWAIT)
        attempt, full = by_token.get(data[:TOKEN], (None, False))
        if attempt is None:
            return
        if not answers:
            attempt.came_back.add(full)
            return
        attempt.arrived.add(full)
        attempt.seen = source[0]
        on.sendto(data, source)
    except OSError:
        return  # refused by an ICMP error of an earlier datagram, or the answer has no way


def summary(cells: Iterable[Cell], node_of: dict[str, str]) -> Iterator[str]:
    """What the failures have in common: `nobody reaches node2`. node_of: the node of each end, by the end's name."""
    every = list(cells)
    # what goes between a pod and a node's own address passes the tunnel in one direction alone
    able = [cell for cell in every if cell.kinds == "pod-pod"] or every
    between = [cell for cell in able if node_of[cell.source] != node_of[cell.target]]
    nodes = sorted(set(node_of.values()))
    for node in nodes:
        to = [cell for cell in between if node_of[cell.target] == node]
        out = [cell for cell in between if node_of[cell.source] == node]
        if len(nodes) < 3:
            to, out = [], []  # of two nodes both ends say the same
        unreached, reaches_none = (bool(some) and not any(c.ok for c in some) for some in (to, out))
        if unreached and reaches_none:
            yield f"{node} is cut off: nobody reaches it, and it reaches nobody"
        elif unreached:
            yield f"nobody reaches {node}"
        elif reaches_none:
            yield f"{node} reaches nobody"
    failed = [cell for cell in between if not cell.ok]
    if failed and all("full-size" in cell.why for cell in failed):
        yield "small packets pass everywhere: it is the MTU"


def _listen(end: End) -> socket.socket:
    made = _socket(end.family)
    made.bind((end.address, 0))
    return made


def _socket(family: int) -> socket.socket:
    form = _FORMS[family]
    made = socket.socket(form.af, socket.SOCK_DGRAM)
    made.setsockopt(form.level, form.discover, IP_PMTUDISC_DO)
    return made


def _connect(target: End, port: int) -> socket.socket:
    made = _socket(target.family)
    try:
        made.connect((target.address, port))
    except OSError:
        made.close()
        raise
    return made


def _round_trip(sending: socket.socket, listening: socket.socket, answer_s: float) -> tuple[float | None, str]:
    """Microseconds there and back (None: it did not come back), and the source seen ("": it did not arrive)."""
    token = os.urandom(8)
    began = time.perf_counter()
    try:
        sending.send(token)
        came = _receive(listening, token, answer_s)
        if came is None:
            return None, ""
        listening.sendto(token, came)
        if _receive(sending, token, answer_s) is None:
            return None, came[0]
    except OSError:
        return None, ""
    return (time.perf_counter() - began) * 1e6, came[0]


def _receive(on: socket.socket, token: bytes, answer_s: float) -> tuple[str, int] | None:
    until = time.monotonic() + answer_s
    while (left := until - time.monotonic()) > 0 and select.select([on], [], [], left)[0]:
        data, source = on.recvfrom(64)
        if data == token:
            return source[0], source[1]
    return None
