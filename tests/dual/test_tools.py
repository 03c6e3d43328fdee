"""Commands on a node of both families: what they say of IPv6, and that they accuse nobody for it."""

from __future__ import annotations

import json
import subprocess
import threading

from tests.diagnosis.test_faults import asking  # noqa: F401 (a fixture)
from tests.support.wait import until


def test_doctor_finds_nothing_wrong_with_a_healthy_node(world):
    """subnet.env has the smaller MTU of both: that of IPv6, not that of the device of IPv4."""
    one, _ = world.nodes(2)
    world.pod_ends(one, "a")
    command = (one.command[2], "-m", "overlay.cli.app", "doctor", "--json", "--run-dir", str(one.run_dir))
    done = subprocess.run(
        ["ip", "netns", "exec", world.namespace(one.node), *command, "--subnet-file", str(one.run_dir / "subnet.env")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {(each["subject"], each["state"]): each for each in json.loads(done.stdout)}
    assert ("MTU", "ok") in found, found
    assert ("MTU", "wrong") not in found
    assert {subject for subject, _ in found} >= {"sysctls IPv6", "MTU IPv6", "addresses IPv6", "offloads IPv6"}, found
    assert {state for subject, state in found if subject.endswith("IPv6")} == {"ok"}, found
    one.kill()
    done = subprocess.run(
        ["ip", "netns", "exec", world.namespace(one.node), *command, "--subnet-file", str(one.run_dir / "subnet.env")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    alone = {each["subject"]: (each["state"], each["what"]) for each in json.loads(done.stdout)}
    for subject, device in (("entries", "flannel.1"), ("entries IPv6", "flannel-v6.1")):
        state, what = alone[subject]
        assert (state, f"1 by {device}, with a route, a neighbour and an FDB entry each" in what) == ("ok", True), what


def test_capture_shows_packets_of_ipv6(world):
    one, two = world.nodes(2)

    def answers(agent) -> bool:
        return [each["state"] for each in agent.status()["reachability_ipv6"]] == ["ok"]

    # what was sent before an entry stood left by the default route, and may have waited for the router's MAC address
    until("each is answered by the other", lambda: answers(one) and answers(two), 30)
    subnet = two.status()["lease"]["subnet_ipv6"]
    command = (one.command[2], "-m", "overlay.cli.app", "capture", "--run-dir", str(one.run_dir), "--json")
    lines: list[str] = []
    there = threading.Thread(target=lambda: lines.extend(world.run(one.node, *command, "-n", "1", subnet).splitlines()))
    there.start()
    there.join(60)  # agents ping each other through the tunnel each few seconds
    (seen,) = (json.loads(line) for line in lines)
    assert seen["outer"]["vni"] == 1
    assert {seen["outer"]["source"], seen["outer"]["destination"]} == {"fd00:192:168:1::2", "fd00:192:168:1::3"}
    assert subnet.removesuffix("/64") in (seen["source"], seen["destination"])
    assert seen["what"].startswith("icmpv6 echo")


def overlay(world, agent, *words: str) -> subprocess.CompletedProcess[str]:
    command = (agent.command[2], "-m", "overlay.cli.app", *words, "--run-dir", str(agent.run_dir))
    return subprocess.run(
        ["ip", "netns", "exec", world.namespace(agent.node), *command], capture_output=True, text=True, check=False
    )


def test_full_size_is_that_of_pods_which_is_the_smaller_of_both_families(world, asking):  # noqa: F811
    agents = world.nodes(2, *asking)
    pods = [[end.address for end in world.pod_ends(agent, "a")] for agent in agents]
    until("all answer", lambda: not agents[0].problems() and len(agents[0].status()["peers_ipv6"]) == 1)
    for ours, theirs in zip(*pods, strict=True):
        for words in (
            ("check", "--json", theirs),
            ("trace", "--json", ours, theirs),
            ("trace", "--json", "node", theirs),
        ):
            done = overlay(world, agents[0], *words)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert overlay(world, agents[1], "check", pods[1][0]).returncode == 0, "of its own pod"
    assert overlay(world, agents[0], "trace", "--json", pods[0][0], "node2").returncode == 0
    wrong = overlay(world, agents[0], "trace", pods[1][0], pods[0][0])
    assert (wrong.returncode, "run it at node2" in wrong.stderr) == (2, True)
    assert overlay(world, agents[0], "check").stdout.count("2 were asked, 2 answer") == 1


def test_the_cluster_shows_what_is_wrong_in_ipv6_alone(world, asking):  # noqa: F811
    agents = world.nodes(2, *asking)
    until("all is well", lambda: {each["state"] for each in agents[0].status()["reachability_ipv6"]} == {"ok"}, 30)
    assert "NO" not in overlay(world, agents[0], "status", "--cluster").stdout
    rules = "add table ip6 planted; add chain ip6 planted in { type filter hook input priority 0; }; add rule ip6 planted in udp dport 8472 drop"
    world.run("node2", "nft", rules)
    until("it is said", lambda: "unreachable IPv6" in agents[0].problems(), 40)
    shown = overlay(world, agents[0], "status", "--cluster").stdout
    assert "NO (IPv6)" in shown
    worst = shown[shown.index("peers, as") :]
    assert "node2" in worst.splitlines()[2] or "node1" in worst.splitlines()[2], worst
