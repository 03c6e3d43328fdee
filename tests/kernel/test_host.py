"""This node's own interfaces in a real kernel: which are the pod network's, which the underlay's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyroute2 import IPRoute

from lease.config import parse_config
from lease.model import ip_number, prefix
from overlay.kernel.netlink import RequestSocket
from overlay.node.links import Host
from overlay.settings.settings import Settings

NETWORK = prefix("192.168.0.0/16")
"""The underlay lies inside: a lab's flat network."""
OWN = prefix("192.168.77.0/24")


@pytest.fixture
def host(inside) -> Iterator[Callable[[], Host]]:
    """The Host of the namespace, with its links read and its underlay chosen."""
    requests = inside(RequestSocket)
    made = inside(lambda: Host(Settings(iface=("eth0",)), requests, dict))

    def read() -> Host:
        made.read_links()
        made.choose_underlay()
        return made

    yield read
    made._links_io.close()  # an agent keeps it for as long as it lives
    requests.close()


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
    assert any(a.deprecated for a in host().addresses.values())
    assert host().interfaces_in(NETWORK) == {index}


CONFIG = parse_config('{"Network":"192.168.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}')


@pytest.mark.parametrize("kube", [False, True])
@pytest.mark.parametrize(
    ("name", "address", "length", "lost"),
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
        ("cnix", "192.168.78.1", 24, []),
        ("docker0", "192.168.78.1", 24, []),
    ],
)
def test_a_lost_subnet_is_that_of_a_bridge_for_pods(inside, host, kube, name, address, length, lost):
    bridge(inside, name, address, length)
    found = host()
    found.settings = found.settings._replace(kube=kube)
    assert [str(subnet) for subnet in found.lost_subnets(CONFIG, OWN)] == lost
    assert found.bridges == ({name} if lost else set())


def test_a_bridge_that_has_another_address_too_is_somebody_elses(inside, host):
    index = bridge(inside, "cni0", "192.168.78.1")

    def more() -> None:
        with IPRoute() as ipr:
            ipr.addr("add", index=index, address="172.17.0.1", prefixlen=16)

    inside(more)
    assert host().lost_subnets(CONFIG, OWN) == []


def test_a_number_for_an_address_is_no_bridges(inside, host):
    def build() -> None:
        with IPRoute() as ipr:
            ipr.addr("add", index=ipr.link_lookup(ifname="flannel.1")[0], address="192.168.78.0", prefixlen=32)

    inside(build)
    found = host()
    assert ip_number("192.168.78.0", 4) in {a.address for a in found.addresses.values()}
    assert found.lost_subnets(CONFIG, OWN) == []
