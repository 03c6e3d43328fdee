"""`overlay trace` of IPv6: the same steps, counters and verdicts as of IPv4."""

from __future__ import annotations

import pytest

from tests.diagnosis.test_faults import asking, check, counters_are_gone, trace  # noqa: F401 (a fixture)
from tests.support.wait import until

PLANTED = (
    "add table ip6 planted; add chain ip6 planted {hook} {{ type filter hook {hook} priority 0; }};"
    " add rule ip6 planted {hook} {rule} drop"
)


@pytest.fixture
def ends(world, asking):  # noqa: F811
    """Agents of two nodes, and the IPv6 addresses of a pod of each."""
    agents = world.nodes(2, *asking)
    pods = [next(end.address for end in world.pod_ends(agent, "a") if ":" in end.address) for agent in agents]
    until("it is delivered", lambda: trace(world, agents[0], *pods)["verdict"] == "delivered")
    return agents, pods


def steps(found) -> dict[str, int]:
    """Of the last size: how often packets were counted at each step, of both nodes and directions."""
    return {f"{step['node']} {step['step']}": step["counted"] for step in found["rounds"][-1]["steps"]}


@pytest.mark.parametrize("words", [(), ("--proto", "tcp", "--port", "81"), ("--proto", "udp", "--port", "81")])
def test_each_step_counts_each_packet(world, ends, words):
    agents, pods = ends
    found = trace(world, agents[0], *pods, *words)
    assert found["verdict"] == "delivered", found
    counted = steps(found)
    assert set(counted.values()) == {3}, found
    for step in ("node1 flannel-v6.1 put it into VXLAN", "node2 came by eth0, in VXLAN", "node2 routed to cni0"):
        assert step in counted, counted
    if not words:
        assert [each["packet_bytes"] for each in found["rounds"]] == [64, 1430], "full-size ones as well"
    counters_are_gone(world, agents)


def test_from_a_node_and_by_its_name(world, ends):
    agents, pods = ends
    assert trace(world, agents[0], "node", pods[1])["verdict"] == "delivered"
    assert trace(world, agents[0], pods[0], "node2")["verdict"] == "delivered"
    assert trace(world, agents[0], pods[0], "fd00:192:168:1::3")["verdict"] == "delivered"


@pytest.mark.parametrize(
    ("node", "hook", "rule", "words"),
    [
        ("node2", "forward", "ip6 daddr fd00:10:244::/48", "dropped at node2.*forward chains"),
        ("node1", "output", "udp dport 8472", "dropped at node1"),
        ("node2", "input", "udp dport 8472", "dropped at node2.*input chains"),
    ],
)
def test_the_rule_that_drops_is_named(world, ends, node, hook, rule, words):
    agents, pods = ends
    world.run(node, "nft", PLANTED.format(hook=hook, rule=rule))
    found = trace(world, agents[0], *pods)
    assert (found["verdict"], found["node"]) == ("dropped", node), found
    assert f"chain ip6 planted {hook} drops" in "; ".join(found["because"]), found
    assert words.partition(".*")[0] in found["text"]
    asked = check(world, agents[0], pods[1])
    assert asked["state"] == "unreachable"


def test_a_route_that_leads_nowhere_and_a_pod_that_is_not_there(world, ends):
    agents, pods = ends
    gone = pods[1].rpartition(":")[0] + ":99"
    found = trace(world, agents[0], pods[0], gone)
    assert (found["verdict"], found["node"]) == ("dropped", "node2"), found
    world.run("node1", "ip", "-6", "rule", "add", "pref", "100", "to", "fd00:10:244::/48", "blackhole")
    found = trace(world, agents[0], *pods)
    assert (found["verdict"], found["node"]) == ("dropped", "node1"), found
    assert "ip -6 rule 100" in "; ".join(found["because"]) or "ip rule 100" in "; ".join(found["because"]), found
