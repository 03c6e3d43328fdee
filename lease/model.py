"""The values of the lease world: small, frozen, cheap. 20,000 of each fit in a few MiB.

Addresses are integers (network order read as a number) and MACs are 48-bit integers: a tuple of those costs half of
what `ipaddress` objects cost (docs/decisions.md, "Leases are tuples of integers"). Text is made at the edges only.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import NamedTuple

WIDTH = {4: 32, 6: 128}
"""Bits of an address, by family."""

_BYTE = "(0|[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4 = re.compile(rf"{_BYTE}\.{_BYTE}\.{_BYTE}\.{_BYTE}")
_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")
KEY_SIZE = 32
"""Bytes of a key of WireGuard."""
MAC_FORM = re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}")


class Prefix(NamedTuple):
    """An IP prefix: family 4 or 6, its base address as a number without host bits, its length in bits."""

    family: int
    base: int
    length: int

    def __str__(self) -> str:
        return f"{ip_text(self.family, self.base)}/{self.length}"

    @property
    def last(self) -> int:
        """The highest address in it."""
        return self.base | ((1 << (WIDTH[self.family] - self.length)) - 1)

    def holds(self, address: int) -> bool:
        """Whether an address (of the same family) lies in it."""
        return self.base <= address <= self.last

    def covers(self, other: Prefix) -> bool:
        """Whether every address of `other` lies in it."""
        return self.family == other.family and self.length <= other.length and self.holds(other.base)

    def overlaps(self, other: Prefix) -> bool:
        """Whether the two share an address."""
        return self.covers(other) or other.covers(self)


class Endpoint(NamedTuple):
    """What a node publishes for one family: its subnet, and the VTEP behind which that subnet lives.

    public_ip: underlay address as a number. vni, mac: from BackendData; None where the backend has none, or the record says
    no VNI: the network's then.
    source: the address its frames come from, where that is not its public IP (a node behind NAT, or with several addresses);
    else 0.
    key, port: of WireGuard, its public key and the UDP port it listens on; b"" and 0 with other backends.
    """

    subnet: Prefix
    public_ip: int
    vni: int | None
    mac: int | None
    source: int = 0
    key: bytes = b""
    port: int = 0

    @property
    def identity(self) -> int:
        """What no two nodes have: the VTEP's MAC, else the public key, else the public IP, each in a range of its own."""
        if self.mac is not None:
            return self.mac
        return 1 << 256 | int.from_bytes(self.key, "big") if self.key else 1 << 130 | self.public_ip

    @property
    def vtep(self) -> str:
        """What tells its VTEP from others', as people write it: MAC, or public key; "" where the backend has neither."""
        if self.mac is not None:
            return mac_text(self.mac)
        return key_text(self.key)

    def outer_sources(self) -> tuple[int, ...]:
        """The addresses its frames may come from: its own, or what a NAT makes of that."""
        return (self.public_ip, self.source) if self.source else (self.public_ip,)


class Lease(NamedTuple):
    """One node's claim on a subnet, as the store holds it.

    key: the store's own name for the record (etcd: the last part of the key, `10.244.1.0-24`).
    v4, v6: the families it has. node: the identity of its owner, "" where the record does not say (flannel's).
    created, modified: the store's revisions, by which the earlier claim wins and changes are fenced.
    handle: the etcd lease under it, 0 for a reservation that never expires.
    """

    key: str
    backend: str
    v4: Endpoint | None
    v6: Endpoint | None
    node: str
    created: int
    modified: int
    handle: int

    @classmethod
    def of(cls, key: str, backend: str, ends: Iterable[Endpoint], node: str, created: int = 0, uid: int = 0) -> Lease:
        """Of its parts, each in the place of its family, as a store gets it. uid: the handle of one on a Node."""
        by_family = {end.subnet.family: end for end in ends}
        return cls(key, backend, by_family.get(4), by_family.get(6), node, created, 0, uid)

    def endpoint(self, family: int) -> Endpoint | None:
        """The part of one family, 4 or 6."""
        return self.v4 if family == 4 else self.v6

    @property
    def ends(self) -> tuple[Endpoint, ...]:
        """The parts it has."""
        return tuple(end for end in (self.v4, self.v6) if end is not None)

    @property
    def first(self) -> Endpoint:
        """The part by which its owner is known: of IPv4 where it has one, as in flannel's keys."""
        end = self.v4 or self.v6
        assert end is not None, "a record without any endpoint is refused when it is read"
        return end

    def same_claim(self, other: Lease) -> bool:
        """Whether both say the same to a peer: all but revisions and the etcd lease."""
        return self[:5] == other[:5]


class Refused(NamedTuple):
    """A record that cannot be used, and why. `created` orders it among the others of its subnet."""

    key: str
    reason: str
    modified: int


def ip_text(family: int, address: int) -> str:
    """An address as people write it."""
    if family == 4:
        return f"{address >> 24}.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"
    from ipaddress import IPv6Address  # half a MiB that an IPv4 cluster need not hold

    return str(IPv6Address(address))


def ip_number(text: str, family: int) -> int:
    """An address of one family as a number: four decimal numbers without leading zeros, or RFC 4291's text.

    Raises ValueError when it is none.
    """
    if family != 4:
        from ipaddress import IPv6Address

        address = IPv6Address(text)
        # int() would forget a zone: what stands before it is somebody else's, on another link
        if address.scope_id is not None:
            raise ValueError(f"{text[:60]!a} is an address with a zone")
        return int(address)
    found = _IPV4.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:60]!a} is not an IPv4 address")
    first, second, third, fourth = map(int, found.groups())
    return first << 24 | second << 16 | third << 8 | fourth


def prefix(text: str) -> Prefix:
    """`10.244.1.0/24` as a Prefix; host bits are masked away, as flannel does; an address alone is a whole-length one.

    Raises ValueError.
    """
    family = 6 if ":" in text else 4
    address, slash, length_text = text.partition("/")
    length = WIDTH[family]
    if slash:
        if not _LENGTH.fullmatch(length_text) or int(length_text) > length:
            raise ValueError(f"{text[:60]!a} has no prefix length from 0 to {length}")
        length = int(length_text)
    return Prefix(family, ip_number(address, family) & mask(family, length), length)


def mask(family: int, length: int) -> int:
    """The netmask of a length, as a number."""
    width = WIDTH[family]
    return ((1 << length) - 1) << (width - length)


def around(family: int, address: int, length: int) -> Prefix:
    """The prefix of that length that holds an address."""
    return Prefix(family, address & mask(family, length), length)


def mac_text(mac: int) -> str:
    """A MAC in lower-case colon form, as flannel writes it."""
    return mac.to_bytes(6, "big").hex(":")


def mac_number(text: str) -> int:
    """A MAC in colon form as a number. Raises ValueError."""
    if not MAC_FORM.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not six colon-separated hex bytes")
    return int(text.replace(":", ""), 16)


def key_bytes(text: str) -> bytes:
    """A key of WireGuard as people write it: base64 of 32 bytes. Raises ValueError, which does not show it."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None
    if len(key) != KEY_SIZE or key_text(key) != text:
        raise ValueError(f"it has {len(key)} bytes, not {KEY_SIZE}")
    return key


def key_text(key: bytes) -> str:
    """What `key_bytes` reads."""
    return base64.b64encode(key).decode("ascii")


def link_local(mac: int) -> int:
    """The IPv6 link-local address of a MAC: fe80::/64 and its modified EUI-64 (RFC 4291, appendix A)."""
    return 0xFE80 << 112 | (mac >> 24 ^ 0x020000) << 40 | 0xFFFE << 24 | mac & 0xFFFFFF


def mac_of(link_local_address: int) -> int | None:
    """The MAC that `link_local` made an address of, None where it did not."""
    mac = (link_local_address >> 40 & 0xFFFFFF ^ 0x020000) << 24 | link_local_address & 0xFFFFFF
    return mac if link_local(mac) == link_local_address else None


def mac_fault(mac: int) -> str | None:
    """Why a MAC cannot be a VTEP's, or None."""
    if mac == 0:
        return "is all zero"
    if mac >> 40 & 1:
        return "is a multicast address"
    return None


NO_NODE = {
    4: tuple(map(prefix, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4"))),
    6: (Prefix(6, 0, 16), Prefix(6, 0xFE80 << 112, 10), Prefix(6, 0xFF << 120, 8)),  # ::/16, fe80::/10, ff00::/8
}
"""By family, what is never a node's address: this-network, loopback, multicast, reserved, mapped IPv4, link-local (RFC
6890)."""
