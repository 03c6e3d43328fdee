"""Expressions of nftables beyond those of wire.py: conntrack's tuples and mark, registers by number, maps of verdicts,
chains that are called, limits and logs. Pure.

Source: include/uapi/linux/netfilter/nf_tables.h (expressions' attributes), net/netfilter/nft_ct.c (which of them break a
rule: an address of a family that the connection is not of, anything of a packet without a connection).
"""

from __future__ import annotations

from overlay.kernel.nftables.wire import expression, nest, word
from overlay.kernel.route import wire

ORIGINAL, REPLY = 0, 1
"""IP_CT_DIR_ORIGINAL, IP_CT_DIR_REPLY: whose tuple. The source of the reply's is the destination after translation."""
STATE, MARK, L4PROTO, PROTO_SRC, SRC_IP, SRC_IP6 = 0, 3, 10, 11, 19, 21
"""NFT_CT_STATE, NFT_CT_MARK, NFT_CT_PROTOCOL, NFT_CT_PROTO_SRC, NFT_CT_SRC_IP, NFT_CT_SRC_IP6."""
SOURCE = {4: SRC_IP, 6: SRC_IP6}
INVALID, UNTRACKED = 1, 64
"""Bits of a state: NF_CT_STATE_INVALID_BIT, NF_CT_STATE_UNTRACKED_BIT."""
META_OIF, META_OIFNAME, META_NFPROTO, META_PKTTYPE = 5, 7, 15, 19
_PACKET_HOST = bytes(1)
"""PACKET_HOST (linux/if_packet.h)."""
_ACCEPT, _RETURN, _JUMP, _GOTO = 1, -5 & 0xFFFFFFFF, -3 & 0xFFFFFFFF, -4 & 0xFFFFFFFF
_SECOND = 1
"""A limit's unit, in seconds."""


def ct(key: int, direction: int | None = None, place: int = 0) -> bytes:
    """A property of the packet's connection into the registers, of one direction where it has two. place: how many parts of
    four bytes of a key stand before it."""
    way = [] if direction is None else [wire.attr(3, bytes([direction]))]
    return expression("ct", word(1, _register(place)), word(2, key), *way)


def set_mark() -> bytes:
    """The connection's mark from the first register."""
    return expression("ct", word(2, MARK), word(4, _register(0)))


def _register(place: int) -> int:
    """As the kernel itself numbers it: four of 4 bytes (from NFT_REG32_00, 8) are one of 16 (from NFT_REG_1, 1)."""
    return 8 + place if place % 4 else 1 + place // 4


def bits(mask: bytes, more: bytes = b"") -> bytes:
    """The first registers and a mask, exclusive or `more`."""
    parts = word(1, _register(0)), word(2, _register(0)), word(3, len(mask)), nest(4, wire.attr(1, mask))
    return expression("bitwise", *parts, nest(5, wire.attr(1, more or bytes(len(mask)))))


def equal(data: bytes) -> bytes:
    """Go on only if the first registers are this."""
    return _compare(0, data)


def differ(data: bytes) -> bytes:
    """Go on only if they are not."""
    return _compare(1, data)


def _compare(operator: int, data: bytes) -> bytes:
    return expression("cmp", word(1, _register(0)), word(2, operator), nest(3, wire.attr(1, data)))


def load(offset: int, size: int, place: int = 0) -> bytes:
    """Bytes of the network header into the registers. place: as of `ct`."""
    return expression("payload", word(1, _register(place)), word(2, 1), word(3, offset), word(4, size))


def meta(key: int, place: int = 0) -> bytes:
    """A property of the packet into the registers. place: as of `ct`."""
    return expression("meta", word(2, key), word(1, _register(place)))


def for_this_host() -> bytes:
    """Let a frame be one for this host."""
    return _data(_PACKET_HOST) + expression("meta", word(2, META_PKTTYPE), word(3, _register(0)))


def to_mac(mac: int) -> bytes:
    """Give a frame another destination."""
    where = word(2, 0), word(3, 0), word(4, 6)
    return _data(mac.to_bytes(6, "big")) + expression("payload", word(5, _register(0)), *where, word(6, 0), word(7, 0))


def _data(data: bytes) -> bytes:
    return expression("immediate", word(1, _register(0)), nest(2, wire.attr(1, data)))


def found_in(name: str) -> bytes:
    """Go on only if what the registers hold, from the first on, is in a set."""
    return expression("lookup", wire.attr(1, wire.text(name)), word(2, _register(0)), word(5, 0))


def absent_from(name: str) -> bytes:
    """Go on only if what the registers hold is not in a set."""
    return expression("lookup", wire.attr(1, wire.text(name)), word(2, _register(0)), word(5, 1))


def verdict_of(name: str) -> bytes:
    """Go on as a map of verdicts says of what the registers hold; as if this were not there where it says nothing."""
    return expression("lookup", wire.attr(1, wire.text(name)), word(2, _register(0)), word(3, 0), word(5, 0))


def verdict(code: int, chain: str = "") -> bytes:
    """A verdict as data: of an expression, or of an element of a map."""
    return nest(2, word(1, code) + (wire.attr(2, wire.text(chain)) if chain else b""))


def chain_or_return(chain: str) -> bytes:
    """Go on in that chain and do not come back to this one; "": come back to where this chain was called."""
    return verdict(_GOTO, chain) if chain else verdict(_RETURN)


def jump(chain: str) -> bytes:
    """Go on in a chain, and then here."""
    return _immediate(verdict(_JUMP, chain))


def goto(chain: str) -> bytes:
    """Go on in a chain, and not here."""
    return _immediate(verdict(_GOTO, chain))


def _immediate(data: bytes) -> bytes:
    return expression("immediate", word(1, 0), nest(2, data))


def limit(per_second: int, burst: int) -> bytes:
    """Go on only so often."""
    rate, unit = (value.to_bytes(8, "big") for value in (per_second, _SECOND))
    return expression("limit", wire.attr(1, rate), wire.attr(2, unit), word(3, burst))


def log_to(group: int, prefix: str, bytes_each: int) -> bytes:
    """Tell who listens to an NFLOG group of the packet, so many bytes of it."""
    return expression(
        "log", wire.attr(1, group.to_bytes(2, "big")), wire.attr(2, wire.text(prefix)), word(3, bytes_each)
    )


ACCEPT, RETURN, DROP = (_immediate(verdict(code)) for code in (_ACCEPT, _RETURN, 0))
COUNT = expression("counter")
"""Counts in the rule itself."""
