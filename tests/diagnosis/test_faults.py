"""Faults planted one at a time in a lab of three nodes with pods: what status and check say of each, on both ends and nowhere
else, and that it is over when the fault is."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import pytest

from overlay.lab import netns
from tests.support.diagnosis import Row
from tests.support.wait import PATIENCE, until


class Fault(NamedTuple):
    """plant, mend: commands on a node ("underlay": beside them all). said: words of problems by node, in a regular
    expression each; the nodes that are not named say nothing new. check: words of node1's check of node2's pod, "" where that
    answers; trace: the same of what it says of packets between them; beside: problems that may be said as well."""

    plant: tuple[tuple[str, str], ...]
    mend: tuple[tuple[str, str], ...]
    said: dict[str, dict[str, str]]
    check: str
    trace: str
    beside: frozenset[str] = frozenset()


DROP = (
    "nft add table ip planted; nft add chain ip planted in '{ type filter hook input priority 0; }';"
    " nft add chain ip planted out '{ type filter hook output priority 0; }';"
    " nft add rule ip planted in udp dport 8472 drop; nft add rule ip planted out udp dport 8472 drop"
)
FORWARD = (
    "nft add table ip planted; nft add chain ip planted onward '{ type filter hook forward priority 0; }';"
    " nft add rule ip planted onward ip daddr 10.244.0.0/16 drop"
)
MASQUERADE = (
    "nft add table ip planted; nft add chain ip planted post '{ type nat hook postrouting priority 50; }';"
    " nft add rule ip planted post oifname flannel.1 masquerade"
)
GONE = "nft delete table ip planted"
SILENT = r"its underlay address answers, its VTEP does not.*UDP 8472"


@pytest.fixture
def asking(tmp_path) -> tuple[str, ...]:
    """The flags by which agents ask each other."""
    path = tmp_path / "ask-secret"
    path.write_text("a secret of a test of ours\n")
    return (f"--ask-secret-file={path}",)


FAULTS = {
    "UDP 8472 dropped on a node": Fault(
        (("node1", DROP),),
        (("node1", GONE),),
        {
            "node1": {"unreachable": rf"all 2 peers, each: {SILENT}", "foreign rules": "drops the tunnel"},
            "node2": {"unreachable": rf"node1 192.168.1.2: {SILENT}"},
            "node3": {"unreachable": rf"node1 192.168.1.2: {SILENT}"},
        },
        SILENT,
        "dropped at node1.*chain ip planted out drops the tunnel",
    ),
    "path MTU below the interface's": Fault(
        (("underlay", "ip link set {to_node2} mtu 1400"),),
        (("underlay", "ip link set {to_node2} mtu 1500"),),
        {
            "node1": {"path mtu": "node2 192.168.1.3: small packets pass, full-size ones are lost"},
            "node2": {"path mtu": "all 2 peers, each: small packets pass"},
            "node3": {"path mtu": "node2 192.168.1.3: small packets pass"},
        },
        "full-size ones are lost.*the largest that pass have 13",
        "packets of 1450 bytes: .*dropped.*(passed|left).*the path's MTU is too low",
    ),
    "an ip rule with a blackhole in another table": Fault(
        (("node1", "ip route add blackhole 10.244.0.0/16 table 52; ip rule add pref 5270 lookup 52"),),
        (("node1", "ip rule del pref 5270; ip route flush table 52"),),
        {
            "node1": {"ways": "blackhole 10.244.0.0/16 of table 52.*ip rule 5270", "unreachable": "all 2 peers, each: this node's"},
            "node2": {"unreachable": "node1 192.168.1.2"},
            "node3": {"unreachable": "node1 192.168.1.2"},
        },
        "this node's own kernel.*blackhole 10.244.0.0/16 of table 52",
        "dropped at node1.*blackhole 10.244.0.0/16 of table 52.*ip rule 5270",
    ),
    "a drop rule in somebody's forward chain": Fault(
        (("node2", FORWARD),),
        (("node2", GONE),),
        {"node2": {"foreign rules": "planted onward drops"}},
        "the way to node2 is whole.*a filter",
        'dropped at node2, between "routed to cni0".*chain ip planted onward drops these packets',
    ),
    "the route of the pods removed": Fault(
        (("node2", "ip route del {subnet2} dev cni0"),),
        (("node2", "ip route add {subnet2} dev cni0 proto kernel scope link src {gateway2}"),),
        {"node2": {"routes": "no route leads .* to cni0"}},
        "the way to node2 is whole",
        "dropped at node2, .*not by cni0.*to be put back",
        frozenset({"ways"}),
    ),
    "masquerade of others on what leaves by the tunnel": Fault(
        (("node1", MASQUERADE),),
        (("node1", GONE),),
        {"node1": {"foreign masquerade": "planted post"}},
        "",
        "delivered.*from node1 on .* its source is another: it was masqueraded",
    ),
    "no carrier on the underlay": Fault(
        (("underlay", "ip link set {to_node1} down"),),
        (("underlay", "ip link set {to_node1} up"),),
        {
            "node1": {"carrier": "eth0, which leads to peers, has no carrier"},
            "node2": {"unreachable": "node1 192.168.1.2: neither its underlay address nor its VTEP answers"},
            "node3": {"unreachable": "node1 192.168.1.2: neither"},
        },
        "neither its underlay address nor its VTEP answers|own kernel",
        "eth0 has no carrier",
        frozenset({"store", "ways", "waiting"}),
    ),
    "a node that is down": Fault(
        (("node2", "ip link set eth0 down"),),
        (("node2", "ip link set eth0 up"),),
        {
            "node2": {"carrier": "eth0, which leads to peers, is down"},
            "node1": {"unreachable": "node2 192.168.1.3: neither its underlay address nor its VTEP answers"},
            "node3": {"unreachable": "node2 192.168.1.3: neither"},
        },
        "neither its underlay address nor its VTEP answers.*is that node up",
        "left this node; what became of it at node2 is not known.*node2 was asked, and gave no answer",
        frozenset({"store", "ways", "waiting"}),
    ),
    "an address that leads elsewhere, and strict rp_filter": Fault(
        (("node2", ("ip link add planted type veth peer name planted2; ip link set planted up; ip link set planted2 up; ip route add 192.168.1.2/32 dev planted;"
          " sysctl -qw net.ipv4.conf.eth0.rp_filter=1")),),
        (("node2", "ip link del planted; sysctl -qw net.ipv4.conf.eth0.rp_filter=0"),),
        {
            "node1": {"unreachable": "node2 192.168.1.3: neither its underlay address nor its VTEP answers"},
            "node2": {"ways to single peers": r"packets of the tunnel from .* are dropped.*eth0.rp_filter=2"},
        },
        "neither its underlay address nor its VTEP answers",
        "node2",
        frozenset({"ways", "unreachable"}),
    ),
    "frames of one node dropped below IP on the far side": Fault(
        (("node2", ("nft add table netdev planted; nft add chain netdev planted in"
          " '{ type filter hook ingress device eth0 priority 0; }'; nft add rule netdev planted in udp dport 8472 ip saddr 192.168.1.2 drop")),),
        (("node2", "nft delete table netdev planted"),),
        {
            "node1": {"unreachable": f"node2 192.168.1.3: {SILENT}|the way there is broken"},
            "node2": {
                "unreachable": f"node1 192.168.1.2: {SILENT}",
                "foreign rules": "chain netdev planted in drops the tunnel from 192.168.1.2",
            },
        },
        "VTEP does not",
        "dropped at node2, .*came by eth0.*chain netdev planted in drops the tunnel",
    ),
}  # fmt: skip


def check(world: Any, agent: Any, *words: str) -> dict[str, Any]:
    """`overlay check` on an agent's node, as JSON."""
    command = (sys.executable, "-m", "overlay.cli.app", "check", "--run-dir", str(agent.run_dir), "--json", *words)
    done = subprocess.run(
        ["nsenter", f"--net={netns.path(world.namespace(agent.node))}", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    every = found if isinstance(found, list) else [found]
    assert done.returncode == (0 if all(each["state"] == "ok" for each in every) else 1)
    return found


def trace(world: Any, agent: Any, *words: str) -> dict[str, Any]:
    """`overlay trace` on an agent's node, as JSON."""
    command = (sys.executable, "-m", "overlay.cli.app", "trace", "--run-dir", str(agent.run_dir), "--json", *words)
    done = subprocess.run(
        ["nsenter", f"--net={netns.path(world.namespace(agent.node))}", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["verdict"] == "delivered" else 1)
    return found


def doctor(world: Any, agent: Any) -> list[dict[str, Any]]:
    """`overlay doctor` on an agent's node, as JSON."""
    command = (
        sys.executable, "-m", "overlay.cli.app", "doctor", "--run-dir", str(agent.run_dir), "--json",
        "--subnet-file", str(agent.run_dir / "subnet.env"), "--cni-conf-dir", str(agent.run_dir / "cni"),
    )  # fmt: skip
    done = subprocess.run(
        ["nsenter", f"--net={netns.path(world.namespace(agent.node))}", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def counters_are_gone(world: Any, agents: list[Any]) -> None:
    for agent in agents:
        assert "overlay_trace" not in world.run(agent.node, "nft", "list", "tables")


def is_well(agents: list[Any]) -> bool:
    """Everybody answers everybody, and nobody says anything."""
    for agent in agents:
        status = agent.status()
        assert {peer["state"] for peer in status["reachability"]} == {"ok"}, (agent.node, status["reachability"])
        assert len(status["reachability"]) == len(agents) - 1
        assert status["problems"] == [], (agent.node, status["problems"])
    return True


@pytest.mark.timeout(300 * PATIENCE)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_both_ends_and_nowhere_else(world, row, asking, name):
    fault, agents = FAULTS[name], world.nodes(3, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    until("all is well before", lambda: is_well(agents), 30)
    assert check(world, agents[0], pods[1].address)["state"] == "ok"
    subnet = str(agents[1].subnet())
    words = {
        "subnet2": subnet, "gateway2": subnet.replace("0/24", "1"),
        **{f"to_{agent.node}": port_of(world, agent.node) for agent in agents},
    }  # fmt: skip
    for node, command in fault.plant:
        world.run(node, "sh", "-c", command.format(**words) if "{ type" not in command else command)

    def said() -> bool:
        for agent in agents:
            problems, wanted = agent.problems(), fault.said.get(agent.node, {})
            for subject, expected in wanted.items():
                assert re.search(expected, problems.get(subject, "")), (agent.node, subject, problems)
            beside = problems.keys() - wanted.keys() - fault.beside
            assert not beside, (agent.node, problems)
        return True

    planted = time.monotonic()
    until("it is said", said, 45)
    took = time.monotonic() - planted
    found = check(world, agents[0], pods[1].address)
    if fault.check:
        assert found["state"] != "ok"
        assert re.search(fault.check, f"{found['verdict']}; {found['remedy']}"), found
    else:
        assert found["state"] == "ok"
    if "node3" not in fault.said and "node1" not in fault.said:
        assert check(world, agents[0], pods[2].address)["state"] == "ok", "nobody else is accused"
    traced = trace(world, agents[0], pods[0].address, pods[1].address)
    words_of_it = "; ".join((traced["text"], *traced["because"], *traced["notes"]))
    assert re.search(fault.trace, words_of_it), words_of_it
    counters_are_gone(world, agents[:1])
    node = next(agent for agent in agents if agent.node in fault.said)
    told = {each["subject"] for each in doctor(world, node) if each["state"] in ("wrong", "warning")}
    assert {f"agent: {subject}" for subject in fault.said[node.node]} <= told, "doctor has it as well"
    problems = {agent.node: agent.problems() for agent in agents}
    row(Row(name, problems, found["verdict"] if fault.check else "answers", words_of_it, took))
    for node, command in fault.mend:
        world.run(node, "sh", "-c", command.format(**words))
    until("all is well again", lambda: is_well(agents), 60)
    counters_are_gone(world, agents)


def port_of(world: Any, node: str) -> str:
    """The underlay's port to a node's eth0."""
    link = json.loads(world.run(node, "ip", "-j", "link", "show", "eth0"))[0]
    listed = json.loads(world.run("underlay", "ip", "-j", "link"))
    return next(each["ifname"] for each in listed if each["ifindex"] == link["link_index"])


@pytest.mark.timeout(300 * PATIENCE)
def test_an_agent_that_is_dead_on_the_far_side_is_seen_where_it_matters(world, row, asking):
    """Its datapath stays, and learns of nobody who joins: to him alone it is a fault."""
    one, two = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in (one, two)]
    until("all is well before", lambda: is_well([one, two]), 30)
    two.kill()
    three = world.agent(world.node(3), "--node-name=node3", *asking)
    three.wait_ready()
    newcomer = world.pod(three, "a")
    planted = time.monotonic()
    until(
        "who joined says it",
        lambda: re.search(f"node2 192.168.1.3: {SILENT}", three.problems().get("unreachable", "")),
        45,
    )
    took = time.monotonic() - planted
    assert one.problems() == {}, "pods that reached each other still do"
    found = check(world, three, pods[1].address)
    assert found["state"] != "ok"
    assert "the agent of node2 was asked, and gives no answer" in found["far_side"][0]
    assert "dead (the datapath stays" in found["far_side"][0]
    assert check(world, one, pods[1].address)["state"] == "ok"
    traced = trace(world, three, newcomer.address, pods[1].address)
    words = "; ".join((traced["text"], *traced["because"], *traced["notes"]))
    assert re.search("left this node.*node2 was asked, and gave no answer", words), words
    row(
        Row(
            "an agent that is dead on the far side, and a node that joins",
            {"node3": three.problems()},
            found["far_side"][0],
            words,
            took,
        )
    )


@pytest.mark.timeout(400 * PATIENCE)
def test_loss_in_one_direction_is_said_of_that_peer_alone(world, row, asking):
    agents = world.nodes(3, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    until("all is well before", lambda: is_well(agents), 30)
    half = FULL_SIZE.replace("meta length gt 1414", "ip saddr 192.168.1.2 numgen random mod 10 lt 5")
    world.run("node2", "sh", "-c", half)
    planted = time.monotonic()
    until("it is said", lambda: "node2 192.168.1.3" in agents[0].problems().get("loss", ""), 240)
    took = time.monotonic() - planted
    for agent in agents:
        text = " ".join(agent.problems().values())
        assert "node3" not in text, (agent.node, text)
    assert agents[2].problems() == {}
    traced = trace(world, agents[0], pods[0].address, pods[2].address)
    assert traced["verdict"] == "delivered"
    row(
        Row(
            "half of the packets lost in one direction",
            {"node1": agents[0].problems()},
            "",
            "",
            took,
        )
    )


AHEAD = "import time; now = time.time; time.time = lambda: now() + 600; import sys; from overlay.main import run; sys.exit(run(sys.argv[1:]))"


@pytest.mark.timeout(300 * PATIENCE)
def test_a_clock_that_is_wrong_costs_no_pod_a_packet_and_doctor_names_it(world, row, asking):
    one = world.agent(world.node(1), "--node-name=node1", *asking).wait_ready()
    two = world.agent(world.node(2), "--node-name=node2", *asking, program=AHEAD).wait_ready()
    pods = [world.pod(agent, "a") for agent in (one, two)]
    until("all is well", lambda: is_well([one, two]), 45)
    assert check(world, one, pods[1].address)["state"] == "ok"
    named = {each["subject"]: each for each in doctor(world, one)}["clocks"]
    assert named["state"] == "warning"
    assert re.search(r"this node's clock and that of node2 \(.*its clock and ours differ by 6\d\d s", named["what"]), (
        named
    )
    row(Row("a clock that is ten minutes ahead", {"node1": {"doctor: clocks": named["what"]}}, "answers", "", 0))
    two.kill()
    world.agent("node2", "--node-name=node2", *asking).wait_ready()
    until("all is well again", lambda: is_well([one, world.agents[-1]]), 45)
    assert {each["subject"]: each["state"] for each in doctor(world, one)}["clocks"] == "ok"


FULL_SIZE = (
    "nft add table netdev planted; nft add chain netdev planted in '{ type filter hook ingress device eth0 priority 0; }';"
    " nft add rule netdev planted in udp dport 8472 meta length gt 1414 drop"
)


@pytest.mark.timeout(300 * PATIENCE)
def test_full_size_packets_that_the_tunnel_loses_cost_no_trace_its_other_end(world, asking):
    """What the other node counted is a large answer itself."""
    agents = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    for agent in agents:
        world.run(agent.node, "sh", "-c", FULL_SIZE)
    found = trace(world, agents[0], pods[0].address, pods[1].address)
    assert "packets of 1450 bytes: dropped at node2" in found["text"]
    assert "the path's MTU is too low" in found["because"][0]
    assert {step["node"] for step in found["rounds"][0]["steps"]} == {"node1", "node2"}


@pytest.mark.timeout(300 * PATIENCE)
def test_packets_of_others_are_not_taken_for_probes(world, asking):
    """A pod sends so many others that each identification comes up."""
    agents = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    beside = world.pod(agents[1], "b")
    world.run("node1", "sh", "-c", FORWARD.replace("ip daddr 10.244.0.0/16", f"ip daddr {pods[1].address}"))
    talking = world.talk(pods[0], beside.address, 9)
    try:
        for _ in range(6):
            found = trace(world, agents[0], pods[0].address, pods[1].address, "--proto", "udp", "--port", "53")
            assert 'dropped at node1, between "routed to flannel.1"' in found["text"]
            assert found["notes"] == []
    finally:
        talking.stop()


@pytest.mark.timeout(300 * PATIENCE)
def test_a_trace_that_is_ended_leaves_nothing_and_neither_does_one_that_is_killed(world, asking):
    agents = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    for number in (signal.SIGTERM, signal.SIGKILL):
        command = (sys.executable, "-m", "overlay.cli.app", "trace", "--run-dir", str(agents[0].run_dir))
        process = subprocess.Popen(
            ["nsenter", f"--net={netns.path(world.namespace('node1'))}", *command, pods[0].address, pods[1].address],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until("it counts", lambda: "overlay_trace" in world.run("node1", "nft", "list", "tables"), 20)
        process.send_signal(number)
        process.wait(20)
        if number == signal.SIGTERM:
            counters_are_gone(world, agents[:1])
    world.run("node1", "nft", "add", "table", "ip", "overlay_trace_1_ab")  # of long ago
    world.restart(agents[0]).wait_ready()
    until(
        "those that are over go at a start",
        lambda: "overlay_trace_1_ab" not in world.run("node1", "nft", "list", "tables"),
        20,
    )
    agents[1].stop()
    counters_are_gone(world, agents[1:])


@pytest.mark.timeout(300 * PATIENCE)
def test_a_stranger_with_the_pods_address_is_not_entered(world, asking):
    agents = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    with world.stranger(pods[0].address):
        assert trace(world, agents[0], pods[0].address, pods[1].address)["verdict"] == "delivered"


def test_forwarding_that_is_switched_off_on_the_pods_bridge_is_put_back(world):
    agents = world.nodes(2)
    pods = [world.pod(agent, "a") for agent in agents]
    until("all is well before", lambda: is_well(agents), 30)
    world.run("node2", "sysctl", "-qw", "net.ipv4.conf.cni0.forwarding=0")
    until("it is put back", lambda: agents[1].status()["counters"]["mended_sysctl"], 20)
    assert "cni0" in str(agents[1].events("sysctl.mended"))
    assert check(world, agents[0], pods[1].address)["state"] == "ok"


def test_a_healthy_lab_says_nothing_and_check_and_trace_agree(world, asking):
    agents = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    until("all is well", lambda: is_well(agents), 30)
    every = check(world, agents[0])
    assert [each["state"] for each in every] == ["ok"]
    for target in (pods[1].address, "node2", "192.168.1.3", str(agents[1].subnet())):
        found = check(world, agents[0], target)
        assert (found["state"], found["peer"]["node_name"]) == ("ok", "node2"), target
        assert all(probe["answered"] == probe["sent"] for probe in found["probes"])
    assert check(world, agents[0], pods[0].address)["state"] == "ok", "one of its own"
    beside = world.pod(agents[0], "b")
    for source, target, *more in (
        (pods[0].address, pods[1].address), (pods[0].address, beside.address), ("node", pods[1].address),
        (pods[0].address, pods[1].address, "--proto", "tcp", "--port", "81"),
        (pods[0].address, pods[1].address, "--proto", "udp", "--port", "81"),
    ):  # fmt: skip
        found = trace(world, agents[0], source, target, *more)
        assert found["verdict"] == "delivered", found
        for each in found["rounds"]:
            assert {step["counted"] for step in each["steps"]} == {3}, (source, target, more, each["steps"])
            assert each["answers"]
    counters_are_gone(world, agents)


def test_a_filter_that_lets_some_flows_pass_is_seen_by_several(world, asking):
    agents = world.nodes(2, *asking)
    pods = [world.pod(agent, "a") for agent in agents]
    until("all is well", lambda: is_well(agents), 30)
    world.run(
        "node2", "nft", "add table ip planted; add chain ip planted in { type filter hook input priority 0; };"
        " add rule ip planted in udp dport 8472 udp sport & 1 == 1 drop",
    )  # fmt: skip
    flows = "--proto", "tcp", "--port", "81", "--flows", "14"  # all take one side: 2 of 2^14 times
    found = trace(world, agents[0], pods[0].address, pods[1].address, *flows)
    assert re.search(r"^(\d|1[0-3]) of 14 flows came through: one of several ways", found["flows"]), found["flows"]
    assert found["verdict"] != "delivered"
    assert (found["node"], found["step"]) == ("node2", "input")
    counters_are_gone(world, agents)


def test_what_cannot_be_checked_is_said(world):
    (one,) = world.nodes(1)
    nobodys = "10.244.7.9" if str(one.subnet()) != "10.244.7.0/24" else "10.244.8.9"
    command = (sys.executable, "-m", "overlay.cli.app", "check", "--run-dir", str(one.run_dir))
    for target, words in (
        ("nobody", "no peer has that name"), ("10.99.0.1", "outside of Network"), (nobodys, "no node holds it"),
    ):  # fmt: skip
        done = subprocess.run([*command, target], capture_output=True, text=True, check=False)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
