"""The nftables table by which each port of a pod's bridge is bound to its pod's addresses: its form. Pure.

Sources: RFC 826 and RFC 5227 (ARP), RFC 4861 and RFC 4862 (neighbour discovery), IEEE 802.1Q.
"""

from __future__ import annotations

from typing import NamedTuple

from lease.families import FAMILIES, V4, V6, Family
from overlay.firewall import lift as lifting
from overlay.firewall.lift import ADDRESSES, PREROUTING, Lift
from overlay.firewall.nat import TABLE_PREFIX
from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.nftables.wire import equal, load, meta

SUFFIX = "-pods"
MACS = "macs"


class _Sets(NamedTuple):
    """The sets of a family. ports: those that are bound in it; addresses: with the port."""

    ports: str
    addresses: str
    key: int


SETS = {
    4: _Sets("ports", ADDRESSES[4], nf_wire.IFACE_AND_IPV4),
    6: _Sets("ports6", ADDRESSES[6], nf_wire.IFACE_AND_IPV6),
}
ENDS = "ends"
"""No rule asks it: the MACs of the node's ends, to know whose bindings those are."""
SPOOFED = "spoofed"
BY_MAC = "a MAC of another"
"""The first of anti-spoofing's own rules."""
_NF_BR_PRE_ROUTING, _EARLY = 0, -300
_IPV4, _ARP, _IPV6, _VLAN, _QINQ = (value.to_bytes(2, "big") for value in (0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8))
_ICMPV6 = b"\x3a"
_SOLICIT, _ADVERT, _ROUTER_ADVERT, _REDIRECT = (bytes([value]) for value in (135, 136, 134, 137))
_NOWHERE = bytes(16)


def table_name(network: int) -> str:
    """The table of a network."""
    return f"{TABLE_PREFIX}{network}{SUFFIX}"


def table(network: int, antispoof: bool = True, lift: Lift | None = None) -> nf_wire.Table:
    """The form of the table. antispoof: whether a port's pod is kept to what it has; lift: whether frames between pods are
    given to the node. Source: RFC 826 (ARP's sender behind 14 bytes), RFC 4861 (neighbour discovery), IEEE 802.1Q."""
    port = (meta(nf_wire.META_IIF), meta(nf_wire.META_IIFNAME, 1))
    bound, bound6 = ((*port, nf_wire.found_in(SETS[number].ports)) for number in (4, 6))
    icmpv6 = (meta(nf_wire.META_L4PROTO), equal(_ICMPV6), load("transport", 0, 1))
    drop = (nf_wire.count(SPOOFED), nf_wire.DROP)

    def kind(ethertype: bytes) -> tuple[bytes, ...]:
        return meta(nf_wire.META_PROTOCOL), equal(ethertype)

    def not_its_own(field: bytes, name: str) -> tuple[bytes, ...]:
        return meta(nf_wire.META_IIF), field, nf_wire.absent_from(name)

    rules: list[tuple[str, tuple[bytes, ...]]] = [
        (BY_MAC, (*bound, *not_its_own(load("ether", 6, 6, 1), MACS))),
        ("an IPv4 source of another", (*bound, *kind(_IPV4), *not_its_own(_source(V4), SETS[4].addresses))),
        (
            "ARP for another's address",  # a probe has none (RFC 5227)
            (*bound, *kind(_ARP), load("network", 14, 4), nf_wire.differ(bytes(4)),
             *not_its_own(load("network", 14, 4, 1), SETS[4].addresses)),
        ),
        (
            "a probe for another's address",  # who probes for it, too, has it (RFC 5227, 2.1.1)
            (*bound, *kind(_ARP), load("network", 14, 4), equal(bytes(4)),
             *not_its_own(load("network", 24, 4, 1), SETS[4].addresses)),
        ),
        (
            "an IPv6 source of another",  # one that checks whether an address is free has none yet
            (*bound6, *kind(_IPV6), load("network", V6.source_at, V6.size), nf_wire.differ(_NOWHERE),
             *not_its_own(_source(V6), SETS[6].addresses)),
        ),
        (
            "a neighbour advertisement for another's address",
            (*bound6, *kind(_IPV6), *icmpv6, equal(_ADVERT),
             *not_its_own(load("transport", 8, 16, 1), SETS[6].addresses)),
        ),
        (
            "a check whether another's address is free",  # two that check one address have it neither (RFC 4862, 5.4.3)
            (*bound6, *kind(_IPV6), load("network", V6.source_at, V6.size), equal(_NOWHERE), *icmpv6, equal(_SOLICIT),
             *not_its_own(load("transport", 8, 16, 1), SETS[6].addresses)),
        ),
        ("a router advertisement", (*bound, *kind(_IPV6), *icmpv6, equal(_ROUTER_ADVERT))),
        ("a redirect", (*bound, *kind(_IPV6), *icmpv6, equal(_REDIRECT))),
        ("a VLAN tag, behind which all that could hide", (*bound, *kind(_VLAN))),
        ("a VLAN tag, behind which all that could hide", (*bound, *kind(_QINQ))),
    ]  # fmt: skip
    return nf_wire.Table(
        "bridge",
        table_name(network),
        (
            *(nf_wire.Set(each.ports, nf_wire.IFACE_AND_NAME, 20) for each in SETS.values()),
            nf_wire.Set(MACS, nf_wire.IFACE_AND_ETHER, 12),
            *(nf_wire.Set(each.addresses, each.key, 4 + FAMILIES[number].size) for number, each in SETS.items()),
            nf_wire.Set(ENDS, nf_wire.IFACE_AND_ETHER, 12),
            *(lifting.SETS if lift is not None else ()),
        ),
        (SPOOFED,),
        (nf_wire.Chain(PREROUTING, _NF_BR_PRE_ROUTING, _EARLY), *(lifting.CHAINS if lift is not None else ())),
        (
            *(nf_wire.Rule(PREROUTING, comment, (*each, *drop)) for comment, each in (rules if antispoof else ())),
            *(lifting.rules(lift) if lift is not None else ()),
        ),
    )


def _source(family: Family) -> bytes:
    """The source address, behind the port's number."""
    return load("network", family.source_at, family.size, 1)
