"""A peer's three messages of IPv6 at once. Pure; wire.py says the same in plain words, and tests compare the two.

Source: include/uapi/linux/{netlink,rtnetlink,neighbour}.h.
"""

from __future__ import annotations

import struct

from overlay.kernel.route import wire
from overlay.kernel.route.entries import NUD_PERMANENT, PROTOCOL, RT_TABLE_MAIN, RTNH_F_ONLINK

_NEIGHBOUR = struct.Struct("=LHHLLBBHlHBBHH16sHH6s2x")
_FDB = struct.Struct("=LHHLLBBHlHBBHH6s2xHH16s")
_ROUTE = struct.Struct("=LHHLLBBBBBBBBLHH16sHHLHHLHH16s")
_ADD = wire.NLM_F_REQUEST | wire.NLM_F_CREATE
_REPLACE, _NEW = _ADD | wire.NLM_F_REPLACE, _ADD | wire.NLM_F_EXCL
_LINK_LOCAL = bytes.fromhex("fe80000000000000")
_PARTS = (
    slice(0, _NEIGHBOUR.size),
    slice(_NEIGHBOUR.size, _NEIGHBOUR.size + _FDB.size),
    slice(_NEIGHBOUR.size + _FDB.size, None),
)


def peer_messages(seq: int, base: bytes, length: int, mac: bytes, public_ip: bytes, metric: int, oif: int) -> bytes:
    """The three messages that put a peer reached by tunnel in place, numbered from `seq`: wire.neighbour_add, fdb_add and
    route_add (which must not be there yet). base, public_ip: sixteen bytes in network order; mac: six. The gateway is the
    link-local address of the MAC (lease.model.link_local)."""
    gateway = _LINK_LOCAL + bytes((mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE)) + mac[3:]
    return (
        _NEIGHBOUR.pack(
            _NEIGHBOUR.size, wire.RTM_NEWNEIGH, _REPLACE, seq, 0,
            wire.AF_INET6, 0, 0, oif, NUD_PERMANENT, 0, wire.RTN_UNICAST,
            20, wire.NDA_DST, gateway, 10, wire.NDA_LLADDR, mac,
        )
        + _FDB.pack(
            _FDB.size, wire.RTM_NEWNEIGH, _REPLACE, seq + 1, 0,
            wire.AF_BRIDGE, 0, 0, oif, NUD_PERMANENT, wire.NTF_SELF, 0,
            10, wire.NDA_LLADDR, mac, 20, wire.NDA_DST, public_ip,
        )
        + _ROUTE.pack(
            _ROUTE.size, wire.RTM_NEWROUTE, _NEW, seq + 2, 0,
            wire.AF_INET6, length, 0, 0, RT_TABLE_MAIN, PROTOCOL, wire.RT_SCOPE_UNIVERSE, wire.RTN_UNICAST, RTNH_F_ONLINK,
            20, wire.RTA_DST, base, 8, wire.RTA_OIF, oif, 8, wire.RTA_PRIORITY, metric, 20, wire.RTA_GATEWAY, gateway,
        )
    )  # fmt: skip


def some_of(messages: bytes, bits: int) -> bytes:
    """Of a peer's three messages those of the kinds whose bits are set."""
    return b"".join(messages[part] for kind, part in enumerate(_PARTS) if bits >> kind & 1)
