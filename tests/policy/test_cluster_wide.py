"""ClusterNetworkPolicies by real packets: tiers, priorities, actions; judged by an evaluator that reads as the API does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from overlay.api.serve import SOCKET_NAME, ask_unix
from tests.policy.test_asking import overlay
from tests.policy.test_enforcing import asks
from tests.support.policy import Evaluator
from tests.support.probing import Field, Probe
from tests.support.wait import until

SWITCH = "--cluster-network-policy"
LABELS = {"x/a": {"app": "a"}, "x/b": {"app": "b"}, "y/a": {"app": "a"}, "y/c": {"app": "c"}}
SPACES = {"x": {"team": "one"}, "y": {"team": "two"}}
WEB = [{"name": "web", "containerPort": 81}]
STEPS = 14


def wide(name: str, tier: str, priority: int, subject: dict[str, Any], **rules: Any) -> dict[str, Any]:
    spec = {"tier": tier, "priority": priority, "subject": subject, **rules}
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": spec,
    }  # fmt: skip


def pods_of(space: dict[str, str] | None = None, **labels: str) -> dict[str, Any]:
    return {"pods": {"namespaceSelector": {"matchLabels": space or {}}, "podSelector": {"matchLabels": labels}}}


ALL = {"namespaces": {}}
TCP_80 = [{"tcp": {"destinationPort": {"number": 80}}}]
DENY_FROM_B = {"name": "no-b", "action": "Deny", "from": [pods_of(app="b")]}


@pytest.fixture
def four(world, field: Field):
    """x/a and y/c on node1, x/b and y/a on node2; each answers at TCP and UDP 80 and 81."""
    world.begin(2, SWITCH)
    one, two = world.agents
    for agent, key in ((one, "x/a"), (two, "x/b"), (two, "y/a"), (one, "y/c")):
        for end in world.named_pod(agent, *key.split("/")):
            for protocol in ("TCP", "UDP"):
                for port in (80, 81):
                    field.serve(end, protocol, port)
    world.pods_settled(field)
    return world


def objects(world, *policies: dict[str, Any]) -> list[dict[str, Any]]:
    spaces = [{"kind": "Namespace", "metadata": {"name": name, "labels": given}} for name, given in SPACES.items()]
    return [*spaces, *world.pod_objects(LABELS, dict.fromkeys(LABELS, WEB)), *policies]


def network_policy(name: str, space: str, **spec: Any) -> dict[str, Any]:
    return {
        "kind": "NetworkPolicy", "metadata": {"namespace": space, "name": name}, "spec": {"podSelector": {}, **spec},
    }  # fmt: skip


def some(rng: random.Random, world) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cluster-wide policies and others, by chance: every tier, action and kind of peer and port."""
    ends = [end for those in world.ends.values() for end in those]

    def pods() -> dict[str, Any]:
        space = rng.choice([{}, {"team": "one"}, {"team": "two"}])
        return rng.choice([{"namespaces": {"matchLabels": space}}, pods_of(space, app=rng.choice("abc"))])

    def peer(direction: str) -> dict[str, Any]:
        if direction == "egress" and rng.random() < 0.4:
            return {"networks": [f"{end.address}/{32 if end.family == 4 else 128}" for end in rng.sample(ends, 2)]}
        return pods()

    def rule(direction: str) -> dict[str, Any]:
        made: dict[str, Any] = {
            "action": rng.choice(["Accept", "Deny", "Pass"]),
            "from" if direction == "ingress" else "to": [peer(direction) for _ in range(rng.randint(1, 2))],
        }
        if rng.random() < 0.6:
            span = {"range": {"start": 79, "end": 80}}
            kinds = [*TCP_80, {"udp": {"destinationPort": span}}, {"destinationNamedPort": "web"}]
            made["protocols"] = rng.sample(kinds, rng.randint(1, 2))
        return made

    made = [
        wide(
            f"c{number}", rng.choice(["Admin", "Baseline"]), rng.randint(0, 3), pods(),
            **{way: [rule(way) for _ in range(rng.randint(1, 3))] for way in ("ingress", "egress") if rng.random() < 0.7},
        )
        for number in range(rng.randint(1, 4))
    ]  # fmt: skip
    names = [
        network_policy("only-b", space, ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}])
        for space in SPACES
        if rng.random() < 0.4
    ]
    return made, names


@pytest.mark.timeout(300)
def test_what_they_say_together_is_what_packets_find(four, field: Field):
    world, rng = four, random.Random(19)
    ends = [end for those in world.ends.values() for end in those]
    pairs = [(one, two) for one in ends for two in ends if one.name != two.name and one.family == two.family]
    probes = [Probe(*pair, protocol, port) for pair in pairs for protocol in ("TCP", "UDP") for port in (80, 81)]
    outcomes = set()
    for step in range(STEPS):
        wides, names = some(rng, world)
        every = objects(world, *names, *wides)
        world.apply(every)
        slow = Evaluator(SPACES, [each for each in every if each["kind"] == "Pod"], names, wides)
        want = [
            slow.allowed(probe.source.address, probe.target.address, probe.protocol, probe.port) for probe in probes
        ]
        wrong = field.wrong(zip(probes, want, strict=True))
        assert not wrong, (step, wides, names, wrong[:5])
        outcomes |= set(want)
        for agent in world.agents:
            assert not [subject for subject in agent.problems() if "polic" in subject]
    assert outcomes == {True, False}, "both were tried"


def test_it_says_who_decided(four, field: Field):
    world = four
    one = world.agents[0]
    baseline = wide("base", "Baseline", 0, ALL, ingress=[{"action": "Deny", "from": [ALL]}])
    admin = wide("top", "Admin", 1, pods_of(app="a"), ingress=[
        {"action": "Pass", "from": [{"namespaces": {"matchLabels": {"team": "two"}}}]}, DENY_FROM_B,
    ])  # fmt: skip
    world.apply(objects(world, admin, baseline))
    assert not any(asks(world, field, "x/b", "x/a"))
    assert not any(asks(world, field, "y/c", "x/a")), "passed to the Baseline tier, which denies"

    code, text = overlay(world, "explain", "x/b", "x/a", "80")
    assert code == 1
    assert "ClusterNetworkPolicy/top ingress 1 (no-b): Deny from pods app=b of all namespaces, any port" in text
    code, text = overlay(world, "explain", "y/c", "x/a", "80")
    assert code == 1
    assert "ClusterNetworkPolicy/top ingress 0: Pass from all pods of namespaces team=two, any port" in text
    assert "ClusterNetworkPolicy/base ingress 0: Deny" in text
    decided = {(each["policies"], each["verdict"]): each["packets"] for each in one.status()["policy"]["decided"]}
    assert decided["ClusterNetworkPolicy/top", "denied"] > 0
    assert decided["ClusterNetworkPolicy/top", "passed"] > 0
    assert decided["ClusterNetworkPolicy/base", "denied"] > 0
    _, page = ask_unix(f"{one.run_dir}/{SOCKET_NAME}", "/metrics")
    assert (
        'overlay_policy_packets_total{policies="ClusterNetworkPolicy/top",direction="ingress",verdict="denied"}' in page
    )
    world.apply(objects(world, network_policy("all", "x", ingress=[{}]), admin, baseline))
    assert all(asks(world, field, "y/c", "x/a")), "a NetworkPolicy stands before the Baseline tier"
    assert not any(asks(world, field, "x/b", "x/a")), "and behind the Admin tier"
    later = {(each["policies"], each["verdict"]): each["packets"] for each in one.status()["policy"]["decided"]}
    assert all(later[key] >= count for key, count in decided.items()), "what was counted stays, though the chain went"


def test_a_pod_under_a_deny_is_not_reached_beside_layer_3(four):
    """What a bridge carries beside IP is closed for it, and open for others."""
    world = four
    deny = wide("d", "Admin", 0, pods_of(app="a"), ingress=[{"action": "Deny", "from": [pods_of(app="b")]}])
    world.apply(objects(world, deny))
    one = world.agents[0]
    until(
        "its port is closed", lambda: "closed" in world.run("node1", "nft", "list", "table", "bridge", "overlay-1-pods")
    )
    accept = wide("d", "Admin", 0, pods_of(app="a"), ingress=[{"action": "Accept", "from": [pods_of(app="b")]}])
    world.apply(objects(world, accept))
    assert one.status()["policy"]["isolated_addresses"] == 0, "what accepts alone isolates nobody"


def test_without_the_switch_it_is_said_that_they_are_not_enforced(four, field: Field):
    world = four
    deny = wide("d", "Admin", 0, ALL, ingress=[{"action": "Deny", "from": [ALL]}])
    plain = world.agent(world.node(3), "--node-name=node3", f"--policy-dir={world.objects}", world.results("node3"))
    world.all_ready()
    world.apply(objects(world, deny))
    until("it says so", lambda: "policies not enforced" in plain.problems())
    assert "1 ClusterNetworkPolicies exist, and none is enforced: --cluster-network-policy is false" in str(
        plain.problems()
    )
    assert not any(asks(world, field, "x/b", "x/a")), "the others enforce it"
