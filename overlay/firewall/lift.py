"""Pods of one node meet layer 3: a frame from one to another is given to the node, which forwards it like any other, so that
policies, Services and masquerade see it whatever br_netfilter says. What layer 3 does not see is closed for isolated pods.
The form of that part of the table of pods_table.py. Pure.

Its own effects: such a packet's TTL is one less, and the node would tell the sender of a shorter way (ICMP and ICMPv6
redirects), which is dropped.

Sources: RFC 792 (redirect, type 5), RFC 4861 (types 135 to 137), net/bridge/br_input.c (what is for the host goes up).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lease.families import FAMILIES, Family
from lease.model import Prefix, mask
from overlay.kernel.nftables import expressions as nf
from overlay.kernel.nftables import wire as nf_wire

CLOSED = "closed"
"""The set of the ports of pods that a policy isolates."""
PREROUTING, BETWEEN, OUTPUT = "prerouting", "between", "output"
_NF_BR_FORWARD, _NF_BR_LOCAL_OUT = 2, 3
ADDRESSES = {4: "addresses", 6: "addresses6"}
"""The sets of what each port's pod has, of pods_table.py."""
_ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
_ARP = b"\x08\x06"
_ICMP, _ICMPV6 = b"\x01", b"\x3a"
_SOLICIT, _ADVERT = b"\x87", b"\x88"
_REDIRECTS = {4: (_ICMP, b"\x05"), 6: (_ICMPV6, b"\x89")}


class Lift(NamedTuple):
    """What is lifted. bridges: subnets of pods, each with the MAC of the bridge that they are on, in order; policed: some
    policy exists, so that an address is only that of the port it is bound to, and isolated pods' ports are closed."""

    bridges: tuple[tuple[Prefix, int], ...]
    policed: bool


CHAINS = (nf_wire.Chain(BETWEEN, _NF_BR_FORWARD, -200), nf_wire.Chain(OUTPUT, _NF_BR_LOCAL_OUT, -300))
SETS = (nf_wire.Set(CLOSED, nf_wire.IFACE_AND_NAME, 20),)


def rules(lift: Lift) -> Iterator[nf_wire.Rule]:
    """Those of the chains, in order; those of `prerouting` come after anti-spoofing's own."""
    for family in FAMILIES.values():
        subnets = [(subnet, mac) for subnet, mac in lift.bridges if subnet.family == family.number]
        if subnets:
            yield from _lifting(family, subnets, lift.policed)
    yield from _between(lift)
    for number, (protocol, kind) in _REDIRECTS.items():
        yield nf_wire.Rule(OUTPUT, "a redirect to the pod itself", (*_icmp(number, protocol, kind), nf_wire.DROP))
    for subnet, _ in lift.bridges if lift.policed else ():
        family = FAMILIES[subnet.family]
        to_port = nf_wire.meta(nf_wire.META_OIF), nf_wire.load("network", family.destination_at, family.size, 1)
        expressions = (
            *_of(subnet.family),
            *_to(subnet),
            *to_port,
            nf_wire.absent_from(ADDRESSES[subnet.family]),
            nf_wire.DROP,
        )
        yield nf_wire.Rule(OUTPUT, "to another's port", expressions)


def _lifting(family: Family, subnets: list[tuple[Prefix, int]], policed: bool) -> Iterator[nf_wire.Rule]:
    number = family.number
    if number == 6:
        for kind in (_SOLICIT, _ADVERT):
            yield nf_wire.Rule(PREROUTING, "neighbours are found on the link", (*_icmp(6, _ICMPV6, kind), nf.ACCEPT))
    for subnet, _ in subnets if policed else ():
        by_port = nf_wire.meta(nf_wire.META_IIF), nf_wire.load("network", family.source_at, family.size, 1)
        source = nf_wire.load("network", family.source_at, family.size), *_prefix(subnet)
        expressions = *_of(number), *source, *by_port, nf_wire.absent_from(ADDRESSES[number]), nf_wire.DROP
        yield nf_wire.Rule(PREROUTING, "a port that has not this address", expressions)
    for subnet, mac in subnets:
        away = nf_wire.meta(nf_wire.META_PKTTYPE), nf_wire.differ(bytes(1))
        lifted = nf.for_this_host(), nf.to_mac(mac)
        yield nf_wire.Rule(PREROUTING, "to the node, which forwards it", (*_of(number), *away, *_to(subnet), *lifted))


def _between(lift: Lift) -> Iterator[nf_wire.Rule]:
    """What is still bridged from port to port: what layer 3 does not see."""
    yield nf_wire.Rule(BETWEEN, "", (nf_wire.meta(nf_wire.META_PROTOCOL), nf_wire.equal(_ARP), nf.ACCEPT))
    for kind in (_SOLICIT, _ADVERT):
        yield nf_wire.Rule(BETWEEN, "", (*_icmp(6, _ICMPV6, kind), nf.ACCEPT))
    for subnet, _ in lift.bridges:  # what br_netfilter translated (a Service) it bridges past the lift
        family = FAMILIES[subnet.family]
        host = nf_wire.meta(nf_wire.META_PKTTYPE), nf_wire.equal(bytes(1))
        to_port = nf_wire.meta(nf_wire.META_OIF), nf_wire.load("network", family.destination_at, family.size, 1)
        bound = nf_wire.found_in(ADDRESSES[subnet.family]), nf.ACCEPT
        yield nf_wire.Rule(BETWEEN, "", (*_of(subnet.family), *_to(subnet), *host, *to_port, *bound))
    for index, name in ((nf_wire.META_IIF, nf_wire.META_IIFNAME), (nf_wire.META_OIF, nf_wire.META_OIFNAME)):
        port = nf_wire.meta(index), nf_wire.meta(name, 1)
        yield nf_wire.Rule(BETWEEN, "layer 2 of an isolated pod", (*port, nf_wire.found_in(CLOSED), nf_wire.DROP))


def _of(number: int) -> tuple[bytes, ...]:
    return nf_wire.meta(nf_wire.META_PROTOCOL), nf_wire.equal(_ETHERTYPES[number])


def _icmp(number: int, protocol: bytes, kind: bytes) -> tuple[bytes, ...]:
    """An ICMP message of a type, in a family."""
    is_icmp = nf_wire.meta(nf_wire.META_L4PROTO), nf_wire.equal(protocol)
    return *_of(number), *is_icmp, nf_wire.load("transport", 0, 1), nf_wire.equal(kind)


def _to(subnet: Prefix) -> tuple[bytes, ...]:
    family = FAMILIES[subnet.family]
    return nf_wire.load("network", family.destination_at, family.size), *_prefix(subnet)


def _prefix(subnet: Prefix) -> tuple[bytes, ...]:
    family = FAMILIES[subnet.family]
    masked = nf_wire.masked(family.packed(mask(subnet.family, subnet.length)))
    return masked, nf_wire.equal(family.packed(subnet.base))
