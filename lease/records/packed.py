"""Many leases in little memory: each packed into one bytes object, some 100 bytes instead of 700.

A Lease is what all code speaks of; it is made when it is read. What is asked of all leases at once (who has this
address, this MAC) is answered on the packed form. `decode` reads flannel's usual record straight into it; anything else is
codec.py's, and tests compare the two.
"""

from __future__ import annotations

import marshal
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from socket import inet_ntop, inet_pton
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import Endpoint, Lease, Prefix
from lease.records.codec import MAX_VALUE, encode_key
from lease.records.subnets import Keys

HEAD = struct.Struct(">IBI6siQQqB")
"""Subnet base, its length, public IP, MAC (0: none), VNI (-1: it says none), created, modified, handle, form."""
USUAL, NODE, GENERAL, NO_IPV4, DUAL = 0, 1, 2, 3, 4
"""Forms: flannel's usual record in etcd, whose key follows from its subnet, with the node's text behind the head; a Node's,
IPv4 alone, with its uid (16 bytes) and name there; any other, with all fields but the IPv4 endpoint marshalled behind
the head; one without an IPv4 endpoint; flannel's usual record of both families, with SECOND and the node's text there."""
SECOND = struct.Struct(">16sB16s6s")
"""Of the IPv6 endpoint: subnet base, its length, public IP, MAC; the VNI is that of the head."""
HEAD_FAMILY = 4
"""The family of the endpoint in the head."""
FORM = HEAD.size - 1
MODIFIED = slice(27, 35)
"""0 in the forms that have it behind the head."""


class Place(NamedTuple):
    """Where the parts of a family's endpoint are, in the forms that have them there. number: base and length."""

    forms: frozenset[int]
    number: slice
    length: int
    public_ip: slice
    mac: slice


PLACES = {
    4: Place(frozenset((USUAL, NODE, DUAL)), slice(0, 5), 4, slice(5, 9), slice(9, 15)),
    6: Place(frozenset((DUAL,)), *(
        slice(HEAD.size, HEAD.size + 17), HEAD.size + 16, slice(HEAD.size + 17, HEAD.size + 33),
        slice(HEAD.size + 33, HEAD.size + 39),
    )),
}  # fmt: skip
_NODES = HEAD.size + SECOND.size
"""Where the node's text of a DUAL begins."""
NUMBER, LENGTH, PUBLIC_IP, MAC = PLACES[HEAD_FAMILY][1:]
_LARGEST = (1 << 63) - 1
_UID, _LATEST = (1 << 128) - 1, (1 << 128 + 63) - 1
"""Of a Node's lease: annotations.seniority."""
_AF_INET, _AF_INET6 = 2, 10
_ALL6 = (1 << 128) - 1
_NO_REFERENCES = 0
"""marshal's version in which equal values give equal bytes."""

_USUAL = re.compile(
    r"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})-([1-9]|[12]\d|3[01]) "
    r'\{"PublicIP":"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})","PublicIPv6":null,"BackendType":"vxlan",'
    r'"BackendData":\{"VNI":(0|[1-9]\d{0,6}),"VtepMAC":"([0-9a-f][02468ace](?::[0-9a-f]{2}){5})"\}'
    r'(?:,"OverlayNode":"([ !#-\[\]-~]{0,128})")?\}',
    re.ASCII,
)
"""Key and value with a blank between them. A VNI of eight digits is left to codec.py."""
_DUAL = re.compile(
    r"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})-([1-9]|[12]\d|3[01])&([a-f\d:]{2,39})-([1-9]\d?|1[01]\d|12[0-7]) "
    r'\{"PublicIP":"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})","PublicIPv6":"([a-f\d:]{2,39})","BackendType":"vxlan",'
    r'"BackendData":\{"VNI":(0|[1-9]\d{0,6}),"VtepMAC":"([0-9a-f][02468ace](?::[0-9a-f]{2}){5})"\},'
    r'"BackendV6Data":\{"VNI":(0|[1-9]\d{0,6}),"VtepMAC":"([0-9a-f][02468ace](?::[0-9a-f]{2}){5})"\}'
    r'(?:,"OverlayNode":"([ !#-\[\]-~]{0,128})")?\}',
    re.ASCII,
)
"""The same of a record of both families."""
_HEAD_OF_BYTES = struct.Struct(">4sB4s6siQQqB")
_NO_MAC = "00:00:00:00:00:00"


def quick_number(packed: bytes, family: int) -> int | None:
    """The subnet number of a record whose head alone says all that a table of peers of that family needs, else None."""
    place = PLACES[family]
    return int.from_bytes(packed[place.number], "big") if packed[FORM] in place.forms else None


def by_flannel(packed: bytes) -> bool:
    """Whether flannel wrote a record of etcd: it says no node, and is no reservation."""
    if packed[FORM] != GENERAL:
        return (packed[FORM], len(packed)) in ((USUAL, HEAD.size), (DUAL, _NODES))
    lease = unpack(packed)
    return not lease.node and (lease.handle != 0 or any(end.mac is not None for end in lease.ends))


def may_have_key(packed: bytes) -> bool:
    """Whether an endpoint may have a public key: flannel's usual records of vxlan have none."""
    return packed[FORM] in (GENERAL, NO_IPV4)


def subnet_number_of(packed: bytes, family: int) -> int | None:
    """The subnet of a family of any lease, None where it has none."""
    there = quick_number(packed, family)
    if there is not None:
        return there
    end = unpack(packed).endpoint(family)
    return None if end is None else number(end.subnet)


def outer_source(packed: bytes, family: int) -> int | None:
    """The only address that frames of a lease come from, where the head alone says it, else None."""
    place = PLACES[family]
    return int.from_bytes(packed[place.public_ip], "big") if packed[FORM] in place.forms else None


def number(subnet: Prefix) -> int:
    """A subnet as one number: base and length."""
    return subnet.base << 8 | subnet.length


def prefix_of(subnet_number: int, family: int) -> Prefix:
    """What `number` made a number of."""
    return Prefix(family, subnet_number >> 8, subnet_number & 255)


def subnet_of(packed: bytes) -> Prefix:
    """The IPv4 subnet of a packed lease that has one."""
    return Prefix(4, int.from_bytes(packed[:4], "big"), packed[LENGTH])


def pack(lease: Lease) -> bytes:
    """A lease as bytes. Equal leases give equal bytes."""
    end = lease.v4
    if end is not None and any(end[4:]):
        return _general(lease, end)
    small = 0 <= lease.created <= _LARGEST and 0 <= lease.modified <= _LARGEST and -_LARGEST <= lease.handle <= _LARGEST
    if (
        end is not None
        and small
        and lease.v6 is None
        and end.mac is not None
        and end.vni is not None
        and lease.backend == "vxlan"
        and lease.key == encode_key(end.subnet)
    ):
        mac = end.mac.to_bytes(6, "big")
        head = HEAD.pack(
            end.subnet.base, end.subnet.length, end.public_ip, mac, end.vni,
            lease.created, lease.modified, lease.handle, USUAL,
        )  # fmt: skip
        return head + lease.node.encode("utf-8", "surrogatepass")
    if (
        end is not None
        and lease.v6 is None
        and end.mac is not None
        and end.vni is not None
        and lease.backend == "vxlan"
        and lease.key == lease.node
        and lease.modified == 0
        and 0 <= lease.created <= _LATEST
        and lease.handle == lease.created & _UID
    ):
        mac = end.mac.to_bytes(6, "big")
        head = HEAD.pack(
            end.subnet.base, end.subnet.length, end.public_ip, mac, end.vni, lease.created >> 128, 0, 0, NODE
        )
        return head + lease.handle.to_bytes(16, "big") + lease.node.encode("utf-8", "surrogatepass")
    if end is not None and small and (packed := _dual(lease, end)) is not None:
        return packed
    return _general(lease, end)


def _dual(lease: Lease, end: Endpoint) -> bytes | None:
    """A lease in flannel's usual form of both families, None: it is no such one."""
    other = lease.v6
    if (
        other is None
        or any(other[4:])
        or None in (end.mac, end.vni, other.mac)
        or other.vni != end.vni
        or lease.backend != "vxlan"
        or lease.key != encode_key(end.subnet, other.subnet)
    ):
        return None
    assert end.mac is not None
    assert other.mac is not None
    head = HEAD.pack(
        end.subnet.base, end.subnet.length, end.public_ip, end.mac.to_bytes(6, "big"), end.vni,
        lease.created, lease.modified, lease.handle, DUAL,
    )  # fmt: skip
    second = SECOND.pack(
        other.subnet.base.to_bytes(16, "big"), other.subnet.length, other.public_ip.to_bytes(16, "big"),
        other.mac.to_bytes(6, "big"),
    )  # fmt: skip
    return head + second + lease.node.encode("utf-8", "surrogatepass")


def _general(lease: Lease, end: Endpoint | None) -> bytes:
    v6 = None if lease.v6 is None else (*lease.v6.subnet, *lease.v6[1:])
    more = end[4:] if end is not None else ()
    rest = (lease.key, lease.backend, v6, lease.node, lease.created, lease.modified, lease.handle, more)
    if end is None:
        head = HEAD.pack(0, 255, 0, b"", -1, 0, 0, 0, NO_IPV4)
    else:
        mac = (end.mac or 0).to_bytes(6, "big")
        vni = -1 if end.vni is None else end.vni
        head = HEAD.pack(end.subnet.base, end.subnet.length, end.public_ip, mac, vni, 0, 0, 0, GENERAL)
    return head + marshal.dumps(rest, _NO_REFERENCES)


def unpack(packed: bytes) -> Lease:
    """The lease that was packed."""
    base, length, public_ip, mac, vni, created, modified, handle, form = HEAD.unpack_from(packed)
    v4 = None
    if form != NO_IPV4:
        v4 = Endpoint(Prefix(4, base, length), public_ip, None if vni < 0 else vni, int.from_bytes(mac, "big") or None)
    if form == USUAL:
        assert v4 is not None
        node = packed[HEAD.size :].decode("utf-8", "surrogatepass")
        return Lease(encode_key(v4.subnet), "vxlan", v4, None, node, created, modified, handle)
    if form == NODE:
        uid = int.from_bytes(packed[HEAD.size : HEAD.size + 16], "big")
        name = packed[HEAD.size + 16 :].decode("utf-8", "surrogatepass")
        return Lease(name, "vxlan", v4, None, name, created << 128 | uid, 0, uid)
    if form == DUAL:
        base6, length6, public_ip6, mac6 = SECOND.unpack_from(packed, HEAD.size)
        subnet6 = Prefix(6, int.from_bytes(base6, "big"), length6)
        other = Endpoint(subnet6, int.from_bytes(public_ip6, "big"), vni, int.from_bytes(mac6, "big"))
        assert v4 is not None
        node = packed[_NODES:].decode("utf-8", "surrogatepass")
        return Lease(encode_key(v4.subnet, subnet6), "vxlan", v4, other, node, created, modified, handle)
    key, backend, six, node, created, modified, handle, more = marshal.loads(packed[HEAD.size :])  # noqa: S302 (our own)
    v6 = None if six is None else Endpoint(Prefix(*six[:3]), *six[3:])
    if v4 is not None:
        v4 = Endpoint(*v4[:4], *more)
    return Lease(key, backend, v4, v6, node, created, modified, handle)


def decode(key: bytes, value: bytes, created: int, modified: int, handle: int) -> bytes | None:
    """A record of etcd, in flannel's usual form, as a packed lease; None for any other form, good or bad.

    Args: as codec.decode_lease, which says the same of it.
    """
    if b" " in key or created < 0 or modified < 0:  # no etcd's: it is left to codec.py
        return None
    if b"&" in key:
        return _decode_dual(key, value, created, modified, handle)
    found = _USUAL.fullmatch(f"{key.decode('latin-1')} {value.decode('latin-1')}")
    if found is None or len(value) > MAX_VALUE:
        return None
    base_text, length_text, public_ip, vni, mac, node = found.groups()
    try:
        base, address = inet_pton(_AF_INET, base_text), inet_pton(_AF_INET, public_ip)
    except OSError:
        return None
    length = int(length_text)
    if int.from_bytes(base, "big") << length & 0xFFFFFFFF or mac == _NO_MAC:
        return None
    head = _HEAD_OF_BYTES.pack(
        base, length, address, bytes.fromhex(mac.replace(":", "")), int(vni), created, modified, handle, USUAL
    )
    return head + node.encode() if node else head


def _decode_dual(key: bytes, value: bytes, created: int, modified: int, handle: int) -> bytes | None:
    found = _DUAL.fullmatch(f"{key.decode('latin-1')} {value.decode('latin-1')}")
    if found is None or len(value) > MAX_VALUE:
        return None
    base_text, length_text, base6_text, length6_text, public_ip, public_ip6, vni, mac, vni6, mac6, node = found.groups()
    try:
        base, address = inet_pton(_AF_INET, base_text), inet_pton(_AF_INET, public_ip)
        base6, address6 = inet_pton(_AF_INET6, base6_text), inet_pton(_AF_INET6, public_ip6)
    except OSError:
        return None
    length, length6 = int(length_text), int(length6_text)
    host_bits = int.from_bytes(base, "big") << length & 0xFFFFFFFF or int.from_bytes(base6, "big") << length6 & _ALL6
    if host_bits or vni != vni6 or _NO_MAC in (mac, mac6) or base6_text != inet_ntop(_AF_INET6, base6):
        return None  # the last: the key could not be made of it again
    head = _HEAD_OF_BYTES.pack(
        base, length, address, bytes.fromhex(mac.replace(":", "")), int(vni), created, modified, handle, DUAL
    )
    second = SECOND.pack(base6, length6, address6, bytes.fromhex(mac6.replace(":", "")))
    return head + second + (node.encode() if node else b"")


class Leases(Mapping[str, Lease]):
    """Leases by key, packed. Not changed once others have it."""

    def __init__(self, packed: dict[str, bytes] | None = None) -> None:
        self.packed: dict[str, bytes] = {} if packed is None else packed

    @classmethod
    def of(cls, leases: Iterable[Lease]) -> Leases:
        """Of leases."""
        return cls({lease.key: pack(lease) for lease in leases})

    def __getitem__(self, key: str) -> Lease:
        return unpack(self.packed[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def __contains__(self, key: object) -> bool:
        return key in self.packed

    def of_family(self, family: int) -> Leases:
        """Those that have a part of a family; these, where all have."""
        if family == HEAD_FAMILY:
            if not any(p[FORM] == NO_IPV4 for p in self.packed.values()):
                return self
            return Leases({key: p for key, p in self.packed.items() if p[FORM] != NO_IPV4})
        found = {key: p for key, p in self.packed.items() if p[FORM] >= GENERAL}
        return Leases({key: p for key, p in found.items() if p[FORM] == DUAL or unpack(p).endpoint(family) is not None})

    def having(
        self, family: Family, public_ip: int, mac: int | None, nodes: tuple[str, ...], key: bytes = b""
    ) -> Iterator[Lease]:
        """The leases of that public IP, MAC or public key, or with one of these texts (none is empty) in their node's:
        these, and maybe some others."""
        address = family.packed(public_ip)
        hardware = mac.to_bytes(6, "big") if mac is not None else b""
        heads = family.number == HEAD_FAMILY
        found = [
            p
            for p in self.packed.values()
            if (
                p[PUBLIC_IP] == address or p[MAC] == hardware
                if heads
                else may_have_key(p) or (p[FORM] == DUAL and (address in p or (hardware and hardware in p)))
            )
        ]
        for text in {*(text.encode() for text in nodes), *([key] if key else ())}:
            found += [p for p in self.packed.values() if text in p]
        return map(unpack, dict.fromkeys(found))

    def overlapping(self, subnet: Prefix) -> Iterator[Lease]:
        """Those whose subnet of that family shares an address with this one."""
        for packed in self.packed.values():
            if subnet.family == HEAD_FAMILY:
                if packed[FORM] != NO_IPV4 and subnet_of(packed).overlaps(subnet):
                    yield unpack(packed)
            elif packed[FORM] >= GENERAL:
                lease = unpack(packed)
                end = lease.endpoint(subnet.family)
                if end is not None and end.subnet.overlaps(subnet):
                    yield lease

    def unusual(
        self, family: int, length: int, without: str | None = None
    ) -> tuple[dict[int, Keys], list[tuple[str, Prefix]]]:
        """Subnets of a family, but for one key's, that are not found by the key of a subnet of that length: by base the keys
        of those of that length in records of both families, whose key says more, each base once; and of the others key and
        subnet."""
        bases: dict[int, Keys] = {}
        others: list[tuple[str, Prefix]] = []
        place, of_bytes = PLACES[family], int.from_bytes
        first, last, at = place.number.start, place.number.stop - 1, place.length
        for key, packed in self.packed.items():
            form = packed[FORM]
            if key == without:
                continue
            if form == DUAL and packed[at] == length and (base := of_bytes(packed[first:last], "big")) not in bases:
                bases[base] = key
            elif family != HEAD_FAMILY or packed[LENGTH] != length or form:
                there = subnet_number_of(packed, family)
                if there is not None:
                    others.append((key, Prefix(family, there >> 8, there & 255)))
        return bases, others

    def with_mac(self, mac: int) -> Iterator[Lease]:
        """Those of a MAC, in either family."""
        hardware = mac.to_bytes(6, "big")
        for packed in self.packed.values():
            if hardware in packed or may_have_key(packed):
                lease = unpack(packed)
                if any(end.mac == mac for end in lease.ends):
                    yield lease

    def without(self, key: str) -> dict[str, bytes]:
        """A copy of the packed leases, but one."""
        packed = dict(self.packed)
        packed.pop(key, None)
        return packed


def fields(packed: bytes) -> tuple[Any, ...]:
    """The head, unpacked: see HEAD."""
    return HEAD.unpack_from(packed)
