"""The pods' bridge, when the network's MTU grows by another backend."""

from __future__ import annotations

from contextlib import closing

from overlay.cni.lists import CONFLIST
from overlay.lab import netns
from tests.support.wait import until
from tests.support.world import World


def mtu(world, name: str) -> int:
    return int(world.run("node1", "ip", "-o", "link", "show", name).split(" mtu ")[1].split()[0])


def test_it_follows_once_no_pod_of_before_is_left(tmp_path):
    """As long as there is one, a packet of the new size would be dropped at its port without a word."""
    with closing(World(tmp_path / "world")) as world:
        world.config()
        (agent,) = world.nodes(1)
        old = world.pod(agent, "old")
        world.config(Backend={"Type": "host-gw"})
        listed = agent.run_dir / "cni" / CONFLIST
        until("new pods get more", lambda: '"mtu": 1500' in listed.read_text())
        world.pod(agent, "new")
        world.settled(agent)
        assert mtu(world, "cni0") == 1450
        netns.delete(old.namespace)
        until("it follows", lambda: mtu(world, "cni0") == 1500)
        world.config()
        until("it is vxlan", lambda: agent.status()["device"]["kind"] == "vxlan" and agent.ready())
        world.settled(agent)
        assert mtu(world, "cni0") == 1500, "to a smaller one it goes with the pods"
