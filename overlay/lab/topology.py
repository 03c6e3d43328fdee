"""The lab's wires: an underlay bridge 192.168.1.0/24 in a namespace of its own, one namespace for each node and pod."""

from __future__ import annotations

import os

from pyroute2 import IPRoute

from overlay.lab import netns

NETWORK, GATEWAY, LENGTH = "192.168.1", "192.168.1.1", 24
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


def make_underlay(lab: str) -> None:
    """The bridge, with the gateway's address on it."""
    name = underlay_name(lab)
    netns.create(name)

    def build() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname=BRIDGE, kind="bridge")
            index = ipr.link_lookup(ifname=BRIDGE)[0]
            ipr.addr("add", index=index, address=GATEWAY, prefixlen=LENGTH)
            ipr.link("set", index=index, state="up")

    netns.inside(name, build)


def make_node(lab: str, node: str, number: int) -> None:
    """A node: eth0 on the bridge, its address, the default route."""
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
            ipr.addr("add", index=index, address=node_address(number), prefixlen=LENGTH)
            ipr.link("set", index=index, state="up")
            ipr.route("add", dst="default", gateway=GATEWAY)

    try:
        netns.inside(underlay_name(lab), wire)
    finally:
        os.close(handle)
    netns.inside(name, address)
