"""ICMP echo as probes: requests that their answers are recognised by, on one raw socket for each family.

Sources: RFC 792 and RFC 4443 (the messages), raw(7), icmp(7), ip(7) and ipv6(7) (MTU_DISCOVER), linux/filter.h (the filter).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from lease.families import V4, V6, Family
from lease.model import Prefix, ip_text

_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
"""IP_MTU_DISCOVER, IPV6_MTU_DISCOVER."""
_PROBE = 3
"""IP_PMTUDISC_PROBE: don't fragment, and do not ask what is known of the path."""
_SO_TIMESTAMPNS, _SO_ATTACH_FILTER = 35, 26
_ICMP6_FILTER = 1
_SKF_NET_OFF = 0xFFF00000
"""linux/filter.h: -0x100000, from where on offsets count from the network header."""
_PKTINFO = {4: (socket.IPPROTO_IP, 8), 6: (socket.IPPROTO_IPV6, 50)}
"""IP_PKTINFO with struct in_pktinfo (ip(7)), IPV6_PKTINFO with struct in6_pktinfo (RFC 3542)."""
_HEAD = struct.Struct("!BBHHH")
_TOKEN = 8
_BUFFER = 1 << 18
SMALL = 56
"""Bytes of data, as ping(8) sends."""
LEAST = _TOKEN
_RECV = 1 << 16


class _Form(NamedTuple):
    """What an echo is in a family. headers: of IP and ICMP; shown: the raw socket gives the IP header as well."""

    protocol: int
    request: int
    answer: int
    headers: int
    shown: bool


_FORMS = {4: _Form(socket.IPPROTO_ICMP, 8, 0, 28, True), 6: _Form(socket.IPPROTO_ICMPV6, 128, 129, 48, False)}


_REFUSALS = {
    errno.EINVAL: "a blackhole route",
    errno.ENETUNREACH: "no route",
    errno.EHOSTUNREACH: "an unreachable route, or nobody there",
    errno.EACCES: "a prohibit route",
    errno.EPERM: "a filter of this node drops it",
    errno.ENOKEY: "no WireGuard peer has that address; does its record name an address of the family that Mode wants?",
    errno.EMSGSIZE: "it is larger than the MTU of the interface or route",
}


def refusal_text(code: int) -> str:
    """Why the kernel did not send, by `EchoSocket.send`."""
    return _REFUSALS.get(code, os.strerror(code))


class Seen(NamedTuple):
    """An echo that came. answer: to a request of ours with this sequence number; else somebody asks us. at_ns: when, by the
    clock of `time.time_ns`."""

    source: int
    answer: bool
    sequence: int
    at_ns: int


def data_of(family: Family, mtu: int) -> int:
    """The bytes of data with which an echo has just that MTU."""
    return max(mtu - _FORMS[family.number].headers, LEAST)


def request(family: Family, identifier: int, sequence: int, token: bytes, size: int) -> bytes:
    """The ICMP message. size: bytes of data, LEAST at least. Of IPv6 the kernel makes the checksum."""
    kind, (data, total) = _FORMS[family.number].request, _data(token, size)
    check = 0 if family is V6 else ~_folded(total + (kind << 8) + identifier + sequence) & 0xFFFF
    return _HEAD.pack(kind, 0, check, identifier, sequence) + data


@lru_cache(maxsize=16)
def _data(token: bytes, size: int) -> tuple[bytes, int]:
    """The data, and its sum for the checksum (RFC 1071): the same in each request of a size."""
    data = token.ljust(max(size, LEAST), b"\0")
    return data, sum_of(data)


def sum_of(data: bytes) -> int:
    """The one's complement sum of RFC 1071."""
    padded = data + bytes(len(data) % 2)
    return _folded(sum(struct.unpack(f"!{len(padded) // 2}H", padded)))


def _folded(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def interesting(identifier: int, askers: Prefix, length: int, place: int = 0) -> bytes:
    """A filter for an IPv4 raw socket, as struct sock_filter: answers to this identifier, and requests from the address at a
    place in subnets of that length within a prefix: 0, the VTEP, or 1, the pods' gateway; no pod can have one."""
    hosts, mask = (1 << 32 - length) - 1, ~((1 << 32 - askers.length) - 1) & 0xFFFFFFFF
    program = (
        (0xB1, 0, 0, 0),  # ldx 4*([0]&0xf): behind the IP header
        (0x50, 0, 0, 0),  # ldb [x]: the type
        (0x15, 0, 2, 0),  # an answer:
        (0x48, 0, 0, 4),  # ldh [x+4]: the identifier
        (0x15, 4, 5, identifier),
        (0x15, 0, 4, 8),  # a request:
        (0x20, 0, 0, 12),  # ld [12]: the source
        (0x54, 0, 0, hosts | mask),  # and: the prefix's bits as they are, and those of the host
        (0x15, 0, 1, askers.base | place),
        (0x06, 0, 0, 0xFFFF),
        (0x06, 0, 0, 0),
    )
    return b"".join(struct.pack("=HBBI", *one) for one in program)


def interesting6(identifier: int, askers: Prefix, length: int, place: int = 0) -> bytes:
    """The same for ICMPv6, which a raw socket sees from the ICMP header on; the IPv6 header is at SKF_NET_OFF."""
    form, hosts, mask = _FORMS[6], (1 << 128 - length) - 1, ~((1 << 128 - askers.length) - 1) & (1 << 128) - 1
    program = [
        (0x30, 0, 0, 0),  # ldb [0]: the type
        (0x15, 0, 2, form.answer),  # an answer:
        (0x28, 0, 0, 4),  # ldh [4]: the identifier
        (0x15, 13, 14, identifier),
        (0x15, 0, 13, form.request),  # a request:
    ]
    for word in range(4):  # of the source
        low = 96 - 32 * word
        bits, wanted = (hosts | mask) >> low & 0xFFFFFFFF, (askers.base | place) >> low & 0xFFFFFFFF
        program += [
            (0x20, 0, 0, _SKF_NET_OFF + 8 + 4 * word),  # ld
            (0x54, 0, 0, bits),  # and
            (0x15, 0, 10 - 3 * word, wanted),
        ]
    program += [(0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0)]
    return b"".join(struct.pack("=HBBI", *one) for one in program)


def _from(family: Family, source: int) -> tuple[int, int, bytes]:
    """The control message by which the kernel takes a source address."""
    address = source.to_bytes(family.bits // 8, "big")
    value = address + struct.pack("=i", 0) if family is V6 else struct.pack("=i4s4x", 0, address)
    return *_PKTINFO[family.number], value


class EchoSocket:
    """Sends requests, takes answers and what peers ask. Not blocking. Raises OSError: no CAP_NET_RAW."""

    def __init__(self, family: Family, askers: Prefix | None = None, length: int = 0, place: int = 0) -> None:
        """askers, length, place: requests from that address of subnets of that length within the prefix are seen as well
        (`interesting`)."""
        self._family, self._form = family, _FORMS[family.number]
        self._identifier, self._token = int.from_bytes(os.urandom(2), "big"), os.urandom(_TOKEN)
        self._socket = socket.socket(
            family.af, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, self._form.protocol
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.setsockopt(*_MTU_DISCOVER[family.number], _PROBE)
            self._filter(askers, length, place)
        except BaseException:
            self._socket.close()
            raise

    def _filter(self, askers: Prefix | None, length: int, place: int) -> None:
        nobody = Prefix(self._family.number, (1 << self._family.bits) - 1, self._family.bits)
        make = interesting if self._family is V4 else interesting6
        program = make(self._identifier, askers or nobody, length if askers else 0, place)
        held = array("B", program)  # whose address is known without ctypes, half a MiB
        form = struct.pack("HP", len(program) // 8, held.buffer_info()[0])
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, form)
        if self._family is V6:  # before the other: most of what comes is neighbour discovery
            passed = [self._form.answer] + ([self._form.request] if askers is not None else [])
            blocked = bytearray(b"\xff" * 32)
            for kind in passed:  # struct icmp6_filter: a bit for each type that is not wanted
                word, bit = divmod(kind, 32)
                at = word * 4
                value = int.from_bytes(blocked[at : at + 4], "little") & ~(1 << bit)
                blocked[at : at + 4] = value.to_bytes(4, "little")
            self._socket.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, bytes(blocked))

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def send(self, address: int, sequence: int, size: int, source: int = 0) -> int:
        """Ask an address; 0, or the errno by which the kernel refuses: EMSGSIZE, ENETUNREACH, EPERM (a filter)...
        source: an address of this node, 0: the kernel's choice."""
        message = request(self._family, self._identifier, sequence & 0xFFFF, self._token, size)
        with_source = [_from(self._family, source)] if source else []
        try:
            self._socket.sendmsg([message], with_source, 0, (ip_text(self._family.number, address), 0))
        except OSError as error:
            busy = error.errno in (errno.EAGAIN, errno.ENOBUFS)  # as lost: nothing refuses it
            return 0 if busy else error.errno or errno.EIO
        return 0

    def seen(self, most: int) -> Iterator[Seen]:
        """What came, so many at most; who sends more is not read."""
        for _ in range(most):
            try:
                data, extra, _, source = self._socket.recvmsg(_RECV, 64)
            except (BlockingIOError, InterruptedError):
                return
            if (one := self._parse(data, source[0], extra)) is not None:
                yield one

    def _parse(self, data: bytes, source: str, extra: list[tuple[int, int, bytes]]) -> Seen | None:
        start = (data[0] & 15) * 4 if self._form.shown and data else 0
        if len(data) < start + _HEAD.size + _TOKEN:
            return None
        kind, _, _, identifier, sequence = _HEAD.unpack_from(data, start)
        answer = kind == self._form.answer
        ours = data[start + _HEAD.size :][:_TOKEN] == self._token
        if answer and (identifier != self._identifier or not ours):
            return None
        if not answer and (kind != self._form.request or ours):
            return None
        at = next(
            (struct.unpack("qq", value) for _, kind, value in extra if kind == _SO_TIMESTAMPNS and len(value) == 16),
            None,
        )
        at_ns = time.time_ns() if at is None else at[0] * 1_000_000_000 + at[1]
        address = int.from_bytes(socket.inet_pton(self._family.af, source.partition("%")[0]), "big")
        return Seen(address, answer, sequence, at_ns)
