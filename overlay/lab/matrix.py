"""Who reaches whom: one datagram there and one back between every two ends, with the source that the far side saw.

All sockets belong to this process; each was made inside the namespace of its end and stays there. So no program runs in
the pods, and the time measured is the kernel's.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from overlay.lab import netns

TRIES, ANSWER_S = 3, 1.0


@dataclass(frozen=True, slots=True)
class End:
    """One end: a pod or a node. address: where others reach it."""

    name: str
    kind: str
    namespace: str
    address: str
    node: str


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
        kinds = f"{source.kind}-{target.kind}"
        for end in (target, source):
            if end.name in self._broken:
                return Cell(source.name, target.name, kinds, None, "", "", False, self._broken[end.name])
        listening = self._listening[target.name]
        best: float | None = None
        seen = own = ""
        try:
            sending = netns.inside(source.namespace, lambda: _connect(target, listening.getsockname()[1]))
        except OSError as error:
            return Cell(source.name, target.name, kinds, None, "", "", False, f"no route: {error.strerror}")
        with sending:
            own = sending.getsockname()[0]
            for _ in range(TRIES):
                took, saw = _round_trip(sending, listening, answer_s)
                seen = saw or seen
                if took is not None and (best is None or took < best):
                    best = took
                if took is None and best is None:
                    break
        wanted = expected(source, target, own)
        why = "" if best is not None else ("no way back" if seen else "nothing arrived")
        if best is not None and seen != wanted:
            why = f"source rewritten: {wanted} became {seen}"
        return Cell(source.name, target.name, kinds, best, seen, own, not why, why)

    def all(self, expected: Expected = no_nat, answer_s: float = ANSWER_S) -> list[Cell]:
        """Every pair of which at least one is a pod."""
        return [
            self.measure(source, target, expected, answer_s)
            for source in self.ends
            for target in self.ends
            if source is not target and "pod" in (source.kind, target.kind)
        ]


def _listen(end: End) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((end.address, 0))
    return made


def _connect(target: End, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
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
