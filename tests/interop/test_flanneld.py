"""One cluster of both kinds, and nodes that move from one to the other under live traffic."""

import json

from lease.records.codec import NODE_FIELD
from overlay.lab import matrix
from tests.interop.conftest import Flanneld
from tests.support.wait import until

CONF = {"EnableNFTables": True}


def test_nodes_of_both_kinds_side_by_side(world):
    world.config(**CONF)
    theirs = Flanneld(world, world.node(1)).wait_ready()
    ours = world.agent(world.node(2), "--node-name=node2").wait_ready()
    third = Flanneld(world, world.node(3)).wait_ready()
    for node in ("node1", "node2", "node3"):
        until("everybody knows everybody", lambda node=node: world.peers(node) == 2)
    ends = [world.pod(agent, "a") for agent in (theirs, ours, third)]
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 6
    assert all(cell.ok for cell in cells), cells


def test_from_flannel_to_ours_and_back_under_live_traffic(world):
    world.config(**CONF)
    first = Flanneld(world, world.node(1)).wait_ready()
    second = Flanneld(world, world.node(2)).wait_ready()
    until("they know each other", lambda: world.peers("node1") == world.peers("node2") == 1)
    source, target = world.pod(first, "a"), world.pod(second, "a")
    before = world.records()
    with world.stream(source, target) as there, world.stream(target, source) as back:
        first.stop()
        ours = world.agent("node1", "--node-name=node1").wait_ready()
        until("ours has its peer", lambda: len(ours.status()["peers"]) == 1 and not ours.status()["differences"])
        until(
            "no route of flannel's is left",
            lambda: [r.protocol for r in world.kernel("node1")["routes"].values()] == [111],
        )
        now = world.records()
        assert now.keys() == before.keys(), "the same subnets"
        for key, record in now.items():
            assert {k: v for k, v in json.loads(record["value"]).items() if k != NODE_FIELD} == json.loads(
                before[key]["value"]
            )
        second.stop()
        ours_too = world.agent("node2", "--node-name=node2").wait_ready()
        until("ours too", lambda: len(ours_too.status()["peers"]) == 1 and not ours_too.status()["differences"])
        # and the way back
        ours.stop()
        Flanneld(world, "node1").wait_ready()
        until(
            "flannel's route stands in front again",
            lambda: (
                "proto 111" in world.run("node1", "ip", "route")
                and world.run("node1", "ip", "route").count("onlink") == 2
            ),
        )
        ours_too.stop()
        Flanneld(world, "node2").wait_ready()
        until("on both", lambda: world.run("node2", "ip", "route").count("onlink") == 2)
        until("enough was sent", lambda: there.sent > 200)  # also on its last way
    assert (there.lost(), back.lost()) == (0, 0)
    final = world.records()
    assert final.keys() == before.keys()
    assert {k: r["BackendData"] for k, r in final.items()} == {k: r["BackendData"] for k, r in before.items()}, (
        "the same MACs"
    )


def test_what_we_write_is_read_by_flannel_after_it_started(world):
    world.config(**CONF)
    Flanneld(world, world.node(1)).wait_ready()
    ours = world.agent(world.node(2), "--node-name=node2").wait_ready()
    until("flannel has us", lambda: world.peers("node1") == 1)
    mac, peer = next(iter(world.kernel("node1")["fdb"].items()))
    assert f"{mac:012x}" == ours.mac().replace(":", "")
    assert peer
