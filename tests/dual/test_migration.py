"""A running network that gets IPv6, and gives it up again, under traffic; and who gets which subnet."""

from __future__ import annotations

import signal
import time

import pytest

from lease.families import V6
from lease.model import ip_text, prefix
from overlay.lab import netns
from overlay.lab.matrix import End
from tests.support.reach import all_reach
from tests.support.wait import until


def has_both(agent) -> bool:
    found = agent.status()
    return bool(found["lease"].get("subnet_ipv6")) and len(found.get("peers_ipv6", ())) == 1 and not found["problems"]


def has_one(agent) -> bool:
    found = agent.status()
    return "subnet_ipv6" not in found["lease"] and "peers_ipv6" not in found and not found["problems"]


def test_ipv4_to_both_and_back_live(world):
    world.config()
    agents = world.nodes(2)
    pods = [world.pod(agent, "a") for agent in agents]
    subnets = [agent.status()["lease"]["subnet"] for agent in agents]
    with world.stream(*pods) as there, world.stream(*reversed(pods)) as back:
        world.use(4, 6)
        for agent in agents:
            until("it has both", lambda agent=agent: has_both(agent), 30)
            assert agent.ready()
        assert [agent.status()["lease"]["subnet"] for agent in agents] == subnets
        later = [world.pod_ends(agent, "b") for agent in agents]
        assert [len(ends) for ends in later] == [2, 2], "new pods get both"
        until("they reach each other", lambda: all_reach([end for ends in later for end in ends]), 25)
        assert len(world.records()) == 2
        world.config()
        for agent in agents:
            until("it has one", lambda agent=agent: has_one(agent), 30)
        assert (there.lost(), back.lost()) == (0, 0)
    assert [agent.status()["lease"]["subnet"] for agent in agents] == subnets
    for agent in agents:
        assert "flannel-v6" not in world.run(agent.node, "ip", "link")
        assert "ip6" not in world.run(agent.node, "nft", "list", "tables")
        assert "IPV6" not in (agent.run_dir / "subnet.env").read_text()
        assert agent.events("device.gone") == agent.events("device.down") == []
    assert sorted(world.records()) == sorted(subnet.replace("/", "-") for subnet in subnets)


def test_a_pod_made_at_that_moment_sends_by_ipv6(world):
    """The kernel shows its IPv6 address some time after the first; nothing but the network config changed."""
    world.config()
    agents = world.nodes(2)
    for agent in agents:
        world.pod(agent, "a")
    world.use(4, 6)
    for agent in agents:
        until("it has both", lambda agent=agent: has_both(agent), 30)
        assert agent.ready()
    there = world.pod_ends(agents[1], "b")
    lease = agents[0].status()["lease"]
    v4, v6 = (prefix(lease[name]) for name in ("subnet", "subnet_ipv6"))
    end = End("node1-late/v6", "pod", world.namespace("node1-late"), ip_text(6, v6.base + 0x99), "node1")
    netns.create(end.namespace)
    world.run(
        "node1", *["ip", "link", "add", "vethlate", "type", "veth", "peer", "name", "eth0", "netns"], end.namespace
    )
    world.run("node1", *f"ip address replace {ip_text(6, v6.base + 1)}/64 dev cni0 nodad".split())
    world.run("node1-late", *f"ip address add {ip_text(4, v4.base + 0x99)}/24 dev eth0".split())
    world.run("node1-late", *["ip", "link", "set", "eth0", "up"])
    world.run("node1", *["ip", "link", "set", "vethlate", "master", "cni0", "up"])
    table = ("nft", "list", "set", "bridge", "overlay-1-pods")
    until("IPv4 is bound", lambda: ip_text(4, v4.base + 0x99) in world.run("node1", *table, "addresses"))
    assert end.address not in world.run("node1", *table, "addresses6")
    world.run("node1-late", *f"ip address add {end.address}/64 dev eth0 nodad".split())
    world.run("node1-late", *f"ip route add default via {ip_text(6, v6.base + 1)}".split())
    until("IPv6 is bound", lambda: end.address in world.run("node1", *table, "addresses6"), 5)
    until("it reaches others", lambda: all_reach([end, there[1]]))


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_killed_on_the_way_to_both(world, after_s):
    world.config()
    agents = world.nodes(2)
    pods = [world.pod(agent, "a") for agent in agents]
    subnets = [agent.status()["lease"]["subnet"] for agent in agents]
    with world.stream(*pods) as stream:
        world.use(4, 6)
        time.sleep(after_s)
        agents[0].stop(signal.SIGKILL)
        again = world.restart(agents[0]).wait_ready()
        for agent in (again, agents[1]):
            until("it has both", lambda agent=agent: has_both(agent), 30)
        world.config()
        time.sleep(after_s)
        again.stop(signal.SIGKILL)
        again = world.restart(agents[0]).wait_ready()
        for agent in (again, agents[1]):
            until("it has one", lambda agent=agent: has_one(agent), 30)
        assert stream.lost() == 0
    assert [agent.status()["lease"]["subnet"] for agent in (again, agents[1])] == subnets
    assert sorted(world.records()) == sorted(subnet.replace("/", "-") for subnet in subnets)
    assert "flannel-v6" not in world.run("node1", "ip", "link"), "what the last run made goes with the family"


def test_a_change_while_no_agent_runs(world):
    agents = world.nodes(2)
    subnet = agents[0].status()["lease"]["subnet"]
    agents[0].stop()
    world.config()
    until("the other has one", lambda: has_one(agents[1]), 30)
    again = world.restart(agents[0]).wait_ready()
    until("it has one", lambda: has_one(again), 30)
    assert again.status()["lease"]["subnet"] == subnet
    assert "flannel-v6" not in world.run("node1", "ip", "link")
    assert "ip6" not in world.run("node1", "nft", "list", "tables")


def test_twenty_agents_at_once_get_subnets_of_their_own(world):
    """Of IPv6 no key keeps them apart; and the pools do not fit, so that they draw."""
    world.use(4, 6, IPv6Network="fd00:10:244::/58", SubnetMin="10.244.100.0")
    nodes = [world.node(number) for number in range(1, 21)]
    agents = [world.agent(node, f"--node-name={node}", "--probes=false") for node in nodes]
    for agent in agents:
        agent.wait_ready(90)
    leases = [agent.status()["lease"] for agent in agents]
    for name in ("subnet", "subnet_ipv6", "vtep_mac", "vtep_mac_ipv6"):
        assert len({lease[name] for lease in leases}) == 20, name
    assert all(prefix("fd00:10:244::/58").covers(prefix(lease["subnet_ipv6"])) for lease in leases)
    until("each knows all others", lambda: all(len(a.status()["peers_ipv6"]) == 19 for a in agents), 60)


def test_an_earlier_record_with_our_ipv6_subnet_keeps_it(world):
    """Somebody else's flannel may choose it at the same moment: the key does not say who was first."""
    agents = world.nodes(2)
    one, two = (agent.status()["lease"] for agent in agents)
    record = next(r for key, r in world.records().items() if key == one["key"])
    world.put_record(
        f"10.244.250.0-24&{one['subnet_ipv6'].replace('/', '-')}",
        {
            "PublicIP": "192.168.1.99", "PublicIPv6": "fd00:192:168:1::99", "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:99"},
            "BackendV6Data": {"VNI": 1, "VtepMAC": "0a:00:00:00:06:99"},
        },
    )  # fmt: skip
    world.settled(agents[0])
    assert agents[0].status()["lease"]["subnet_ipv6"] == one["subnet_ipv6"], "ours was there before"
    assert [peer["subnet"] for peer in agents[1].status()["peers_ipv6"]] == [one["subnet_ipv6"]]
    assert record["PublicIPv6"] == "fd00:192:168:1::2"
    # and the other way round: ours comes later
    agents[0].stop()
    world.drop_record(one["key"])
    until("the other has it", lambda: "fd00:192:168:1::99" in str(agents[1].status()["peers_ipv6"]))
    again = world.restart(agents[0]).wait_ready()
    until("both are its peers", lambda: len(again.status()["peers_ipv6"]) == 2)
    assert again.status()["lease"]["subnet"] == one["subnet"], "as in subnet.env"
    assert again.status()["lease"]["subnet_ipv6"] not in (one["subnet_ipv6"], two["subnet_ipv6"])
    assert world.kernel("node1", family=V6)["routes"].keys() >= {(prefix(one["subnet_ipv6"]).base, 64)}, (
        "that of the other"
    )
