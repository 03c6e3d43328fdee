"""Backends by a real API server: annotations as flannel writes them, and that nodes reach each other."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.support.reach import all_reach
from tests.support.wait import until
from tests.support.world import KubeWorld


@pytest.fixture(params=["host-gw", "wireguard"])
def clusters(request, tmp_path):
    with closing(KubeWorld(tmp_path / "world")) as made:
        made.use(4, 6, Backend={"Type": request.param})
        yield made, request.param


def test_nodes_find_each_other_by_annotations(clusters):
    cluster, backend = clusters
    agents = cluster.nodes(2, "--ip-masq")
    for number, agent in enumerate(agents, 1):
        data = data6 = "null"
        if backend == "wireguard":
            key = agent.status()["lease"]["public_key"]
            data, data6 = (f'{{"PublicKey":"{key}","Port":{port}}}' for port in (51820, 51821))
        assert cluster.kube.notes(agent.node) == {
            "kube-subnet-manager": "true",
            "backend-type": backend,
            "backend-data": data,
            "backend-v6-data": data6,
            "public-ip": f"192.168.1.{number + 1}",
            "public-ipv6": f"fd00:192:168:1::{number + 1}",
        }
    ends = [end for agent in agents for end in cluster.pod_ends(agent, "a")]
    until("all reach all", lambda: all_reach(ends), 25)
    until("the condition is told", lambda: cluster.kube.condition("node1", "OverlayReady"))
    version = cluster.kube.read("node1")["metadata"]["resourceVersion"]
    again = cluster.restart(agents[0], "--ip-masq").wait_ready()
    until("it has its peers", lambda: cluster.has_peers(again, 1))
    assert cluster.kube.read("node1")["metadata"]["resourceVersion"] == version, "a restart writes nothing"
    until("all reach all", lambda: all_reach(ends))
