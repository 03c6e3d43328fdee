"""Networks of IPv6 and of both families: who reaches whom, what is put back, what costs no packet."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack

import pytest

from lease.families import V6
from lease.model import ip_text
from overlay.api.family import of_family
from overlay.lab.matrix import Wires
from tests.support.reach import all_reach
from tests.support.wait import until

SOON = 8.0


def whole(world, before) -> None:
    until("the kernel is as before", lambda: world.kernel("node1", family=V6) == before, SOON)


def test_every_pod_reaches_every_other_by_each_family(world6):
    agents = world6.nodes(3)
    ends = [end for agent in agents for end in world6.pod_ends(agent, "a")]
    assert {end.family for end in ends} == set(world6.families)
    until("addresses are settled", lambda: all_reach(ends), 25)
    with Wires(ends) as wires:
        cells = wires.all()
    assert [cell for cell in cells if not cell.ok] == []
    assert len(cells) == 6 * len(world6.families)
    assert {cell.size for cell in cells} == {1430}, "one MTU for both: the smaller"
    for agent in agents:
        assert agent.problems() == {}
        lines = dict(line.split("=") for line in (agent.run_dir / "subnet.env").read_text().splitlines())
        assert lines["FLANNEL_MTU"] == "1430"
        assert lines["FLANNEL_IPV6_NETWORK"] == "fd00:10:244::/48"
        assert ("FLANNEL_NETWORK" in lines) == (4 in world6.families)
    until(
        "all answer",
        lambda: all(
            each["state"] == "ok"
            for agent in agents
            for family in world6.families
            for each in of_family(agent.status(), family)["reachability"]
        ),
        30,
    )


def test_what_peers_find_is_what_flannel_writes(world6):
    (agent,) = world6.nodes(1)
    ((key, record),) = world6.records().items()
    six = of_family(agent.status(), 6)["lease"]
    dual = 4 in world6.families
    subnet6 = six["subnet"].replace("/", "-")
    assert key.partition("&")[2] == subnet6
    assert record["PublicIPv6"] == "fd00:192:168:1::2"
    assert record["BackendV6Data"] == {"VNI": 1, "VtepMAC": six["vtep_mac"]}
    assert record["PublicIP"] == ("192.168.1.2" if dual else "0.0.0.0")
    assert ("BackendData" in record) == dual
    assert key.startswith("0.0.0.0-0&") != dual
    if dual:
        assert record["BackendData"]["VtepMAC"] != six["vtep_mac"], "each device has its own"


@pytest.mark.parametrize(
    "command",
    [
        "ip -6 route del {subnet} dev flannel-v6.1",
        "ip -6 route replace {subnet} via {gateway} dev flannel-v6.1 onlink metric 2048 mtu 1300",
        "ip -6 neigh del {gateway} dev flannel-v6.1",
        "ip -6 neigh replace {gateway} lladdr 02:00:00:00:00:99 dev flannel-v6.1 nud permanent",
        "bridge fdb del {mac} dev flannel-v6.1",
        "bridge fdb replace {mac} dev flannel-v6.1 dst fd00:192:168:1::99",
        "ip -6 route add fd00:10:244:ff::/64 via {gateway} dev flannel-v6.1 onlink proto 111",
        "ip link set flannel-v6.1 down",
        "ip link del flannel-v6.1",
        "ip -6 addr flush dev flannel-v6.1 scope global",
        "echo 1 > /proc/sys/net/ipv6/conf/flannel-v6.1/disable_ipv6",
        "ip link set flannel-v6.1 mtu 1200",
        "ip -6 route flush dev flannel-v6.1 proto 111; ip -6 neigh flush dev flannel-v6.1 nud permanent",
        "nft delete table ip6 overlay-1-guard",
        "sysctl -qw net.ipv6.conf.all.forwarding=0",
    ],
)
def test_what_somebody_alters_is_put_back(world6, command):
    agents = world6.nodes(2)
    ends = [end for agent in agents for end in world6.pod_ends(agent, "a") if end.family == 6]
    before = world6.kernel("node1", family=V6)
    (base, length), route = next(iter(before["routes"].items()))
    gateway = ip_text(6, route.via)
    mac = of_family(agents[1].status(), 6)["lease"]["vtep_mac"]
    words = {"subnet": f"{ip_text(6, base)}/{length}", "gateway": gateway, "mac": mac}
    until("pods reach each other", lambda: all_reach(ends), 25)
    world6.run("node1", "sh", "-c", command.format(**words))
    if (
        "link del" not in command
    ):  # before packets of full size: a pod remembers for ten minutes what an MTU of 1300 refused
        whole(world6, before)
    until("pods reach each other again", lambda: all_reach(ends), SOON)
    until("nothing is said any more", lambda: agents[0].problems() == {}, 15)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_costs_no_packet_in_either_family(world6, number):
    agents = world6.nodes(2)
    ends = [world6.pod_ends(agent, "a") for agent in agents]
    until("pods reach each other", lambda: all_reach([end for pair in ends for end in pair]), 25)
    writes_before = world6.kernel("node1", family=V6)
    with ExitStack() as stack:
        entered = [stack.enter_context(world6.stream(one, other)) for one, other in zip(*ends, strict=True)]
        agents[0].stop(number)
        again = world6.restart(agents[0]).wait_ready()
        until("it is settled", lambda: world6.has_peers(again, 1))
    assert [stream.lost() for stream in entered] == [0] * len(entered)
    assert world6.kernel("node1", family=V6) == writes_before
    counters = again.status()["counters"]
    assert [name for name in counters if name.startswith("writes_")] == []


def test_a_nodes_own_ipv6_survives_forwarding(world6):
    """A kernel that forwards forgets the default route that a router advertised, unless accept_ra is 2."""
    node = world6.node(1)
    world6.run(node, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=0", "net.ipv6.conf.eth0.accept_ra=1")
    world6.run(node, "ip", "-6", "route", "del", "default")
    world6.run(node, "ip", "-6", "route", "add", "default", "via", "fd00:192:168:1::1", "dev", "eth0", "proto", "ra")
    world6.agent(node, "--node-name=node1", "--iface=eth0").wait_ready()
    until(
        "it forwards",
        lambda: world6.run(node, "sysctl", "-n", "net.ipv6.conf.all.forwarding").strip() == "1",
    )
    assert world6.run(node, "sysctl", "-n", "net.ipv6.conf.eth0.accept_ra").strip() == "2"
    assert "default via fd00:192:168:1::1" in world6.run(node, "ip", "-6", "route")


def test_a_family_that_is_gone_costs_the_other_nothing(world):
    agents = world.nodes(2)
    ends = [world.pod_ends(agent, "a") for agent in agents]
    four = [pair[0] for pair in ends]
    with world.stream(*four) as stream:
        world.run("node1", "ip", "-6", "addr", "flush", "dev", "eth0", "scope", "global")
        until("it is said", lambda: "underlay IPv6" in agents[0].problems(), 15)
        assert agents[0].ready(), "IPv4 is as it was"
        (agents[0].run_dir / "subnet.env").unlink()  # as after a boot
        again = world.restart(agents[0]).wait_ready()
        assert again.status()["lease"]["subnet_ipv6"], "what peers know of us stays"
        assert "FLANNEL_SUBNET=" in (again.run_dir / "subnet.env").read_text(), "pods can be made"
        world.run("node1", "ip", "-6", "addr", "add", "fd00:192:168:1::2/64", "dev", "eth0", "nodad")
        until("IPv6 is back", lambda: again.problems() == {}, 20)
        assert stream.lost() == 0
    until("all is as it was", lambda: all_reach([end for pair in ends for end in pair]), 25)


def test_a_node_without_ipv6_is_a_peer_of_ipv4_alone_and_gets_the_other_later(world):
    (one,) = world.nodes(1)
    world.families = (4,)
    node = world.node(2)
    two = world.agent(node, "--node-name=node2").wait_ready()
    lines = dict(line.split("=") for line in (two.run_dir / "subnet.env").read_text().splitlines())
    assert lines["FLANNEL_SUBNET"] == two.status()["lease"]["subnet"].replace(".0/", ".1/"), "pods can be made"
    assert "FLANNEL_IPV6_SUBNET" not in lines
    assert "&" not in two.status()["lease"]["key"]
    assert "no IPv6 address of its own" in two.problems()["lease family"]
    assert "underlay IPv6" in two.problems()
    until("it is a peer", lambda: [peer["node_name"] for peer in one.status()["peers"]] == ["node2"])
    assert one.status()["peers_ipv6"] == []
    assert one.status()["refused_records"] == []
    assert one.problems() == {}
    subnet = two.status()["lease"]["subnet"]
    world.run(node, "ip", "-6", "addr", "add", "fd00:192:168:1::3/64", "dev", "eth0", "nodad")
    until("it has both", lambda: "&" in two.status()["lease"]["key"], 20)
    until("all is well", lambda: two.problems() == {} and len(one.status()["peers_ipv6"]) == 1, 20)
    assert two.status()["lease"]["subnet"] == subnet, "the key is another, the subnet is not"
    until("pods get addresses of both", lambda: "FLANNEL_IPV6_SUBNET" in (two.run_dir / "subnet.env").read_text())
    assert len(world.records()) == 2


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"BackendV6Data": {"VNI": 1, "VtepMAC": "nonsense"}}, 6),
        ({"PublicIPv6": "nonsense"}, 6),
        ({"PublicIPv6": "fe80::1"}, 6),
        ({"PublicIPv6": "::ffff:192.168.1.9"}, 6),
        ({"PublicIPv6": "ff02::1"}, 6),
        ({"BackendV6Data": None}, 6),
        ({"BackendData": {"VNI": 1, "VtepMAC": "nonsense"}}, 4),
        ({"PublicIP": "0.0.0.0"}, 4),
        ({"PublicIP": "224.0.0.1"}, 4),
        ({"PublicIP": "192.168.1.2"}, 4),
    ],
)
def test_what_is_wrong_with_one_half_of_a_record_costs_that_half(world, change, family):
    (agent,) = world.nodes(1)
    value = {
        "PublicIP": "192.168.1.9",
        "PublicIPv6": "fd00:192:168:1::9",
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:09"},
        "BackendV6Data": {"VNI": 1, "VtepMAC": "0a:00:00:00:06:09"},
    }
    key = "10.244.9.0-24&fd00:10:244:9::-64"
    world.put_record(key, value | change)
    other = 10 - family
    peers = until("the good half is a peer", lambda: of_family(agent.status(), other)["peers"])
    assert [peer["subnet"] for peer in peers] == ["10.244.9.0/24" if other == 4 else "fd00:10:244:9::/64"]
    assert of_family(agent.status(), family)["peers"] == []
    assert key in json.dumps(agent.status()["refused_records"]), "and it is said what is wrong"
    world.put_record(key, value)
    until("both", lambda: all(of_family(agent.status(), each)["peers"] for each in (4, 6)))
    assert agent.status()["refused_records"] == []
