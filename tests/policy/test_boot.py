"""A node that boots: nothing stands in its kernel, and no pod is made before what policies say of it does."""

from __future__ import annotations

import pytest

from overlay.cni.controller import NEW_PODS
from overlay.cni.lists import CONFLIST
from overlay.firewall.lift import BETWEEN
from overlay.policy.sources import REFUSED_S
from overlay.policy.table import SUFFIX
from tests.policy.test_enforcing import DENY_ALL, LABELS
from tests.support.wait import until


def boot(world, agent) -> None:
    """What a reboot leaves of a node: files on its disk, and nothing of /run or the kernel's."""
    agent.stop()
    world.run(agent.node, "nft", "flush", "ruleset")
    (agent.run_dir / "subnet.env").unlink()


def again(world, agent):
    """An agent with the same flags."""
    return world.agent(agent.node, *agent.command[agent.command.index("--log-format=json") + 1 :])


def may_be_made(agent) -> bool:
    """Whether the network list can make a pod (subnet.env is read by it: overlay/cni/lists.py)."""
    return (agent.run_dir / "subnet.env").exists() and (agent.run_dir / "cni" / CONFLIST).exists()


def first_seen(world, agent) -> str:
    """The tables of a node's kernel at the moment when a pod may be made."""
    until("a pod may be made", lambda: may_be_made(agent), 60, pause_s=0.001)
    with agent.paused():  # what it does later is not asked
        return world.run(agent.node, "nft", "list", "ruleset")


@pytest.fixture
def one(world):
    world.begin(1)
    world.named_pod(world.agents[0], "x", "a")
    world.apply([*world.pod_objects(LABELS, {}), DENY_ALL])
    return world


def test_no_pod_is_made_after_a_boot_before_policies_are_in_the_kernel(one):
    (agent,) = one.agents
    boot(one, agent)
    one.objects.rename(away := one.folder / "not mounted yet")
    agent = again(one, agent)
    until("it is told", lambda: "makes none before policies" in agent.problems().get(NEW_PODS, ""))
    assert "No such file" in agent.problems()["policies unread"]
    assert not may_be_made(agent)
    assert not agent.ready()
    away.rename(one.objects)
    tables = first_seen(one, agent)
    assert SUFFIX in tables
    assert f"chain {BETWEEN} " in tables, "what pods of this node send each other passes it"
    agent.wait_ready()
    until("nothing is wrong", lambda: agent.problems() == {})


def test_a_first_agent_on_a_node_writes_no_network_list_before(world):
    """There is no subnet.env of before, and no list."""
    world.objects = world.folder / "policies"
    world.objects.mkdir()
    (world.objects / "all.yaml").write_text(
        "kind: NetworkPolicy\nmetadata: {name: deny, namespace: x}\nspec: {podSelector: {}, policyTypes: [Ingress]}\n"
    )
    node = world.node(1)
    agent = world.agent(node, f"--node-name={node}", f"--policy-dir={world.objects}")
    assert SUFFIX in first_seen(world, agent)


def test_a_restart_waits_for_nothing(one):
    """Pods are made meanwhile as before: the table of before stands, and holds who is not known."""
    (agent,) = one.agents
    agent.stop()
    one.objects.rename(one.folder / "away")
    agent = again(one, agent).wait_ready()
    assert may_be_made(agent)


def test_who_is_refused_policies_for_good_makes_pods_and_tells(kube):
    """An operator who took a newer image with the ClusterRole of before."""
    role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/overlay"
    rules = [rule for rule in kube.kube.ask("GET", role)["rules"] if "networkpolicies" not in rule["resources"]]
    kube.kube.ask("PATCH", role, {"rules": rules}, "application/merge-patch+json")
    node = kube.node(1)
    agent = kube.agent(node, "--ip-masq", kube.results(node))
    until("it is believed", lambda: may_be_made(agent), REFUSED_S + 60)
    waited = [event["timestamp"] for event in agent.events("problem") if event["subject"] == NEW_PODS]
    written = [event["timestamp"] for event in agent.events("file.written") if event["path"].endswith("subnet.env")]
    assert waited, "an API server that starts refuses as well"
    assert waited[0] < written[0]
    agent.wait_ready()
    assert "forbidden" in agent.problems()["policies unread"]
