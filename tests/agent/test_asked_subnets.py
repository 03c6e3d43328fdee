"""Subnets that are asked for by --subnet: of other lengths than the config's, taken, moved to, outside of the range."""

from __future__ import annotations

import pytest

from overlay.lab.matrix import Wires
from tests.support.wait import until

LARGE, SMALL = "10.244.18.0/23", "10.244.64.192/26"


def ends_of(world, agents):
    return [world.pod(agent, "a") for agent in agents]


def test_nodes_with_subnets_of_different_lengths_reach_each_other(world):
    """And a restart, of all at once, keeps them."""
    world.config()
    one = world.agent(world.node(1), "--node-name=node1", f"--subnet={LARGE}").wait_ready()
    two = world.agent(world.node(2), "--node-name=node2", f"--subnet={SMALL}").wait_ready()
    three = world.agent(world.node(3), "--node-name=node3").wait_ready()
    assert (str(one.subnet()), str(two.subnet()), three.subnet().length) == (LARGE, SMALL, 24)
    until("all know all", lambda: all(world.peers(agent.node) == 2 for agent in (one, two, three)))
    with Wires(ends_of(world, (one, two, three))) as wires:
        assert all(cell.ok for cell in wires.all())
    for agent in (one, two, three):
        assert agent.problems() == {}
    flags = {"node1": [f"--subnet={LARGE}"], "node2": [f"--subnet={SMALL}"], "node3": []}
    again = [world.restart(agent, *flags[agent.node]) for agent in (one, two, three)]
    assert [str(agent.wait_ready().subnet()) for agent in again] == [LARGE, SMALL, str(three.subnet())]


def test_twenty_agents_never_take_a_part_of_what_was_asked_for(world):
    world.config(SubnetMin="10.244.18.0", SubnetMax="10.244.25.0")
    asked = world.agent(world.node(1), "--node-name=node1", f"--subnet={LARGE}").wait_ready()
    others = [world.agent(world.node(number), f"--node-name=node{number}").wait_ready() for number in range(2, 8)]
    subnets = [agent.subnet() for agent in (asked, *others)]
    assert not any(a.overlaps(b) for place, a in enumerate(subnets) for b in subnets[:place]), subnets
    eighth = world.agent(world.node(8), "--node-name=node8")
    until("the range is full", lambda: "all 8 subnets" in str(eighth.problems()))


def test_one_that_is_taken_is_waited_for(world):
    world.config()
    one = world.agent(world.node(1), "--node-name=node1", "--subnet=10.244.18.0/24").wait_ready()
    two = world.agent(world.node(2), "--node-name=node2", f"--subnet={LARGE}")
    words = f"--subnet {LARGE} is not free: 10.244.18.0-24 has it"
    until("it says so", lambda: any(words in text for text in two.problems().values()), 20)
    assert not two.ready()
    one.stop()
    world.drop_record("10.244.18.0-24")
    two.wait_ready()
    assert str(two.subnet()) == LARGE


def test_a_node_moves_to_what_is_asked_for_and_stays_where_that_is_taken(world):
    world.config()
    # so that LARGE is free
    two = world.agent(world.node(2), "--node-name=node2", "--subnet=10.244.40.0/24").wait_ready()
    one = world.agent(world.node(1), "--node-name=node1").wait_ready()
    until("all know all", lambda: world.has_peers(one, 1) and world.has_peers(two, 1))
    before = str(one.subnet())
    one = world.restart(one, f"--subnet={two.subnet()}").wait_ready()
    assert str(one.subnet()) == before, "another node has it: nothing is lost"
    assert f"this node keeps {before}" in one.problems()["subnet"]
    one = world.restart(one, f"--subnet={LARGE}").wait_ready()
    assert one.problems() == {}
    assert str(one.subnet()) == LARGE
    until(
        "the old one is given back",
        lambda: set(world.records()) == {"10.244.18.0-23", str(two.subnet()).replace("/", "-")},
    )
    until("its peer follows", lambda: LARGE in world.run("node2", "ip", "route"))


@pytest.mark.parametrize("length", [23, 25, 26])
def test_a_part_of_what_is_held_or_more_is_moved_to(world, length):
    """Its key is another, of the same base."""
    world.config()
    one = world.agent(world.node(1), "--node-name=node1", "--subnet=10.244.40.0/24").wait_ready()
    one = world.restart(one, f"--subnet=10.244.40.0/{length}").wait_ready()
    assert str(one.subnet()) == f"10.244.40.0/{length}"
    assert set(world.records()) == {f"10.244.40.0-{length}"}
    assert one.problems() == {}


def test_pods_on_a_subnet_that_was_asked_for_are_told_of_when_it_is_another_nodes(world):
    world.config()
    one = world.agent(world.node(1), "--node-name=node1", f"--subnet={SMALL}").wait_ready()
    world.pod(one, "a")
    one = world.restart(one).wait_ready()
    assert one.subnet().length == 24
    until("its pod's subnet is known as lost", lambda: SMALL in one.problems().get("retained", ""), 20)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("10.99.0.0/24", "--subnet 10.99.0.0/24 is outside of the range"),
        ("10.244.128.0/17", "a quarter of Network"),
        ("fd00::/64", "the network has no IPv6"),
    ],
)
def test_what_nobody_can_have_is_said_and_the_node_gets_another(world, asked, words):
    world.config(Network="10.244.0.0/16")  # without the bounds that others have here
    agent = world.agent(world.node(1), "--node-name=node1", f"--subnet={asked}").wait_ready()
    assert words in agent.problems()["subnet"]
    assert agent.subnet().length == 24
