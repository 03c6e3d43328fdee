"""Our image and manifest on a real two-node Kubernetes of both families: pods, Services and podCIDRs have an address of each.
The steps build on each other and run in this order."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from overlay.lab.proof import Proof
from tests.cluster.test_cluster import UNBROKEN
from tests.support.clusters import two_nodes

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def proof() -> Iterator[Proof]:
    with two_nodes("d", families=(4, 6)) as made:
        yield made


def test_the_manifest_makes_every_node_ready(proof):
    proof.install()
    for name in proof.names:
        cidrs = proof.cluster.objects("node", name)[0]["spec"]["podCIDRs"]
        assert [":" in cidr for cidr in cidrs] == [False, True]
        assert proof.notes(name).keys() >= {"public-ip", "public-ipv6", "backend-v6-data"}


def test_pods_and_nodes_reach_each_other_in_both_families(proof):
    ends = [end for end in proof.pods() if end.kind == "pod"]
    assert {end.family for end in ends} == {4, 6}
    across = [cell for cell in proof.reach() if cell.kinds == "pod-pod" and cell.seen == cell.own]
    assert len([cell for cell in across if ":" in cell.own]) == len(across) / 2 == 12


def test_a_service_answers_in_both_families(proof):
    found = proof.service()
    assert re.search(
        r"10\.96\.\d+\.\d+:80 answers 4 pods, by 2 pods; \[fd00:10:96::\w+\]:80 answers 4 pods, by 2 pods$", found
    )


def test_connections_of_ipv6_are_kept_by_an_update_and_by_killed_agents(proof):
    assert UNBROKEN.search(proof.rolling_restart())
    assert UNBROKEN.search(proof.agent_killed())


def test_a_node_goes_and_returns(proof):
    proof.node_returns("node2")
    cidrs = proof.cluster.objects("node", "node2")[0]["spec"]["podCIDRs"]
    assert f"{cidrs[1]} via" in proof.cluster.run("node1", ["ip", "-6", "route"])


def test_uninstall_leaves_nothing(proof):
    proof.uninstall()
    for name in proof.names:
        assert "flannel" not in proof.cluster.run(name, ["ip", "link"])
        assert not proof.notes(name)
