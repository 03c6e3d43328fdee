"""Which routing rule and which route decide about a packet, as `ip rule` and `ip route` write them. Pure.

The kernel's answer to `ip route get` names table and interface, not the rule (net/ipv4/fib_rules.c asks them in this order).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from lease.families import Family
from lease.model import Prefix, ip_text
from overlay.kernel.route.entries import RT_TABLE_MAIN
from overlay.kernel.route.lookup import (
    FR_ACT_TO_TBL,
    PROTOCOLS,
    RTN_THROW,
    TABLES,
    TYPES,
    AnyRoute,
    Packet,
    Rule,
    Way,
)

FIRST, LAST = 0, 32766
"""Priorities of the rules that every kernel begins with: for the tables local and main (default's is one more)."""


class Decision(NamedTuple):
    """rule: None: no rule leads anywhere. route: None where the rule itself ends it."""

    rule: Rule | None
    route: AnyRoute | None


def decision(
    family: Family,
    rules: Iterable[Rule],
    routes_of: Callable[[int], list[AnyRoute]],
    names: Mapping[int, str],
    packet: Packet,
) -> Decision:
    """What decides about a packet. rules: in the order of their priorities; names: of interfaces, by number."""
    for rule in rules:
        if not matches(rule, names, packet, family):
            continue
        if rule.action != FR_ACT_TO_TBL:
            if rule.action in TYPES:
                return Decision(rule, None)
            continue
        route = _longest(routes_of(rule.table), packet, family)
        if route is None or route.kind == RTN_THROW or route.length <= rule.suppress:
            continue
        return Decision(rule, route)
    return Decision(None, None)


def refuses(found: Decision) -> bool:
    """Whether it is a rule or a route that sends packets nowhere."""
    return found.rule is not None and (found.route is None or found.route.kind in TYPES)


def matches(rule: Rule, names: Mapping[int, str], packet: Packet, family: Family) -> bool:
    """Whether a rule is about a packet; of selectors that are not known here it is not."""
    width = family.bits

    def inside(address: int, base: int, length: int) -> bool:
        return length < 0 or address >> (width - length) == base >> (width - length)

    found = (
        not rule.unclear
        and not rule.l3mdev
        and inside(packet.source, rule.source, rule.source_length)
        and inside(packet.address, rule.destination, rule.destination_length)
        and rule.iif in ("", names.get(packet.iif, "lo"))
        and rule.oif in ("", names.get(packet.oif, "?"))
        and (packet.mark ^ rule.mark) & rule.mask == 0
        and rule.protocol in (0, packet.protocol)
        and rule.ports[0] <= packet.port <= rule.ports[1]
    )
    return found != rule.invert


def _longest(routes: Iterable[AnyRoute], packet: Packet, family: Family) -> AnyRoute | None:
    width = family.bits
    fitting = [
        route
        for route in routes
        if packet.address >> (width - route.length) == route.base >> (width - route.length)
        and (not packet.oif or route.oif in (0, packet.oif))
    ]
    return max(fitting, key=lambda route: route.length, default=None)


def rule_text(family: Family, rule: Rule) -> str:
    """As `ip rule` writes it, without the priority."""
    parts = ["not"] if rule.invert else []
    parts.append(f"from {_prefix(family, rule.source, rule.source_length)}")
    if rule.destination_length >= 0:
        parts.append(f"to {_prefix(family, rule.destination, rule.destination_length)}")
    if rule.mask:
        mask = "" if rule.mask == 0xFFFFFFFF else f"/{rule.mask:#x}"
        parts.append(f"fwmark {rule.mark:#x}{mask}")
    parts += [f"{word} {name}" for word, name in (("iif", rule.iif), ("oif", rule.oif)) if name]
    if rule.protocol:
        parts.append(f"ipproto {PROTOCOLS.get(rule.protocol, str(rule.protocol))}")
    if rule.ports != (0, 0xFFFF):
        parts.append(
            f"dport {rule.ports[0]}" if rule.ports[0] == rule.ports[1] else f"dport {rule.ports[0]}-{rule.ports[1]}"
        )
    parts.append(f"lookup {table_text(rule.table)}" if rule.action == FR_ACT_TO_TBL else TYPES.get(rule.action, "?"))
    return " ".join(parts)


def route_text(family: Family, route: AnyRoute, names: Mapping[int, str]) -> str:
    """As `ip route` writes it."""
    where = "default" if not route.length else str(Prefix(family.number, route.base, route.length))
    parts = [TYPES[route.kind]] if route.kind in TYPES else []
    parts.append(where)
    if route.via:
        parts.append(f"via {ip_text(family.number, route.via)}")
    if route.oif and route.kind not in TYPES:  # IPv6 gives those the loopback
        parts.append(f"dev {names.get(route.oif, route.oif)}")
    return " ".join(parts)


def table_text(table: int) -> str:
    """A table's name where it has one everywhere, else its number."""
    return TABLES.get(table, str(table))


def _prefix(family: Family, base: int, length: int) -> str:
    return "all" if length <= 0 else str(Prefix(family.number, base, length))


def cause(family: Family, network: Prefix, found: Decision, names: Mapping[int, str]) -> str:
    """What decides, and what an operator does about it; "" where nothing is known."""
    rule, route = found
    if rule is None:
        return "no route leads there: ip route"
    by = f"ip rule {rule.priority} ({rule_text(family, rule)})"
    ours_first = (
        f"ip rule add pref {rule.priority - 1} to {network} lookup main puts the pod network's routes before it"
    )
    if rule.priority <= 1:  # 0 is that of the table local
        ours_first = f"ip rule del pref {rule.priority}, or give it a higher number"
    if route is None:
        return f"{by} ends it; {ours_first}"
    text = f"{route_text(family, route, names)} of table {table_text(route.table)}"
    if rule.table == RT_TABLE_MAIN and rule.priority >= LAST:
        if not route.length or (route.kind not in TYPES and route.length < network.length):
            return f"no closer route leads there, so {text} says so; it is to be put back: ip route"
        return f"the route {text} says so; ip route del {route_text(family, route, names)}, if nobody needs it"
    if rule.priority > FIRST:
        return f"the route {text} says so, to which {by} leads before the table main is asked; {ours_first}"
    return f"the route {text} says so"


def refusal_text(way: Way) -> str:
    """Why a packet goes nowhere, from the kernel's errno."""
    return {
        errno.ENETUNREACH: "go nowhere (no route)",
        errno.EHOSTUNREACH: "are refused (unreachable)",
        errno.EACCES: "are refused (prohibited)",
        errno.EINVAL: "are dropped (blackhole)",
        errno.EXDEV: "are dropped as spoofed (rp_filter)",
    }.get(way.error, "go nowhere")
