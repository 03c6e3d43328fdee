"""A namespace with an underlay interface and a vxlan device, the test inside it."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyroute2 import IPRoute

from lease.model import ip_number, mac_number
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.kernel.route.links import Links
from overlay.lab import netns
from tests.support.clock import Clock
from tests.support.world import ready_the_machine

MAC = "0e:2a:00:00:00:01"


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


@pytest.fixture
def space() -> Iterator[str]:
    """A namespace with eth0 192.168.1.2/24 (its peer p0 beside it) and flannel.1, up."""
    name = f"overlay-t{os.getpid()}x{uuid.uuid4().hex[:6]}"
    netns.create(name)

    def build() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname="eth0", kind="veth", peer="p0")
            lower = ipr.link_lookup(ifname="eth0")[0]
            ipr.addr("add", index=lower, address="192.168.1.2", prefixlen=24)
            for link in ("eth0", "p0"):
                ipr.link("set", index=ipr.link_lookup(ifname=link)[0], state="up")
        links = Links()
        links.create(
            VxlanDevice("flannel.1", 1, 8472, ip_number("192.168.1.2", 4), lower, 1450, mac_number(MAC), False, False)
        )
        found = links.read("flannel.1")
        assert found is not None
        links.set_up(found.ifindex)
        links.close()

    try:
        netns.inside(name, build)
        yield name
    finally:
        netns.delete(name)


@pytest.fixture
def inside(space) -> Callable[[Callable[[], Any]], Any]:
    """Run something in that namespace."""
    return lambda act: netns.inside(space, act)


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def sets(inside) -> Iterator[NetfilterSocket]:
    """A socket to nftables of that namespace."""
    made = inside(NetfilterSocket)
    yield made
    made.close()


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before
