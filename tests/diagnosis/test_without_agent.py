"""What doctor says of a node on which no agent runs: its entries stand in the kernel, and can be looked at."""

from __future__ import annotations

import pytest

from tests.diagnosis.test_faults import doctor


def entries(world, agent) -> tuple[str, str]:
    (found,) = (each for each in doctor(world, agent) if each["subject"] == "entries")
    return found["state"], found["what"]


@pytest.mark.parametrize(
    ("backend", "whole"), [("vxlan", "a route, a neighbour and an FDB entry"), ("host-gw", "a route")]
)
def test_entries_that_stand_are_counted_and_a_missing_one_is_named(world, backend, whole):
    world.config(Backend={"Type": backend})
    one, two, _ = world.nodes(3)
    world.pod(one, "a")
    one.kill()
    assert entries(world, one) == (
        "ok",
        f"peers in the kernel: 2, with {whole} each; who joins while no agent runs gets none",
    )
    subjects = {each["subject"]: each["state"] for each in doctor(world, one)}
    assert subjects["agent"] == "wrong"
    assert {subjects[name] for name in ("sysctls", "firewalls: forward", "MTU", "addresses")} == {"ok"}
    if backend == "vxlan":
        world.run("node1", "bridge", "fdb", "del", two.mac(), "dev", "flannel.1")
        missing = f"{two.subnet()} has no FDB entry for {two.mac()} on flannel.1"
        assert entries(world, one) == ("wrong", f"of 2 peers: {missing}")
        world.run("node1", "ip", "neigh", "del", str(two.subnet()).partition("/")[0], "dev", "flannel.1")
        state, what = entries(world, one)
        assert (state, "has no neighbour entry for" in what) == ("wrong", True)
        world.run("node1", "ip", "link", "del", "flannel.1")
        (found,) = (each for each in doctor(world, one) if each["subject"] == "network")
        assert "nothing stands of the network" in found["what"]


def test_where_no_network_was_made_that_is_said(world):
    (agent,) = world.nodes(1)
    agent.stop()
    (agent.run_dir / "subnet.env").unlink()
    (found,) = (each for each in doctor(world, agent) if each["subject"] == "network")
    assert "no agent has made a network here" in found["what"]
