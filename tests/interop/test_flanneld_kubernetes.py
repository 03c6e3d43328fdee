"""The same on Kubernetes: nodes of both kinds by their annotations, and nodes that move under live traffic."""

from overlay.lab import matrix
from tests.interop.conftest import Flanneld
from tests.support.wait import until

CONF = {"EnableNFTables": True}


def uids(world) -> dict[str, tuple[str, dict[str, str]]]:
    return {name: (world.kube.read(name)["metadata"]["uid"], world.kube.notes(name)) for name in ("node1", "node2")}


def test_nodes_of_both_kinds_side_by_side(kube_world):
    world = kube_world
    world.config(**CONF)
    theirs = Flanneld(world, world.node(1)).wait_ready()
    ours = world.agent(world.node(2)).wait_ready()
    third = Flanneld(world, world.node(3)).wait_ready()
    for node in ("node1", "node2", "node3"):
        until("everybody knows everybody", lambda node=node: world.peers(node) == 2)
    ends = [world.pod(agent, "a") for agent in (theirs, ours, third)]
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 6
    assert all(cell.seen for cell in cells), cells


def test_from_flannel_to_ours_and_back_under_live_traffic(kube_world):
    world = kube_world
    world.config(**CONF)
    first = Flanneld(world, world.node(1)).wait_ready()
    second = Flanneld(world, world.node(2)).wait_ready()
    until("they know each other", lambda: world.peers("node1") == world.peers("node2") == 1)
    source, target = world.pod(first, "a"), world.pod(second, "a")
    before = uids(world)
    assert len(before["node1"][1]) == 4
    with world.stream(source, target) as there, world.stream(target, source) as back:
        first.stop()
        ours = world.agent("node1").wait_ready()
        until(
            "no route of flannel's is left",
            lambda: [r.protocol for r in world.kernel("node1")["routes"].values()] == [111],
        )
        assert uids(world) == before, "annotations byte for byte as flannel wrote them"
        second.stop()
        ours_too = world.agent("node2").wait_ready()
        until("ours too", lambda: len(ours_too.status()["peers"]) == 1 and not ours_too.status()["differences"])
        assert uids(world) == before
        ours.stop()
        Flanneld(world, "node1").wait_ready()
        until("flannel's route stands in front", lambda: world.run("node1", "ip", "route").count("onlink") == 2)
        ours_too.stop()
        Flanneld(world, "node2").wait_ready()
        until("on both", lambda: world.run("node2", "ip", "route").count("onlink") == 2)
        until("enough was sent", lambda: there.sent > 200)  # also on its last way
    assert (there.lost(), back.lost()) == (0, 0)
    assert uids(world) == before, "the same MACs"
