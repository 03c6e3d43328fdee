"""The two address families, as values: what is different between them stands here and nowhere else.

Code that serves a family takes it as a parameter; there is no function of which a twin exists for the other family.
"""

from __future__ import annotations

import socket
from typing import NamedTuple


class Family(NamedTuple):
    """An address family.

    number: 4 or 6, as in `Prefix.family`. bits, size: of an address. af: AF_INET or AF_INET6, as netlink and sockets number
    it. nft: nftables' name. nft_number: nftables' number (NFPROTO_IPV4, NFPROTO_IPV6). source_at, destination_at: where the
    addresses stand in the IP header, in bytes (RFC 791, RFC 8200). overhead: what VXLAN adds to a packet on an underlay of
    this family: outer IP header, UDP 8, VXLAN 8, inner Ethernet 14. has_broadcast: whether a link's first and last address
    are no host's. routes_die_silently: whether the kernel removes the routes of a device that goes down or away without a
    notification (IPv4: net/ipv4/fib_frontend.c fib_disable_ip).
    """

    number: int
    bits: int
    af: int
    nft: str
    nft_number: int
    source_at: int
    destination_at: int
    overhead: int
    has_broadcast: bool
    routes_die_silently: bool

    @property
    def by_arp(self) -> bool:
        """Whether neighbours are found by ARP (RFC 826), not by neighbour discovery (RFC 4861), which itself tells of an
        address that two have."""
        return self.number == 4

    @property
    def sysctl(self) -> str:
        """Its folder below /proc/sys/net."""
        return f"ipv{self.number}"

    @property
    def text(self) -> str:
        """Its name, as people write it."""
        return f"IPv{self.number}"

    @property
    def size(self) -> int:
        """Bytes of an address."""
        return self.bits // 8

    def packed(self, address: int) -> bytes:
        """An address in network order."""
        return address.to_bytes(self.bits // 8, "big")


V4 = Family(4, 32, socket.AF_INET, "ip", 2, 12, 16, 50, True, True)
V6 = Family(6, 128, socket.AF_INET6, "ip6", 10, 8, 24, 70, False, False)
FAMILIES = {4: V4, 6: V6}
BY_AF = {family.af: family for family in FAMILIES.values()}
