"""An nftables table as one value, elements, maps of verdicts and all; the difference of two of them as messages of one
transaction; and what the kernel says of one. Pure.

For a table that changes in all its parts while packets go through it (policies); wire.py is for tables of a fixed form.
Nothing is ever made anew that stands, since a table that is replaced loses packets (docs/decisions.md, "A table of policies
changes by its difference").
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.nftables.expressions import chain_or_return
from overlay.kernel.nftables.wire import Message, nest, word
from overlay.kernel.route import wire

PLAIN, INTERVALS, RANGES, VERDICTS = range(4)
"""What elements are: keys; where intervals begin and end; pairs of keys, each part between the two's; keys with a chain."""
_INTERVAL, _MAP, _CONCATENATED = 0x4, 0x8, 0x80
_FLAGS = {PLAIN: 0, INTERVALS: _INTERVAL, RANGES: _INTERVAL | _CONCATENATED, VERDICTS: _MAP}
_VERDICT_TYPE, _VERDICT_SIZE = 0xFFFFFF00, 16
_ENDS = 1
"""NFT_SET_ELEM_INTERVAL_END."""
_LIST_ELEM = 1
_CREATE, _APPEND = wire.NLM_F_CREATE, 0x800
_MOST = 60_000
"""Bytes of a list of elements: an attribute holds 65,535."""
_COMMENT = 120
"""Bytes of a rule's comment that are kept: nft shows 127."""


class Form(NamedTuple):
    """What a set or map is. fields: of RANGES, the bytes of each part of a key."""

    key_type: int
    key_size: int
    kind: int = PLAIN
    fields: tuple[int, ...] = ()


class Elements(NamedTuple):
    """A set or map. keys: of INTERVALS each with a byte behind it, 1 where an interval ends before it; of RANGES the lower
    and the upper one, joined. chains: of VERDICTS, the chain by key, "" for `return`."""

    form: Form
    keys: frozenset[bytes] = frozenset()
    chains: Mapping[bytes, str] = {}


class Hook(NamedTuple):
    """Where packets enter a chain of type filter that accepts what no rule drops."""

    number: int
    priority: int


class Rules(NamedTuple):
    """A chain. rules: each one's expressions, and the words that `nft list` shows beside them."""

    rules: tuple[tuple[bytes, str], ...]
    hook: Hook | None = None


class Content(NamedTuple):
    """A table. sets: sets and maps, by name; chains: by name."""

    sets: Mapping[str, Elements] = {}
    chains: Mapping[str, Rules] = {}


class Table(NamedTuple):
    """Which one."""

    family: str
    name: str


def make(table: Table, content: Content) -> list[Message]:
    """Make a table that is not there."""
    name = nf_wire.nfgenmsg(table.family, wire.attr(1, wire.text(table.name)))
    return [(nf_wire.NEWTABLE, _CREATE, name), *difference(table, Content(), content)]


def difference(table: Table, there: Content, wanted: Content) -> list[Message]:
    """What makes one of the other. What refers to something comes after it is made, and goes before it is deleted."""
    head = wire.attr(1, wire.text(table.name))

    def message(kind: int, flags: int, attributes: bytes) -> Message:
        return kind, flags, nf_wire.nfgenmsg(table.family, head + attributes)

    made, filled, emptied, gone = [], [], [], []
    for place, (name, want) in enumerate(wanted.sets.items(), start=1):
        found = there.sets.get(name)
        if found is not None and found.form != want.form:
            raise ValueError(f"the set {name} is of another form than it should be")
        if found is None:
            made.append(message(nf_wire.NEWSET, _CREATE, wire.attr(2, wire.text(name)) + _form(want.form, place)))
        before = found or Elements(want.form)
        if before is want:
            continue
        old = {key: chain for key, chain in before.chains.items() if want.chains.get(key) != chain}
        new = {key: chain for key, chain in want.chains.items() if before.chains.get(key) != chain}
        less = [*(before.keys - want.keys), *old]
        more = _elements(want.form, want.keys - before.keys)
        more += [_verdict(key, chain) for key, chain in new.items()]
        taken = _elements(want.form, less)
        lists = head + wire.attr(2, wire.text(name))
        filled += [
            (kind, flags, nf_wire.nfgenmsg(table.family, lists + nest(3, part)))
            for kind, flags, every in ((nf_wire.DELSETELEM, 0, taken), (nf_wire.NEWSETELEM, _CREATE, more))
            for part in _parts(every)
        ]
    changed = {name: rules for name, rules in wanted.chains.items() if there.chains.get(name) != rules}
    for name, rules in changed.items():
        before_rules = there.chains.get(name)
        if before_rules is None:
            made.append(message(nf_wire.NEWCHAIN, _CREATE, wire.attr(3, wire.text(name)) + _hook(rules.hook)))
        elif before_rules.hook != rules.hook:
            raise ValueError(f"the chain {name} is of another hook than it should be")
        else:
            emptied.append(message(nf_wire.DELRULE, 0, wire.attr(2, wire.text(name))))
    ruled = [message(nf_wire.NEWRULE, _CREATE | _APPEND, rule) for name in changed for rule in _rules(name, wanted)]
    for name in there.chains.keys() - wanted.chains.keys():
        emptied.append(message(nf_wire.DELRULE, 0, wire.attr(2, wire.text(name))))
        gone.append(message(nf_wire.DELCHAIN, 0, wire.attr(3, wire.text(name))))
    for name in there.sets.keys() - wanted.sets.keys():
        if there.sets[name].form.kind == VERDICTS:  # or its chains could not go before it
            gone.insert(0, message(nf_wire.DELSET, 0, wire.attr(2, wire.text(name))))
        else:
            gone.append(message(nf_wire.DELSET, 0, wire.attr(2, wire.text(name))))
    return [*made, *emptied, *filled, *ruled, *gone]


def takes_away(there: Content, wanted: Content, turned: Collection[str] = ()) -> bool:
    """Whether what some rule let through may not be let through any more: keys or rules went, or a key has another chain,
    or its first. turned: sets of which a key that comes may take away as well."""
    for name, before in there.sets.items():
        after = wanted.sets.get(name)
        if after is before:
            continue
        if after is None or before.keys - after.keys or (name in turned and after.keys != before.keys):
            return True
        if any(after.chains.get(key) != chain for key, chain in before.chains.items()):
            return True
        if any(chain and key not in before.chains for key, chain in after.chains.items()):
            return True  # what had no chain may have been let through before
    return any(wanted.chains.get(name) != rules for name, rules in there.chains.items())


def _elements(form: Form, keys: Iterable[bytes]) -> list[bytes]:
    """Of intervals the kernel checks each beginning against what is there, so that ends come with their beginnings."""
    if form.kind in (PLAIN, VERDICTS):
        lead = nf_wire.element_head(form.key_size)
        return [lead + key for key in keys]
    return [_element(form, key) for key in sorted(keys)]


def _form(form: Form, place: int) -> bytes:
    data = word(3, _FLAGS[form.kind]) + word(4, form.key_type) + word(5, form.key_size)
    if form.kind == VERDICTS:
        data += word(6, _VERDICT_TYPE) + word(7, _VERDICT_SIZE)
    data += word(10, place)
    if form.fields:
        data += nest(9, nest(2, b"".join(nest(1, word(1, size)) for size in form.fields)))
    return data


def _element(form: Form, key: bytes) -> bytes:
    if form.kind == INTERVALS:
        end = word(3, _ENDS) if key[-1] else b""
        return nest(_LIST_ELEM, nest(1, wire.attr(1, key[:-1])) + end)
    size = form.key_size
    return nest(_LIST_ELEM, nest(1, wire.attr(1, key[:size])) + nest(10, wire.attr(1, key[size:])))


def _verdict(key: bytes, chain: str) -> bytes:
    return nest(_LIST_ELEM, nest(1, wire.attr(1, key)) + nest(2, chain_or_return(chain)))


def _parts(elements: list[bytes]) -> Iterator[bytes]:
    part: list[bytes] = []
    size = 0
    for each in elements:
        if size + len(each) > _MOST:
            yield b"".join(part)
            part, size = [], 0
        part.append(each)
        size += len(each)
    if part:
        yield b"".join(part)


def _hook(hook: Hook | None) -> bytes:
    if hook is None:
        return b""
    where = word(1, hook.number) + word(2, hook.priority & 0xFFFFFFFF)
    return nest(4, where) + word(5, 1) + wire.attr(7, wire.text("filter"))


def _rules(chain: str, content: Content) -> Iterator[bytes]:
    for expressions, comment in content.chains[chain].rules:
        words = wire.text(comment.encode()[:_COMMENT].decode("utf-8", "ignore"))
        yield (
            wire.attr(2, wire.text(chain))
            + nest(4, expressions)
            + (wire.attr(7, bytes((0, len(words))) + words) if comment else b"")
        )


# --- what the kernel says


class Bodies(NamedTuple):
    """The bodies of what was read of a table: its sets, the elements of each by name, its chains, its rules."""

    sets: list[memoryview]
    elements: Mapping[str, list[memoryview]]
    chains: list[memoryview]
    rules: list[memoryview]


def names_of(bodies: list[memoryview]) -> list[str]:
    """The names of sets."""
    return [_text(wire.attributes(body, 4).get(2)) for body in bodies]


def understood(found: Bodies, wanted: Content) -> Content:
    """What stands in the kernel, in terms of what should: a rule that is as it should be is that rule; any other is told by
    what the kernel says of it, which is nothing that is wanted. Sets of a form of nobody's are of no kind."""
    sets: dict[str, Elements] = {}
    for body in found.sets:
        parts = wire.attributes(body, 4)
        name, form = _text(parts.get(2)), _form_of(parts)
        elements = [each for one in found.elements.get(name, ()) for each in _listed(one)]
        if form.kind == VERDICTS:
            sets[name] = Elements(form, chains=dict(_chain_of(each) for each in elements))
        elif form.kind == PLAIN:
            plain = (key for one in found.elements.get(name, ()) for key in nf_wire.elements(one, form.key_size))
            sets[name] = Elements(form, frozenset(plain))
        else:
            sets[name] = Elements(form, frozenset(_key_of(form, each) for each in elements))
    there: dict[str, list[memoryview]] = {}
    for body in found.rules:
        there.setdefault(_text(wire.attributes(body, 4).get(2)), []).append(body)
    chains = {}
    for body in found.chains:
        parts = wire.attributes(body, 4)
        name = _text(parts.get(3))
        rules, want = there.get(name, []), wanted.chains.get(name)
        seen = [(bytes(each), "") for each in rules]
        if want is not None and len(want.rules) == len(rules):
            pairs = zip(want.rules, rules, strict=True)
            seen = [rule if _is_rule(rule, each) else (bytes(each), "") for rule, each in pairs]
        chains[name] = Rules(tuple(seen), _hook_of(parts))
    return Content(sets, chains)


def counted(rules: Iterable[memoryview]) -> Iterator[tuple[str, str, int]]:
    """Of rules that count: their chain, their comment, and the packets they saw."""
    for body in rules:
        parts = wire.attributes(body, 4)
        packets = None
        for _, expression in nf_wire.walk(parts[4]) if 4 in parts else ():
            said = wire.attributes(expression, 0)
            if _text(said.get(1)) == "counter" and 2 in said:
                packets = _number(wire.attributes(said[2], 0).get(2))
        if packets is not None:
            comment = bytes(parts.get(7, b""))[2:].rstrip(b"\0").decode("utf-8", "replace")
            yield _text(parts.get(2)), comment, packets


def are_rules(found: Rules, wanted: Rules) -> bool:
    """Whether rules that were understood as something else are these."""
    if found.hook != wanted.hook or len(found.rules) != len(wanted.rules):
        return False
    pairs = zip(found.rules, wanted.rules, strict=True)
    return all(there == rule or _is_rule(rule, memoryview(there[0])) for there, rule in pairs)


def _is_rule(rule: tuple[bytes, str], there: memoryview) -> bool:
    return nf_wire.holds(memoryview(nest(4, rule[0])), there[4:])


def _form_of(parts: Mapping[int, memoryview]) -> Form:
    flags = _number(parts.get(3))
    fields: tuple[int, ...] = ()
    if 9 in parts and (listed := wire.attributes(parts[9], 0).get(2)) is not None:
        fields = tuple(_number(wire.attributes(each, 0).get(1)) for _, each in nf_wire.walk(listed))
    kinds = {value: kind for kind, value in _FLAGS.items()}
    return Form(_number(parts.get(4)), _number(parts.get(5)), kinds.get(flags & ~0x40, -1), fields)


def _hook_of(parts: Mapping[int, memoryview]) -> Hook | None:
    if 4 not in parts:
        return None
    hook = wire.attributes(parts[4], 0)
    return Hook(_number(hook.get(1)), int.from_bytes(hook.get(2, b""), "big", signed=True))


def _listed(body: memoryview) -> Iterator[Mapping[int, memoryview]]:
    listed = wire.attributes(body, 4).get(3)
    for _, element in nf_wire.walk(listed) if listed is not None else ():
        yield wire.attributes(element, 0)


def _value(data: memoryview | None) -> bytes:
    return bytes(wire.attributes(data, 0).get(1, b"")) if data is not None else b""


def _key_of(form: Form, parts: Mapping[int, memoryview]) -> bytes:
    key = _value(parts.get(1))
    if form.kind == INTERVALS:
        return key + bytes([_number(parts.get(3)) & _ENDS])
    return key + (_value(parts.get(10)) or key)


def _chain_of(parts: Mapping[int, memoryview]) -> tuple[bytes, str]:
    data = parts.get(2)
    said = wire.attributes(data, 0).get(2) if data is not None else None
    return _value(parts.get(1)), _text(wire.attributes(said, 0).get(2)) if said is not None else ""


def _number(data: memoryview | None) -> int:
    return int.from_bytes(data, "big") if data is not None else 0


def _text(data: memoryview | None) -> str:
    return bytes(data).rstrip(b"\0").decode("utf-8", "replace") if data is not None else ""


_PORT = struct.Struct(">BxxxHxx")


def port_key(protocol: int, port: int) -> bytes:
    """inet_proto . inet_service."""
    return _PORT.pack(protocol, port)
