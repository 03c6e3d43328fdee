"""flannel's keys and values <-> Lease. Pure; golden files in tests/unit/recordings.

Source: flannel pkg/subnet/subnet.go (keys), pkg/lease/lease.go (LeaseAttrs), pkg/backend/vxlan/vxlan.go (BackendData).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lease.model import (
    WIDTH,
    Endpoint,
    Lease,
    Prefix,
    ip_number,
    ip_text,
    key_bytes,
    key_text,
    mac_fault,
    mac_number,
    mac_text,
)

NODE_FIELD, SOURCE_FIELD = "OverlayNode", "OverlaySource"
"""The JSON fields of ours: the identity of the node, and the outer source of its frames where that is not PublicIP. flannel
ignores unknown fields."""
SOURCE_FAMILY = 4
"""The only family that has an outer source: it is for NAT."""
FIELDS = {4: ("PublicIP", "BackendData"), 6: ("PublicIPv6", "BackendV6Data")}
"""flannel's names of them, by family."""
MAX_VALUE = 16_384
"""Bytes of a value we read; a real one has some 200. What is longer is refused unread."""

_KEY_BASE = {
    4: re.compile(r"\A(\d{1,3}(?:\.\d{1,3}){3})-", re.ASCII),
    6: re.compile(r"&([a-f\d:]+)-", re.ASCII),
}
_KEY = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3})-(\d{1,2})(?:&([a-f\d:]+)-(\d{1,3}))?", re.ASCII)


class BadRecord(ValueError):
    """A record that cannot be read. The message names the field, and what was expected there."""


NO_V4 = "0.0.0.0-0"
"""The first half of a key, and what PublicIP then is, where there is no IPv4 (flannel's zero values)."""
NO_PUBLIC_IP = "0.0.0.0"  # noqa: S104 (what flannel writes, nobody listens there)


def encode_key(v4: Prefix | None, v6: Prefix | None = None) -> str:
    """The last part of the etcd key: `10.244.1.0-24`, with `&fd00:1::-64` for dual stack; `0.0.0.0-0&fd00:1::-64` where
    there is no IPv4."""
    key = NO_V4 if v4 is None else f"{ip_text(4, v4.base)}-{v4.length}"
    return key if v6 is None else f"{key}&{ip_text(6, v6.base)}-{v6.length}"


def key_of(ends: Iterable[Endpoint]) -> str:
    """The key of a record with these parts."""
    subnets = {end.subnet.family: end.subnet for end in ends}
    return encode_key(subnets.get(4), subnets.get(6))


def decode_key(key: str) -> tuple[Prefix | None, Prefix | None]:
    """The subnets a key names, one at least. Unlike flannel it accepts no leading text and no host bits.

    Raises:
        BadRecord: names the part and what is allowed.
    """
    found = _KEY.fullmatch(key)
    if not found:
        raise BadRecord(f"key {key[:80]!a} is not of the form 10.244.1.0-24 or 10.244.1.0-24&fd00:1::-64")
    v6 = _key_prefix(key, found[3], found[4], 6) if found[3] else None
    if v6 is not None and f"{found[1]}-{found[2]}" == NO_V4:
        return None, v6
    return _key_prefix(key, found[1], found[2], 4), v6


def key_subnet(key: str, family: int) -> Prefix | None:
    """The subnet of one family that a key of etcd names, None where it names none."""
    try:
        v4, v6 = decode_key(key)
    except BadRecord:
        return None
    return v4 if family == 4 else v6


def key_ranges(key: str, without: str = "") -> list[tuple[bytes, bytes]]:
    """Where all keys of the same base lie, but one of them, as etcd's keys and range_ends: 10.244.5.0-24, 10.244.5.0-25,
    10.244.5.0-24&fd00:..-64 ('.' follows '-'); where there is no IPv4, of the same base of IPv6."""
    lead = f"{NO_V4}&"
    head, _, _ = key.removeprefix(lead).partition("-")
    base = (lead + head if key.startswith(lead) else head).encode()
    first, after, one = base + b"-", base + b".", without.encode()
    if not first <= one < after:
        return [(first, after)]
    return [(first, one), (one + b"\0", after)]


def key_base(key: str, family: int) -> int | None:
    """The base address of one family that a key names, also one that is otherwise bad; None where there is none."""
    found = _KEY_BASE[family].search(key)
    try:
        return ip_number(found[1], family) if found else None
    except ValueError:
        return None


def _key_prefix(key: str, base: str, length: str, family: int) -> Prefix:
    width = WIDTH[family]
    try:
        number, bits = ip_number(base, family), int(length)
    except ValueError as error:
        raise BadRecord(f"key {key[:80]!a}: {error}") from None
    if not 1 <= bits < width:
        raise BadRecord(f"key {key[:80]!a}: prefix length {bits} must be from 1 to {width - 1}")
    if number & ((1 << (width - bits)) - 1):
        raise BadRecord(f"key {key[:80]!a}: {base} has host bits beyond /{bits}")
    return Prefix(family, number, bits)


def encode_value(lease: Lease) -> bytes:
    """A record's value, byte for byte as flannel writes it, with our own fields behind it where they say anything."""
    ends = {family: lease.endpoint(family) for family in FIELDS}
    value: dict[str, Any] = {
        FIELDS[family][0]: None if end is None else ip_text(family, end.public_ip) for family, end in ends.items()
    }
    value[FIELDS[4][0]] = value[FIELDS[4][0]] or NO_PUBLIC_IP
    value["BackendType"] = lease.backend
    for family, end in ends.items():
        if end is not None and (data := backend_data(end)) is not None:
            value[FIELDS[family][1]] = data
    if lease.node:
        value[NODE_FIELD] = lease.node
    if lease.v4 is not None and lease.v4.source:
        value[SOURCE_FIELD] = ip_text(4, lease.v4.source)
    return json.dumps(value, separators=(",", ":")).encode()


def decode_lease(key: str, value: bytes, created: int = 0, modified: int = 0, handle: int = 0) -> Lease:
    """Read one record as flannel and we write it to etcd.

    Args:
        key: last part of the etcd key, `10.244.1.0-24`, with `&fd00:1::-64` for dual stack.
        value: JSON object, UTF-8; unknown fields are ignored.
        created, modified, handle: etcd's create and mod revision, and the etcd lease under it.

    Of two parts a bad one costs itself alone: it has no MAC then, and no table of peers takes it.

    Raises:
        BadRecord: names the field and what was expected there.
    """
    v4, v6 = decode_key(key)
    if len(value) > MAX_VALUE:
        raise BadRecord(f"value has {len(value)} bytes; a record has at most {MAX_VALUE}")
    try:
        fields = json.loads(value.decode())  # of bytes it would take UTF-16, which nobody else here reads
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"value is not JSON: {ascii(str(error)[:100])[1:-1]}") from None
    if not isinstance(fields, dict):
        raise BadRecord("value is not a JSON object")
    backend = fields.get("BackendType") or ""
    node = fields.get(NODE_FIELD) or ""
    if not isinstance(backend, str) or not isinstance(node, str):
        raise BadRecord(f"BackendType and {NODE_FIELD} must be strings")
    subnets = [v4] if v4 is not None else []
    if v6 is not None and (v4 is None or fields.get(FIELDS[6][0]) is not None):
        subnets.append(v6)
    ends = read_parts([(subnet, partial(_endpoint, subnet, fields, backend)) for subnet in subnets])
    return Lease.of(key, backend[:32], ends, node[:128])._replace(created=created, modified=modified, handle=handle)


def read_parts(parts: Sequence[tuple[Prefix, Callable[[], Endpoint]]]) -> list[Endpoint]:
    """Each part of a record, by its subnet and how it is read. One that cannot be read has neither address nor MAC then,
    which no table of peers takes, while another can. Raises BadRecord: none can."""
    ends: list[Endpoint] = []
    faults: list[BadRecord] = []
    for subnet, read in parts:
        try:
            ends.append(read())
        except BadRecord as fault:
            faults.append(fault)
            ends.append(Endpoint(subnet, 0, None, None))
    if faults and len(faults) == len(ends):
        raise faults[0]
    return ends


def _endpoint(subnet: Prefix, fields: dict[str, Any], backend: str) -> Endpoint:
    ip_name, data_name = FIELDS[subnet.family]
    text = fields.get(ip_name)
    if not isinstance(text, str):
        raise BadRecord(f"{ip_name}: missing; it must be an IPv{subnet.family} address")
    try:
        public_ip = ip_number(text, subnet.family)
    except ValueError:
        raise BadRecord(f"{ip_name}: {text[:60]!a} must be an IPv{subnet.family} address") from None
    source = outer_source(fields.get(SOURCE_FIELD), SOURCE_FIELD, public_ip) if subnet.family == SOURCE_FAMILY else 0
    return endpoint(subnet, public_ip, source, backend, fields.get(data_name), data_name)


def endpoint(subnet: Prefix, public_ip: int, source: int, backend: str, data: object, name: str) -> Endpoint:
    """What a record says of one family. data: BackendData, parsed; name: of the field it stood in. Raises BadRecord."""
    if backend == "vxlan":
        return Endpoint(subnet, public_ip, *vxlan_data(data, name), source)
    if backend == "wireguard":
        return Endpoint(subnet, public_ip, None, None, 0, *wireguard_data(data, name))
    return Endpoint(subnet, public_ip, None, None, source if backend == "ipip" else 0)


def outer_source(text: object, name: str, public_ip: int) -> int:
    """The outer source that a record names beside its public IP, 0 where none. Raises BadRecord."""
    if text is None or text == "":
        return 0
    try:
        address = ip_number(text, 4) if isinstance(text, str) else -1
    except ValueError:
        address = -1
    if address < 0:
        raise BadRecord(f"{name}: {str(text)[:60]!a} must be an IPv4 address")
    return 0 if address == public_ip else address


def backend_data(end: Endpoint) -> dict[str, int | str] | None:
    """What `vxlan_data` and `wireguard_data` read; None: its backend publishes nothing."""
    if end.mac is not None:
        return {**({} if end.vni is None else {"VNI": end.vni}), "VtepMAC": mac_text(end.mac)}
    return {"PublicKey": key_text(end.key), "Port": end.port} if end.key else None


def wireguard_data(data: object, name: str) -> tuple[bytes, int]:
    """Public key and UDP port of `{"PublicKey":"..","Port":51820}` (flannel pkg/backend/wireguard). Raises BadRecord."""
    if not isinstance(data, dict):
        there = "missing" if data is None else f"{str(data)[:40]!a}"
        raise BadRecord(f'{name}: {there}; it must be an object like {{"PublicKey":"..","Port":51820}}')
    text, port = data.get("PublicKey"), data.get("Port")
    if not isinstance(text, str):
        raise BadRecord(f"{name}.PublicKey: missing; it must be a key of WireGuard in base64")
    try:
        key = key_bytes(text)
    except ValueError as error:
        raise BadRecord(f"{name}.PublicKey: {text[:60]!a}: {error}") from None
    if not any(key):
        raise BadRecord(f"{name}.PublicKey: it is all zero")
    if type(port) is not int or not 1 <= port <= 65535:
        raise BadRecord(f"{name}.Port: {str(port)[:40]!a} must be a whole number from 1 to 65535")
    return key, port


def vxlan_data(data: object, name: str) -> tuple[int | None, int]:
    """VNI and VTEP MAC of `{"VNI":1,"VtepMAC":"aa:.."}`; an absent VNI (older flannels, load balancers' Nodes) is None: the
    network's. Raises BadRecord."""
    if not isinstance(data, dict):
        there = "missing" if data is None else f"{str(data)[:40]!a}"
        raise BadRecord(f'{name}: {there}; it must be an object like {{"VNI":1,"VtepMAC":"0e:.."}}')
    vni, text = data.get("VNI"), data.get("VtepMAC")
    if vni is not None and (type(vni) is not int or not 0 <= vni < 1 << 24):
        raise BadRecord(f"{name}.VNI: {str(vni)[:40]!a} must be a whole number from 0 to 16777215")
    if not isinstance(text, str):
        raise BadRecord(f"{name}.VtepMAC: missing; it must be a MAC like 0e:2a:00:00:00:01")
    try:
        mac = mac_number(text)
    except ValueError as error:
        raise BadRecord(f"{name}.VtepMAC: {error}") from None
    if fault := mac_fault(mac):
        raise BadRecord(f"{name}.VtepMAC: {text} {fault}")
    return vni, mac
