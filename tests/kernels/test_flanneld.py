"""wireguard and ipip beside the real flanneld, and nodes that move from one to the other under live traffic. Here, since
flanneld knows no WireGuard but the kernel's."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from lease.records.codec import NODE_FIELD
from overlay.lab import matrix
from tests.interop.conftest import Flanneld
from tests.support.reach import all_reach
from tests.support.wait import until

KINDS = {
    "wireguard": ("wireguard", "flannel-wg", (4,)),
    "wireguard, dual stack": ("wireguard", "flannel-wg", (4, 6)),
    "ipip": ("ipip", "flannel.ipip", (4,)),
}


@pytest.fixture(params=KINDS)
def mixed(request, world):
    backend, world.device_name, families = KINDS[request.param]
    world.use(*families, Backend={"Type": backend})
    return world


def ends_of(world, agents):
    return [world.pod_ends(agent, "a") for agent in agents]


def test_nodes_of_both_kinds_side_by_side(mixed):
    theirs = Flanneld(mixed, mixed.node(1)).wait_ready()
    ours = mixed.agent(mixed.node(2), "--node-name=node2").wait_ready()
    third = Flanneld(mixed, mixed.node(3)).wait_ready()
    ends = [end for pair in ends_of(mixed, (theirs, ours, third)) for end in pair]
    until("pods reach each other", lambda: all_reach(ends), 30)
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 6 * len(mixed.families)
    assert all(cell.ok for cell in cells), cells
    assert ours.problems() == {}


def test_from_flannel_to_ours_under_live_traffic_and_back(mixed):
    """No packet is lost on the way to ours, though flanneld is killed (a flanneld that ends deletes its WireGuard device, and
    one that starts makes it anew, so that the way back costs what that costs)."""
    first = Flanneld(mixed, mixed.node(1)).wait_ready()
    second = Flanneld(mixed, mixed.node(2)).wait_ready()
    pairs = ends_of(mixed, (first, second))
    ends = [end for pair in pairs for end in pair]
    until("pods reach each other", lambda: all_reach(ends), 30)
    before, device = mixed.records(), mixed.index("node1", mixed.device_name)
    with ExitStack() as stack:
        ways = [way for one, two in zip(*pairs, strict=True) for way in ((one, two), (two, one))]
        streams = [stack.enter_context(mixed.stream(*way)) for way in ways]
        for node, agent in (("node1", first), ("node2", second)):
            agent.process.kill()
            agent.process.wait(15)
            mixed.agent(node, f"--node-name={node}").wait_ready()
        until("enough was sent", lambda sent=streams[0].sent: streams[0].sent > sent + 200)
    assert [stream.lost() for stream in streams] == [0] * len(streams)
    assert mixed.index("node1", mixed.device_name) == device, "the same device"
    now = mixed.records()
    assert now.keys() == before.keys(), "the same subnets"
    for key, record in now.items():
        value = {k: v for k, v in json.loads(record["value"]).items() if k != NODE_FIELD}
        assert value == json.loads(before[key]["value"]), "and what peers read: key, port, address"
    for node in ("node1", "node2"):
        next(agent for agent in reversed(mixed.agents) if agent.node == node).stop()
        Flanneld(mixed, node).wait_ready()
    until("pods reach each other", lambda: all_reach(ends), 30)
    assert mixed.records().keys() == before.keys()
