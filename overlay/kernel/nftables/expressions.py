"""Expressions of nftables beyond those of wire.py: conntrack's tuples and mark, frames for this host, maps of verdicts,
chains that are called, limits and logs. Pure.

Source: include/uapi/linux/netfilter/nf_tables.h (expressions' attributes), net/netfilter/nft_ct.c (which of them break a
rule: an address of a family that the connection is not of, anything of a packet without a connection).
"""

from __future__ import annotations

from overlay.kernel.nftables.wire import GOTO, META_PKTTYPE, decide, expression, nest, register, verdict, word
from overlay.kernel.route import wire

ORIGINAL, REPLY = 0, 1
"""IP_CT_DIR_ORIGINAL, IP_CT_DIR_REPLY: whose tuple. The source of the reply's is the destination after translation."""
STATE, MARK, L4PROTO, PROTO_SRC, SRC_IP, SRC_IP6 = 0, 3, 10, 11, 19, 21
"""NFT_CT_STATE, NFT_CT_MARK, NFT_CT_PROTOCOL, NFT_CT_PROTO_SRC, NFT_CT_SRC_IP, NFT_CT_SRC_IP6."""
SOURCE = {4: SRC_IP, 6: SRC_IP6}
INVALID, UNTRACKED = 1, 64
"""Bits of a state: NF_CT_STATE_INVALID_BIT, NF_CT_STATE_UNTRACKED_BIT."""
_PACKET_HOST = bytes(1)
"""PACKET_HOST (linux/if_packet.h)."""
_ACCEPT, _RETURN, _JUMP = 1, -5 & 0xFFFFFFFF, -3 & 0xFFFFFFFF
_SECOND = 1
"""A limit's unit, in seconds."""


def ct(key: int, direction: int | None = None, place: int = 0) -> bytes:
    """A property of the packet's connection into the registers, of one direction where it has two. place: as of `load`."""
    way = [] if direction is None else [wire.attr(3, bytes([direction]))]
    return expression("ct", word(1, register(place)), word(2, key), *way)


def set_mark() -> bytes:
    """The connection's mark from the first register."""
    return expression("ct", word(2, MARK), word(4, register(0)))


def for_this_host() -> bytes:
    """Let a frame be one for this host."""
    return _data(_PACKET_HOST) + expression("meta", word(2, META_PKTTYPE), word(3, register(0)))


def to_mac(mac: int) -> bytes:
    """Give a frame another destination."""
    where = word(2, 0), word(3, 0), word(4, 6)
    return _data(mac.to_bytes(6, "big")) + expression("payload", word(5, register(0)), *where, word(6, 0), word(7, 0))


def _data(data: bytes) -> bytes:
    return expression("immediate", word(1, register(0)), nest(2, wire.attr(1, data)))


def verdict_of(name: str) -> bytes:
    """Go on as a map of verdicts says of what the registers hold; as if this were not there where it says nothing."""
    return expression("lookup", wire.attr(1, wire.text(name)), word(2, register(0)), word(3, 0), word(5, 0))


def chain_or_return(chain: str) -> bytes:
    """Go on in that chain and do not come back to this one; "": come back to where this chain was called."""
    return verdict(GOTO, chain) if chain else verdict(_RETURN)


def jump(chain: str) -> bytes:
    """Go on in a chain, and then here."""
    return decide(verdict(_JUMP, chain))


def limit(per_second: int, burst: int) -> bytes:
    """Go on only so often."""
    rate, unit = (value.to_bytes(8, "big") for value in (per_second, _SECOND))
    return expression("limit", wire.attr(1, rate), wire.attr(2, unit), word(3, burst))


def log_to(group: int, prefix: str, bytes_each: int) -> bytes:
    """Tell who listens to an NFLOG group of the packet, so many bytes of it."""
    return expression(
        "log", wire.attr(1, group.to_bytes(2, "big")), wire.attr(2, wire.text(prefix)), word(3, bytes_each)
    )


ACCEPT, RETURN = (decide(verdict(code)) for code in (_ACCEPT, _RETURN))
COUNT = expression("counter")
"""Counts in the rule itself."""
