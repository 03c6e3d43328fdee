"""Frames taken apart: Ethernet, IPv4 or IPv6, UDP, VXLAN, ipip and WireGuard, and what is inside. Pure.

Sources: IEEE 802.3, RFC 791, RFC 8200, RFC 4443, RFC 768, RFC 7348, RFC 2003; WireGuard's paper, section 5.4 (messages); the
file: libpcap's savefile format (pcap-savefile(5)).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection
from typing import NamedTuple

from lease.model import ip_text

VNI_VALID = 0x08
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
_ETHERNET, _MOST = 1, 262144
_ICMP = {0: "echo reply", 3: "unreachable", 8: "echo request", 11: "time exceeded"}
_ICMPV6 = {
    1: "unreachable", 2: "packet too big", 3: "time exceeded", 128: "echo request", 129: "echo reply",
    133: "router solicitation", 134: "router advertisement", 135: "neighbour solicitation", 136: "neighbour advertisement",
}  # fmt: skip
_ECHO = {1: (0, 8), 58: (128, 129)}
_FRAGMENT, _MORE_HEADERS = 44, (0, 43, 60)
"""IPv6's header of a fragment; those of options and routing, which say their length in units of eight bytes (RFC 8200)."""
_IPIP, _UDP = 4, 17
_MESSAGES = {1: "handshake initiation", 2: "handshake response", 3: "cookie reply", 4: "data"}
"""WireGuard's, by the first byte; three zeroes follow."""
_NO_MACS = bytes(12)
_FLAGS = ((2, "S"), (1, "F"), (4, "R"), (8, "P"), (16, "."))


class Packet(NamedTuple):
    """An IP packet. what: its protocol and what stands in that, for people."""

    source: str
    destination: str
    protocol: int
    length: int
    what: str
    payload: bytes


class Frame(NamedTuple):
    """What came by an interface. outer: where it is of the tunnel, else None; vni: of VXLAN, None: it is none; inner: None
    where it cannot be read, since it is encrypted; inner_macs: source, destination, "" where there are none."""

    outer: Packet | None
    vni: int | None
    inner: Packet | None
    inner_macs: tuple[str, str]


def parse(frame: bytes, known: Collection[int], kind: str = "vxlan") -> Frame | None:
    """kind: the backend's type; known: UDP ports of the tunnel. None: no IP, or no VXLAN with IP inside."""
    outer = _ethernet(frame)
    if outer is None:
        return None
    macs = frame[6:12].hex(":"), frame[0:6].hex(":")
    if kind == "ipip" and outer.protocol == _IPIP:
        inner = _ethernet(_NO_MACS + b"\x08\x00" + outer.payload)
        return None if inner is None else Frame(outer, None, inner, ("", ""))
    ports = struct.unpack_from("!HH", outer.payload) if outer.protocol == _UDP and len(outer.payload) >= 16 else (0, 0)
    if kind == "wireguard" and any(port and port in known for port in ports):
        message = _MESSAGES.get(outer.payload[8], f"of type {outer.payload[8]}")
        return Frame(outer._replace(what=f"wireguard {message}"), None, None, ("", ""))
    if kind != "vxlan" or not ports[1] or ports[1] not in known:
        return Frame(None, None, outer, macs)
    return _vxlan(outer)


def parse_bare(packet: bytes) -> Frame | None:
    """A packet of a tunnel's device that has no link layer."""
    framed = with_link_layer(packet)
    found = _ethernet(framed)
    return None if found is None else Frame(None, None, found, ("", ""))


def with_link_layer(packet: bytes) -> bytes:
    """An IP packet behind an Ethernet header without addresses, so that one file holds it beside others."""
    return _NO_MACS + (b"\x86\xdd" if packet[:1] and packet[0] >> 4 == 6 else b"\x08\x00") + packet


def _vxlan(outer: Packet) -> Frame | None:
    vxlan = outer.payload[8:]
    if vxlan[0] & VNI_VALID == 0:
        return None
    inside = vxlan[8:]
    inner = _ethernet(inside)
    if inner is None:
        return None
    inner_macs = inside[6:12].hex(":"), inside[0:6].hex(":")
    return Frame(outer, int.from_bytes(vxlan[4:7], "big"), inner, inner_macs)


def line(found: Frame) -> str:
    """For people."""
    if found.outer is None:
        return _line(found.inner)
    if found.inner is None:
        return _line(found.outer)
    how = "ipip" if found.vni is None else f"vni {found.vni}"
    return f"{found.outer.source} > {found.outer.destination} {how} | {_line(found.inner)}"


def _line(packet: Packet | None) -> str:
    return "" if packet is None else f"{packet.source} > {packet.destination} {packet.what}, {packet.length} bytes"


def pcap_head() -> bytes:
    """What a file begins with; times are in nanoseconds."""
    return struct.pack("=LHHlLLL", 0xA1B23C4D, 2, 4, 0, 0, _MOST, _ETHERNET)


def pcap_record(frame: bytes, at_ns: int) -> bytes:
    """A frame of it."""
    seconds, nanoseconds = divmod(at_ns, 1_000_000_000)
    return struct.pack("=LLLL", seconds & 0xFFFFFFFF, nanoseconds, len(frame), len(frame)) + frame


def _ethernet(frame: bytes) -> Packet | None:
    if frame[12:14] == b"\x86\xdd":
        return _ipv6(frame[14:])
    if len(frame) < 34 or frame[12:14] != b"\x08\x00" or frame[14] >> 4 != 4:
        return None
    header = (frame[14] & 15) * 4
    length, protocol = int.from_bytes(frame[16:18], "big"), frame[23]
    payload = frame[14 + header :]
    source, destination = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
    fragment = int.from_bytes(frame[20:22], "big") & 0x1FFF
    what = f"fragment of {_PROTOCOLS.get(protocol, protocol)}" if fragment else _what(protocol, payload)
    return Packet(source, destination, protocol, length, what, b"" if fragment else payload)


def _ipv6(packet: bytes) -> Packet | None:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    length, protocol = 40 + int.from_bytes(packet[4:6], "big"), packet[6]
    source, destination = (ip_text(6, int.from_bytes(packet[at : at + 16], "big")) for at in (8, 24))
    payload = packet[40:]
    while protocol in (*_MORE_HEADERS, _FRAGMENT) and len(payload) >= 8:
        if protocol == _FRAGMENT and int.from_bytes(payload[2:4], "big") >> 3:
            what = f"fragment of {_PROTOCOLS.get(payload[0], payload[0])}"
            return Packet(source, destination, payload[0], length, what, b"")
        size = 8 if protocol == _FRAGMENT else 8 * (payload[1] + 1)
        protocol, payload = payload[0], payload[size:]
    return Packet(source, destination, protocol, length, _what(protocol, payload), payload)


def _what(protocol: int, data: bytes) -> str:
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    if protocol in _ECHO and len(data) >= 8:
        kind, code, ident, sequence = data[0], data[1], *struct.unpack_from("!HH", data, 4)
        detail = f" id {ident} seq {sequence}" if kind in _ECHO[protocol] else f" code {code}"
        return f"{name} {(_ICMP if protocol == 1 else _ICMPV6).get(kind, f'type {kind}')}{detail}"
    if protocol in (6, 17) and len(data) >= 8:
        source, destination = struct.unpack_from("!HH", data)
        flags = "".join(letter for bit, letter in _FLAGS if len(data) >= 14 and data[13] & bit) if protocol == 6 else ""
        return f"{name} {source} > {destination}{f' [{flags}]' if flags else ''}"
    return name
