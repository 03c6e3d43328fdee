"""Groups and contracts by real packets, from files and from the Kubernetes API with our own definition."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from overlay.policy.groups import LABEL
from tests.policy.test_asking import overlay
from tests.policy.test_enforcing import asks
from tests.support.probing import Field
from tests.support.wait import until

DEFINITION = Path(__file__).parents[2] / "manifests" / "contracts.yaml"
CONTRACT = {
    "apiVersion": "overlay.network/v1alpha1", "kind": "Contract", "metadata": {"name": "x-to-db"},
    "spec": {"provider": "db", "consumer": "namespace:x", "ports": [{"port": 80}]},
}  # fmt: skip
LABELS = {"y/d": {LABEL: "db"}}
PLACES = {"x/a": 0, "x/b": 1, "y/c": 0, "y/d": 1}
"""By pod: its node."""


def serve(field: Field, ends) -> None:
    for end in ends:
        for protocol in ("TCP", "UDP"):
            field.serve(end, protocol, 80)


def talking(world, field: Field) -> set[tuple[str, str]]:
    """By TCP 80, in both families."""
    found = set()
    for source, target in itertools.permutations(PLACES, 2):
        answers = asks(world, field, source, target)[::2]
        assert len(set(answers)) == 1, "both families"
        found |= {(source, target)} if answers[0] else set()
    return found


WITHIN = {("x/a", "x/b"), ("x/b", "x/a")}
JOINED = {("x/a", "y/d"), ("x/b", "y/d")}


def test_files(world, field: Field):
    world.begin(2, "--groups=namespace")
    for key, place in PLACES.items():
        serve(field, world.named_pod(world.agents[place], *key.split("/")))

    def apply(*contracts: dict[str, Any]) -> None:
        world.apply([*world.pod_objects(LABELS, {}), *contracts])

    apply()
    until("pods of one namespace talk, and no others", lambda: talking(world, field) == WITHIN, 40)
    apply(CONTRACT)
    until("a contract joins two groups, one way", lambda: talking(world, field) == WITHIN | JOINED)
    code, text = overlay(world, "explain", "y/c", "y/d", "80")
    assert code == 1
    assert "Group/db ingress 3 (no contract): Deny from 10.244.0.0/16 or fd00:10:244::/48, any port" in text
    code, text = overlay(world, "explain", "x/a", "y/d", "80")
    assert code == 0
    assert "Group/db ingress 1 (contract x-to-db): Accept from" in text
    found = world.agents[0].status()["policy"]
    assert (found["policies"], found["groups"]) == (0, 3)
    assert not [subject for agent in world.agents for subject in agent.problems() if "polic" in subject]


@pytest.mark.parametrize("flag", ["--groups=everything"])
def test_a_mode_that_is_none_is_refused(world, flag):
    world.no_pods()
    agent = world.agent(world.node(1), flag)
    agent.process.wait(20)
    assert "groups: 'everything' must be one of off, one, namespace, deployment" in agent.log()


def test_the_kubernetes_api(kube, field: Field):
    """The definition may come later, and the switch live."""
    kube.begin(2)
    kube.namespaces(x={}, y={})
    for key, place in PLACES.items():
        namespace, name = key.split("/")
        serve(field, kube.pod_of_api(kube.agents[place], namespace, name, **LABELS.get(key, {})))
    kube.pods_settled(field)
    kube.config_file("overlayd.json", {"groups": "namespace"})
    until("pods of one namespace talk, and no others", lambda: talking(kube, field) == WITHIN, 40)
    one = kube.agents[0]
    until("it says what lacks", lambda: "overlay.network" in one.problems().get("policies unread", ""))
    kube.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(DEFINITION.read_text()))
    until("it is there", lambda: "policies unread" not in one.problems(), 60)
    until("a contract is taken", lambda: kube.create("/apis/overlay.network/v1alpha1/contracts", CONTRACT) is None)
    until("it joins two groups, one way", lambda: talking(kube, field) == WITHIN | JOINED)
    kube.config_file("overlayd.json", {"groups": "off"})
    until("all talk", lambda: len(talking(kube, field)) == 12)
