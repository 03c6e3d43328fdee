"""Leases and nodes for tests, from as few words as possible."""

from __future__ import annotations

from lease.backend_config import VxlanConfig
from lease.families import V4, V6
from lease.model import Endpoint, Lease, Prefix, ip_number, mac_number, prefix
from overlay.backends.choose import backend_of
from overlay.peers.plan import Node

OWN_MAC = mac_number("0a:00:00:00:00:02")


def lease(
    subnet: str, ip: str, mac: str = "", *, created: int = 1, vni: int = 1, backend: str = "vxlan", node: str = ""
) -> Lease:
    """A peer's record; its MAC is made from its public IP where none is given."""
    where, address = prefix(subnet), ip_number(ip, 4)
    number = mac_number(mac) if mac else (0x0A << 40) | address
    return Lease(
        subnet.replace("/", "-"), backend, Endpoint(where, address, vni, number), None, node, created, created, 0
    )


def widened(it: Prefix) -> Prefix:
    """A prefix of IPv6 that lies to others as this one of IPv4 does."""
    return Prefix(6, it.base << 96, it.length)


def in_family(record: Lease, family: int) -> Lease:
    """A record of IPv4, or the same for IPv6: its addresses are the first 32 bits there."""
    end = record.first
    if family == end.subnet.family:
        return record
    return record._replace(v4=None, v6=end._replace(subnet=widened(end.subnet), public_ip=end.public_ip << 96))


def node_in(family: int) -> Node:
    """`node` of IPv4, or the same for IPv6."""
    here = node()
    if family == 4:
        return here
    return here._replace(
        network=widened(here.network),
        backend=backend_of(VxlanConfig(), V6),
        own=in_family(here.own, 6),
        on_link=tuple(map(widened, here.on_link)),
        neighbours=tuple(map(widened, here.neighbours)),
        addresses=frozenset(address << 96 for address in here.addresses),
    )


def node(**change) -> Node:
    """Node 192.168.1.2 with 10.244.2.0/24 in 10.244.0.0/16."""
    own = lease("10.244.2.0/24", "192.168.1.2", "0a:00:00:00:00:02")
    fields = {
        "network": prefix("10.244.0.0/16"),
        "backend": backend_of(VxlanConfig(), V4),
        "own": own,
        "on_link": (prefix("192.168.1.0/24"),),
        "neighbours": (prefix("192.168.1.0/24"),),
        "addresses": frozenset({ip_number("192.168.1.2", 4)}),
        "retained": (),
    }
    return Node(**(fields | change))
