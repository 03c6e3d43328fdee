"""Takes bits out of the marks of all connections that conntrack has. (Connections themselves are never deleted.)

Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import struct
from contextlib import closing

from overlay.kernel.netlink import NETLINK_NETFILTER, KernelError, RequestSocket
from overlay.kernel.route import wire

_NEW, _GET = 1 << 8, 1 << 8 | 1
"""IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, of NFNL_SUBSYS_CTNETLINK."""
_TUPLE, _MARK, _ZONE = 1, 8, 18
"""CTA_TUPLE_ORIG, CTA_MARK, CTA_ZONE."""
_NFGENMSG = 4


def clear_marks(bits: int) -> int:
    """Of each connection with some of these bits in its mark, take them out; how many were. One that ends meanwhile needs
    none. Raises KernelError."""
    with closing(RequestSocket(NETLINK_NETFILTER)) as requests:
        every = struct.pack(">BBH", 0, 0, 0)
        marked = requests.dump(
            lambda seq: wire.dump_request(_GET, seq, every), lambda body: _without(body, bits)
        )  # fmt: skip
        first = requests.take_seqs(len(marked))
        messages = [wire.message(_NEW, 0, seq, body) for seq, body in enumerate(marked, start=first)]
        refused = requests.execute(messages, first) if messages else {}
    for refusal in refused.values():
        if refusal.errno != errno.ENOENT:  # that one ended
            raise KernelError(refusal.errno, f"marks of connections: {refusal}")
    return len(marked)


def _without(body: memoryview, bits: int) -> bytes | None:
    """What gives a connection a mark without these bits; None: it has none of them."""
    parts = wire.attributes(body, _NFGENMSG)
    mark = int.from_bytes(parts.get(_MARK, b""), "big")
    if not mark & bits or _TUPLE not in parts:
        return None
    attributes = wire.attr(_TUPLE | wire.NESTED, bytes(parts[_TUPLE]))
    attributes += wire.attr(_MARK, (mark & ~bits & 0xFFFFFFFF).to_bytes(4, "big"))
    if _ZONE in parts:
        attributes += wire.attr(_ZONE, bytes(parts[_ZONE]))
    return struct.pack(">BBH", body[0], 0, 0) + attributes
