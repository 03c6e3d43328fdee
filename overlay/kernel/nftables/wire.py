"""An nftables table of ours as netlink messages, and what the kernel says of one. Pure.

For tables whose sets change with every peer or pod: by netlink 20,000 elements take 50 ms, and none of it is a program that
must be started. What changes rarely is loaded by the distribution's nft (nft.py).

Source: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h; libnftnl udata.h (the comment of a rule). Tests compare what is
loaded with how nft lists it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from lease.families import V4, V6
from overlay.kernel.route import wire

FAMILY = {"inet": 1, "ip": V4.nft_number, "ip6": V6.nft_number, "bridge": 7}
_SUBSYSTEM, _BATCH_BEGIN, _BATCH_END = 10, 0x10, 0x11
(
    NEWTABLE, GETTABLE, DELTABLE, NEWCHAIN, GETCHAIN, DELCHAIN, NEWRULE, GETRULE, DELRULE, NEWSET, GETSET, DELSET,
    NEWSETELEM, GETSETELEM, DELSETELEM, NEWGEN, GETGEN, TRACE, NEWOBJ, GETOBJ,
) = range(20)  # fmt: skip
_WITH_TIMEOUT, _FROM_RULES = 0x10, 0x20
_LIST_ELEM = 1
_TABLE_FLAGS, _TABLE_USE = 2, 3
"""NFTA_TABLE_USE: how many chains, sets, objects and flow tables a table has."""
_COUNTER_OBJECT = 1
_BASES = {"ether": 0, "network": 1, "transport": 2}
META_L4PROTO, META_IIF, META_IIFNAME, META_PROTOCOL = 16, 4, 6, 1
META_OIF, META_OIFNAME, META_NFPROTO, META_PKTTYPE = 5, 7, 15, 19
IPV4_ADDR, IPV6_ADDR, ETHER_ADDR, IFACE_INDEX, IFACE_NAME = 7, 8, 9, 20, 41
"""nft's own numbers of key types (include/datatype.h); a concatenation has them shifted by six bits each."""
ADDRESS = {V4.number: IPV4_ADDR, V6.number: IPV6_ADDR}
IFACE_AND_IPV4, IFACE_AND_IPV6, IFACE_AND_ETHER, IFACE_AND_NAME = (
    IFACE_INDEX << 6 | kind for kind in (IPV4_ADDR, IPV6_ADDR, ETHER_ADDR, IFACE_NAME)
)
"""Keys of 8, 20, 12 and 20 bytes: each part is filled up to a multiple of four."""
_HOST_ORDER = struct.pack("=BBL", 0, 4, 1)
"""NFTNL_UDATA_SET_KEYBYTEORDER: BYTEORDER_HOST_ENDIAN."""
GOTO = -4 & 0xFFFFFFFF
"""NFT_GOTO (linux/netfilter/nf_tables.h)."""
_ELEMENTS_A_MESSAGE = 2000
"""Of 16 to 20 bytes each: an attribute holds 65,535 bytes."""
Message = tuple[int, int, bytes]
"""Type, flags and body of a netlink message, without its header."""


class Set(NamedTuple):
    """A set of keys of so many bytes; what is in it is not part of the table's form."""

    name: str
    key_type: int
    key_size: int
    timeout_s: int = 0
    """Its elements go by themselves after so long, and rules may add some; 0: neither."""
    most: int = 0


class Chain(NamedTuple):
    """A base chain of type filter that accepts what no rule drops; without a hook one that rules lead to (`goto`)."""

    name: str
    hook: int | None = None
    priority: int = 0


class Rule(NamedTuple):
    """Expressions, and the words that `nft list` shows beside them."""

    chain: str
    comment: str
    expressions: tuple[bytes, ...]


class Table(NamedTuple):
    """The form of a table: all but the elements of its sets, and what its counters count."""

    family: str
    name: str
    sets: tuple[Set, ...]
    counters: tuple[str, ...]
    chains: tuple[Chain, ...]
    rules: tuple[Rule, ...]


# --- expressions: each an element of a rule's list


def load(base: str, offset: int, size: int, place: int = 0) -> bytes:
    """Bytes of the packet into the registers. base: ether, network or transport header; place: how many parts of four bytes
    of a key stand before these."""
    return expression("payload", word(1, register(place)), word(2, _BASES[base]), word(3, offset), word(4, size))


def meta(key: int, place: int = 0) -> bytes:
    """A property of the packet into the registers. place: as of `load`."""
    return expression("meta", word(2, key), word(1, register(place)))


def register(place: int) -> int:
    """As the kernel itself numbers it: four of 4 bytes (from NFT_REG32_00, 8) are one of 16 (from NFT_REG_1, 1)."""
    return 8 + place if place % 4 else 1 + place // 4


def equal(data: bytes) -> bytes:
    """Go on only if the registers are this."""
    return _compare(0, data)


def differ(data: bytes) -> bytes:
    """Go on only if the registers are not this."""
    return _compare(1, data)


def masked(mask: bytes, more: bytes = b"") -> bytes:
    """The registers and a mask, exclusive or `more`."""
    size, flipped = len(mask), wire.attr(1, more or bytes(len(mask)))
    parts = word(1, 1), word(2, 1), word(3, size), nest(4, wire.attr(1, mask)), nest(5, flipped)
    return expression("bitwise", *parts)


def found_in(name: str) -> bytes:
    """Go on only if what the registers hold is in a set."""
    return expression("lookup", wire.attr(1, wire.text(name)), word(2, 1), word(5, 0))


def absent_from(name: str) -> bytes:
    """Go on only if what the registers hold is not in a set."""
    return expression("lookup", wire.attr(1, wire.text(name)), word(2, 1), word(5, 1))


def count(counter: str) -> bytes:
    """Count the packet."""
    return expression("objref", word(1, _COUNTER_OBJECT), wire.attr(2, wire.text(counter)))


def remember(name: str, timeout_s: int) -> bytes:
    """Put what the register holds into a set, for so long. Where that is full the rule ends."""
    timeout = wire.attr(6, (timeout_s * 1000).to_bytes(8, "big"))
    return expression("dynset", wire.attr(1, wire.text(name)), word(3, 1), word(4, 1), timeout)


def _compare(operator: int, data: bytes) -> bytes:
    return expression("cmp", word(1, 1), word(2, operator), nest(3, wire.attr(1, data)))


def goto(chain: str) -> bytes:
    """Go on in a chain without a hook, and do not come back: the base chain then accepts."""
    return decide(verdict(GOTO, chain))


def verdict(code: int, chain: str = "") -> bytes:
    """A verdict as data: of an expression, or of an element of a map."""
    return nest(2, word(1, code) + (wire.attr(2, wire.text(chain)) if chain else b""))


def decide(data: bytes) -> bytes:
    """This verdict."""
    return expression("immediate", word(1, 0), nest(2, data))


def expression(name: str, *attributes: bytes) -> bytes:
    """One expression of a rule, with its own attributes."""
    return nest(_LIST_ELEM, wire.attr(1, wire.text(name)) + nest(2, b"".join(attributes)))


def word(kind: int, value: int) -> bytes:
    """An attribute of 32 bits in network order."""
    return wire.attr(kind, value.to_bytes(4, "big"))


def nest(kind: int, data: bytes) -> bytes:
    """An attribute of attributes."""
    return wire.attr(kind | wire.NESTED, data)


DROP = decide(verdict(0))


# --- messages


def replace(table: Table, elements: Mapping[str, Iterable[bytes]]) -> list[Message]:
    """Make a table anew with these elements, whatever stood under its name."""
    name, made = wire.attr(1, wire.text(table.name)), wire.NLM_F_CREATE
    messages = [
        (NEWTABLE, made, nfgenmsg(table.family, name)),
        (DELTABLE, 0, nfgenmsg(table.family, name)),
        (NEWTABLE, made, nfgenmsg(table.family, name)),
    ]
    for place, one in enumerate(table.sets, start=1):
        # nft shows an interface by its number in the byte order that stands in the user data
        more = wire.attr(13, _HOST_ORDER) if one.key_type == IFACE_INDEX else b""
        flags = b"" if one.timeout_s else word(3, 0)
        messages.append((NEWSET, made, nfgenmsg(table.family, name + _set(one) + flags + word(10, place) + more)))
        messages += add_elements(table, one.name, elements.get(one.name, ()))
    for counter in table.counters:
        what = wire.attr(2, wire.text(counter)) + word(3, _COUNTER_OBJECT)
        messages.append((NEWOBJ, made, nfgenmsg(table.family, name + what + nest(4, b""))))
    messages += [(NEWCHAIN, made, nfgenmsg(table.family, name + _chain(chain))) for chain in table.chains]
    appended = made | 0x800  # NLM_F_APPEND
    for rule in table.rules:
        comment = wire.text(rule.comment)
        words = wire.attr(7, bytes((0, len(comment))) + comment)
        messages.append((NEWRULE, appended, nfgenmsg(table.family, name + _rule(rule) + words)))
    return messages


def remove(family: str, table: str) -> list[Message]:
    """Take a table away, if it is there."""
    name = nfgenmsg(family, wire.attr(1, wire.text(table)))
    return [(NEWTABLE, wire.NLM_F_CREATE, name), (DELTABLE, 0, name)]


def add_elements(table: Table, name: str, keys: Iterable[bytes]) -> list[Message]:
    """Put keys into a set; those that are there already are no error."""
    return _elements(NEWSETELEM, wire.NLM_F_CREATE, table, name, keys)


def remove_elements(table: Table, name: str, keys: Iterable[bytes]) -> list[Message]:
    """Take keys out of a set; one that is not there is an error (ENOENT), and nothing is done."""
    return _elements(DELSETELEM, 0, table, name, keys)


def _elements(kind: int, flags: int, table: Table, name: str, keys: Iterable[bytes]) -> list[Message]:
    head = wire.attr(1, wire.text(table.name)) + wire.attr(2, wire.text(name))
    every = list(keys)
    messages = []
    for start in range(0, len(every), _ELEMENTS_A_MESSAGE):
        part = every[start : start + _ELEMENTS_A_MESSAGE]
        lead = element_head(len(part[0]))
        body = b"".join([lead + key for key in part])
        messages.append((kind, flags, nfgenmsg(table.family, head + nest(3, body))))
    return messages


def element_head(size: int) -> bytes:
    """What stands before the key of an element; a key is a multiple of four bytes long."""
    return struct.pack("=HHHHHH", 12 + size, _LIST_ELEM | wire.NESTED, 8 + size, 1 | wire.NESTED, 4 + size, 1)


def _set(one: Set) -> bytes:
    form = wire.attr(2, wire.text(one.name)) + word(4, one.key_type) + word(5, one.key_size)
    if not one.timeout_s:
        return form
    timeout = wire.attr(11, (one.timeout_s * 1000).to_bytes(8, "big"))
    return form + word(3, _WITH_TIMEOUT | _FROM_RULES) + timeout + nest(9, word(1, one.most))


def _chain(chain: Chain) -> bytes:
    if chain.hook is None:
        return wire.attr(3, wire.text(chain.name))
    hook = word(1, chain.hook) + word(2, chain.priority & 0xFFFFFFFF)
    return wire.attr(3, wire.text(chain.name)) + nest(4, hook) + word(5, 1) + wire.attr(7, wire.text("filter"))


def _rule(rule: Rule) -> bytes:
    return wire.attr(2, wire.text(rule.chain)) + nest(4, b"".join(rule.expressions))


def batch(messages: list[Message], first: int) -> bytes:
    """Messages as one transaction, numbered from `first`; the end of it has the last number. Only the last message is
    acknowledged, others if they are refused."""
    whole = [wire.message(_BATCH_BEGIN, 0, first, _batch_body())]
    last = len(messages)
    for place, (kind, flags, body) in enumerate(messages, start=1):
        ack = wire.NLM_F_ACK if place == last else 0
        whole.append(wire.message(_SUBSYSTEM << 8 | kind, flags | ack, first + place, body))
    whole.append(wire.message(_BATCH_END, 0, first + last + 1, _batch_body()))
    return b"".join(whole)


def dump(kind: int, family: str, seq: int, table: str, name: str = "") -> bytes:
    """A request for all of a kind; of a set's elements the set is named as well."""
    what = wire.attr(1, wire.text(table)) + (wire.attr(2, wire.text(name)) if name else b"")
    return wire.message(_SUBSYSTEM << 8 | kind, wire.NLM_F_DUMP, seq, nfgenmsg(family, what))


def get(kind: int, family: str, seq: int, table: str, name: str) -> bytes:
    """A request for one chain (GETCHAIN), one counter (GETOBJ), or the table itself (GETTABLE, without a name)."""
    what = wire.attr(1, wire.text(table))
    if name:
        what += wire.attr(3 if kind == GETCHAIN else 2, wire.text(name))
    if kind == GETOBJ:
        what += word(3, _COUNTER_OBJECT)
    return wire.message(_SUBSYSTEM << 8 | kind, 0, seq, nfgenmsg(family, what))


def nfgenmsg(family: str, attributes: bytes) -> bytes:
    """The body of a message: struct nfgenmsg (family, version, resource), and attributes."""
    return struct.pack(">BBH", FAMILY[family], 0, 0) + attributes


def _batch_body() -> bytes:
    return struct.pack(">BBH", 0, 0, _SUBSYSTEM)


# --- what the kernel says


class Found(NamedTuple):
    """The bodies of what was read: the table itself, each of its chains that was asked for, its rules and its sets."""

    table: memoryview
    chains: list[memoryview]
    rules: list[memoryview]
    sets: list[memoryview]


def is_formed(table: Table, found: Found) -> bool:
    """Whether a table has the form it should have, neither less nor more. The order of its rules counts."""
    things = len(table.chains) + len(table.sets) + len(table.counters)
    return (
        _word_of(found.table, _TABLE_FLAGS) == 0  # a dormant one does nothing
        and _word_of(found.table, _TABLE_USE) == things
        and _all_held(
            [_chain(chain) for chain in table.chains if chain.hook is not None], _of_table(table, found.chains)
        )
        and _all_held([_set(one) for one in table.sets], _of_table(table, found.sets))
        and all(
            _all_held([_rule(rule) for rule in table.rules if rule.chain == chain.name], _of_chain(table, chain, found))
            for chain in table.chains
        )
    )


def _word_of(body: memoryview, kind: int) -> int:
    return int.from_bytes(wire.attributes(body, 4).get(kind, b""), "big")


def _of_table(table: Table, bodies: list[memoryview]) -> list[memoryview]:
    return [body[4:] for body in of_table(table.name, bodies)]


def of_table(name: str, bodies: list[memoryview]) -> list[memoryview]:
    """Those that say that they are of a table: of chains the kernel lists those of all."""
    wanted = memoryview(wire.attr(1, wire.text(name)))
    return [body for body in bodies if holds(wanted, body[4:])]


def _of_chain(table: Table, chain: Chain, found: Found) -> list[memoryview]:
    name = memoryview(wire.attr(2, wire.text(chain.name)))
    return [body for body in _of_table(table, found.rules) if holds(name, body)]


def _all_held(wanted: list[bytes], there: list[memoryview]) -> bool:
    """Each by one, in order; the kernel lists chains, sets and rules as they were made."""
    return len(wanted) == len(there) and all(
        holds(memoryview(one), other) for one, other in zip(wanted, there, strict=True)
    )


def holds(wanted: memoryview, there: memoryview) -> bool:
    """Whether attributes are all there with these values, and lists as long as they should be; the kernel shows more of its
    own."""
    wanted_attrs, found_attrs = list(walk(wanted)), [(kind & wire.KIND, data) for kind, data in walk(there)]
    if any(kind == _LIST_ELEM | wire.NESTED for kind, _ in wanted_attrs):
        same = len(wanted_attrs) == len(found_attrs)
        return same and all(holds(one[1], other[1]) for one, other in zip(wanted_attrs, found_attrs, strict=True))
    values = dict(found_attrs)
    for kind, data in wanted_attrs:
        value = values.get(kind & wire.KIND)
        if value is None or not (holds(data, value) if kind & wire.NESTED else value == data):
            return False
    return True


def walk(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The attributes in a buffer, one after the other: kinds with their flags, and data."""
    at, end = 0, len(data)
    while at + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4 or at + size > end:
            return
        yield kind, data[at + 4 : at + size]
        at += (size + 3) & ~3


def elements(body: memoryview, size: int) -> list[bytes]:
    """The keys in one message of a set's dump."""
    listed = wire.attributes(body, 4).get(3)
    if listed is None:
        return []
    data, step = bytes(listed), 12 + size
    lead = data[:12]
    plain = struct.unpack("=HHHHHH", lead)[::2] == (step, 8 + size, 4 + size) if len(lead) == 12 else False
    if plain and len(data) % step == 0 and all(data.startswith(lead, at) for at in range(0, len(data), step)):
        return [data[at + 12 : at + step] for at in range(0, len(data), step)]
    keys = []
    for _, element in walk(listed):
        key = wire.attributes(element, 0).get(1)
        value = wire.attributes(key, 0).get(1) if key is not None else None
        if value is not None:
            keys.append(bytes(value))
    return keys


def counted(body: memoryview) -> int:
    """The packets of a counter."""
    data = wire.attributes(body, 4).get(4)
    packets = wire.attributes(data, 0).get(2) if data is not None else None
    return int.from_bytes(packets, "big") if packets is not None else 0
