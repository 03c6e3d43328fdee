"""Of a healthy lab nothing is said, for ten minutes: no problem, no warning, no peer in doubt, while pods talk and come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from overlay.lab import netns
from tests.support.wait import until

SECONDS = float(os.environ.get("OVERLAY_HEALTHY_SECONDS", "600"))


def overlay(world: Any, agent: Any, *words: str) -> Any:
    done = subprocess.run(
        ["nsenter", f"--net={netns.path(world.namespace(agent.node))}", sys.executable, "-m", "overlay.cli.app", *words,
         "--run-dir", str(agent.run_dir), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_is_said_of_a_healthy_lab(world, tmp_path):
    secret = tmp_path / "ask-secret"
    secret.write_text("a secret of a test of ours\n")
    agents = world.nodes(3, f"--ask-secret-file={secret}")
    pods = [world.pod(agent, "a") for agent in agents]
    until("all answer", lambda: all({r["state"] for r in a.status()["reachability"]} == {"ok"} for a in agents), 60)
    until("nothing is wrong", lambda: not any(agent.problems() for agent in agents), 60)
    quiet_from = {agent.node: len(agent.log()) for agent in agents}
    end, turn = time.monotonic() + SECONDS, 0
    with world.stream(pods[0], pods[1]) as stream:
        while time.monotonic() < end:
            turn += 1
            for agent in agents:
                status = agent.status()
                assert status["problems"] == [], (turn, agent.node)
                assert status["ready"]
                assert {each["state"] for each in status["reachability"]} == {"ok"}, (turn, agent.node)
                assert not any(count for name, count in status["counters"].items() if name.startswith("mended_")), (
                    status["counters"]
                )
            if turn % 12 == 0:
                assert overlay(world, agents[turn // 12 % 3], "check")[0]["state"] == "ok"
                assert overlay(world, agents[0], "trace", pods[0].address, pods[2].address)["verdict"] == "delivered"
                wrong = [
                    each
                    for each in overlay(world, agents[1], "doctor")
                    if each["state"] == "wrong" and "CNI" not in each["subject"]
                ]
                assert wrong == [], "doctor finds nothing of the lab's network wrong"
            time.sleep(5)
    assert stream.lost() == 0
    for agent in agents:
        said = [json.loads(line) for line in agent.log()[quiet_from[agent.node] :].splitlines() if line.startswith("{")]
        loud = [line for line in said if line.get("level") in ("warning", "error")]
        assert loud == [], agent.node
        assert agent.status()["history"] == agent.status()["history"][:3], "what a start brought, and no more"
