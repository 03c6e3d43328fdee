"""One packet between two pods, caught on the underlay, taken apart: the proof of the encapsulation (RFC 7348)."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from overlay.lab import netns
from overlay.lab.processes import LabError

ETH_P_ALL, ETH_P_IP = 3, 0x0800
UDP = 17
VNI_VALID = 0x08


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
    outer = _udp(frame)
    if outer is None or outer[2][1] != port or len(outer[3]) < 8 or outer[3][0] & VNI_VALID == 0:
        return None
    vni = int.from_bytes(outer[3][4:7], "big")
    inner = _udp(outer[3][8:])
    if inner is None:
        return None
    return Captured(interface, len(frame), *outer[:3], vni, *inner[:3], inner[3].hex())


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


def _udp(frame: bytes) -> tuple[tuple[str, str], tuple[str, str], tuple[int, int], bytes] | None:
    """MACs, addresses, ports and payload of an Ethernet frame with IPv4 and UDP in it."""
    if len(frame) < 14 + 20 + 8 or struct.unpack_from("!H", frame, 12)[0] != ETH_P_IP:
        return None
    header = (frame[14] & 0x0F) * 4
    if frame[14] >> 4 != 4 or frame[14 + 9] != UDP or len(frame) < 14 + header + 8:
        return None
    ports = struct.unpack_from("!HH", frame, 14 + header)
    return (
        (frame[6:12].hex(":"), frame[0:6].hex(":")),
        (socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])),
        (ports[0], ports[1]),
        frame[14 + header + 8 :],
    )
