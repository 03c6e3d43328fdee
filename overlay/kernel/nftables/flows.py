"""What the kernel tells of flows: packets that a rule logs to an NFLOG group, and connections that conntrack begins.

Sources: include/uapi/linux/netfilter/nfnetlink_log.h, nfnetlink_conntrack.h, nfnetlink_compat.h (NFNLGRP_CONNTRACK_NEW).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import NamedTuple

from overlay.kernel.netlink import NETLINK_NETFILTER, KernelError, refusal_of
from overlay.kernel.route import wire

_CONNTRACK, _ULOG = 1, 4
"""NFNL_SUBSYS_CTNETLINK, NFNL_SUBSYS_ULOG."""
_LOG_PACKET, _LOG_CONFIG = _ULOG << 8, _ULOG << 8 | 1
_CT_NEW = _CONNTRACK << 8
_CFG_CMD, _CFG_MODE = 1, 2
_BIND, _COPY_PACKET = 1, 2
_PAYLOAD, _PREFIX = 9, 10
_TUPLE_ORIGINAL, _TUPLE_REPLY, _TUPLE_IP, _TUPLE_PROTO = 1, 2, 1, 2
_GROUP_NEW = 1
_NFGENMSG = 4
_RECV, _BUFFER = 1 << 16, 4 << 20


class Flow(NamedTuple):
    """A connection's first packet. Addresses packed, the target's after translation; ports 0 where the protocol has none."""

    source: bytes
    target: bytes
    protocol: int
    source_port: int
    port: int


class Denied(NamedTuple):
    """A packet that a rule logged. prefix: the rule's."""

    prefix: str
    flow: Flow


class Denials:
    """The packets logged to a group, in this network namespace. One listener a group. To be closed."""

    def __init__(self, group: int, bytes_each: int) -> None:
        """Raises KernelError: somebody listens there already (EBUSY), or the kernel has no NFLOG."""
        self.socket = _socket()
        bind = wire.attr(_CFG_CMD, struct.pack("=B", _BIND))
        mode = wire.attr(_CFG_MODE, struct.pack(">IBx", bytes_each, _COPY_PACKET))
        try:
            for number, attributes in enumerate((bind, mode), start=1):
                body = struct.pack(">BBH", 0, 0, group) + attributes
                self.socket.send(wire.message(_LOG_CONFIG, wire.NLM_F_ACK, number, body))
                _acknowledged(self.socket)
        except BaseException:
            self.socket.close()
            raise

    def read(self) -> list[Denied]:
        """What came. Raises OSError."""
        found = []
        for message in wire.split(self.socket.recv(_RECV)):
            if message.kind != _LOG_PACKET:
                continue
            parts = wire.attributes(message.body, _NFGENMSG)
            flow = flow_of(bytes(parts.get(_PAYLOAD, b"")))
            if flow is not None:
                found.append(Denied(bytes(parts.get(_PREFIX, b"")).rstrip(b"\0").decode("utf-8", "replace"), flow))
        return found

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()


class Connections:
    """Connections that conntrack begins, in this network namespace: those that every rule let through. To be closed."""

    def __init__(self) -> None:
        """Raises OSError: the kernel has no such events."""
        self.socket = _socket()
        self.socket.setsockopt(270, 1, _GROUP_NEW)  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP

    def read(self) -> list[Flow]:
        """What came. Raises OSError."""
        messages = wire.split(self.socket.recv(_RECV))
        found = (_connection(message.body) for message in messages if message.kind == _CT_NEW)
        return [flow for flow in found if flow is not None]

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    made.bind((0, 0))
    return made


def _acknowledged(there: socket.socket) -> None:
    for message in wire.split(there.recv(_RECV)):
        if message.kind == wire.NLMSG_ERROR and (refusal := refusal_of(message)) is not None:
            raise KernelError(refusal.errno, f"NFLOG: {refusal}")


def flow_of(packet: bytes) -> Flow | None:
    """Of the beginning of an IP packet; None: it is none, or a later fragment."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        at, protocol = (packet[0] & 15) * 4, packet[9]
        if int.from_bytes(packet[6:8], "big") & 0x1FFF:
            return None
        return Flow(packet[12:16], packet[16:20], protocol, *_ports(protocol, packet[at:]))
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        at, protocol = 40, packet[6]
        while protocol in (0, 43, 60) and len(packet) >= at + 8:  # options and routing (RFC 8200)
            protocol, at = packet[at], at + 8 * (packet[at + 1] + 1)
        return Flow(packet[8:24], packet[24:40], protocol, *_ports(protocol, packet[at:]))
    return None


def _ports(protocol: int, data: bytes) -> tuple[int, int]:
    if protocol not in (6, 17, 132) or len(data) < 4:
        return 0, 0
    first, second = struct.unpack_from(">HH", data)
    return first, second


def _connection(body: memoryview) -> Flow | None:
    parts = wire.attributes(body, _NFGENMSG)
    original, reply = (_tuple(parts.get(kind)) for kind in (_TUPLE_ORIGINAL, _TUPLE_REPLY))
    if original is None or reply is None:
        return None
    return Flow(original.source, reply.source, original.protocol, original.source_port, reply.source_port)


def _tuple(data: memoryview | None) -> Flow | None:
    parts: Mapping[int, memoryview] = wire.attributes(data, 0) if data is not None else {}
    if _TUPLE_IP not in parts or _TUPLE_PROTO not in parts:
        return None
    ends, how = wire.attributes(parts[_TUPLE_IP], 0), wire.attributes(parts[_TUPLE_PROTO], 0)
    source, target = (bytes(ends.get(four) or ends.get(six) or b"") for four, six in ((1, 3), (2, 4)))
    number, first, second = (int.from_bytes(how.get(kind, b""), "big") for kind in (1, 2, 3))
    return Flow(source, target, number, first, second)
