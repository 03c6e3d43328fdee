"""host-gw: one cluster of both kinds, and nodes that move from one to the other under live traffic."""

import json

import pytest

from lease.records.codec import NODE_FIELD
from overlay.lab import matrix
from tests.interop.conftest import Flanneld
from tests.support.wait import until
from tests.support.world import ROOT

BACKENDS = {
    "host-gw": {"Type": "host-gw"},
    "DirectRouting": {"Type": "vxlan", "DirectRouting": True},
}


@pytest.fixture(params=BACKENDS)
def mixed(request, world):
    world.config(EnableNFTables=True, Backend=BACKENDS[request.param])
    return world


def to_peers(world, node) -> list[str]:
    """The protocols of the routes to pods of others by eth0."""
    lines = world.run(node, "ip", "route", "show", "dev", "eth0").splitlines()
    return sorted(
        "111" if "proto 111" in line else "boot" for line in lines if line.startswith("10.244.") and "via" in line
    )


def returned(mixed) -> list[str]:
    """flannel puts its route before ours with DirectRouting; with host-gw it finds that ours leads there, and takes it."""
    kind = json.loads(mixed.etcd.get(f"{ROOT}/config")[f"{ROOT}/config"]["value"])["Backend"]["Type"]
    return ["111"] if kind == "host-gw" else ["111", "boot"]


def test_nodes_of_both_kinds_side_by_side(mixed):
    theirs = Flanneld(mixed, mixed.node(1)).wait_ready()
    ours = mixed.agent(mixed.node(2), "--node-name=node2").wait_ready()
    third = Flanneld(mixed, mixed.node(3)).wait_ready()
    for node, proto in (("node1", "boot"), ("node2", "111"), ("node3", "boot")):
        until("everybody knows everybody", lambda node=node, proto=proto: to_peers(mixed, node) == [proto] * 2)
    ends = [mixed.pod(agent, "a") for agent in (theirs, ours, third)]
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 6
    assert all(cell.ok for cell in cells), cells
    assert ours.problems() == {}


def test_from_flannel_to_ours_and_back_under_live_traffic(mixed):
    first = Flanneld(mixed, mixed.node(1)).wait_ready()
    second = Flanneld(mixed, mixed.node(2)).wait_ready()
    until("they know each other", lambda: to_peers(mixed, "node1") == to_peers(mixed, "node2") == ["boot"])
    source, target = mixed.pod(first, "a"), mixed.pod(second, "a")
    before = mixed.records()
    with mixed.stream(source, target) as there, mixed.stream(target, source) as back:
        first.stop()
        ours = mixed.agent("node1", "--node-name=node1").wait_ready()
        until("no route of flannel's is left", lambda: to_peers(mixed, "node1") == ["111"])
        assert not ours.status()["conflicting_routes"]
        now = mixed.records()
        assert now.keys() == before.keys(), "the same subnets"
        for key, record in now.items():
            value = {k: v for k, v in json.loads(record["value"]).items() if k != NODE_FIELD}
            assert value == json.loads(before[key]["value"])
        second.stop()
        ours_too = mixed.agent("node2", "--node-name=node2").wait_ready()
        until("ours too", lambda: to_peers(mixed, "node2") == ["111"])
        # and the way back
        ours.stop()
        Flanneld(mixed, "node1").wait_ready()
        back_again = returned(mixed)
        until("flannel has its route", lambda: to_peers(mixed, "node1") == back_again)
        ours_too.stop()
        Flanneld(mixed, "node2").wait_ready()
        until("on both", lambda: to_peers(mixed, "node2") == back_again)
        until("enough was sent", lambda: there.sent > 200)
    assert (there.lost(), back.lost()) == (0, 0)
    assert mixed.records().keys() == before.keys()


def test_a_route_that_leads_elsewhere_is_a_strangers(mixed):
    ours = mixed.agent(mixed.node(1), "--node-name=node1").wait_ready()
    other = mixed.agent(mixed.node(2), "--node-name=node2").wait_ready()
    until("it has its peer", lambda: to_peers(mixed, "node1") == ["111"])
    mixed.run("node1", "ip", "route", "add", str(other.subnet()), "via", "192.168.1.77", "dev", "eth0")
    until("it is reported", lambda: ours.status()["conflicting_routes"])
    mixed.settled(ours)
    assert to_peers(mixed, "node1") == ["111", "boot"], "and left alone"
