"""Changes of the network config that a running agent follows, in networks of IPv6 and of both families."""

from __future__ import annotations

import pytest

from overlay.api.family import of_family
from tests.support.reach import all_reach
from tests.support.wait import until


def views(world, agent) -> list[dict]:
    return [of_family(agent.status(), family) for family in world.families]


def settled(world, agents) -> bool:
    return all(agent.ready() and agent.problems() == {} for agent in agents)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        # of each family's device
        ({"VNI": 7}, {4: {"vni": 7}, 6: {"vni": 7}}),
        ({"Port": 4790}, {4: {"port": 4790}, 6: {"port": 4790}}),
        ({"MTU": 1400}, {4: {"mtu": 1350}, 6: {"mtu": 1330}}),
    ],
    ids=["VNI", "port", "MTU"],
)
def test_the_devices_follow_the_config(world6, backend, device):
    agents = world6.nodes(2)
    subnets = sorted(world6.records())
    ends = [end for agent in agents for end in world6.pod_ends(agent, "a")]
    until("addresses are settled", lambda: all_reach(ends), 25)
    world6.use(*world6.families, Backend={"Type": "vxlan", **backend})
    for agent in agents:
        until(
            "it has taken it over",
            lambda agent=agent: all(
                view["device"].items() >= device[view["family"]].items() for view in views(world6, agent)
            ),
            20,
        )
    until("all is well", lambda: settled(world6, agents), 30)
    fitting = [end for agent in agents for end in world6.pod_ends(agent, "b")]  # made for the MTU of now
    until("pods reach each other", lambda: all_reach(fitting), 25)
    assert sorted(world6.records()) == subnets
    for agent in agents:
        vni = backend.get("VNI", 1)
        links = world6.run(agent.node, "ip", "-o", "link")
        assert f"flannel-v6.{vni}:" in links
        assert (f"flannel.{vni}:" in links) == (4 in world6.families)
        assert links.count("flannel") == len(world6.families), "no device of the config before is left"


def test_direct_routing_is_switched_on_and_off_under_traffic(world6):
    agents = world6.nodes(2)
    pods = [world6.pod_ends(agent, "a") for agent in agents]
    until("addresses are settled", lambda: all_reach([end for ends in pods for end in ends]), 25)

    def by(interface: str) -> bool:
        lines = [
            line
            for agent in agents
            for number in world6.families
            for line in world6.run(agent.node, "ip", f"-{number}", "route", "show", "proto", "111").splitlines()
        ]
        return len(lines) == 2 * len(world6.families) and all(
            f"dev {interface}" in line or (interface == "flannel" and "dev flannel" in line) for line in lines
        )

    assert by("flannel")
    world6.use(*world6.families, Backend={"Type": "vxlan", "DirectRouting": True})
    until("routes lead by the underlay", lambda: by("eth0"), 20)
    until("all is well", lambda: settled(world6, agents), 20)
    until("pods reach each other directly", lambda: all_reach([end for ends in pods for end in ends]), 10)
    for agent in agents:
        for view in views(world6, agent):
            assert [peer["path"] for peer in view["peers"]] == ["direct"]
    world6.use(*world6.families)
    until("routes lead by the tunnel", lambda: by("flannel"), 20)
    until("pods reach each other by the tunnel", lambda: all_reach([end for ends in pods for end in ends]), 10)
    until("all is well", lambda: settled(world6, agents), 20)


def test_a_subnet_of_each_family_can_be_asked_for(world):
    asked = "10.244.18.0/23", "fd00:10:244:8000::/60"
    flags = [f"--subnet={each}" for each in asked]
    one = world.agent(world.node(1), "--node-name=node1", *flags).wait_ready()
    two = world.agent(world.node(2), "--node-name=node2").wait_ready()
    lease = one.status()["lease"]
    assert (lease["subnet"], lease["subnet_ipv6"]) == asked
    ends = [*world.pod_ends(one, "a"), *world.pod_ends(two, "a")]
    until("pods reach each other", lambda: all_reach(ends), 25)
    assert world.restart(one, *flags).wait_ready().status()["lease"]["subnet_ipv6"] == asked[1]
    two = world.restart(two, f"--subnet={asked[1]}").wait_ready()
    assert two.status()["lease"]["subnet_ipv6"] != asked[1], "it is taken"


def test_a_subnet_of_one_family_that_is_asked_for_leaves_the_other(world):
    (agent,) = world.nodes(1)
    before = agent.status()["lease"]["subnet_ipv6"]
    agent = world.restart(agent, "--subnet=10.244.18.0/23").wait_ready()
    lease = agent.status()["lease"]
    assert (lease["subnet"], lease["subnet_ipv6"]) == ("10.244.18.0/23", before)
    flags = "--subnet=10.244.64.0/24", f"--subnet={before}"
    agent = world.restart(agent, *flags).wait_ready()
    lease = agent.status()["lease"]
    assert (lease["subnet"], lease["subnet_ipv6"]) == ("10.244.64.0/24", before)
    assert len(world.records()) == 1
