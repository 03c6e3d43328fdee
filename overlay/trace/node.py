"""What trace needs to know of a node: interfaces, its subnet, its peers, taken from the agent's status and the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lease.families import FAMILIES, V4, Family
from lease.model import Prefix, ip_number, prefix
from overlay.api.family import network_of
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route.entries import Address, Link
from overlay.node.interfaces import gateway_holders
from overlay.trace.points import Names


class NotTraceable(Exception):
    """One line for the operator: what is missing."""


class WrongEnds(NotTraceable):
    """The addresses are not those of a trace from here."""


class Peer(NamedTuple):
    """A peer, as the status has it. name: of its node, else its public IP."""

    subnet: Prefix
    public_ip: int
    name: str
    direct: bool
    missing: tuple[str, ...]


class Pod(NamedTuple):
    """An address of our own subnet. link: the node's end of its veth, None: none was found; up: whether its own end is,
    None: not known."""

    address: int
    link: Link | None
    up: bool | None = None
    mac: int = 0
    """Of its own end, 0: not known."""


class Node(NamedTuple):
    """This node. problems: its agent's, by subject; counters: what its guard and anti-spoofing dropped so far."""

    name: str
    own: Prefix
    network: Prefix
    tunnel: str
    underlay: str
    local: int
    kind: str
    port: int
    mtu: int
    overhead: int
    links: Mapping[int, Link]
    addresses: tuple[Address, ...]
    bridges: tuple[str, ...]
    problems: Mapping[str, str]
    dropped: Mapping[str, int]
    peers: tuple[Mapping[str, Any], ...]
    lifted: bool = False
    """Packets between its pods are forwarded by it, not bridged."""

    @property
    def family(self) -> Family:
        """Of its pods."""
        return FAMILIES[self.own.family]

    def number_of(self, name: str) -> int:
        """The number of an interface, 0: there is none of that name."""
        return next((index for index, link in self.links.items() if link.name == name), 0)

    def link(self, name: str) -> Link | None:
        """An interface by name."""
        return self.links.get(self.number_of(name))

    def is_own(self, address: int) -> bool:
        """Whether an address is this node's itself."""
        return any(each.address == address for each in self.addresses)

    def peer_of(self, address: int) -> Peer | None:
        """The peer whose pod, or VTEP, has an address."""
        for each in self.peers:
            subnet = prefix(each["subnet"])
            if subnet.holds(address):
                public_ip = ip_number(each["public_ip"], subnet.family)
                name = each["node_name"] or each["public_ip"]
                return Peer(subnet, public_ip, name, each["path"] == "direct", tuple(each["missing"]))
        return None

    @property
    def bridge(self) -> str:
        """The one by which pods are attached, `cni0` while there is none."""
        return self.bridges[0] if self.bridges else "cni0"

    def names(self, pod: Pod | None, direct: bool, tunnel: bool = True) -> Names:
        """The interfaces of a way. tunnel: it leads to a peer."""
        veth = pod.link.name if pod is not None and pod.link is not None else ""
        if not tunnel:
            return Names(veth, self.bridge, "", "", self.port)
        return Names(veth, self.bridge, "" if direct else self.tunnel, self.underlay, self.port, self.kind == "vxlan")


def read(found: Mapping[str, Any], requests: RequestSocket, family: Family = V4) -> Node:
    """This node, by its agent's status, as a view of the family. Raises NotTraceable, KernelError."""
    if not found["lease"] or not found["device"] or not found["underlay"]:
        raise NotTraceable("this node has no lease or no device yet: overlay status says what it waits for")
    own = prefix(found["lease"]["subnet"])
    links = {link.ifindex: link for link in requests.links()}
    addresses = tuple(requests.addresses(family))
    holders = gateway_holders(own, addresses)
    names = tuple(sorted(links[index].name for index in holders if index in links))
    return Node(
        name=found["node_name"] or found["lease"]["public_ip"],
        own=own,
        network=network_of(found),
        tunnel=found["device"]["name"],
        underlay=found["underlay"]["interface"],
        local=ip_number(found["device"]["local"], family.number),
        kind=found["device"]["kind"],
        port=found["device"]["port"],
        mtu=found["device"]["mtu"],
        overhead=found["device"]["overhead"],
        links=links,
        addresses=addresses,
        bridges=names,
        problems={each["subject"]: each["text"] for each in found["problems"]},
        dropped=dropped(found),
        peers=tuple(found["peers"]),
        lifted=bool((found.get("antispoof") or {}).get("lifted")),
    )


def dropped(found: Mapping[str, Any]) -> dict[str, int]:
    """What our own tables dropped, by reason."""
    counters: Mapping[str, int] = found["counters"]
    return {name: count for name, count in counters.items() if name.startswith("dropped_")}


def pod_of(node: Node, requests: RequestSocket, address: int, family: Family = V4) -> Pod:
    """The pod of this node that has an address, by the addresses of the other ends of veths."""
    for link in node.links.values():
        if link.kind != "veth" or link.netnsid < 0:
            continue
        with suppress(KernelError):
            end = requests.pod_end(link)
            if end is not None and address in end.addresses.get(family.number, ()):
                return Pod(address, link, end.up, end.mac)
    return Pod(address, None)
