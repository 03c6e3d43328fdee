"""The node's network as the tunnel needs it: sysctls, firewalls, MTUs, offloads, addresses."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lease.families import V4
from lease.model import ip_text, mac_text, prefix
from lease.tenure.claim import Answer
from overlay.doctor.finding import Finding, Findings, State, ok, unknown
from overlay.kernel.netlink import KernelError, RequestSocket, error_text
from overlay.kernel.nftables import iptables, program
from overlay.kernel.route.links import read_sysctl, write_sysctl
from overlay.node.sysctls import bridge_filter_fault, wanted_sysctls, wanted_sysctls_of_ipv6
from overlay.probes import ladder
from overlay.probes.ladder import Rung
from overlay.process.files import read_text
from overlay.trace.node import Node
from overlay.trace.pods import queues

PEERS, CONNECT_S = 3, 1.0
CLOSED_PORT = 1
"""Nobody listens there (tcpmux): what answers with a reset has taken the packet."""


def sysctls(node: Node) -> Findings:
    """Those that pods' traffic needs."""
    direct = any(each["path"] == "direct" for each in node.peers)
    if node.family is V4:
        wrong = wanted_sysctls(node.tunnel, node.underlay, direct, node.bridges, read_sysctl)
    else:
        own = (link.name for link in node.links.values() if link.kind not in ("veth", "bridge"))
        wrong = wanted_sysctls_of_ipv6(node.tunnel, node.underlay, node.bridges, own, read_sysctl)
    for name, value in wrong.items():
        shown = name.replace("/", ".")
        yield Finding(
            "sysctls",
            State.WRONG,
            f"{shown} is {read_sysctl(name)}",
            "packets of pods are not forwarded, or dropped as spoofed; the agent sets it: somebody sets it back",
            f"sysctl -w {shown}={value}; grep -r {shown.split('.')[-1]} /etc/sysctl.conf /etc/sysctl.d",
            partial(write_sysctl, name, value),
        )
    if not wrong:
        filters = ", and rp_filter lets packets of peers in" if node.family is V4 else ""
        yield ok("sysctls", f"forwarding is on{filters}")
    if node.family is not V4:
        return
    if fault := bridge_filter_fault(read_sysctl):
        what, _, mend = fault.partition("; ")
        yield Finding(
            "bridge filter", State.WARN, what, "kube-proxy's rules must see packets between pods of one node", mend
        )
    else:
        yield ok("bridge filter", "bridge-nf-call-iptables is on")


_DEAF = {
    "net/ipv4/icmp_echo_ignore_all": ("1", State.WARN, "no ping is answered: others call this node unreachable"),
    "net/ipv4/conf/all/arp_ignore": ("8", State.WRONG, "no ARP is answered: nobody finds this node"),
    "net/ipv4/conf/{underlay}/arp_ignore": ("8", State.WRONG, "no ARP is answered: nobody finds this node"),
}


_DEAF6 = {"net/ipv6/icmp/echo_ignore_all": ("1", State.WARN, "no ping is answered: others call this node unreachable")}


def deaf(node: Node) -> Findings:
    """Sysctls by which a node does not answer others."""
    for name, (value, state, why) in (_DEAF if node.family is V4 else _DEAF6).items():
        name = name.format(underlay=node.underlay)  # noqa: PLW2901
        if read_sysctl(name) == value:
            shown = name.replace("/", ".")
            yield Finding("sysctls", state, f"{shown} is {value}", why, f"sysctl -w {shown}=0")


def held(node: Node) -> Findings:
    """Queueing disciplines of others, and IPsec policies, on the way of pods' packets."""
    requests = RequestSocket()
    try:
        bridges = {link.ifindex for link in node.links.values() if link.name in node.bridges}
        ports = (link.name for link in node.links.values() if link.master in bridges)
        names = node.tunnel, node.underlay, *node.bridges, *ports
        lines = list(queues(node, names, requests))
    finally:
        requests.close()
    for line in lines:
        what, _, look = line.partition(": ")
        yield Finding("queues", State.WARN, what, "it may hold or drop packets of pods", look)
    done = subprocess.run(["ip", "xfrm", "policy"], capture_output=True, text=True, timeout=5, check=False)
    if "action block" in done.stdout:
        yield Finding(
            "IPsec",
            State.WARN,
            "there are policies that block packets",
            "those of pods may be among them",
            "ip xfrm policy",
        )
    if not lines and done.returncode == 0 and "action block" not in done.stdout:
        yield ok("queues and IPsec", "none that holds or blocks packets")


# --- firewalls

_KNOWN = (
    ("overlay", "ours"), ("firewalld", "firewalld"), ("kube", "kube-proxy"), ("docker", "docker"), ("cali", "Calico"),
    ("f2b", "fail2ban"), ("crowdsec", "crowdsec"), ("libvirt", "libvirt"), ("netavark", "podman"), ("ufw", "ufw"),
)  # fmt: skip


def firewalls(node: Node) -> Findings:
    """Who has rules where packets of pods go, in the order in which they are asked; and what they do."""
    family = node.family
    try:
        chains = program.base_chains(family.nft)
    except KernelError as error:
        yield unknown("firewalls", error_text(error), "apt-get install nftables")
        return
    for hook in ("forward", "input"):
        there = [chain for chain in chains if chain.hook == hook]
        there.sort(key=lambda chain: chain.priority)
        order = ", ".join(f"{chain.table} {chain.name} ({_whose(chain.table)}, {chain.priority})" for chain in there)
        yield ok(f"firewalls: {hook}", f"in this order: {order}" if order else "nobody has rules")
    old = iptables.legacy_tables(family.number)
    if old and any(chain.table in ("filter", "nat") for chain in chains):
        yield Finding(
            "firewalls",
            State.WARN,
            f"the old iptables (tables {', '.join(old)}) and nftables are both in use",
            "each packet goes through both, and who reads the one does not see the other's rules",
            "update-alternatives --set iptables /usr/sbin/iptables-nft, and restart who wrote the old rules",
        )


def _whose(table: str) -> str:
    found = (name for start, name in _KNOWN if table.lower().startswith(start))
    return next(found, "iptables" if table in ("filter", "nat", "mangle", "raw", "security") else "another program")


# --- MTUs


def mtus(node: Node, subnet_file: str, devices: Mapping[str, int]) -> Findings:
    """Pods' interfaces must not have a larger one than the tunnel's device. devices: each family's MTU, by its name."""
    under, tunnel = node.link(node.underlay), node.link(node.tunnel)
    if under is None or tunnel is None:
        yield Finding(
            "MTU", State.WRONG, f"{node.tunnel if tunnel is None else node.underlay} is not there", "", "overlay status"
        )
        return
    wrong = 0
    if tunnel.mtu > under.mtu - node.overhead:
        wrong += 1
        yield Finding(
            "MTU",
            State.WRONG,
            f"{node.tunnel} has {tunnel.mtu}, {node.underlay} {under.mtu}",
            f"the tunnel's packets need {node.overhead} bytes more than what they carry: full-size ones are lost",
            f"set Backend.MTU in the network config to {under.mtu} or less, or take it out",
        )
    bridges = {link.ifindex for link in node.links.values() if link.name in node.bridges}
    large = [
        link.name
        for link in node.links.values()
        if link.mtu > tunnel.mtu and (link.ifindex in bridges or link.master in bridges)
    ]
    if large:
        wrong += 1
        shown = ", ".join(large[:4]) + (f" and {len(large) - 4} more" if len(large) > 4 else "")
        yield Finding(
            "MTU",
            State.WARN,
            f"{shown} have more than the {tunnel.mtu} of {node.tunnel}",
            "pods send packets that do not fit into the tunnel: TCP learns it by ICMP, where nobody filters that;"
            " UDP is fragmented or lost",
            "make these pods anew: the CNI list gives the MTU of subnet.env to new ones",
        )
    said = next(
        (line.partition("=")[2] for line in read_text(subnet_file).splitlines() if line.startswith("FLANNEL_MTU=")), ""
    )
    smallest = min(devices, key=lambda name: devices[name], default=node.tunnel)
    if said and said != str(devices.get(smallest, tunnel.mtu)):
        wrong += 1
        yield Finding(
            "MTU", State.WRONG, f"{subnet_file} says {said}, {smallest} has {devices.get(smallest, tunnel.mtu)}",
            "new pods get that",
            "overlay status: the agent writes it",
        )  # fmt: skip
    if not wrong:
        yield ok("MTU", f"{node.underlay} {under.mtu}, {node.tunnel} {tunnel.mtu}, no pod has more")


# --- offloads


def offloads(node: Node) -> Findings:
    """Whether packets whose checksum the network card (or the device of a virtual machine) makes arrive: some make it wrong
    inside of VXLAN. A TCP connection is tried where pings pass, whose checksum is made by us."""
    peers = [(each["node_name"] or each["public_ip"], prefix(each["subnet"]).base) for each in node.peers]
    asked = ladder.ask(node.family, [Rung("", vtep) for _, vtep in peers[: 4 * PEERS]], 2, 0.5) if peers else []
    answering = [peer for peer, each in zip(peers, asked, strict=False) if each.outcome.ok][:PEERS]
    if not node.overhead:
        return  # nothing encapsulates
    if not answering:
        yield unknown("offloads", "no peer answers pings, by which a fault of checksums could be told from others")
        return
    silent = [name for name, vtep in answering if not _takes_tcp(ip_text(node.family.number, vtep))]
    if len(silent) == len(answering):
        yield Finding(
            "offloads",
            State.WARN,
            f"{', '.join(silent)} answer pings through the tunnel, not TCP",
            "either their firewalls drop TCP to the nodes themselves, or a network card or hypervisor makes wrong checksums"
            " inside of VXLAN",
            f"ethtool -K {node.tunnel} tx-checksum-ip-generic off, and try again: if TCP passes then, it is that",
        )
    else:
        yield ok(
            "offloads", f"TCP passes the tunnel to {', '.join(name for name, _ in answering if name not in silent)}"
        )


def _takes_tcp(address: str) -> bool:
    try:
        with socket.create_connection((address, CLOSED_PORT), CONNECT_S):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def duplicates(node: Node, who_answers: Callable[[int], Answer]) -> Findings:
    """Whether another machine has our address. Of IPv6 the kernel finds that itself (RFC 4862, 5.4)."""
    address = ip_text(node.family.number, node.local)
    if not node.family.by_arp:
        yield from _refused_by_kernel(address)
        return
    found = who_answers(node.local)
    if found.by is not None:
        yield Finding(
            "addresses",
            State.WRONG,
            f"{mac_text(found.by)} answers for {address}, too",
            "peers' packets go to whoever answers last",
            f"find it: arping -D -I {node.underlay} {address}; bridge fdb or the switch says the port",
        )
    elif found.conclusive:
        yield ok("addresses", f"nobody else answers for {address}")
    else:
        yield unknown("addresses", f"whether anybody else has {address} cannot be asked on this link")


def _refused_by_kernel(address: str) -> Findings:
    done = subprocess.run(
        ["ip", "-6", "-o", "addr", "show", "dadfailed"], capture_output=True, text=True, timeout=5, check=False
    )
    taken = [words[3] for words in map(str.split, done.stdout.splitlines()) if len(words) > 3]
    if done.returncode:
        yield unknown("addresses", f"duplicate addresses cannot be asked for: {done.stderr.strip()}")
    elif taken:
        yield Finding(
            "addresses",
            State.WRONG,
            f"another machine has {', '.join(taken)}, so that the kernel does not use it here",
            "who is sent to it there gets nothing",
            "give one of both another address; ip -6 addr show dadfailed",
        )
    else:
        yield ok("addresses", f"nobody else has {address}")


def counters(found: Mapping[str, Any]) -> Findings:
    """What our own tables dropped, and how often things had to be mended: somebody works against the agent."""
    mended = {name: count for name, count in found["counters"].items() if name.startswith("mended_") and count > 20}
    for name, count in mended.items():
        yield Finding(
            "repairs",
            State.WARN,
            f"{name.removeprefix('mended_').replace('_', ' ')} were put right {count} times",
            "somebody alters them again and again, and packets are lost each time",
            "the agent's log names each (mended); look for a second network agent, a script, networkd",
        )
