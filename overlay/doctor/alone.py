"""A node whose agent does not answer: what stands in its kernel, by subnet.env and the devices' names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lease.families import FAMILIES, V4, Family
from lease.model import Prefix, ip_text, mac_text
from overlay.cni.lists import networks_of, previous_subnet
from overlay.doctor.finding import Finding, Findings, State, ok, unknown
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.entries import PROTOCOL, Address, FoundRoute, Link
from overlay.kernel.route.links import Links
from overlay.node.interfaces import gateway_holders
from overlay.reach import foreign_rules, ways
from overlay.reach.causes import Causes
from overlay.trace.node import Node, NotTraceable

_KINDS = {"vxlan": ("vxlan", 0), "ipip": ("ipip", 20), "wireguard": ("wireguard", 80), "tun": ("wireguard", 80)}
"""Backend and bytes of its outer headers (of VXLAN the family's), by the kind of the device."""
_NAMES = {4: ("flannel.", "flannel-wg"), 6: ("flannel-v6.", "flannel-wg")}
"""flannel.VNI, flannel.ipip, flannel-wg; flannel-v6.VNI, flannel-wg-v6, and flannel-wg of both families."""
NAMED, ASKED = 3, 3
_BY_KERNEL = 2
"""RTPROT_KERNEL: of a route that came with an address."""


def families_of(subnet_file: str) -> list[Family]:
    """Of which a network was made here; IPv4, where none was."""
    return [each for each in FAMILIES.values() if previous_subnet(subnet_file, each.number)] or [V4]


def node_of(subnet_file: str, requests: RequestSocket, family: Family) -> Node:
    """This node. Raises NotTraceable: no network was made here; KernelError, OSError."""
    own = previous_subnet(subnet_file, family.number)
    network = next((each for each in networks_of(subnet_file) if each.family == family.number), None)
    if own is None or network is None:
        raise NotTraceable(f"{subnet_file} is not there, or names no subnet: no agent has made a network here")
    links = {link.ifindex: link for link in requests.links()}
    addresses = tuple(requests.addresses(family))
    tunnel = _tunnel(links, family, own, addresses)
    every = requests.routes(family)
    routes = [route for route in every if _is_of_peer(route, network, own, tunnel)]
    local, lower, port = _under(tunnel)
    lower = lower or next((route.oif for route in routes if tunnel is None or route.oif != tunnel.ifindex), 0)
    lower = lower or next((route.oif for route in every if not route.key.length), 0)
    local = local or next((each.address for each in addresses if each.oif == lower and not each.scope), 0)
    under = links.get(lower)
    if (tunnel is None and not routes) or under is None or not local:
        raise NotTraceable("there is neither a tunnel's device nor a route to a peer: nothing stands of the network")
    kind, overhead = _KINDS[tunnel.kind] if tunnel is not None else ("host-gw", 0)
    overhead = family.overhead if kind == "vxlan" else overhead
    beyond = tunnel or under
    bridges = sorted(links[index].name for index in gateway_holders(own, addresses) if index in links)
    return Node(
        name="this node", own=own, network=network, tunnel=beyond.name, underlay=under.name, local=local, kind=kind,
        port=port, mtu=beyond.mtu, overhead=overhead, links=links, addresses=addresses, bridges=tuple(bridges),
        problems={}, dropped={}, peers=tuple({"path": "direct"} for route in routes if route.oif == lower),
    )  # fmt: skip


def _tunnel(links: dict[int, Link], family: Family, own: Prefix, addresses: Iterable[Address]) -> Link | None:
    """The device that has the base of our subnet: of several networks on a node each has its own."""
    having = {each.oif for each in addresses if each.address == own.base}
    names = _NAMES[family.number]
    found = (link for link in links.values() if link.name.startswith(names) and link.kind in _KINDS)
    return next((link for link in found if link.ifindex in having), None)


def _is_of_peer(route: FoundRoute, network: Prefix, own: Prefix, tunnel: Link | None) -> bool:
    """Ours, and flannel's that go by the device."""
    there = Prefix(network.family, route.key.base, route.key.length)
    by_tunnel = tunnel is not None and route.oif == tunnel.ifindex and route.protocol != _BY_KERNEL
    return network.covers(there) and there != own and (by_tunnel or (bool(route.via) and route.protocol == PROTOCOL))


def _under(tunnel: Link | None) -> tuple[int, int, int]:
    """Local address and interface of the underlay, and the tunnel's port; 0: not known."""
    if tunnel is None:
        return 0, 0, 0
    links = Links()
    try:
        found = links.read(tunnel.name)
    finally:
        links.close()
    if found is None:
        return 0, 0, 0
    return max(found.local, 0), found.lower, max(found.port, 0)


def entries(node: Node, requests: RequestSocket) -> Findings:
    """Whether each peer's entries are whole: they stay while no agent runs, but nobody puts them right."""
    tunnel = node.link(node.tunnel)
    if tunnel is None or not tunnel.up:
        what = f"{node.tunnel} is {'not there' if tunnel is None else 'down'}"
        yield Finding("entries", State.WRONG, what, "no packet goes to or comes from a peer", "start the agent")
        return
    of_tunnel = tunnel if node.kind != "host-gw" else None
    routes = [route for route in requests.routes(node.family) if _is_of_peer(route, node.network, node.own, of_tunnel)]
    by_tunnel = [route for route in routes if of_tunnel is not None and route.oif == of_tunnel.ifindex]
    lacking = list(_lacking(node, tunnel.ifindex, by_tunnel, requests)) if node.kind == "vxlan" else []
    if node.kind == "vxlan":
        lacking += _without_route(node, tunnel.ifindex, by_tunnel, requests)
    if lacking:
        shown = "; ".join(lacking[:NAMED]) + (f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else "")
        yield Finding(
            "entries", State.WRONG, f"of {len(by_tunnel)} peers: {shown}", "their pods are not reached from here",
            "start the agent: it puts them back",
        )  # fmt: skip
        return
    if not routes:
        yield Finding(
            "entries", State.WARN, "no peer has any", "no pod of another node is reached from here", "start the agent"
        )
        return
    parts = []
    if by_tunnel:
        whole = {
            "vxlan": "a route, a neighbour and an FDB entry",
            "wireguard": "a route (their keys were not looked at)",
        }
        parts.append(f"{len(by_tunnel)} by {node.tunnel}, with {whole.get(node.kind, 'a route')} each")
    if len(routes) > len(by_tunnel):
        parts.append(f"{len(routes) - len(by_tunnel)} directly, with a route each")
    what = f"peers in the kernel: {'; '.join(parts)}. Who joins while no agent runs gets none"
    if node.kind == "vxlan":
        yield ok("entries", what)
    else:
        yield unknown("entries", f"{what}; whether these are all is known to the agent alone")


def _without_route(node: Node, oif: int, routes: list[FoundRoute], requests: RequestSocket) -> list[str]:
    """Peers whose neighbour entry stands, and whose route is gone."""
    routed = {route.via for route in routes}
    there = (
        each.address for each in requests.neighbours(node.family, oif) if each.mac and node.network.holds(each.address)
    )
    return [
        f"{ip_text(node.family.number, address)} has a neighbour entry on {node.tunnel}, and no route leads to its subnet"
        for address in there
        if address not in routed
    ]


def ways_of(node: Node, requests: RequestSocket) -> Findings:
    """What the kernel's look-ups and the rules of others do with packets to and from the first peers."""
    tunnel, family = node.number_of(node.tunnel), node.family
    lower = node.number_of(node.underlay)
    of_tunnel = node.link(node.tunnel) if node.kind != "host-gw" else None
    routes = [route for route in requests.routes(family) if _is_of_peer(route, node.network, node.own, of_tunnel)]
    known = {each.mac: each.dst for each in requests.fdb(family, tunnel)} if node.kind == "vxlan" else {}
    macs = {each.address: each.mac for each in requests.neighbours(family, tunnel)} if node.kind == "vxlan" else {}
    bridges = tuple(node.number_of(name) for name in node.bridges)
    here = ways.Here(node.own, tunnel, lower, node.local, bridges, node.port)
    names = {index: link.name for index, link in node.links.items()}
    causes, reader = Causes(family, requests, node.network, names), foreign_rules.Reader(family)
    wrong = [f"{node.link(name).name} is down" for name in node.bridges if not node.link(name).up]  # type: ignore[union-attr]
    flows = []
    for route in routes[:ASKED]:
        direct = of_tunnel is None or route.oif != tunnel
        public_ip = route.via if direct else known.get(macs.get(route.via) or 0) or 0
        peer = ways.Peer(Prefix(family.number, route.key.base, route.key.length), public_ip, direct)
        questions = (each for each in ways.questions(here, peer) if public_ip or each.what not in ways.OF_ONE_PEER)
        for question in questions:
            way = requests.way(family, question.packet)
            if not ways.is_as_asked(question, way):
                what = question.what.format(peer=peer.subnet)
                wrong.append(f"{what} {causes.happens(question, way)}: {causes.cause(question, way)}")
        wants = foreign_rules.of_node(here, {**names, tunnel: node.tunnel}, node.bridges or ("cni0",), node.port)
        flows += [flow for flow in foreign_rules.flows_of(family, wants, peer) if public_ip or not flow.port]
    for _, subject, line, packets in foreign_rules.findings(family, flows, reader):
        if subject == foreign_rules.DROPS:
            wrong.append(line.replace("{these}", packets))
    for line in dict.fromkeys(wrong):
        what, _, mend = line.partition(": ")
        yield Finding("ways", State.WRONG, what, "packets of pods do not get through", mend)
    if not wrong and routes:
        asked = f"{min(len(routes), ASKED)} of {len(routes)} peers"
        yield ok("ways", f"neither the kernel's look-ups nor rules of others stand in the way of {asked}")


def _lacking(node: Node, oif: int, routes: list[FoundRoute], requests: RequestSocket) -> Iterator[str]:
    number = node.family.number
    macs = {each.address: each.mac for each in requests.neighbours(node.family, oif)}
    known = {each.mac: each.dst for each in requests.fdb(node.family, oif)}
    for route in routes:
        subnet = Prefix(number, route.key.base, route.key.length)
        mac = macs.get(route.via)
        if mac is None:
            yield f"{subnet} has no neighbour entry for {ip_text(number, route.via)} on {node.tunnel}"
        elif not known.get(mac):
            yield f"{subnet} has no FDB entry for {mac_text(mac)} on {node.tunnel}"
