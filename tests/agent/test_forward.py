"""Forward chains of others that drop by policy: iptables' own, the old and the new, and any other."""

from __future__ import annotations

import json

import pytest

from tests.support.reach import all_reach
from tests.support.wait import until


def rules(world, program: str) -> list[str]:
    return [line for line in world.run("node1", program, "-S", "FORWARD").splitlines() if "overlay-1 forward" in line]


@pytest.mark.parametrize("program", ["iptables", "iptables-legacy"])
def test_a_forward_policy_of_drop_lets_pods_through(world, program):
    world.config()
    agents = world.nodes(2)
    ends = [world.pod(agent, "pod") for agent in agents]
    assert all_reach(ends)
    # as Docker does; the agent is stopped for a moment, to show that the policy bites
    agents[0].stop()
    world.run("node1", program, "-P", "FORWARD", "DROP")
    assert not all_reach(ends)
    agent = world.restart(agents[0]).wait_ready()
    until("two rules stand there", lambda: len(rules(world, program)) == 2)
    assert all_reach(ends)
    if program == "iptables":  # of the old ones nobody tells us: they are looked at with each full check
        world.run("node1", program, "-F", "FORWARD")
        until("they come back", lambda: len(rules(world, program)) == 2)
        world.run("node1", program, "-P", "FORWARD", "ACCEPT")
        until("and go when nothing is dropped any more", lambda: rules(world, program) == [])
    assert "forward chain" not in agent.problems()


def test_rules_of_a_policy_are_taken_out_by_uninstall(world):
    world.config()
    agent = world.nodes(1)[0]
    world.run("node1", "iptables", "-A", "FORWARD", "-s", "10.1.0.0/16", "-j", "ACCEPT")
    world.run("node1", "iptables", "-P", "FORWARD", "DROP")
    until("rules stand", lambda: len(rules(world, "iptables")) == 2)
    agent.stop()
    flags = [flag for flag in agent.command[5:] if flag.startswith("--")]
    assert "rules taken out" in world.run("node1", agent.command[2], "-m", "overlay.cli.app", "uninstall", *flags)
    assert rules(world, "iptables") == []
    assert "10.1.0.0/16" in world.run("node1", "iptables", "-S", "FORWARD"), "what is not ours stays"


def test_another_chain_that_drops_is_named(world):
    world.config()
    agent = world.nodes(1)[0]
    world.run(
        "node1",
        "nft",
        "add table inet mine; add chain inet mine forward { type filter hook forward priority 0; policy drop; }",
    )
    again = world.restart(agent).wait_ready()
    until("it is told", lambda: "inet mine forward drops" in json.dumps(again.problems()))
    assert again.ready(), "whether it accepts pods' traffic is the operator's to know"
    assert world.run("node1", "nft", "list", "chain", "inet", "mine", "forward").count("accept") == 0


RELOAD = (
    "nft add table inet firewalld_policy_drop",
    "nft add chain inet firewalld_policy_drop filter_forward '{ type filter hook forward priority 9; policy drop; }'",
    "nft add rule inet firewalld_policy_drop filter_forward ct state established,related accept",
    *(f"iptables -t {table} {flag}" for table in ("filter", "nat", "mangle", "raw") for flag in ("-F", "-X", "-Z")),
    "nft delete table inet firewalld_policy_drop",
)
"""What firewalld 1.3 does, whose backend is nftables (policy drop, flush of all backends, accept)."""


def test_a_reload_of_firewalld_beside_docker(world):
    """It takes our rules of the chain that Docker's policy closes, which come back, and leaves our tables alone."""
    agents = world.nodes(2)
    ends = [world.pod(agent, "pod") for agent in agents]
    world.run("node1", "iptables", "-P", "FORWARD", "DROP")
    until("rules stand", lambda: len(rules(world, "iptables")) == 2)
    with agents[0].paused():  # it would put them back while the other programs still run
        world.run("node1", "sh", "-ec", "\n".join(RELOAD))
        assert rules(world, "iptables") == []
    until("they are back", lambda: len(rules(world, "iptables")) == 2)
    assert all_reach(ends)
    counters = agents[0].status()["counters"]
    assert [counters[f"mended_{name}"] for name in ("guard", "pods", "nat")] == [0, 0, 0]
    assert agents[0].problems() == {}
