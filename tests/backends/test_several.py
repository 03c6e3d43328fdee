"""Several networks of different backends on the same nodes (flannel's functional test `multi`): each by its own way, and none in
another's."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.support.reach import all_reach
from tests.support.wait import until
from tests.support.world import World

NETWORKS = {
    "hostgw": '{"Network":"10.50.0.0/16","Backend":{"Type":"host-gw"}}',
    "wireguard": '{"Network":"10.60.0.0/16","Backend":{"Type":"wireguard"}}',
}
DEVICES = {"vxlan": "flannel.1", "hostgw": "eth0", "wireguard": "flannel-wg"}


def started(world, name: str, node: str):
    """An agent of a network, ready; that of vxlan as others make it."""
    if name == "vxlan":
        return world.agent(node, f"--node-name={node}").wait_ready()
    flags = f"--etcd-prefix=/{name}/network", f"--node-name={node}"
    return world.agent(node, *flags, run_dir=f"{node}-{name}").wait_ready()


@pytest.fixture
def networks(tmp_path):
    """Agents of two nodes, by network."""
    with closing(World(tmp_path / "world")) as world:
        for name, config in NETWORKS.items():
            world.etcd.put(f"/{name}/network/config", config)
        world.config()
        found = {"vxlan": world.nodes(2)}
        for name in NETWORKS:
            found[name] = [started(world, name, node) for node in ("node1", "node2")]
        for agents in found.values():
            for agent in agents:
                until("it has its peer", lambda agent=agent: len(agent.status()["peers"]) == 1, 20)
        yield world, found


def quiet(found) -> bool:
    """Nobody puts right what another network's agent made."""
    for agents in found.values():
        for agent in agents:
            status = agent.status()
            assert status["differences"] == [], (agent.node, status["differences"])
            assert agent.problems().keys() <= {"shared port"}, (agent.node, agent.problems())
            mended = {name: n for name, n in status["counters"].items() if name.startswith("mended_") and n}
            said = [line for line in agent.log().splitlines() if any(word in line for word in ("mended", "device"))]
            assert mended == {}, (agent.run_dir.name, mended, said)
    return True


def test_each_network_goes_its_own_way(networks):
    world, found = networks
    pods = {name: [world.pod(agent, name) for agent in agents] for name, agents in found.items()}
    for name, ends in pods.items():
        until("pods of one network reach each other", lambda ends=ends: all_reach(ends), 25)
        way = world.run("node1", "ip", "route", "get", ends[1].address)
        assert f"dev {DEVICES[name]} " in way, (name, way)
    until("nobody undoes another's work", lambda: quiet(found), 20)
    for agents in found.values():  # a second start finds all as it is
        for agent in agents:
            agent.stop()
    again = {name: [started(world, name, agent.node) for agent in agents] for name, agents in found.items()}
    for ends in pods.values():
        until("they still do", lambda ends=ends: all_reach(ends), 25)
    until("nothing was altered by it", lambda: quiet(again), 20)


def test_a_network_that_is_uninstalled_leaves_the_others(networks):
    world, found = networks
    kept = {name: [world.pod(agent, name) for agent in found[name]] for name in ("vxlan", "wireguard")}
    agent = found["hostgw"][0]
    agent.stop()
    flags = agent.command[agent.command.index("-m") + 2 :]
    world.run(agent.node, agent.command[2], "-m", "overlay.cli.app", "uninstall", "--vni=10000000", *flags)
    assert "10.50." not in world.run("node1", "ip", "route", "show", "proto", "111")
    for ends in kept.values():
        until("the others' pods reach each other", lambda ends=ends: all_reach(ends), 25)
    del found["hostgw"]
    until("nothing else is wrong", lambda: quiet(found), 20)
