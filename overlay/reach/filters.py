"""What other programs' rules do with the first packet of a connection between pods: as `nft -j` lists them. Pure.

Source: libnftables-json(5). What cannot be said of every packet of a kind (a port) is `None`: a rule that asks it decides
nothing here, and what follows an accept of that sort is not sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from lease.model import prefix
from overlay.kernel.nftables.program import Chain

Rule = dict[str, Any]
RulesOf = Callable[[str, str, str], list[Rule] | None]
"""The rules of a chain, by family, table and name; None where it could not be read."""
DEPTH = 16
"""The kernel's own bound on jumps (NFT_JUMP_STACK_SIZE)."""
SetOf = Callable[[str, str, str], list[Any] | None]
"""The elements of a named set, by family, table and name; None where they could not be read."""
DROPS, ACCEPTS, MASQUERADES, SENDS_ELSEWHERE = (
    ("drop", "reject"), ("accept",), ("masquerade", "snat"), ("dnat", "redirect"),
)  # fmt: skip
_ENDS = (*DROPS, *MASQUERADES, *SENDS_ELSEWHERE)
_PROTOCOLS = {"icmp", "icmpv6", "tcp", "udp", "sctp", "dccp", "udplite", "igmp", "esp", "ah", "comp"}
"""Headers that packets of another protocol have not."""
_SILENT = {"counter", "comment", "log", "notrack", "mangle"}
"""Statements that decide nothing."""


class Flow(NamedTuple):
    """Packets of a kind. family: nftables'; iif, oif: names of interfaces, "" where there is none at that hook; protocol,
    port: "" and 0: any."""

    family: str
    iif: str
    oif: str
    source: int
    destination: int
    protocol: str = ""
    port: int = 0
    what: str = ""
    """For the operator."""
    answers: bool = False
    """They are answers in connections that were let through."""
    size: int = 0
    """Of the packets in bytes, 0: any."""
    sports: tuple[int, int] = (0, 0)
    """The source ports that they have, one or another; 0: any."""


class Verdict(NamedTuple):
    """What a base chain does. action: `drop`, `masquerade`..., "accept"; rule: that which does, None: the policy; where: the
    chain it stands in. sure: no rule before it that cannot be judged could have let the packet through."""

    action: str
    rule: Rule | None
    where: str
    sure: bool


def judge(base: Chain, flow: Flow, rules_of: RulesOf, set_of: SetOf = lambda *_name: None) -> Verdict:
    """What a base chain does with the packets of a flow."""
    walk = _Walk(flow, rules_of, set_of)
    found = walk.chain(base.family, base.table, base.name, 0, False)
    if found is not None and found.action in _ENDS:
        return found
    policy = Verdict(base.policy, None, str(base), not walk.maybe_accepted)
    if found is None and policy.action in DROPS and policy.sure:
        return policy
    return walk.doubtful or found or policy


class _Walk:
    def __init__(self, flow: Flow, rules_of: RulesOf, set_of: SetOf) -> None:
        self._flow, self._rules_of, self._set_of = flow, rules_of, set_of
        self.maybe_accepted = False
        """Some packets of the flow may have been let through already."""
        self.doubtful: Verdict | None = None
        """The first that drops or masquerades some of them, maybe."""

    def chain(self, family: str, table: str, name: str, depth: int, doubt: bool) -> Verdict | None:
        """What surely ends the way through a base chain; None: nothing does. doubt: packets may not come here."""
        rules = self._rules_of(family, table, name) if depth <= DEPTH else None
        if rules is None:
            self.maybe_accepted = True  # it was not read
            return None
        for rule in rules:
            fits, verdicts = _read(rule.get("expr", ()), self._flow, partial(self._set_of, family, table))
            if fits is False:
                continue
            for kind, value in verdicts:
                unsure = doubt or fits is None
                if kind == "unknown":
                    self.maybe_accepted = True
                elif kind in ("jump", "goto"):
                    found = self.chain(family, table, str(value), depth + 1, unsure)
                    if found is not None:
                        return found
                    if kind == "goto" and fits:
                        return None
                elif kind == "return":
                    if fits:
                        return None
                    doubt = True  # of the rest of this chain
                elif kind in ACCEPTS:
                    if not unsure:
                        return Verdict(kind, rule, f"{family} {table} {name}", not self.maybe_accepted)
                    self.maybe_accepted = True
                elif fits is None:
                    continue  # somebody forbids a port: no matter of ours
                else:
                    verdict = Verdict(kind, rule, f"{family} {table} {name}", not (doubt or self.maybe_accepted))
                    if not doubt:
                        return verdict
                    self.doubtful = self.doubtful or verdict
                    return None
        return None


def _read(
    expressions: Iterable[Any], flow: Flow, named: Callable[[str], list[Any] | None]
) -> tuple[bool | None, list[tuple[str, Any]]]:
    """Whether a rule is about a flow (None: about some of its packets), and what it does then. named: a set's elements."""
    fits: bool | None = True
    verdicts: list[tuple[str, Any]] = []
    for expression in expressions:
        if not isinstance(expression, dict) or not expression:
            fits = None
            continue
        kind, value = next(iter(expression.items()))
        if kind == "match":
            answer = _match(value, flow, named)
            if answer is False:
                return False, []  # whatever else it says: no more of its sets is read
            fits = None if answer is None else fits
        elif kind in (*_ENDS, *ACCEPTS, "return"):
            verdicts.append((kind, None))
        elif kind == "vmap":
            verdicts += _mapped(value, flow, named)
        elif kind in ("jump", "goto"):
            verdicts.append((kind, value["target"]))
        elif kind == "xt":
            known = value if isinstance(value, dict) else {}  # of older programs there is no more than that
            name = str(known.get("name"))
            if known.get("type") == "target":
                action = name.lower()
                verdicts.append((action if action in _ENDS else "unknown", None))
            elif name != "comment":
                fits = None
        elif kind not in _SILENT:
            verdicts.append(("unknown", None))
    return fits, verdicts


def _mapped(vmap: Any, flow: Flow, named: Callable[[str], list[Any] | None]) -> Iterator[tuple[str, Any]]:
    """What a verdict map does."""
    data = vmap.get("data") if isinstance(vmap, dict) else None
    pairs = named(data[1:]) if isinstance(data, str) and data.startswith("@") else data
    pairs = pairs.get("set") if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list):
        yield "unknown", None
        return
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict) and pair[1]):
            yield "unknown", None
            continue
        fits = _holds(vmap.get("key"), pair[0], flow)
        kind, value = next(iter(pair[1].items()))
        if fits is None:
            yield "unknown", None
        elif fits:
            yield kind, value.get("target") if isinstance(value, dict) else None


def _match(match: dict[str, Any], flow: Flow, named: Callable[[str], list[Any] | None]) -> bool | None:
    left, right, operator = match.get("left"), match.get("right"), match.get("op", "==")
    if isinstance(right, str) and right.startswith("@"):
        right = named(right[1:])
        if right is None:
            return None
    if (answer := _of_size(left, right, operator, flow)) is not None:
        return answer
    answer = _holds(left, right, flow)
    if answer is None or operator not in ("==", "!=", "in"):
        return None
    return not answer if operator == "!=" else answer


_COMPARED: dict[str, Callable[[int, int], bool]] = {
    ">": lambda size, value: size > value,
    ">=": lambda size, value: size >= value,
    "<": lambda size, value: size < value,
    "<=": lambda size, value: size <= value,
    "==": lambda size, value: size == value,
    "!=": lambda size, value: size != value,
}


def _of_size(left: Any, right: Any, operator: str, flow: Flow) -> bool | None:
    """What a match says of the packets' length; None: it is about something else, or that is not known."""
    if not flow.size or not isinstance(left, dict) or operator not in _COMPARED:
        return None
    length = left == {"meta": {"key": "length"}} or left.get("payload") == {"protocol": "ip", "field": "length"}
    if not length:
        return None
    if isinstance(right, int):
        return _COMPARED[operator](flow.size, right)
    fits = _number_fits(flow.size, right)
    return fits if fits is None or operator == "==" else not fits


def _holds(left: Any, right: Any, flow: Flow) -> bool | None:
    if not isinstance(left, dict):
        return None
    kind, field = next(iter(left.items()))
    key = field.get("key") if isinstance(field, dict) else None
    if kind == "meta" and key in ("iifname", "iif", "oifname", "oif"):
        name = flow.iif if key.startswith("iif") else flow.oif
        return _any(right, lambda value: _name_fits(name, value))
    if kind == "meta" and key == "nfproto":
        return _any(right, lambda value: value == ("ipv6" if flow.family == "ip6" else "ipv4"))
    if kind == "meta" and key in ("l4proto", "protocol") and flow.protocol:
        return _any(right, lambda value: value == flow.protocol) if key == "l4proto" else None
    if kind == "ct" and key == "state":
        return _any(right, lambda value: value == ("established" if flow.answers else "new"))
    if kind == "ct" and key == "direction":
        return _any(right, lambda value: value == ("reply" if flow.answers else "original"))
    if kind == "ct" and key == "status":
        return _any(right, lambda value: None if value not in ("dnat", "snat", "assured", "seen-reply") else False)
    if kind == "meta" and key == "mark":
        return _any(right, lambda value: value == 0 if isinstance(value, int) else None)
    if kind == "&" and isinstance(field, list) and field[:1] == [{"meta": {"key": "mark"}}]:
        return _any(right, lambda value: value == 0 if isinstance(value, int) else None)
    if kind == "fib" and isinstance(field, dict) and field.get("result") == "type":
        return _any(right, lambda value: _type_fits(flow, str(field.get("flags")), value))
    if kind == "payload" and isinstance(field, dict):
        return _payload(field, right, flow)
    return None


def _type_fits(flow: Flow, flags: Any, value: Any) -> bool | None:
    """Of an address: whether it is this node's. That of a pod is not."""
    if value not in ("local", "unicast", "broadcast", "multicast", "anycast"):
        return None
    local = bool(flow.protocol) and bool(flow.iif if flags == "daddr" else not flow.iif)
    return bool(value == ("local" if local else "unicast"))


def _payload(field: dict[str, Any], right: Any, flow: Flow) -> bool | None:
    protocol, name = field.get("protocol"), field.get("field")
    if flow.protocol and protocol in _PROTOCOLS and protocol != flow.protocol:
        return False
    if protocol in ("ip", "ip6") and name in ("saddr", "daddr"):
        if protocol != flow.family:
            return False
        address = flow.source if name == "saddr" else flow.destination
        return _any(right, lambda value: _address_fits(address, value))
    if protocol in ("tcp", "udp", "th") and name == "dport" and flow.port:
        if protocol not in ("th", flow.protocol):
            return False
        return _any(right, lambda value: _number_fits(flow.port, value))
    if protocol in ("udp", "th") and name == "sport" and flow.sports[1]:
        return _any(right, lambda value: _meets(flow.sports, value))
    if protocol in ("ip", "ip6") and name in ("protocol", "nexthdr") and flow.protocol:
        return _any(right, lambda value: value == flow.protocol)
    return None


def _any(right: Any, fits: Callable[[Any], bool | None]) -> bool | None:
    """Whether one of the values does; None where one cannot be judged and no other does."""
    answers = [fits(value) for value in _values(right)]
    if any(answers):
        return True
    return None if None in answers else False


def _values(right: Any) -> Iterator[Any]:
    if isinstance(right, dict) and "set" in right:
        yield from right["set"] if isinstance(right["set"], list) else [right["set"]]
    elif isinstance(right, list):
        yield from map(_plain, right)
    else:
        yield right


def _plain(element: Any) -> Any:
    """An element of a set, without its timeout and counter."""
    return (
        element["elem"].get("val") if isinstance(element, dict) and isinstance(element.get("elem"), dict) else element
    )


def _name_fits(name: str, value: Any) -> bool | None:
    if not isinstance(value, str) or value.startswith("@"):
        return None
    return name.startswith(value[:-1]) if value.endswith("*") else name == value


def _address_fits(address: int, value: Any) -> bool | None:
    try:
        if isinstance(value, str) and not value.startswith("@"):
            return prefix(value).holds(address)
        if isinstance(value, dict) and "prefix" in value:
            return prefix(f"{value['prefix']['addr']}/{value['prefix']['len']}").holds(address)
        if isinstance(value, dict) and "range" in value:
            first, last = (prefix(each).base for each in value["range"])
            return first <= address <= last
    except (ValueError, KeyError, TypeError):
        return None
    return None


def _meets(numbers: tuple[int, int], value: Any) -> bool | None:
    """Whether one of a range of numbers may be meant."""
    if isinstance(value, int):
        return numbers[0] <= value <= numbers[1]
    if isinstance(value, dict) and isinstance(value.get("range"), list):
        first, last = value["range"]
        return bool(first <= numbers[1] and numbers[0] <= last)
    return None


def _number_fits(number: int, value: Any) -> bool | None:
    if isinstance(value, int):
        return number == value
    if isinstance(value, dict) and isinstance(value.get("range"), list):
        first, last = value["range"]
        return bool(first <= number <= last)
    return None
