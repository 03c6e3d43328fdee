"""A probe: a packet that is recognised wherever it comes along, by a mark in its IP header, and its answer. Pure.

The mark is IPv4's identification, or the lower 16 bits of IPv6's flow label: neither NAT nor a router changes them.

Sources: RFC 791 (IPv4), RFC 8200 and RFC 6437 (IPv6, flow labels), RFC 792 and RFC 4443 (ICMP), RFC 768 (UDP), RFC 9293
(TCP).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lease.families import FAMILIES, Family
from overlay.probes.echo import sum_of

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
_ICMPV6 = 58
_IP = struct.Struct("!BBHHHBBHLL")
_IP6 = struct.Struct("!LHBB16s16s")
_DONT_FRAGMENT, _TTL = 0x4000, 64
_SYN, _RST, _ACK = 2, 4, 16
_HEADERS = {"icmp": 8, "tcp": 20, "udp": 8}


class _Icmp(NamedTuple):
    """Types of a family's ICMP. errors: of those that say that a packet did not come through."""

    request: int
    answer: int
    unreachable: int
    too_big: int
    exceeded: int


ICMP = {4: _Icmp(8, 0, 3, -1, 11), 6: _Icmp(128, 129, 1, 2, 3)}
"""too_big: a type of its own in IPv6, a code of unreachable in IPv4."""


class Probe(NamedTuple):
    """source, destination: addresses; port: of the destination, 0 for ICMP; ident: the echo's identifier, or the source's
    port; ip_id: the mark; size: of the packet, in bytes; family: 4 or 6."""

    source: int
    destination: int
    protocol: str
    port: int
    ident: int
    ip_id: int
    size: int
    version: int = 4

    @property
    def family(self) -> Family:
        """Of its addresses."""
        return FAMILIES[self.version]

    @property
    def number(self) -> int:
        """The protocol's number."""
        return _ICMPV6 if self.protocol == "icmp" and self.version == 6 else PROTOCOLS[self.protocol]

    @property
    def name(self) -> str:
        """The protocol's name, as nftables has it."""
        return "icmpv6" if self.number == _ICMPV6 else self.protocol

    @property
    def data(self) -> int:
        """Bytes behind the headers."""
        return max(0, self.size - header_bytes(self.protocol, self.version))


def header_bytes(protocol: str, family: int) -> int:
    """Of IP and the protocol."""
    return (20 if family == 4 else 40) + _HEADERS[protocol]


def least(protocol: str, family: int = 4) -> int:
    """The size of the smallest probe of a protocol: one that carries a few bytes."""
    return header_bytes(protocol, family) + (0 if protocol == "tcp" else 16)


def packet(probe: Probe, sequence: int) -> bytes:
    """The whole packet; don't fragment is set."""
    body = _body(probe, sequence)
    if probe.version == 6:
        ends = map(probe.family.packed, (probe.source, probe.destination))
        return _IP6.pack(6 << 28 | probe.ip_id, len(body), probe.number, _TTL, *ends) + body
    head = _IP.pack(
        0x45, 0, 20 + len(body), probe.ip_id, _DONT_FRAGMENT, _TTL, probe.number, 0, probe.source, probe.destination
    )
    check = ~sum_of(head) & 0xFFFF
    return head[:10] + check.to_bytes(2, "big") + head[12:] + body


def _body(probe: Probe, sequence: int) -> bytes:
    data = bytes(probe.data)
    if probe.protocol == "icmp":
        made = struct.pack("!BBHHH", ICMP[probe.version].request, 0, 0, probe.ident, sequence & 0xFFFF) + data
        check = _checked(probe, made) if probe.version == 6 else ~sum_of(made) & 0xFFFF
        return made[:2] + check.to_bytes(2, "big") + made[4:]
    if probe.protocol == "udp":
        made = struct.pack("!HHHH", probe.ident, probe.port, 8 + len(data), 0) + data
        return made[:6] + (_checked(probe, made) or 0xFFFF).to_bytes(2, "big") + made[8:]
    made = struct.pack("!HHLLBBHHH", probe.ident, probe.port, sequence + 1, 0, 5 << 4, _SYN, 65535, 0, 0) + data
    return made[:16] + _checked(probe, made).to_bytes(2, "big") + made[18:]


def _checked(probe: Probe, made: bytes) -> int:
    """The checksum over the pseudo header (RFC 768, RFC 9293; RFC 8200 section 8.1)."""
    ends = b"".join(map(probe.family.packed, (probe.source, probe.destination)))
    return ~sum_of(ends + struct.pack("!LL", len(made), probe.number) + made) & 0xFFFF


class Answer(NamedTuple):
    """What came back. text: for the operator; good: it came in the destination's name, whatever it said; source: who sent
    it, as it says; forgeable: a filter on the way can make it as well (a reset, an ICMP error); version: of its family."""

    text: str
    good: bool
    source: int
    forgeable: bool = False
    version: int = 4


_UNREACHABLE = {
    4: {
        0: "no route to the network", 1: "no route to the host", 2: "it speaks no such protocol",
        3: "nobody listens on that port",
        4: "the packet is too large for the way (fragmentation needed)", 9: "forbidden (network)", 10: "forbidden (host)",
        13: "forbidden by a filter",
    },
    6: {
        0: "no route there", 1: "forbidden by a filter", 3: "nobody is at that address", 4: "nobody listens on that port",
        5: "forbidden by a filter of sources", 6: "a route rejects it",
    },
}  # fmt: skip
"""Codes of ICMP's destination unreachable (RFC 792, RFC 1812 5.2.7.1; RFC 4443 3.1)."""
_BY_ITSELF = {4: (2, 3), 6: (4,)}
"""Those that the destination itself sends."""


def answer_of_packet(probe: Probe, data: bytes) -> Answer | None:
    """What an IPv4 packet that came, with its header, says of a probe; None: it is about something else."""
    if len(data) < 28 or data[0] >> 4 != 4:
        return None
    return answer(probe, data[9], int.from_bytes(data[12:16], "big"), data[(data[0] & 15) * 4 :])


def answer(probe: Probe, protocol: int, source: int, body: bytes) -> Answer | None:
    """The same of what is behind the IP header. protocol: of it; source: its sender."""
    version, known = probe.version, ICMP[probe.version]
    if protocol == (_ICMPV6 if version == 6 else PROTOCOLS["icmp"]) and len(body) >= 8:
        if body[0] == known.answer and probe.protocol == "icmp":
            same = int.from_bytes(body[4:6], "big") == probe.ident
            return Answer("answered", True, source, version=version) if same else None
        if body[0] in (known.unreachable, known.too_big, known.exceeded) and _quotes(probe, body[8:]):
            return _error(probe, source, body[0], body[1])
        return None
    if protocol != probe.number or probe.protocol == "icmp" or len(body) < 8:
        return None
    if struct.unpack_from("!HH", body) != (probe.port, probe.ident):
        return None
    if probe.protocol == "tcp" and len(body) >= 14:
        if body[13] & _RST:
            return Answer("refused (nobody listens on that port)", True, source, True, version)
        if body[13] & (_SYN | _ACK) == (_SYN | _ACK):
            return Answer("answered (the port is open)", True, source, version=version)
    return Answer("answered", True, source, version=version)


def _error(probe: Probe, source: int, kind: int, code: int) -> Answer:
    version, known = probe.version, ICMP[probe.version]
    if kind == known.exceeded:
        text = "the packet's hops were used up on the way: it goes round in a circle"
        return Answer(text, False, source, version=version)
    if kind == known.too_big:
        return Answer("the packet is too large for the way", False, source, True, version)
    by_itself = source == probe.destination and code in _BY_ITSELF[version]
    text = _UNREACHABLE[version].get(code, f"unreachable (code {code})")
    return Answer(f"refused ({text})" if by_itself else text, by_itself, source, True, version)


def _quotes(probe: Probe, quoted: bytes) -> bool:
    """Whether an ICMP error is about a probe: it quotes its header, in which NAT may have changed the addresses."""
    if probe.version == 6:
        return len(quoted) >= 40 and int.from_bytes(quoted[2:4], "big") == probe.ip_id and quoted[6] == probe.number
    return len(quoted) >= 20 and int.from_bytes(quoted[4:6], "big") == probe.ip_id and quoted[9] == probe.number
