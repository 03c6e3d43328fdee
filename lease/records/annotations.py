"""flannel's Node annotations <-> Lease. Pure; golden file in tests/unit/recordings/kube-vxlan.txt.

Source: flannel pkg/subnet/kube/annotations.go (names, prefix rules), kube.go nodeToLease and AcquireLease (values).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

from lease.families import FAMILIES
from lease.model import Endpoint, Lease, Prefix, ip_number, ip_text, prefix
from lease.records.codec import SOURCE_FAMILY, BadRecord, backend_data, endpoint, outer_source, read_parts

DEFAULT_PREFIX = "flannel.alpha.coreos.com"
_FORM = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?/(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?-?)?")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
WITH_DATA = ("vxlan", "wireguard")
"""The backends that publish more than an address."""
LONGEST = 4096
"""Bytes of an annotation we read; a real one has some 50."""


class Names(NamedTuple):
    """The names of the annotations under one prefix, as flannel builds them."""

    managed: str
    backend_type: str
    data: Mapping[int, str]
    """backend-data, backend-v6-data: by family, as the next three."""
    public_ip: Mapping[int, str]
    overwrite: Mapping[int, str]
    node_public_ip: Mapping[int, str]
    source: str
    """Ours: the outer source of a node's frames, where it is not public-ip."""

    @classmethod
    def of(cls, text: str) -> Names:
        """Of --kube-annotation-prefix: `flannel.alpha.coreos.com`, or `example.com/network-`.

        Raises:
            ValueError: it cannot stand before an annotation's name.
        """
        lead = text if "/" in text else f"{text}/"
        if not lead.endswith(("/", "-")):
            lead += "-"
        if not _FORM.fullmatch(lead):
            raise ValueError(f"{text!r} must be a DNS name, with a slash and a word after it at most")
        return cls(
            f"{lead}kube-subnet-manager",
            f"{lead}backend-type",
            {4: f"{lead}backend-data", 6: f"{lead}backend-v6-data"},
            {4: f"{lead}public-ip", 6: f"{lead}public-ipv6"},
            {4: f"{lead}public-ip-overwrite", 6: f"{lead}public-ipv6-overwrite"},
            {4: f"{lead}node-public-ip", 6: f"{lead}node-public-ipv6"},
            f"{lead}overlay-source",
        )

    def read(self) -> tuple[str, ...]:
        """All names that say something to us."""
        by_family = (self.data, self.public_ip, self.overwrite, self.node_public_ip)
        return (self.managed, self.backend_type, *(name for names in by_family for name in names.values()), self.source)


class Hints(NamedTuple):
    """What an operator wrote on our own Node, by family. public_ip: the local address to use (node-public-ip); overwrite:
    what to publish instead of it (public-ip-overwrite). 0 or missing: nothing; None: something that is no address, so what
    it said before holds. faults: what cannot be followed, one line each."""

    public_ip: Mapping[int, int | None] = {}
    overwrite: Mapping[int, int | None] = {}
    faults: tuple[str, ...] = ()


def seniority(created: int, uid: str) -> int:
    """A number by which the older Node comes first: creationTimestamp in seconds, then the uid."""
    return max(0, created) << 128 | uid_number(uid)


def uid_number(uid: str) -> int:
    """A uid as a number; one that is no UUID by its first 16 bytes."""
    if _UUID.fullmatch(uid):
        return int(uid.replace("-", ""), 16)
    return int.from_bytes(uid.encode()[:16].ljust(16, b"\0"), "big")


def node_subnets(pod_cidrs: Iterable[object]) -> dict[int, Prefix]:
    """spec.podCIDRs by family, in whatever order they stand; host bits are masked away, the first of a family counts.

    Raises:
        BadRecord: one of them is not a prefix.
    """
    found: dict[int, Prefix] = {}
    for text in pod_cidrs:
        try:
            subnet = prefix(str(text))
        except ValueError:
            raise BadRecord(f"podCIDR {str(text)[:60]!a} is not a prefix") from None
        found.setdefault(subnet.family, subnet)
    return found


def decode_node(
    name: str, annotations: Mapping[str, str], subnets: Mapping[int, Prefix], names: Names, created: int, uid: int
) -> Lease | None:
    """What a Node's annotations say to its peers; None where no agent has written them (yet).

    Args:
        created: `seniority` of the Node; uid: `uid_number`, kept as the lease's handle.

    Raises:
        BadRecord: names the annotation and what was expected there.
    """
    if annotations.get(names.managed) != "true":
        return None
    backend = annotations.get(names.backend_type, "")
    parts = [
        (subnet, partial(_endpoint, subnet, annotations, names, backend))
        for family, subnet in sorted(subnets.items())
        if annotations.get(names.public_ip[family]) is not None
    ]
    if not parts:
        missing = names.public_ip[min(subnets)] if subnets else ""
        raise BadRecord(f"{missing} is missing" if missing else "it has no podCIDR yet")
    return Lease.of(name, backend[:32], read_parts(parts), name, created, uid)


def _endpoint(subnet: Prefix, annotations: Mapping[str, str], names: Names, backend: str) -> Endpoint:
    """The part of a family. Raises BadRecord."""
    family = subnet.family
    public_ip, data = annotations[names.public_ip[family]], annotations.get(names.data[family])
    try:
        address = ip_number(str(public_ip), family)
    except ValueError:
        raise BadRecord(f"{names.public_ip[family]}: {public_ip!a:.80} must be an IPv{family} address") from None
    source = outer_source(annotations.get(names.source), names.source, address) if family == SOURCE_FAMILY else 0
    value = _data(names.data[family], data) if backend in WITH_DATA else None
    return endpoint(subnet, address, source, backend, value, names.data[family])


def _data(name: str, text: str | None) -> object:
    if text is None or len(text) > LONGEST:
        raise BadRecord(f"{name}: missing" if text is None else f"{name}: has {len(text)} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{name}: not JSON: {str(error)[:100]!a}") from None


def encode(lease: Lease, names: Names) -> dict[str, str | None]:
    """The annotations of a lease, byte for byte flannel's; None: to be removed (a family that this lease lacks).

    flannel cuts its old MAC out of backend-data by text: compact, VNI first, nothing behind the MAC.
    """
    wanted: dict[str, str | None] = {names.managed: "true", names.backend_type: lease.backend}
    for family in FAMILIES:
        end = lease.endpoint(family)
        # "null" where the backend publishes nothing, as flannel writes it
        wanted[names.data[family]] = None if end is None else json.dumps(backend_data(end), separators=(",", ":"))
        if family == SOURCE_FAMILY:
            wanted[names.source] = ip_text(family, end.source) if end is not None and end.source else None
        wanted[names.public_ip[family]] = None if end is None else ip_text(family, end.public_ip)
    return wanted


def hints(annotations: Mapping[str, str], names: Names) -> Hints:
    """What an operator asks of our own Node."""
    faults: list[str] = []

    def address(name: str, family: int) -> int | None:
        text = annotations.get(name, "")
        try:
            return ip_number(text, family) if text else 0
        except ValueError:
            faults.append(f"annotation {name}: {text!a:.60} must be an IPv{family} address; its previous value is kept")
            return None

    public_ip, overwrite = (
        {family: address(name, family) for family, name in by_family.items() if annotations.get(name)}
        for by_family in (names.node_public_ip, names.overwrite)
    )
    return Hints(public_ip, overwrite, tuple(faults))
