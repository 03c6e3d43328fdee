"""The lab's wires: an underlay bridge 192.168.1.0/24 in a namespace of its own, one namespace for each node and pod."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection

from pyroute2 import IPRoute

from overlay.kernel.route.link_wire import IFA_F_NODAD
from overlay.lab import netns

NETWORK, GATEWAY, LENGTH = "192.168.1", "192.168.1.1", 24
NETWORK6, GATEWAY6, LENGTH6 = "fd00:192:168:1", "fd00:192:168:1::1", 64
BRIDGE = "br0"
MAX_NODES = 250


def underlay_name(lab: str) -> str:
    """The namespace of the underlay bridge and of etcd."""
    return f"overlay-{lab}-underlay"


def node_netns(lab: str, node: str) -> str:
    """The namespace of a node, or of a pod (`node1-pod1`)."""
    return f"overlay-{lab}-{node}"


def node_address(number: int) -> str:
    """node1 is 192.168.1.2."""
    return f"{NETWORK}.{number + 1}"


def node_address6(number: int) -> str:
    """node1 is fd00:192:168:1::2."""
    return f"{NETWORK6}::{number + 1:x}"


def make_underlay(lab: str, families: Collection[int] = (4,)) -> None:
    """The bridge, with the gateway's addresses on it."""
    name = underlay_name(lab)
    netns.create(name)

    def build() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname=BRIDGE, kind="bridge")
            index = ipr.link_lookup(ifname=BRIDGE)[0]
            if 4 in families:
                ipr.addr("add", index=index, address=GATEWAY, prefixlen=LENGTH)
            if 6 in families:
                ipr.addr("add", index=index, address=GATEWAY6, prefixlen=LENGTH6, flags=IFA_F_NODAD)
            ipr.link("set", index=index, state="up")

    netns.inside(name, build)


def make_node(lab: str, node: str, number: int, families: Collection[int] = (4,)) -> None:
    """A node: eth0 on the bridge, its addresses, the default routes."""
    name = node_netns(lab, node)
    netns.create(name)
    handle = os.open(netns.path(name), os.O_RDONLY)
    port = f"v{number}"

    def wire() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": handle})
            index = ipr.link_lookup(ifname=port)[0]
            bridge = ipr.link_lookup(ifname=BRIDGE)[0]
            ipr.link("set", index=index, master=bridge, state="up")

    def address() -> None:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname="eth0")[0]
            if 4 in families:
                ipr.addr("add", index=index, address=node_address(number), prefixlen=LENGTH)
            if 6 in families:
                ipr.addr("add", index=index, address=node_address6(number), prefixlen=LENGTH6, flags=IFA_F_NODAD)
            ipr.link("set", index=index, state="up")
            if 4 in families:
                ipr.route("add", dst="default", gateway=GATEWAY)
            if 6 in families:
                ipr.route("add", family=socket.AF_INET6, dst="default", gateway=GATEWAY6)

    try:
        netns.inside(underlay_name(lab), wire)
    finally:
        os.close(handle)
    netns.inside(name, address)
