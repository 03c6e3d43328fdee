"""The agent with no more rights than the manifests give it."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
from pathlib import Path

import yaml

from overlay.api.serve import SOCKET_NAME
from overlay.lab import netns
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "manifests/overlay.yaml"


def _container() -> dict:
    documents = [item for item in yaml.safe_load_all(MANIFEST.read_text()) if item and item["kind"] == "DaemonSet"]
    return documents[0]["spec"]["template"]["spec"]["containers"][0]["securityContext"]


def _within_the_manifests_rights(agent_command: list[str]) -> list[str]:
    """The command with those capabilities and no way to others; root's files are root's still, as in a container."""
    kept = ",".join(f"+{name.lower()}" for name in _container()["capabilities"]["add"])
    setpriv = ["setpriv", "--bounding-set", f"-all,{kept}", "--inh-caps", "-all", "--no-new-privs"]
    enter, where, *rest = agent_command
    return [enter, where, *setpriv, *rest]


def test_the_manifests_capabilities_are_enough_and_all_it_has(world):
    """A device, routes, rules, pods' ports, and what somebody deletes of them."""
    world.config()
    plain = subprocess.Popen

    def confined(command, *args, **more):
        return plain(_within_the_manifests_rights(command) if "overlay" in command else command, *args, **more)

    from tests.support import world as module

    module.subprocess.Popen = confined  # type: ignore[misc]
    try:
        agents = [
            world.agent(world.node(number), f"--node-name=node{number}", "--ip-masq").wait_ready() for number in (1, 2)
        ]
    finally:
        module.subprocess.Popen = plain  # type: ignore[misc]
    until("they know each other", lambda: world.peers("node1") == world.peers("node2") == 1)
    status = Path(f"/proc/{agents[0].process.pid}/status").read_text()
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 1 << 12 | 1 << 13, "NET_ADMIN, NET_RAW"
    assert fields["NoNewPrivs"] == "1"
    assert _container()["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    pods = [world.pod(agent, "a") for agent in agents]
    with world.stream(*pods) as stream:
        until("they talk", lambda: stream.came)
        world.run("node1", "ip", "link", "del", "flannel.1")
        world.run("node1", "nft", "flush", "ruleset")
        until("back", lambda: world.peers("node1") == 1 and "from_pods" in world.run("node1", "nft", "list", "ruleset"))
        until(
            "its pod's port, too",
            lambda: "elements" in world.run("node1", "nft", "list", "set", "bridge", "overlay-1-pods", "ports6"),
        )
    assert stream.came
    assert agents[0].problems() == {}


def test_its_files_are_nobody_elses_to_write(world):
    world.config()
    agent = world.agent(world.node(1), "--node-name=node1").wait_ready()
    assert stat.S_IMODE(os.stat(agent.run_dir / SOCKET_NAME).st_mode) == 0o600
    for path in (agent.run_dir / "subnet.env", agent.run_dir / "cni/10-flannel.conflist"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path
    assert not stat.S_IMODE((agent.run_dir / "cni").stat().st_mode) & 0o022


def test_programs_are_started_by_lists_alone():
    """No shell, no text that is taken apart again, in all that the agent is made of."""
    for path in [*(ROOT / "overlay").rglob("*.py"), *(ROOT / "lease").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("os.system", "os.popen", "eval", "exec", "pickle.loads"), path
            assert not any(word.arg == "shell" for word in node.keywords), path
            if name.startswith("subprocess.") and node.args:
                assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), f"{path}: {ast.unparse(node)}"


def test_an_abstract_socket_of_a_namespace_is_seen_there_alone(world):
    """The lock of the device: another node on this machine has one of the same name."""
    world.config()
    for number in (1, 2):
        world.agent(world.node(number), f"--node-name=node{number}").wait_ready()
    listed = [
        netns.inside(world.namespace(f"node{number}"), lambda: Path("/proc/thread-self/net/unix").read_text())
        for number in (1, 2)
    ]
    assert all("@overlayd/flannel.1" in text for text in listed)
