"""The tunnel over an underlay that is no plain interface: VLAN, bond, bridge, macvlan, ipvlan, VRF, dummy, WireGuard, IPIP.

The development machine's kernel has few of these; Debian's have all (make kernels).
"""

from __future__ import annotations

import subprocess

import pytest

from overlay.lab import matrix, netns, topology
from tests.support.wait import until

BARE = "ip addr flush dev eth0"
BOND = (
    f"{BARE}; ip link set eth0 down; ip link set eth1 down; ip link add bond0 type bond mode active-backup miimon 100;"
    "ip link set eth0 master bond0; ip link set eth1 master bond0; ip link set bond0 up"
)
VRF = "ip link add vrf0 type vrf table 100; ip link set vrf0 up; ip addr add 192.168.7.{a}/24 dev eth1"
DUMMY = (
    "ip link add dummy0 type dummy; ip addr add 10.99.0.{a}/32 dev dummy0; ip link set dummy0 up;"
    "ip route add 10.99.0.{o}/32 via 192.168.1.{o}"
)
ON = "ip addr add 192.168.1.{a}/24 dev %s; ip link set %s up"
KINDS = {
    # script of a node ({a}: its last octet, {o}: the other's), flags, the interface that carries the tunnel
    "VLAN": (f"{BARE}; ip link add link eth0 name eth0.10 type vlan id 10; {ON % ('eth0.10', 'eth0.10')}", (), "eth0.10"),
    "bond": (f"{BOND}; {ON % ('bond0', 'bond0')}", (), "bond0"),
    "VLAN on a bond": (
        f"{BOND}; ip link add link bond0 name bond0.10 type vlan id 10; {ON % ('bond0.10', 'bond0.10')}", (), "bond0.10"),
    "bridge": (f"{BARE}; ip link add ubr type bridge; ip link set eth0 master ubr; {ON % ('ubr', 'ubr')}", (), "ubr"),
    "macvlan": (f"{BARE}; ip link add link eth0 name mv0 type macvlan mode bridge; {ON % ('mv0', 'mv0')}", (), "mv0"),
    "ipvlan": (f"{BARE}; ip link add link eth0 name ipv0 type ipvlan mode l2; {ON % ('ipv0', 'ipv0')}", (), "ipv0"),
    "VRF": (f"{VRF}; ip link set eth1 master vrf0", ("--iface=eth1",), "eth1"),
    "VRF, entered later": (VRF, ("--iface=eth1",), "eth1"),
    "dummy": (DUMMY, ("--iface=dummy0",), "eth0"),
    "dummy as public IP": (DUMMY, ("--public-ip=10.99.0.{a}",), "eth0"),
    "IPIP": (
        ("ip link add ip0 type ipip local 192.168.1.{a} remote 192.168.1.{o};"
         " ip addr add 10.99.0.{a} peer 10.99.0.{o} dev ip0; ip link set ip0 up"), ("--iface=ip0",), "ip0"),
    "WireGuard": ("", ("--iface=wg0",), "wg0"),
}  # fmt: skip


def second_wire(world, node: str, number: int) -> None:
    """eth1, on the underlay's bridge as well."""
    under, there = topology.underlay_name(world.lab), world.namespace(node)
    commands = (
        f"ip -n {under} link add w{number} type veth peer name eth1 netns {there}",
        f"ip -n {under} link set w{number} master br0 up",
        f"ip -n {there} link set eth1 up",
    )
    for command in commands:
        subprocess.run(command.split(), check=True)


def key_pair() -> tuple[str, str]:
    private = subprocess.run(["wg", "genkey"], capture_output=True, text=True, check=True).stdout.strip()
    public = subprocess.run(["wg", "pubkey"], input=private, capture_output=True, text=True, check=True).stdout.strip()
    return private, public


def made(world, kind: str) -> list:
    """Two nodes with an underlay of that kind, and their agents."""
    script, flags, _ = KINDS[kind]
    if kind.startswith("VLAN"):
        to_vlan = (
            "ip link add link br0 name br0.10 type vlan id 10 && ip addr flush dev br0"
            " && ip addr add 192.168.1.1/24 dev br0.10 && ip link set br0.10 up"
        )
        path = netns.path(topology.underlay_name(world.lab))
        subprocess.run(["nsenter", f"--net={path}", "sh", "-ec", to_vlan], check=True)
    keys = {n: key_pair() for n in (1, 2)} if kind == "WireGuard" else {}
    agents = []
    for n in (1, 2):
        name, a, o = world.node(n), n + 1, 4 - n
        second_wire(world, name, n + 50)
        world.run(name, "sh", "-ec", script.format(a=a, o=o) or "true")
        world.run(name, "sh", "-ec", "ip route | grep -q default || ip route add default via 192.168.1.1")
        if keys:
            private = world.folder / f"key{n}"
            private.write_text(keys[n][0])
            world.run(
                name, "sh", "-ec",
                f"ip link add wg0 type wireguard; wg set wg0 listen-port 5555 private-key {private} peer {keys[3 - n][1]}"
                f" endpoint 192.168.1.{o}:5555 allowed-ips 10.99.0.{o}/32;"
                f" ip addr add 10.99.0.{a}/24 dev wg0; ip link set wg0 up",
            )  # fmt: skip
    for n in (1, 2):
        given = (flag.format(a=n + 1) for flag in flags)
        agents.append(world.agent(f"node{n}", f"--node-name=node{n}", *given))
    return agents


@pytest.mark.parametrize("direct", [False, True], ids=["by tunnel", "direct routing"])
@pytest.mark.parametrize("kind", KINDS)
def test_pods_reach_each_other_over(world, kind, direct):
    world.config(Backend={"Type": "vxlan", "DirectRouting": direct})
    agents = made(world, kind)
    for agent in agents:
        agent.wait_ready(60)
    until("they have their peers", lambda: all(len(agent.status()["peers"]) == 1 for agent in agents), 30)
    if kind == "VRF, entered later":
        for agent in agents:
            world.run(agent.node, "ip", "link", "set", "eth1", "master", "vrf0")
    pods = [world.pod(agent, "a") for agent in agents]

    def reached() -> bool:
        with matrix.Wires(pods) as wires:
            return all(cell.ok for cell in wires.all())

    until("small packets and full-size ones pass", reached, 30)
    assert {agent.status()["underlay"]["interface"] for agent in agents} == {KINDS[kind][2]}
    until("no problem is told", lambda: not any(agent.problems() for agent in agents), 15)
    if kind in ("WireGuard", "IPIP"):
        assert [peer["path"] for agent in agents for peer in agent.status()["peers"]] == ["vxlan"] * 2, "no ARP there"
    if kind.endswith("bond"):
        for agent in agents:
            world.run(agent.node, "ip", "link", "set", "eth0", "down")
        until("after the failover", reached, 30)
