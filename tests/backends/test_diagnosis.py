"""Why does A not reach B, with backends in whose packets nobody can look."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.diagnosis.test_faults import asking, check, counters_are_gone, trace  # noqa: F401 (a fixture)
from tests.support.wait import until
from tests.support.world import World

FORWARD = (
    "add table ip planted; add chain ip planted onward { type filter hook forward priority 0; };"
    " add rule ip planted onward ip daddr 10.244.0.0/16 drop"
)
INPUT = (
    "add table ip planted; add chain ip planted in { type filter hook input priority 0; };"
    " add rule ip planted in udp dport 51820 drop"
)


@pytest.fixture(params=["host-gw", "wireguard"])
def network(request, tmp_path):
    with closing(World(tmp_path / "world")) as made:
        made.config(Backend={"Type": request.param})
        made.backend = request.param
        yield made


def test_a_healthy_network_and_a_fault_of_it(network, asking):  # noqa: F811
    agents = network.nodes(2, *asking)
    pods = [network.pod(agent, "a") for agent in agents]
    ways = (pods[0].address, pods[1].address), (pods[0].address, pods[1].address, "--proto", "tcp", "--port", "81")
    for way in ways:
        until("it is delivered", lambda way=way: trace(network, agents[0], *way)["verdict"] == "delivered")
        found = trace(network, agents[0], *way)
        assert {step["counted"] for each in found["rounds"] for step in each["steps"]} == {3}, found
    assert [each["state"] for each in check(network, agents[0])] == ["ok"]
    network.run("node2", "nft", INPUT if network.backend == "wireguard" else FORWARD)
    found = trace(network, agents[0], *ways[0])
    assert found["verdict"] == "dropped"
    assert found["node"] == "node2"
    assert "chain ip planted" in "; ".join(found["because"])
    asked = check(network, agents[0], pods[1].address)
    if network.backend == "wireguard":
        assert "UDP 51820 is filtered on the way" in asked["verdict"]
    else:
        assert "does not forward to it" in asked["verdict"]
    counters_are_gone(network, agents)
