"""The real flanneld beside ours by each backend that it has for IPv6 and that needs no kernel module: in a dual-stack network
on Kubernetes and in etcd, in one of IPv6 alone on Kubernetes (in etcd flannel's own keys of it collide); and a node that moves
to ours and back under traffic."""

from contextlib import ExitStack

import pytest

from overlay.api.family import of_family
from overlay.lab import matrix
from tests.interop.conftest import Flanneld
from tests.support.reach import all_reach
from tests.support.wait import until

BACKENDS = {"vxlan": {"Type": "vxlan"}, "host-gw": {"Type": "host-gw"}}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture(params=[(4, 6), (6,)], ids=["dual stack", "IPv6 alone"])
def kube(request, backend, kube_world):
    kube_world.use(*request.param, EnableNFTables=True, Backend=backend)
    kube_world.node_families = (4, 6)  # the API server is reached by IPv4
    return kube_world


@pytest.fixture
def both_in_etcd(world):
    world.use(4, 6, EnableNFTables=True, Backend=BACKENDS["host-gw"])
    return world


def ends_of(world, agents):
    return [world.pod_ends(agent, "a") for agent in agents]


def whole(agent, families, count: int) -> bool:
    views = [of_family(agent.status(), family) for family in families]
    return all(len(view["peers"]) == count and not view["differences"] for view in views)


def side_by_side(world, start) -> None:
    theirs = Flanneld(world, world.node(1)).wait_ready()
    ours = start("node2")
    third = Flanneld(world, world.node(3)).wait_ready()
    until("ours knows everybody", lambda: whole(ours, world.families, 2), 30)
    ends = [end for pair in ends_of(world, (theirs, ours, third)) for end in pair]
    until("pods reach each other", lambda: reached(ends), 40)
    assert ours.problems() == {}


def reached(ends) -> bool:
    """Every pair of a family; on Kubernetes flannel's own CNI list masquerades what leaves a node, as with flannel."""
    with matrix.Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 2 * len(ends)
    return all(cell.seen for cell in cells)


def moved_and_back(world, start) -> None:
    """One node of two; of each family two streams."""
    first = Flanneld(world, world.node(1)).wait_ready()
    second = Flanneld(world, world.node(2)).wait_ready()
    ends = ends_of(world, (first, second))
    until("pods reach each other", lambda: all_reach([end for pair in ends for end in pair]), 40)
    pairs = [pair for one, two in zip(*ends, strict=True) for pair in ((one, two), (two, one))]
    with ExitStack() as stack:
        streams = [stack.enter_context(world.stream(*pair)) for pair in pairs]
        first.stop()
        ours = start("node1")
        until("ours has its peer", lambda: whole(ours, world.families, 1), 30)
        ours.stop()
        Flanneld(world, "node1").wait_ready()
        sent = [stream.sent for stream in streams]
        until("enough was sent", lambda: all(s.sent > was + 300 for s, was in zip(streams, sent, strict=True)))
    assert [stream.lost() for stream in streams] == [0] * len(streams)


def test_side_by_side_on_kubernetes(kube):
    side_by_side(kube, lambda node: kube.agent(kube.node(int(node[-1]))).wait_ready())


def test_moved_and_back_on_kubernetes(kube):
    moved_and_back(kube, lambda node: kube.agent(node).wait_ready())


def test_side_by_side_in_etcd(both_in_etcd):
    side_by_side(
        both_in_etcd,
        lambda node: both_in_etcd.agent(both_in_etcd.node(int(node[-1])), f"--node-name={node}").wait_ready(),
    )


def test_moved_and_back_in_etcd(both_in_etcd):
    moved_and_back(both_in_etcd, lambda node: both_in_etcd.agent(node, f"--node-name={node}").wait_ready())
