"""Both families, with the real flanneld in one cluster, and nodes that move from one to the other under live traffic."""

import json
from contextlib import ExitStack

from lease.families import V4, V6
from lease.records.codec import NODE_FIELD
from overlay.lab import matrix
from tests.interop.conftest import Flanneld
from tests.support.reach import all_reach
from tests.support.wait import until

CONF = {"EnableNFTables": True}


def has_peer(agent) -> bool:
    found = agent.status()
    return all(len(found[f"peers{end}"]) == 1 and not found[f"differences{end}"] for end in ("", "_ipv6"))


def test_nodes_of_both_kinds_side_by_side(world):
    world.use(4, 6, **CONF)
    theirs = Flanneld(world, world.node(1)).wait_ready()
    ours = world.agent(world.node(2), "--node-name=node2").wait_ready()
    third = Flanneld(world, world.node(3)).wait_ready()
    for node in ("node1", "node2", "node3"):
        for family in (V4, V6):
            until("everybody knows everybody", lambda n=node, f=family: world.peers(n, family=f) == 2)
    ends = [end for agent in (theirs, ours, third) for end in world.pod_ends(agent, "a")]
    until("pods' addresses are settled", lambda: all_reach(ends), 30)
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 12
    assert all(cell.ok for cell in cells), cells
    assert ours.problems() == {}


def test_from_flannel_to_ours_and_back_under_live_traffic(world):
    world.use(4, 6, **CONF)
    first = Flanneld(world, world.node(1)).wait_ready()
    second = Flanneld(world, world.node(2)).wait_ready()
    for family in (V4, V6):
        until(
            "they know each other",
            lambda f=family: world.peers("node1", family=f) == world.peers("node2", family=f) == 1,
        )
    ends = [world.pod_ends(agent, "a") for agent in (first, second)]
    until("pods' addresses are settled", lambda: all_reach([end for pair in ends for end in pair]), 30)
    before = world.records()
    pairs = [pair for one, two in zip(*ends, strict=True) for pair in ((one, two), (two, one))]
    with ExitStack() as stack:
        streams = [stack.enter_context(world.stream(*pair)) for pair in pairs]
        first.stop()
        ours = world.agent("node1", "--node-name=node1").wait_ready()
        until("ours has its peer", lambda: has_peer(ours))
        for family in (V4, V6):
            until(
                "no route of flannel's is left",
                lambda f=family: [r.protocol for r in world.kernel("node1", family=f)["routes"].values()] == [111],
            )
        now = world.records()
        assert now.keys() == before.keys(), "the same subnets"
        for key, record in now.items():
            assert {k: v for k, v in json.loads(record["value"]).items() if k != NODE_FIELD} == json.loads(
                before[key]["value"]
            )
        second.stop()
        ours_too = world.agent("node2", "--node-name=node2").wait_ready()
        until("ours too", lambda: has_peer(ours_too))
        ours.stop()
        Flanneld(world, "node1").wait_ready()
        until(
            "flannel's routes stand in front again",
            lambda: all(world.run("node1", "ip", of, "route").count("onlink") == 2 for of in ("-4", "-6")),
        )
        ours_too.stop()
        Flanneld(world, "node2").wait_ready()
        until("on both", lambda: all(world.run("node2", "ip", of, "route").count("onlink") == 2 for of in ("-4", "-6")))
        sent = [stream.sent for stream in streams]
        sent = [stream.sent for stream in streams]
        until("enough was sent", lambda: all(s.sent > was + 200 for s, was in zip(streams, sent, strict=True)))
    assert [stream.lost() for stream in streams] == [0, 0, 0, 0]
    final = world.records()
    assert final.keys() == before.keys()
    for name in ("BackendData", "BackendV6Data"):
        assert {k: r[name] for k, r in final.items()} == {k: r[name] for k, r in before.items()}, "the same MACs"


def test_a_flannel_of_ipv4_alone_is_not_hung_by_a_key_of_both(world):
    """It would be, for good, by the first: ours waits, and takes IPv6 when that flannel is gone."""
    world.config(**CONF)
    theirs = Flanneld(world, world.node(1)).wait_ready()
    world.use(4, 6, **CONF)
    ours = world.agent(world.node(2), "--node-name=node2").wait_ready()
    until("flannel has us", lambda: world.peers("node1") == 1)
    (key,) = [key for key, record in world.records().items() if record.get(NODE_FIELD)]
    assert "&" not in key
    assert "hangs for good at the first record of both" in ours.problems()["lease family"]
    theirs.stop()
    for other in world.records():
        if other != key:
            world.drop_record(other)
    until("it has both", lambda: "&" in ours.status()["lease"]["key"], 90)
    assert ours.status()["lease"]["key"].startswith(f"{key}&")
