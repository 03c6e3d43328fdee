"""What the failures of a matrix have in common. Pure."""

from __future__ import annotations

from overlay.lab.matrix import Cell, summary

NODES = ("node1", "node2", "node3")
NODE_OF = {f"{node}-pod1": node for node in NODES} | {node: node for node in NODES}


def cells(fails, why="nothing arrived"):
    """Of a pod on each node; fails: whether one from there to there does."""
    found = []
    for source in NODES:
        for target in NODES:
            bad = source != target and fails(source, target)
            found.append(
                Cell(
                    f"{source}-pod1",
                    f"{target}-pod1",
                    "pod-pod",
                    None if bad else 9.0,
                    "",
                    "",
                    not bad,
                    why if bad else "",
                )
            )
    return found


def said(fails, why="nothing arrived"):
    return list(summary(cells(fails, why), NODE_OF))


def test_a_node_that_nobody_reaches_or_that_reaches_nobody_is_named():
    assert said(lambda *_: False) == []
    assert said(lambda _, target: target == "node2") == ["nobody reaches node2"]
    assert said(lambda source, _: source == "node2") == ["node2 reaches nobody"]
    assert said(lambda source, target: "node2" in (source, target)) == [
        "node2 is cut off: nobody reaches it, and it reaches nobody"
    ]
    assert said(lambda source, target: (source, target) == ("node1", "node2")) == []


def test_what_passes_beside_the_tunnel_proves_nothing():
    beside = Cell("node1-pod1", "node2", "pod-node", 9.0, "", "", True)
    found = [*cells(lambda _, target: target == "node2"), beside]
    assert list(summary(found, NODE_OF)) == ["nobody reaches node2"]


def test_the_mtu_is_named_where_only_large_packets_fail():
    why = "full-size packets (1450 bytes, DF) do not arrive: an MTU on the way is smaller"
    found = said(lambda _, target: target == "node2", why)
    assert found[-1] == "small packets pass everywhere: it is the MTU"
