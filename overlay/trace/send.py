"""Probes, sent from inside the pod's own network namespace, or from this node where that cannot be entered."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from lease.model import ip_number, ip_text
from overlay.kernel import namespaces
from overlay.trace.probe import Answer, Probe, answer, answer_of_packet, packet

COUNT, GAP_S = 3, 0.1
_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
_PROBE = 3
"""IP_MTU_DISCOVER and IPV6_MTU_DISCOVER: what is known of the path's MTU is not asked."""


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
        family = self._probe.family
        made = [socket.socket(family.af, flags, socket.IPPROTO_RAW)]  # with the header; so is all that is of IPv6
        made[0].setsockopt(*_MTU_DISCOVER[family.number], _PROBE)
        icmp = self._probe._replace(protocol="icmp").number
        return made + [socket.socket(family.af, flags, protocol) for protocol in {icmp, self._probe.number}]

    def send(self, wait_s: float) -> Sent:
        """All of them, and what is answered within a time behind the last."""
        found: list[tuple[Answer, int]] = []
        count, refused, where = 0, "", ip_text(self._probe.version, self._probe.destination)
        for sequence in range(COUNT):
            at = time.monotonic()
            try:
                self._sending.sendto(packet(self._probe, sequence), (where, 0))
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
                    data, (source, *_) = each.recvfrom(1 << 16)
                except BlockingIOError:
                    continue
                if (one := self._answer(each.proto, source, data)) is not None:
                    found.append((one, round((time.monotonic() - sent_at) * 1e6)))
        return found

    def _answer(self, protocol: int, source: str, data: bytes) -> Answer | None:
        """Of IPv6 a raw socket gives what is behind the header (ipv6(7))."""
        if self._probe.version == 4:
            return answer_of_packet(self._probe, data)
        return answer(self._probe, protocol, ip_number(source.partition("%")[0], 6), data)

    def close(self) -> None:
        """Close the sockets."""
        for each in (self._sending, *self._receiving):
            each.close()


def numbers() -> tuple[int, int]:
    """An identifier (or source port, above those that programs are given) and an IP identification for a probe."""
    return 61000 + int.from_bytes(os.urandom(2), "big") % 4000, 1 + int.from_bytes(os.urandom(2), "big") % 0xFFFF
