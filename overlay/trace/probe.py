"""A probe: a packet that is recognised wherever it comes along, by its IP identification, and its answer. Pure.

Sources: RFC 791 (IPv4), RFC 792 (ICMP), RFC 768 (UDP), RFC 9293 (TCP).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from overlay.probes.echo import sum_of

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
_IP = struct.Struct("!BBHHHBBHLL")
_DONT_FRAGMENT, _TTL = 0x4000, 64
_SYN, _RST, _ACK = 2, 4, 16
_HEADERS = {"icmp": 28, "tcp": 40, "udp": 28}


class Probe(NamedTuple):
    """source, destination: addresses; port: of the destination, 0 for ICMP; ident: the echo's identifier, or the source's
    port; ip_id: of the IP header; size: of the packet, in bytes."""

    source: int
    destination: int
    protocol: str
    port: int
    ident: int
    ip_id: int
    size: int

    @property
    def number(self) -> int:
        """The protocol's number."""
        return PROTOCOLS[self.protocol]


def least(protocol: str) -> int:
    """The size of the smallest probe of a protocol: one that carries a few bytes."""
    return _HEADERS[protocol] + (0 if protocol == "tcp" else 16)


def packet(probe: Probe, sequence: int) -> bytes:
    """The whole IPv4 packet, don't fragment set."""
    body = _body(probe, sequence)
    head = _IP.pack(
        0x45, 0, 20 + len(body), probe.ip_id, _DONT_FRAGMENT, _TTL, probe.number, 0, probe.source, probe.destination
    )
    check = ~sum_of(head) & 0xFFFF
    return head[:10] + check.to_bytes(2, "big") + head[12:] + body


def _body(probe: Probe, sequence: int) -> bytes:
    data = bytes(max(0, probe.size - _HEADERS[probe.protocol]))
    if probe.protocol == "icmp":
        made = struct.pack("!BBHHH", 8, 0, 0, probe.ident, sequence & 0xFFFF) + data
        return made[:2] + (~sum_of(made) & 0xFFFF).to_bytes(2, "big") + made[4:]
    if probe.protocol == "udp":
        made = struct.pack("!HHHH", probe.ident, probe.port, 8 + len(data), 0) + data
        return made[:6] + (_checked(probe, made) or 0xFFFF).to_bytes(2, "big") + made[8:]
    made = struct.pack("!HHLLBBHHH", probe.ident, probe.port, sequence + 1, 0, 5 << 4, _SYN, 65535, 0, 0) + data
    return made[:16] + _checked(probe, made).to_bytes(2, "big") + made[18:]


def _checked(probe: Probe, made: bytes) -> int:
    """The checksum over the pseudo header (RFC 768, RFC 9293)."""
    pseudo = struct.pack("!LLBBH", probe.source, probe.destination, 0, probe.number, len(made))
    return ~sum_of(pseudo + made) & 0xFFFF


class Answer(NamedTuple):
    """What came back. text: for the operator; good: it came in the destination's name, whatever it said; source: who sent
    it, as it says; forgeable: a filter on the way can make it as well (a reset, an ICMP error)."""

    text: str
    good: bool
    source: int
    forgeable: bool = False


_UNREACHABLE = {
    0: "no route to the network", 1: "no route to the host", 2: "it speaks no such protocol",
    3: "nobody listens on that port",
    4: "the packet is too large for the way (fragmentation needed)", 9: "forbidden (network)", 10: "forbidden (host)",
    13: "forbidden by a filter",
}  # fmt: skip
"""Codes of ICMP's destination unreachable (RFC 792, RFC 1812 5.2.7.1)."""


def answer(probe: Probe, data: bytes) -> Answer | None:
    """What a packet that came says of a probe; None: it is about something else."""
    if len(data) < 28 or data[0] >> 4 != 4:
        return None
    start = (data[0] & 15) * 4
    protocol, source = data[9], int.from_bytes(data[12:16], "big")
    body = data[start:]
    if protocol == 1 and len(body) >= 8:
        if body[0] == 0 and probe.protocol == "icmp":
            same = int.from_bytes(body[4:6], "big") == probe.ident
            return Answer("answered", True, source) if same else None
        if body[0] in (3, 11) and _quotes(probe, body[8:]):
            if body[0] == 11:
                return Answer("the packet's hops were used up on the way: it goes round in a circle", False, source)
            by_itself = source == probe.destination and body[1] in (2, 3)
            text = _UNREACHABLE.get(body[1], f"unreachable (code {body[1]})")
            return Answer(f"refused ({text})" if by_itself else text, by_itself, source, True)
        return None
    if protocol != probe.number or probe.protocol == "icmp" or len(body) < 8:
        return None
    ports = struct.unpack_from("!HH", body)
    if ports != (probe.port, probe.ident):
        return None
    if probe.protocol == "tcp" and len(body) >= 14:
        if body[13] & _RST:
            return Answer("refused (nobody listens on that port)", True, source, True)
        if body[13] & (_SYN | _ACK) == (_SYN | _ACK):
            return Answer("answered (the port is open)", True, source)
    return Answer("answered", True, source)


def _quotes(probe: Probe, quoted: bytes) -> bool:
    """Whether an ICMP error is about a probe: it quotes its header, in which NAT may have changed the addresses."""
    return len(quoted) >= 20 and int.from_bytes(quoted[4:6], "big") == probe.ip_id and quoted[9] == probe.number
