"""This node's own interfaces in a real kernel: which are the pod network's, which the underlay's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyroute2 import IPRoute

from lease.config import parse_config
from lease.families import V4
from lease.model import ip_number, prefix
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.kernel.netlink import RequestSocket
from overlay.node.interfaces import interfaces_within, lost_subnets
from overlay.node.links import LinksSource
from overlay.node.underlay_source import UnderlaySource
from overlay.settings.settings import Settings

NETWORK = prefix("192.168.0.0/16")
"""The underlay lies inside: a lab's flat network."""
OWN = prefix("192.168.77.0/24")


@pytest.fixture
def host(inside) -> Iterator[Callable[[], Inputs]]:
    """The inputs of the namespace, with its links read and its underlay chosen."""
    requests = inside(RequestSocket)
    current = CurrentInputs(Settings(iface=("eth0",)))
    links, underlay = (
        LinksSource(current, (V4,), requests),
        UnderlaySource(current, V4, requests, lambda _number: {}, lambda: None),
    )

    def read() -> Inputs:
        links.reconcile(())
        underlay.reconcile(underlay.wants(current.inputs))
        return current.inputs

    yield read
    requests.close()


def lost(found: Inputs, kube: bool = False) -> dict[str, list[str]]:
    assert CONFIG.v4 is not None
    there = lost_subnets(CONFIG.v4, OWN, kube, found.links, found.addresses_of(4), found.underlays[4])
    return {name: [str(subnet) for subnet in subnets] for name, subnets in there.items()}


def bridge(inside: Callable[[Callable[[], Any]], Any], name: str, address: str, length: int = 24) -> int:
    def build() -> int:
        with IPRoute() as ipr:
            ipr.link("add", ifname=name, kind="bridge")
            index = int(ipr.link_lookup(ifname=name)[0])
            ipr.addr("add", index=index, address=address, prefixlen=length)
            return index

    made: int = inside(build)
    return made


def test_an_underlay_inside_the_network_is_not_a_way_of_pods_nor_is_its_deprecated_address(inside, host):
    def deprecate() -> None:
        with IPRoute() as ipr:
            lower, far = (ipr.link_lookup(ifname=name)[0] for name in ("eth0", "p0"))
            ipr.addr("add", index=lower, address="192.168.5.2", prefixlen=24, preferred_lft=0, valid_lft=9999)
            # another machine's address on the same wire, on an interface that is not the underlay
            ipr.addr("add", index=far, address="192.168.1.9", prefixlen=24)

    index = bridge(inside, "cni0", "192.168.77.1")
    inside(deprecate)
    found = host()
    assert any(a.deprecated for a in found.addresses_of(4).values())
    assert interfaces_within(NETWORK, found.addresses_of(4).values(), found.underlays[4]) == {index}


CONFIG = parse_config('{"Network":"192.168.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}')


@pytest.mark.parametrize("kube", [False, True])
@pytest.mark.parametrize(
    ("name", "address", "length", "expected"),
    [
        ("cni0", "192.168.78.1", 24, ["192.168.78.0/24"]),
        ("cni12", "192.168.79.1", 24, ["192.168.79.0/24"]),
        ("cni0", "192.168.78.65", 26, []),  # no subnet that this node can have had
        ("cni0", "192.168.80.1", 20, []),
        ("cni0", "192.168.78.7", 24, []),  # no gateway
        ("cni0", "192.168.77.1", 24, []),  # our own
        ("cni0", "192.168.0.1", 16, []),  # over our own: CRI-O's bridge may be so
        ("cni0", "192.0.0.1", 8, []),  # over the whole network
        ("cni0", "172.17.0.1", 24, []),  # another network's
        ("cni0", "192.168.1.1", 24, []),  # the underlay's
        ("cnix", "192.168.78.1", 24, ["192.168.78.0/24"]),  # by whatever name
        ("docker0", "192.168.78.1", 24, ["192.168.78.0/24"]),
    ],
)
def test_a_lost_subnet_is_that_of_a_bridge_for_pods(inside, host, kube, name, address, length, expected):
    bridge(inside, name, address, length)
    assert lost(host(), kube) == ({name: expected} if expected else {})


def test_a_bridge_that_has_another_address_too_is_somebody_elses(inside, host):
    index = bridge(inside, "cni0", "192.168.78.1")

    def more() -> None:
        with IPRoute() as ipr:
            ipr.addr("add", index=index, address="172.17.0.1", prefixlen=16)

    inside(more)
    assert lost(host()) == {}


def test_a_number_for_an_address_is_no_bridges(inside, host):
    def build() -> None:
        with IPRoute() as ipr:
            ipr.addr("add", index=ipr.link_lookup(ifname="flannel.1")[0], address="192.168.78.0", prefixlen=32)

    inside(build)
    found = host()
    assert ip_number("192.168.78.0", 4) in {a.address for a in found.addresses_of(4).values()}
    assert lost(found) == {}
