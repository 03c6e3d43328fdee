"""Agents that ask each other, the page, and traces by them, whole."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from overlay.ask.client import NoAnswer, ask_agent, secret_in
from overlay.lab import netns
from overlay.page.token import token_of
from tests.support.wait import until


@pytest.fixture
def secret(tmp_path) -> str:
    path = tmp_path / "ask-secret"
    path.write_text("a secret of a test of ours\n")
    return str(path)


def overlay(world: Any, agent: Any, *words: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "overlay.cli.app", *words, "--run-dir", str(agent.run_dir))
    return subprocess.run(
        ["nsenter", f"--net={netns.path(world.namespace(agent.node))}", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_all_are_asked_and_one_that_does_not_answer_is_not_called_well(world, secret):
    one, two = world.nodes(2, f"--ask-secret-file={secret}")
    three = world.agent(world.node(3), "--node-name=node3")  # does not let itself be asked, as flannel
    until("all answer", lambda: len(one.status()["peers"]) == 2 and not one.problems(), 30)
    for agent in (one, two):
        until(
            "they were tried",
            lambda it=agent: [each["state"] for each in it.status()["reachability"]] == ["ok"] * 2,
            40,
        )
    found = json.loads(overlay(world, one, "status", "--cluster", "--json").stdout)
    by_name = {node["name"]: node for node in found["nodes"]}
    assert [by_name[f"node{each}"]["asked"] for each in (1, 2, 3)] == ["answered", "answered", "no answer"]
    assert "refused" in by_name["node3"]["why"]
    pairs = {(found["nodes"][pair[0]]["name"], found["nodes"][pair[1]]["name"]): pair[2] for pair in found["pairs"]}
    assert pairs == {
        ("node1", "node2"): "ok",
        ("node1", "node3"): "ok",
        ("node2", "node1"): "ok",
        ("node2", "node3"): "ok",
    }
    shown = overlay(world, one, "status", "--cluster")
    assert shown.returncode == 0
    assert "2 of 3 agents answered" in shown.stdout
    assert three.problems() == {}


def test_mtus_that_differ_are_named_of_both_ends(world, secret):
    one, two = world.nodes(2, f"--ask-secret-file={secret}")
    world.run("node2", "ip", "link", "set", "eth0", "mtu", "1400")
    until("it follows", lambda: two.status()["device"]["mtu"] == 1350)
    found = json.loads(overlay(world, one, "check", "--json", "node2").stdout)
    assert any(line.startswith("MTU of pods: 1350 on node2, 1450 on this node") for line in found["far_side"]), found
    there = json.loads(overlay(world, two, "check", "--json", "node1").stdout)
    assert any("MTU of pods: 1450 on node1, 1350 on this node" in line for line in there["far_side"]), there
    shown = overlay(world, one, "status", "--cluster").stdout
    assert "MTUs of pods differ: 1450: node1; 1350: node2" in shown


def test_without_the_secret_nothing_is_listened_at_and_a_wrong_one_gets_nothing(world, secret, tmp_path):
    (one,) = world.nodes(1)
    assert one.status()["asking"] is None
    assert ":8473" not in world.run("node1", "ss", "-Hltn")
    one = world.restart(one, f"--ask-secret-file={secret}")
    asking = one.wait_ready().status()["asking"]
    assert asking["addresses"] == [str(one.subnet()).removesuffix("/24"), "192.168.1.2"]
    other = tmp_path / "other"
    other.write_text("another secret, as long as that\n")
    ask = lambda path: world.inside("underlay", lambda: ask_agent(("192.168.1.2",), 8473, secret_in(path), "/status"))  # noqa: E731
    assert ask(secret)["node_name"] == "node1"
    with pytest.raises(NoAnswer, match="another secret"):
        ask(str(other))


def test_a_secret_that_cannot_be_used_and_a_port_that_is_taken_are_told_and_cost_no_peer(world, tmp_path):
    path = tmp_path / "secret"
    one, two = world.nodes(2, f"--ask-secret-file={path}")
    assert f"--ask-secret-file {path}: No such file" in one.problems()["asking"]
    assert one.ready()
    taken = world.inside("node1", lambda: socket.create_server(("192.168.1.2", 8473)))
    path.write_text("a secret of a test of ours\n")
    until("it listens", lambda: "asking" not in two.problems(), 90)
    until("the other says who has it", lambda: "another process" in one.problems().get("asking", ""), 90)
    taken.close()
    until("it is taken once it is free", lambda: "asking" not in one.problems(), 90)
    assert world.peers("node1") == 1


def test_the_page_is_served_and_traces_from_any_node(world, secret):
    one, two = world.nodes(2, f"--ask-secret-file={secret}", "--page=127.0.0.1:8474")
    pods = [world.pod(agent, "a") for agent in (one, two)]
    until("they were tried", lambda: {each["state"] for each in one.status()["reachability"]} == {"ok"}, 30)
    url = overlay(world, one, "page").stdout.strip()
    assert url == f"http://127.0.0.1:8474/?token={token_of(secret_in(secret))}"

    def fetch(path: str) -> str:
        with urllib.request.urlopen(path, timeout=20) as answer:
            return answer.read().decode()

    def fetched(path: str) -> str:
        return world.inside("node1", lambda: fetch(path))

    assert "<title>overlay</title>" in fetched(url)
    assert len(json.loads(fetched(url.replace("/?", "/data.json?")))["nodes"]) == 2
    for source, destination in ((pods[0], pods[1]), (pods[1], pods[0])):
        words = f"source={source.address}&destination={destination.address}"
        found = json.loads(fetched(url.replace("/?", f"/trace.json?{words}&")))
        assert found["verdict"] == "delivered", found
        assert {step["node"] for step in found["rounds"][0]["steps"]} == {"node1", "node2"}
    for here, there in ((one, two), (two, one)):
        words = f"source={here.subnet()}&destination={there.subnet()}"
        found = json.loads(fetched(url.replace("/?", f"/check.json?{words}&")))
        assert (found["state"], found["peer"]["node_name"]) == ("ok", there.node)
        assert len(found["probes"]) == 4, "the ladder"
    assert (
        "no node has"
        in json.loads(fetched(url.replace("/?", "/check.json?source=10.9.0.0/24&destination=x&")))["error"]
    )
    assert "overlay_trace" not in world.run("node1", "nft", "list", "tables")
    assert "overlay_trace" not in world.run("node2", "nft", "list", "tables")


def test_a_page_is_written_as_a_file_also_where_nobody_can_be_asked(world, tmp_path):
    (one,) = world.nodes(1)
    path = tmp_path / "page.html"
    assert overlay(world, one, "status", "--html", str(path)).returncode == 0
    assert "<!doctype html>" in path.read_text()
    wrong = overlay(world, one, "status", "--html", str(tmp_path / "no" / "page.html"))
    assert (wrong.returncode, "No such file" in wrong.stderr) == (1, True)
