"""The compiled form judges as the truth table says, in both families, and as the specification reads."""

from __future__ import annotations

import pytest

from overlay.policy.compile import compile_node
from overlay.policy.explain import Flow, judge
from overlay.policy.index import Index
from overlay.policy.model import EGRESS, INGRESS
from overlay.policy.resources import namespace_of, packed, pod_of, policy_of
from tests.support.policy import PROTOCOLS, Evaluator, Step, cases, in_ipv6, pod_object, sixth

FAMILIES = {4: str, 6: sixth}


def objects(step: Step, family: int):
    """Of a step: pods, namespaces' labels, policies, in a family."""
    pods = [pod_object(pod, FAMILIES[family](pod["ip"])) for pod in step.world["pods"]]
    policies = [in_ipv6(each) if family == 6 else each for each in step.policies]
    return pods, step.world["namespaces"], policies


def compiled_nodes(pods, namespaces, policies):
    labels = {name: namespace_of({"metadata": {"name": name, "labels": given}}) for name, given in namespaces.items()}
    index = Index(map(pod_of, pods), labels)
    read = [policy_of(each) for each in policies]
    return {node: compile_node(index, read, node) for node in {pod["spec"]["nodeName"] for pod in pods}}


def cells(step: Step, pods):
    """Each that is judged: protocol, port, the two pods, their places, and whether they may talk."""
    for name, rows in step.allowed.items():
        protocol, _, number = name.partition("/")
        for i, source in enumerate(pods):
            for j, target in enumerate(pods):
                if rows[i][j] != "-":
                    yield name, protocol, int(number), (source, target), (i, j), rows[i][j] == "."


def address(pod) -> str:
    return pod["status"]["podIPs"][0]["ip"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_truth_table(family):
    judged = 0
    for case in cases():
        for step in case:
            pods, namespaces, policies = objects(step, family)
            nodes = compiled_nodes(pods, namespaces, policies)
            for port, protocol, number, (source, target), (i, j), _ in cells(step, pods):
                flow = Flow(packed(address(source)), packed(address(target)), PROTOCOLS[protocol], number)
                for direction, pod, want in ((EGRESS, source, step.egress), (INGRESS, target, step.ingress)):
                    found = judge(nodes[pod["spec"]["nodeName"]], direction, flow)
                    assert found.known
                    assert found.allowed == (want[port][i][j] == "."), (step.name, direction, port, i, j)
                judged += 1
    assert judged == 35_360


@pytest.mark.parametrize("family", FAMILIES)
def test_the_evaluator_agrees_with_the_truth_table(family):
    """Of a tenth of it: it is slow."""
    for case in list(cases())[::10]:
        for step in case:
            pods, namespaces, policies = objects(step, family)
            slow = Evaluator(namespaces, pods, policies)
            for port, protocol, number, (source, target), _, allowed in cells(step, pods):
                assert slow.allowed(address(source), address(target), protocol, number) == allowed, (step.name, port)
