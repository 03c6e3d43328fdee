"""Commands on a node of both families: what they say of IPv6, and that they accuse nobody for it."""

from __future__ import annotations

import json
import subprocess
import threading


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
