"""A node is given back on Kubernetes: `overlay uninstall`, whole, refused, failed and finished later."""

from __future__ import annotations

import pytest

from tests.agent.test_kubernetes import unavailable
from tests.support.wait import until
from tests.support.world import CNI_CONF, KubeWorld, World


def test_uninstall_leaves_nothing(kube_world):
    world = kube_world
    agents = world.nodes(2)
    before = {agent.node: agent for agent in agents}
    until("the condition is told", lambda: unavailable(world, "node1") == "False")
    agents[0].stop()
    done = world.run(
        "node1", agents[0].command[2], "-m", "overlay.cli.app", "uninstall",
        *[flag for flag in agents[0].command[5:] if flag.startswith("--")],
    )  # fmt: skip
    assert "device flannel.1" in done
    assert world.kube.notes("node1") == {}
    assert unavailable(world, "node1") == ""
    assert world.device("node1") is None
    assert "overlay" not in world.run("node1", "nft", "list", "ruleset")
    assert not (before["node1"].run_dir / "cni" / "10-flannel.conflist").exists()
    assert not (before["node1"].run_dir / "subnet.env").exists()
    until("the peer lost it", lambda: world.peers("node2") == 0)


def uninstall(world: KubeWorld, agent, *more: str) -> str:
    flags = [flag for flag in agent.command[5:] if flag.startswith("--")]
    return world.run(agent.node, agent.command[2], "-m", "overlay.cli.app", "uninstall", *more, *flags)


def test_uninstall_leaves_a_node_alone_that_is_not_ours(kube_world):
    world = kube_world
    world.kube.node("node1", "10.244.1.0/24")
    topology_only = World.node(world, 1)
    agent = world.agent(topology_only)
    agent.wait_ready()
    agent.stop()
    notes = world.kube.notes("node1")
    # flannel has the node again: its list, its device, its annotations
    (agent.run_dir / "cni" / "10-flannel.conflist").write_text(CNI_CONF)
    assert "nft table" in uninstall(world, agent)
    assert world.device("node1") is not None
    assert world.kube.notes("node1") == notes
    assert (agent.run_dir / "cni" / "10-flannel.conflist").read_text() == CNI_CONF
    assert (agent.run_dir / "subnet.env").exists()
    # and once our marks are gone, nothing is touched at all
    (agent.run_dir / "cni" / "10-flannel.conflist").unlink()
    assert uninstall(world, agent) == ""
    assert world.device("node1") is not None
    assert "device flannel.1" in uninstall(world, agent, "--force")


def test_an_uninstall_that_fails_is_finished_by_the_next(kube_world):
    world = kube_world
    agent = world.nodes(1)[0]
    until("the condition is told", lambda: unavailable(world, "node1") == "False")
    agent.stop()
    world.kube.freeze()
    with pytest.raises(AssertionError, match=r"removed device flannel\.1") as failed:
        uninstall(world, agent)
    assert "lease: " in str(failed.value), "what could not be withdrawn is named"
    world.kube.thaw()
    assert "annotation" in uninstall(world, agent)
    assert world.kube.notes("node1") == {}
    assert unavailable(world, "node1") == ""
    assert uninstall(world, agent) == "", "and then all is done"


def test_a_node_that_was_down_is_cleaned_when_it_comes_back(kube_world):
    """A reboot took the device, the tables and all of /run; the network list and the annotations stayed."""
    world = kube_world
    agent = world.nodes(1)[0]
    until("the condition is told", lambda: unavailable(world, "node1") == "False")
    agent.kill()
    world.run("node1", "ip", "link", "del", "flannel.1")
    world.run("node1", "nft", "flush", "ruleset")
    for path in agent.run_dir.iterdir():
        if path.is_file():
            path.unlink()
    assert "10-flannel.conflist" in uninstall(world, agent)
    assert world.kube.notes("node1") == {}
