"""Both families by a real API server, with the rights of our manifest."""

from __future__ import annotations

import json
import signal

from lease.families import V6
from tests.support.reach import all_reach
from tests.support.wait import until


def test_nodes_of_both_families(kube_world):
    world = kube_world
    agents = world.nodes(2, "--ip-masq")
    for number, agent in enumerate(agents, 1):
        notes, lease = world.kube.notes(agent.node), agent.status()["lease"]
        assert notes == {
            "kube-subnet-manager": "true",
            "backend-type": "vxlan",
            "backend-data": f'{{"VNI":1,"VtepMAC":"{lease["vtep_mac"]}"}}',
            "backend-v6-data": f'{{"VNI":1,"VtepMAC":"{lease["vtep_mac_ipv6"]}"}}',
            "public-ip": f"192.168.1.{number + 1}",
            "public-ipv6": f"fd00:192:168:1::{number + 1}",
        }
        assert (lease["subnet"], lease["subnet_ipv6"]) == (f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64")
        found = json.loads((agent.run_dir / "cni" / "10-flannel.conflist").read_text())["plugins"][0]
        assert found["ipam"]["ranges"] == [[{"subnet": lease["subnet"]}], [{"subnet": lease["subnet_ipv6"]}]]
        assert found["mtu"] == 1430
    ends = [world.pod_ends(agent, "a") for agent in agents]
    until("all reach all", lambda: all_reach([end for pair in ends for end in pair]), 25)
    until("the condition is told", lambda: world.kube.condition("node1", "OverlayReady"))
    version = world.kube.read("node1")["metadata"]["resourceVersion"]
    streams = [world.stream(one, other) for one, other in zip(*ends, strict=True)]
    entered = [stream.__enter__() for stream in streams]
    agents[0].stop(signal.SIGKILL)
    again = world.restart(agents[0], "--ip-masq").wait_ready()
    until("it has its peers", lambda: world.has_peers(again, 1))
    assert [stream.lost() for stream in entered] == [0, 0]
    assert world.kube.read("node1")["metadata"]["resourceVersion"] == version, "a restart writes nothing"


def test_a_node_with_a_podcidr_of_one_family_is_of_that_one(kube_world):
    world = kube_world
    (one,) = world.nodes(1, "--ip-masq")
    world.node(2, "10.244.2.0/24")
    two = world.agent("node2", "--ip-masq").wait_ready()
    assert "has podCIDR 10.244.2.0/24 only; it needs one of IPv6" in two.problems()["lease family"]
    assert "public-ipv6" not in world.kube.notes("node2")
    until("it is a peer", lambda: [peer["node_name"] for peer in one.status()["peers"]] == ["node2"])
    assert one.status()["peers_ipv6"] == []
    assert one.problems() == {}
    ends = [end for agent in (one, two) for end in world.pod_ends(agent, "a") if end.family == 4]
    until("its pods reach others by IPv4", lambda: all_reach(ends), 20)


def test_a_node_made_again_with_a_podcidr_of_one_family_lives_on(kube_world):
    world = kube_world
    agents = world.nodes(2, "--ip-masq")
    pid = agents[1].process.pid
    for again, cidrs in (
        (("10.244.2.0/24",), True),
        (("10.244.9.0/24",), True),
        (("10.244.9.0/24", "fd00:10:244:9::/64"), False),
    ):
        world.kube.delete("node2")
        world.kube.node("node2", pod_cidrs=again)
        until("it has it", lambda again=again: agents[1].status()["lease"]["subnet"] == again[0], 40)
        until("it says so", lambda lacks=cidrs: ("lease family" in agents[1].problems()) == lacks, 40)
        until("it is ready", agents[1].ready, 40)
    assert (agents[1].process.pid, agents[1].process.poll()) == (pid, None)
    ends = [end for agent in agents for end in world.pod_ends(agent, "a")]
    assert [end.family for end in ends] == [4, 6, 4, 6]
    until("its pods reach others", lambda: all_reach(ends), 20)


def test_an_operators_addresses_of_both_families(kube_world):
    world = kube_world
    (one,) = world.nodes(1)
    world.kube.annotate("node1", public_ipv6_overwrite="fd00:192:168:1::77")
    until("it is published", lambda: world.kube.notes("node1")["public-ipv6"] == "fd00:192:168:1::77")
    assert world.kube.notes("node1")["public-ip"] == "192.168.1.2"
    world.kube.annotate("node1", public_ipv6_overwrite="192.168.1.9")
    until("it is said", lambda: "must be an IPv6 address" in one.problems().get("annotations", ""))
    assert world.kube.notes("node1")["public-ipv6"] == "fd00:192:168:1::77", "what it said before holds"


def test_a_network_of_ipv6_alone(kube_world):
    """Nodes have IPv4 addresses all the same: the API server is reached by one."""
    world = kube_world
    world.config(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    agents = [world.agent(world.node(n, f"fd00:10:244:{n}::/64"), "--ip-masq") for n in (1, 2)]
    for agent in agents:
        agent.wait_ready()
        notes = world.kube.notes(agent.node)
        assert {name for name in notes if name.startswith(("public", "backend"))} == {
            "backend-type", "backend-v6-data", "public-ipv6",
        }  # fmt: skip
    ends = [end for agent in agents for end in world.pod_ends(agent, "a")]
    assert {end.family for end in ends} == {6}
    until("all reach all", lambda: all_reach(ends), 25)
    assert len(world.kernel("node1", family=V6)["routes"]) == 1
    assert "flannel.1" not in world.run("node1", "ip", "-br", "link")
    assert [agent.problems() for agent in agents] == [{}, {}]
