"""What every backend must do, whatever carries its packets: imported by the tests of those that any kernel has
(test_contract.py) and of those that need a module of the kernel (tests/kernels/test_ipip.py)."""

from __future__ import annotations

import json
import signal

import pytest

from lease.records.codec import NODE_FIELD
from overlay.api.family import of_family
from overlay.lab.matrix import Wires
from tests.support.reach import all_reach
from tests.support.wait import until

SOON = 12.0


def pods_of(network, agents, name="a"):
    ends = [end for agent in agents for end in network.pod_ends(agent, name)]
    until("pods reach each other", lambda: all_reach(ends), 25)
    return ends


def routes(network, node, family):
    """The routes of our protocol, as ip prints them."""
    return sorted(network.run(node, "ip", f"-{family}", "route", "show", "proto", "111").splitlines())


def of_peers(network, node):
    return {family: routes(network, node, family) for family in network.families}


def test_every_pod_reaches_every_other(network, kind):
    agents = network.nodes(3)
    ends = pods_of(network, agents)
    with Wires(ends) as wires:
        cells = wires.all()
    assert len(cells) == 6 * len(kind.families)
    assert [cell for cell in cells if not cell.ok] == []
    assert {cell.size for cell in cells} == {kind.mtu}
    for agent in agents:
        until("nothing is wrong", lambda agent=agent: well(agent), 20)
    for agent in agents:
        lines = dict(line.split("=") for line in (agent.run_dir / "subnet.env").read_text().splitlines())
        assert lines["FLANNEL_MTU"] == str(kind.mtu)
        for family in kind.families:
            view = of_family(agent.status(), family)
            assert view["device"]["name"] == (kind.devices[family] or "eth0")
            assert (view["device"]["mtu"], view["device"]["kind"]) == (kind.mtu, kind.backend["Type"])
            until("its peers answer", lambda agent=agent, family=family: answers(agent, family), 30)
    assert all(mtu_of(network, kind.devices[family]) == kind.mtu for family in kind.families)


def well(agent):
    problems = agent.problems()
    assert not problems, problems
    return agent.ready()


def mtu_of(network, device):
    link = network.device("node1", device or "eth0")
    return link.mtu if link is not None else 0


def answers(agent, family):
    found = of_family(agent.status(), family)["reachability"]
    return len(found) == 2 and all(each["state"] == "ok" for each in found)


def test_records_are_as_flannel_writes_them(network, kind):
    (agent,) = network.nodes(1)
    ((_, record),) = network.records().items()
    value = {name: item for name, item in json.loads(record["value"]).items() if name != NODE_FIELD}
    wanted = {
        "PublicIP": "192.168.1.2" if 4 in kind.families else "0.0.0.0",
        "PublicIPv6": "fd00:192:168:1::2" if 6 in kind.families else None,
        "BackendType": kind.backend["Type"],
    }
    if kind.backend["Type"] == "wireguard":
        key = agent.status()["key"]["public_key"]
        ports = {4: 51820, 6: 51821 if kind.devices[6] == "flannel-wg-v6" else 51820}
        names = {4: "BackendData", 6: "BackendV6Data"}
        wanted |= {names[family]: {"PublicKey": key, "Port": ports[family]} for family in kind.families}
    assert value == wanted
    assert list(value) == list(wanted), "in flannel's order"


def test_a_restart_writes_nothing_and_costs_no_packet(network, kind):
    agents = network.nodes(2)
    ends = pods_of(network, agents)
    source, target = ends[0], next(end for end in ends if end.node != ends[0].node and end.family == ends[0].family)
    before, records = of_peers(network, "node1"), network.records()
    with network.stream(source, target) as there, network.stream(target, source) as back:
        agents[0].kill()
        again = network.restart(agents[0]).wait_ready()
        until("its peer is there", lambda: network.has_peers(again, 1))
        again.stop()
        again = network.restart(again).wait_ready()
        until("enough was sent", lambda: there.sent > 200)
    assert (there.lost(), back.lost()) == (0, 0)
    assert of_peers(network, "node1") == before
    assert {k: r["value"] for k, r in network.records().items()} == {k: r["value"] for k, r in records.items()}
    since = again.events("start")[-1]["timestamp"]
    for event in ("kernel.reconciled", "wireguard.peers", "wireguard.mended", "device.mended"):
        assert [line for line in again.events(event) if line["timestamp"] > since] == []


@pytest.mark.parametrize("command", ["route del", "device down", "device gone", "device mtu", "foreign"])
def test_what_somebody_alters_is_put_back(network, kind, command):
    agents = network.nodes(2)
    ends = pods_of(network, agents)
    before = of_peers(network, "node1")
    for family in kind.families:
        device = kind.devices[family]
        route = before[family][0].split()[0]
        if command.startswith("device") and not device:
            device = "eth0"
        if command == "route del":
            network.run("node1", "ip", f"-{family}", "route", "del", route, "proto", "111")
        elif command == "device down":
            network.run("node1", "ip", "link", "set", device, "down")
            if device == "eth0":
                up = "ip link set eth0 up; ip -6 addr replace fd00:192:168:1::2/64 dev eth0 nodad"
                network.run("node1", "sh", "-c", up)
                network.run("node1", "ip", "route", "replace", "default", "via", "192.168.1.1")
        elif command == "device gone" and device != "eth0" and f"{device}:" in network.run("node1", "ip", "-o", "link"):
            network.run("node1", "ip", "link", "del", device)
        elif command == "device mtu" and device != "eth0":
            network.run("node1", "ip", "link", "set", device, "mtu", "1300")
        elif command == "foreign":
            other = {4: "10.244.0.0/24", 6: "fd00:10:244::/64"}[family]  # of nobody: the first of each network
            network.run("node1", "ip", f"-{family}", "route", "add", other, "dev", device or "eth0", "proto", "111")
    until("it is as before", lambda: of_peers(network, "node1") == before, 20)
    # who sends full-size packets before that learns the smaller MTU, for ten minutes
    until("the MTU, too", lambda: all(mtu_of(network, kind.devices[each]) == kind.mtu for each in kind.families), 20)
    until("pods reach each other again", lambda: all_reach(ends), 20)
    until("nothing is wrong", lambda: well(agents[0]), 20)


def test_a_peer_that_leaves_is_taken_out(network, kind):
    agents = network.nodes(2)
    pods_of(network, agents)
    key = agents[1].status()["lease"]["key"]
    agents[1].stop()
    network.drop_record(key)
    until("no route is left", lambda: of_peers(network, "node1") == {family: [] for family in kind.families}, SOON)
    assert all(of_family(agents[0].status(), family)["peers"] == [] for family in kind.families)


def test_a_record_of_another_backend_is_named(network, kind):
    """A mixed cluster is told of, never silently ignored."""
    (agent,) = network.nodes(1)
    other = {
        "PublicIP": "192.168.1.9", "PublicIPv6": None, "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:01:09"},
    }  # fmt: skip
    network.put_record("10.244.9.0-24", other)
    if 4 in kind.families:
        until("it is refused by name", lambda: "10.244.9.0-24" in agent.refused_records())
        assert f"this network's is {kind.backend['Type']!r}" in agent.refused_records()["10.244.9.0-24"]
        until("the operator is told", lambda: "other backends" in agent.problems())
        text = agent.problems()["other backends"]
        assert "192.168.1.9" in text
        assert "vxlan" in text
        network.drop_record("10.244.9.0-24")
        until("and that it is over", lambda: "other backends" not in agent.problems())


def test_uninstall_leaves_nothing(network, kind):
    one, two = network.nodes(2)
    pods_of(network, [one, two])
    one.stop()
    flags = one.command[one.command.index("-m") + 2 :]
    command = (one.command[2], "-m", "overlay.cli.app")
    planned = network.run("node1", *command, "uninstall", "--dry-run", *flags).splitlines()
    network.run("node1", *command, "release", *flags)
    done = network.run("node1", *command, "uninstall", *flags).splitlines()
    assert {line.replace("removed", "would remove") for line in done} == {*planned}, "it does what it said"
    assert "flannel" not in network.run("node1", "ip", "link")
    assert of_peers(network, "node1") == {family: [] for family in kind.families}
    assert "overlay" not in network.run("node1", "nft", "list", "tables")


def test_a_signal_ends_it_and_the_datapath_stays(network, kind):
    agents = network.nodes(2)
    ends = pods_of(network, agents)
    before = of_peers(network, "node1")
    assert agents[0].stop(signal.SIGTERM) == 0
    assert of_peers(network, "node1") == before
    assert all_reach(ends)
