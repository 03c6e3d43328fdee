"""Faults in a cluster of which one node runs the real flanneld: ours say what is wrong, of that node alone, by stock pings."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from tests.diagnosis.test_faults import DROP, FORWARD, GONE, SILENT, asking, check, trace  # noqa: F401 (fixtures)
from tests.interop.conftest import Flanneld
from tests.support.wait import PATIENCE, until


class Fault(NamedTuple):
    """On node2, flannel's. problem: what nodes 1 and 3 say, "" where that is nothing; check: of its pod; trace: of packets to it."""

    plant: str
    mend: str
    problem: str
    check: str
    trace: str


KEPT = "/tmp/overlay-t-kept"
UNKNOWN = "left this node; what became of it at node2 is not known"
FAULTS = {
    "UDP 8472 dropped": Fault(DROP, GONE, f"unreachable: node2 192.168.1.3: {SILENT}", SILENT, UNKNOWN),
    "a drop rule in its forward chain": Fault(FORWARD, GONE, "", "the way to .* is whole.*a filter", UNKNOWN),
    "an ip rule with a blackhole": Fault(
        "ip route add blackhole 10.244.0.0/16 table 52; ip rule add pref 5270 lookup 52",
        "ip rule del pref 5270; ip route flush table 52",
        f"unreachable: node2 192.168.1.3: {SILENT}",
        SILENT,
        UNKNOWN,
    ),
    "its device down": Fault(
        "ip link set flannel.1 down", "true", f"unreachable: node2 192.168.1.3: {SILENT}", SILENT, UNKNOWN
    ),
    "wrong FDB entries": Fault(  # flannel puts none right
        f"bridge fdb show dev flannel.1 | grep dst >{KEPT}; while read -r mac _ dst _; do"
        f" bridge fdb replace $mac dev flannel.1 dst 192.168.1.77 self; done <{KEPT}",
        f"while read -r mac _ dst _; do bridge fdb replace $mac dev flannel.1 dst $dst self; done <{KEPT}; rm {KEPT}",
        f"unreachable: node2 192.168.1.3: {SILENT}",
        SILENT,
        UNKNOWN,
    ),
    "wrong MACs of peers": Fault(
        f"ip neigh show dev flannel.1 nud permanent >{KEPT}; while read -r base _ mac _; do"
        f" ip neigh replace $base lladdr 0a:00:00:00:00:99 dev flannel.1 nud permanent; done <{KEPT}",
        f"while read -r base _ mac _; do ip neigh replace $base lladdr $mac dev flannel.1 nud permanent; done <{KEPT}; rm {KEPT}",
        f"unreachable: node2 192.168.1.3: {SILENT}",
        SILENT,
        UNKNOWN,
    ),
    "the node down": Fault(
        "ip link set eth0 down",
        "ip link set eth0 up",
        "unreachable: node2 192.168.1.3: neither its underlay address nor its VTEP answers",
        "is that node up",
        UNKNOWN,
    ),
}


def said(agents: list[Any], expected: str) -> bool:
    for agent in agents:
        lines = [f"{subject}: {text}" for subject, text in agent.problems().items()]
        assert len(lines) == bool(expected), (agent.node, lines)
        assert re.search(expected.replace("node2 ", "(node2 )?"), "".join(lines)), (agent.node, lines)
    return True


@pytest.mark.timeout(300 * PATIENCE)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_flannels_node_is_named_by_ours(world, asking, name):  # noqa: F811 (a fixture)
    fault = FAULTS[name]
    one, three = (world.agent(world.node(number), f"--node-name=node{number}", *asking) for number in (1, 3))
    flannel = Flanneld(world, world.node(2)).wait_ready()
    for agent in (one, three):
        agent.wait_ready()
    pods = [world.pod(where, "a") for where in (one, flannel)]
    until(
        "all answer before",
        lambda: all([r["state"] for r in agent.status()["reachability"]] == ["ok", "ok"] for agent in (one, three)),
        60,
    )
    assert check(world, one, pods[1].address)["state"] == "ok", "flannel's kernel answers pings as ours does"
    before = trace(world, one, pods[0].address, pods[1].address)
    assert before["verdict"] == "delivered"
    assert "does flannel run there?" in " ".join(before["notes"])
    world.run("node2", "sh", "-c", fault.plant)
    until("it is said, of that node alone", lambda: said([one, three], fault.problem), 60)
    found = check(world, one, pods[1].address)
    assert found["state"] != "ok"
    assert re.search(fault.check, f"{found['verdict']}; {found['remedy']}"), found
    assert check(world, one, str(three.subnet()))["state"] == "ok", "nobody else is accused"
    traced = trace(world, one, pods[0].address, pods[1].address)
    assert re.search(fault.trace, traced["text"].replace("192.168.1.3", "node2")), traced["text"]
    world.run("node2", "sh", "-c", fault.mend)
