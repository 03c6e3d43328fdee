"""Takes bits out of the marks of all connections that conntrack has. (Connections themselves are never deleted.)

Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import socket
import struct

from overlay.kernel.netlink import NETLINK_NETFILTER, KernelError, refusal_of
from overlay.kernel.route import wire

_NEW, _GET = 1 << 8, 1 << 8 | 1
"""IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, of NFNL_SUBSYS_CTNETLINK."""
_TUPLE, _MARK, _ZONE = 1, 8, 18
"""CTA_TUPLE_ORIG, CTA_MARK, CTA_ZONE."""
_NFGENMSG = 4
_RECV, _BUFFER, _ANSWER_S = 1 << 16, 8 << 20, 10.0


def clear_marks(bits: int) -> int:
    """Of each connection with some of these bits in its mark, take them out; how many were. One that ends meanwhile needs
    none. Raises KernelError."""
    there = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    try:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        there.settimeout(_ANSWER_S)
        there.bind((0, 0))
        marked = [*_marked(there, bits)]
        for number, (family, attributes) in enumerate(marked, start=2):
            there.send(wire.message(_NEW, wire.NLM_F_ACK, number, struct.pack(">BBH", family, 0, 0) + attributes))
            for message in wire.split(there.recv(_RECV)):
                refusal = refusal_of(message) if message.kind == wire.NLMSG_ERROR else None
                if refusal is not None and refusal.errno != errno.ENOENT:  # that one ended
                    raise KernelError(refusal.errno, f"marks of connections: {refusal}")
        return len(marked)
    except KernelError:
        raise
    except OSError as error:
        raise KernelError(error.errno or errno.ETIMEDOUT, f"marks of connections: no answer: {error}") from error
    finally:
        there.close()


def _marked(there: socket.socket, bits: int) -> list[tuple[int, bytes]]:
    """Of each that has such a mark its family, and the attributes of a message that gives it another."""
    there.send(wire.message(_GET, wire.NLM_F_DUMP, 1, struct.pack(">BBH", 0, 0, 0)))
    found: list[tuple[int, bytes]] = []
    while True:
        for message in wire.split(there.recv(_RECV)):
            if message.kind == wire.NLMSG_DONE:
                return found
            if message.kind == wire.NLMSG_ERROR:
                refusal = refusal_of(message)
                if refusal is not None:
                    raise KernelError(refusal.errno, f"marks of connections: {refusal}")
            parts = wire.attributes(message.body, _NFGENMSG)
            mark = int.from_bytes(parts.get(_MARK, b""), "big")
            if mark & bits and _TUPLE in parts:
                attributes = wire.attr(_TUPLE | wire.NESTED, bytes(parts[_TUPLE]))
                attributes += wire.attr(_MARK, (mark & ~bits & 0xFFFFFFFF).to_bytes(4, "big"))
                if _ZONE in parts:
                    attributes += wire.attr(_ZONE, bytes(parts[_ZONE]))
                found.append((message.body[0], attributes))
