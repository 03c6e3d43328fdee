"""One packet between two pods, caught on the underlay, taken apart: the proof of the encapsulation (RFC 7348)."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from overlay.capture import frames
from overlay.lab import netns
from overlay.lab.processes import LabError

ETH_P_ALL = 3
UDP = 17


@dataclass(frozen=True, slots=True)
class Captured:
    """The headers of one VXLAN packet, outermost first."""

    interface: str
    length: int
    outer_mac: tuple[str, str]
    outer_ip: tuple[str, str]
    outer_port: tuple[int, int]
    vni: int
    inner_mac: tuple[str, str]
    inner_ip: tuple[str, str]
    inner_port: tuple[int, int]
    payload: str


def parse_vxlan(frame: bytes, port: int, interface: str) -> Captured | None:
    """Take a frame apart; None where it is no VXLAN packet to that port with IPv4 and UDP inside. Pure."""
    found = frames.parse(frame, (port,))
    if found is None or found.outer is None or found.inner is None or found.vni is None:
        return None
    outer, inner = found.outer, found.inner
    if inner.protocol != UDP or len(inner.payload) < 8 or ":" in inner.source:
        return None
    return Captured(
        interface,
        len(frame),
        (frame[6:12].hex(":"), frame[0:6].hex(":")),
        (outer.source, outer.destination),
        _ports(outer.payload),
        found.vni,
        found.inner_macs,
        (inner.source, inner.destination),
        _ports(inner.payload),
        inner.payload[8:].hex(),
    )


def _ports(udp: bytes) -> tuple[int, int]:
    source, destination = struct.unpack_from("!HH", udp)
    return source, destination


def capture(namespace: str, interface: str, port: int, cause: Callable[[], Any], wait_s: float = 3.0) -> Captured:
    """Listen on an interface while something is sent; the first VXLAN packet that leaves. Raises LabError."""

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.bind((interface, ETH_P_ALL))
        return made

    with netns.inside(namespace, listen) as listening:
        cause()
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0 and select.select([listening], [], [], left)[0]:
            frame, where = listening.recvfrom(65535)
            found = parse_vxlan(frame, port, interface)
            if found is not None and where[2] == socket.PACKET_OUTGOING:
                return found
    raise LabError(f"no VXLAN packet left by {interface} of {namespace} within {wait_s:.0f} s")
