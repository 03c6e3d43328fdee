"""The truth table of ../shared/netpol with real packets: three agents, every pod, every cell, by IPv4, IPv6 and both."""

from __future__ import annotations

from typing import Any

import pytest

from lease.model import prefix
from tests.support.policy import Step, cases
from tests.support.probing import Field, Probe


@pytest.mark.timeout(600)
def test_every_cell(policed, field: Field):
    world = policed
    world.begin(3)
    agents = {agent.node: agent for agent in world.agents}
    steps = [step for case in cases() for step in case]
    for pod in {key_of(pod): pod for step in steps for pod in step.world["pods"]}.values():
        for end in world.named_pod(agents[pod["node"]], pod["namespace"], pod["name"]):
            for protocol in ("TCP", "UDP"):
                for port in (80, 81):
                    field.serve(end, protocol, port)
    world.pods_settled(field)
    judged, wrong = 0, []
    for step in steps:
        world.apply(objects_of(step, world))
        cells = wanted(step, world)
        judged += len(cells)
        wrong += [(step.name, *probe, want) for probe, want in field.wrong(cells)]
        assert len(wrong) < 40, wrong
    assert not wrong
    assert judged == 35_360 * len(world.families)


def key_of(pod) -> str:
    return f"{pod['namespace']}/{pod['name']}"


def objects_of(step: Step, world) -> list[dict[str, Any]]:
    pods = {key_of(pod): pod for pod in step.world["pods"]}
    labels, ports = ({key: pod[name] for key, pod in pods.items()} for name in ("labels", "ports"))
    namespaces = step.world["namespaces"].items()
    return [
        *(each for each in world.pod_objects(labels, ports) if key_of(each["metadata"]) in pods),
        *({"kind": "Namespace", "metadata": {"name": name, "labels": given}} for name, given in namespaces),
        *({**policy, "spec": here(policy["spec"], world)} for policy in step.policies),
    ]


def wanted(step: Step, world) -> list[tuple[Probe, bool]]:
    keys = [key_of(pod) for pod in step.world["pods"]]
    return [
        (Probe(one, two, port.partition("/")[0], int(port.partition("/")[2])), cell == ".")
        for port, rows in step.allowed.items()
        for source, row in zip(keys, rows, strict=True)
        for target, cell in zip(keys, row, strict=True)
        if cell != "-"
        for one, two in zip(world.ends[source], world.ends[target], strict=True)
    ]


def here(value: Any, world) -> Any:
    """A policy's spec with the blocks of the table as they are in this network: node3's subnet, and z/c in it."""
    if isinstance(value, list):
        return [
            each
            for one in value
            for each in (
                blocks(one["ipBlock"], world) if isinstance(one, dict) and "ipBlock" in one else [here(one, world)]
            )
        ]
    return {name: here(each, world) for name, each in value.items()} if isinstance(value, dict) else value


def blocks(block: dict[str, Any], world) -> list[dict[str, Any]]:
    if block["cidr"].startswith("0.0.0.0"):
        length = int(block["cidr"].partition("/")[2])
        every = {4: block["cidr"], 6: f"::/{128 - (32 - length) if length else 0}"}
        return [{"ipBlock": {"cidr": every[family]}} for family in world.families]
    assert block["cidr"] == "10.244.3.0/24", block
    lease = world.agents[2].status()["lease"]
    found = []
    for end in world.ends["z/c"]:
        subnet = prefix(lease["subnet_ipv6"] if end.family == 6 and len(world.families) > 1 else lease["subnet"])
        except_of = {"except": [f"{end.address}/{128 if end.family == 6 else 32}"]} if "except" in block else {}
        found.append({"ipBlock": {"cidr": str(subnet), **except_of}})
    return found
