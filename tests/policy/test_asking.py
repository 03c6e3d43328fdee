"""`overlay policy`: what it says agrees with what packets do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

from overlay.lab import netns
from tests.policy.test_enforcing import FROM_B, LABELS, asks, objects, three  # noqa: F401 (a fixture)
from tests.support.wait import until


def overlay(world, *words: str) -> tuple[int, str]:
    run_dir = world.agents[0].run_dir
    done = subprocess.run(
        [sys.executable, "-m", "overlay.cli.app", "policy", *words, f"--run-dir={run_dir}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_flows_names_pods_and_policies(three, field):  # noqa: F811
    world = three
    world.apply(objects(world, FROM_B))
    run_dir = world.agents[0].run_dir
    listening = subprocess.Popen(
        ["nsenter", f"--net={netns.path(world.namespace('node1'))}", sys.executable, "-m", "overlay.cli.app", "flows",
         "--follow", "--json", f"--run-dir={run_dir}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = []
    thread = threading.Thread(target=lambda: said.extend(map(json.loads, listening.stdout)), daemon=True)
    thread.start()

    def has(verdict: str, **wanted) -> bool:
        return any(each["verdict"] == verdict and wanted.items() <= each.items() for each in said)

    def asked_and(check) -> bool:
        asks(world, field, "x/c", "x/a")
        asks(world, field, "x/b", "x/a")
        return check()

    try:
        for family in (4, 6):
            ends = {key: next(e.address for e in those if e.family == family) for key, those in world.ends.items()}
            denied = {
                "source_pod": "x/c", "destination_pod": "x/a", "source": ends["x/c"], "destination": ends["x/a"],
                "port": 80, "policies": ["x/from-b"],
            }  # fmt: skip
            until("a denied one", lambda denied=denied: asked_and(lambda: has("denied", **denied, protocol="TCP")), 30)
            until("by UDP too", lambda denied=denied: asked_and(lambda: has("denied", **denied, protocol="UDP")), 30)
            allowed = {"source": ends["x/b"], "destination_pod": "x/a", "port": 80, "protocol": "TCP"}
            until("an allowed one", lambda allowed=allowed: asked_and(lambda: has("allowed", **allowed)), 30)
    finally:
        listening.terminate()
        listening.wait(10)
        thread.join(10)
        listening.stdout.close()


def test_explain_says_what_packets_find(three, field):  # noqa: F811
    world = three
    world.apply(objects(world, FROM_B))
    for source in LABELS:
        for target in LABELS:
            if source == target:
                continue
            for port in (80, 81):
                found = asks(world, field, source, target, port)
                for place, protocol in enumerate(("tcp", "udp")):
                    code, said = overlay(world, "explain", source, target, f"{protocol}/{port}")
                    assert code == (0 if found[place] else 1), said
                    assert found[place] == found[place + 2], "in both families"


def test_the_words(three):  # noqa: F811
    world = three
    world.apply(objects(world, FROM_B))
    code, said = overlay(world, "explain", "x/c", "x/a", "80")
    a, c = world.ends["x/a"][0].address, world.ends["x/c"][0].address
    assert (code, said.splitlines()[:4]) == (1, [
        f"x/c ({c}, node1) -> x/a ({a}, node1), TCP 80",
        "  egress of x/c: no policy selects it: allowed",
        "  ingress of x/a: selected by x/from-b: denied, for none of their rules allows it:",
        "    x/from-b ingress 0: from pods app=b of its own namespace, TCP 80",
    ])  # fmt: skip
    assert said.splitlines()[-1] == "denied"
    code, said = overlay(world, "explain", "x/b", a, "tcp/80", "--json")
    found = json.loads(said)
    assert code == 0
    assert found["ways"][0]["ingress"] == {
        "allowed": True, "policies": ["x/from-b"], "rules": [{"policy": "x/from-b", "rule": 0, "action": "Accept"}],
    }  # fmt: skip
    assert overlay(world, "explain", "8.8.8.8", "x/a", "80")[0] == 1
    assert overlay(world, "explain", "x/a", "x/a", "81")[0] == 0, "a pod reaches itself"
    for words, why in (
        (("x/none", "x/a"), "there is no pod x/none"),
        (("x/b", "x/a", "http"), "http: must be a port like 80"),
        (("nonsense", "x/a"), "nonsense: must be an address, or a pod as namespace/name"),
    ):
        code, said = overlay(world, "explain", *words)
        assert code == 2
        assert why in said


def test_check_names_what_is_odd(three):  # noqa: F811
    world = three
    world.apply(objects(world, FROM_B))
    assert overlay(world, "check") == (0, "1 policies: nothing odd\n")
    odd = {
        "kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": "odd"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "nobody"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "gone"}}}], "ports": [{"port": "http"}]}],
        },
    }  # fmt: skip
    world.apply(objects(world, FROM_B, odd))
    code, said = overlay(world, "check")
    assert code == 1
    rule = "x/odd: ingress 0: from pods app=gone of its own namespace, TCP http:"
    assert said.splitlines() == [
        "x/odd: selects no pod: no pod of x has labels app=nobody",
        f"{rule} no pod is pods app=gone of its own namespace",
        f"{rule} no pod has a TCP port named http",
    ]


def test_trace_names_the_policy(three):  # noqa: F811
    """On one node and between two."""
    world = three
    world.apply(objects(world, FROM_B))
    run_dir, namespace = world.agents[0].run_dir, world.namespace("node1")
    for place in (0, 1):
        a, c = world.ends["x/a"][place].address, world.ends["x/c"][place].address
        done = subprocess.run(
            ["nsenter", f"--net={netns.path(namespace)}", sys.executable, "-m", "overlay.cli.app", "trace", c, a,
             "--proto", "tcp", "--port", "80", f"--run-dir={run_dir}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        assert 'between "routed to cni0" and "passed the forward chains"' in done.stdout
        why = (
            "because: a NetworkPolicy denies it: ingress of x/a is isolated by x/from-b: overlay policy explain x/c x/a"
        )
        assert why in done.stdout.splitlines()
