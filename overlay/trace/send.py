"""Probes, sent from inside the pod's own network namespace, or from this node where that cannot be entered."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from lease.model import ip_text
from overlay.kernel import namespaces
from overlay.trace.probe import Answer, Probe, answer, packet

COUNT, GAP_S = 3, 0.1
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3


class Sent(NamedTuple):
    """probes: those that the kernel took; refused: its word where it took none; answers: each with its time in us."""

    probes: int
    refused: str
    answers: list[tuple[Answer, int]]


class Sender:
    """Sockets in a namespace. To be closed. Raises OSError: not root."""

    def __init__(self, probe: Probe, namespace: str | None) -> None:
        """namespace: its path, None: this one."""
        self._probe = probe
        make: Callable[[], list[socket.socket]] = self._sockets
        self._sending, *self._receiving = make() if namespace is None else namespaces.inside(namespace, make)

    def _sockets(self) -> list[socket.socket]:
        flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        made = [socket.socket(socket.AF_INET, flags, socket.IPPROTO_RAW)]
        made[0].setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        protocols = {int(socket.IPPROTO_ICMP), self._probe.number}
        return made + [socket.socket(socket.AF_INET, flags, protocol) for protocol in protocols]

    def send(self, wait_s: float) -> Sent:
        """All of them, and what is answered within a time behind the last."""
        found: list[tuple[Answer, int]] = []
        count, refused = 0, ""
        for sequence in range(COUNT):
            at = time.monotonic()
            try:
                self._sending.sendto(packet(self._probe, sequence), (ip_text(4, self._probe.destination), 0))
                count += 1
            except OSError as error:
                refused = error.strerror or str(error)
            found += self._take(at, GAP_S if sequence < COUNT - 1 else wait_s, COUNT - len(found))
        return Sent(count, "" if count else refused, found)

    def _take(self, sent_at: float, wait_s: float, most: int) -> list[tuple[Answer, int]]:
        found: list[tuple[Answer, int]] = []
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0 and len(found) < most:
            for each in select.select(self._receiving, [], [], left)[0]:
                try:
                    data = each.recv(1 << 16)
                except BlockingIOError:
                    continue
                if (one := answer(self._probe, data)) is not None:
                    found.append((one, round((time.monotonic() - sent_at) * 1e6)))
        return found

    def close(self) -> None:
        """Close the sockets."""
        for each in (self._sending, *self._receiving):
            each.close()


def numbers() -> tuple[int, int]:
    """An identifier (or source port, above those that programs are given) and an IP identification for a probe."""
    return 61000 + int.from_bytes(os.urandom(2), "big") % 4000, 1 + int.from_bytes(os.urandom(2), "big") % 0xFFFF
