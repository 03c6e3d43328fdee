"""`kubectl overlay`: the command `overlay`, run in the agent's pod of a node. kubectl finds plugins by their names
(kubectl-overlay on PATH)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

NAMESPACE = "kube-overlay"
SELECTOR = "app.kubernetes.io/name=overlay,app.kubernetes.io/component=agent"
CONTAINER = "overlayd"
_USAGE = """\
usage: kubectl overlay [--node NODE] [-n NAMESPACE] [--context CONTEXT] [--kubeconfig FILE] COMMAND ...

Runs `overlay COMMAND ...` in the agent's pod of a node (of any, where none is named):

  kubectl overlay --node worker1 status
  kubectl overlay --node worker1 check worker2
  kubectl overlay status --cluster
"""


class CannotRun(Exception):
    """One line."""


def main() -> None:
    """Entry point of kubectl-overlay."""
    try:
        command = command_of(sys.argv[1:])
    except CannotRun as error:
        print(f"kubectl overlay: {error}", file=sys.stderr)
        sys.exit(2)
    os.execvp(command[0], command)


def command_of(words: Sequence[str]) -> list[str]:
    """What is run. Raises CannotRun."""
    options, rest = split(words)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        sys.exit(0 if rest else 2)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise CannotRun("kubectl is not on PATH")
    base = [kubectl, *(f"--{name}={options[name]}" for name in ("context", "kubeconfig") if name in options)]
    namespace = options.get("namespace", NAMESPACE)
    pod = _pod(
        [*base, "-n", namespace, "get", "pods", "-l", SELECTOR, "-o", "json"], options.get("node", ""), namespace
    )
    terminal = ["-it"] if sys.stdin.isatty() and sys.stdout.isatty() else ["-i"]
    return [*base, "-n", namespace, "exec", *terminal, pod, "-c", CONTAINER, "--", "overlay", *rest]


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The plugin's own options, which stand first, and the command. Raises CannotRun."""
    names = {
        "--node": "node",
        "-n": "namespace",
        "--namespace": "namespace",
        "--context": "context",
        "--kubeconfig": "kubeconfig",
    }
    options: dict[str, str] = {}
    left = list(words)
    while left and left[0].partition("=")[0] in names:
        word, equals, value = left.pop(0).partition("=")
        if not equals and not left:
            raise CannotRun(f"{word} needs a value")
        options[names[word]] = value if equals else left.pop(0)
    return options, left


def _pod(command: list[str], node: str, namespace: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotRun(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "kubectl failed")
    return choose(json.loads(done.stdout)["items"], node, namespace)


def choose(pods: Sequence[Mapping[str, Any]], node: str, namespace: str) -> str:
    """The name of the agent's pod of a node, or of the first that runs. Raises CannotRun."""
    by_node = {pod["spec"].get("nodeName", ""): pod for pod in pods}
    if not pods:
        raise CannotRun(f"no agent in namespace {namespace} ({SELECTOR}); -n names another")
    if node:
        if node not in by_node:
            raise CannotRun(f"node {node} has no agent; these have: {', '.join(sorted(by_node)[:10])}")
        return str(by_node[node]["metadata"]["name"])
    running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    if not running:
        raise CannotRun(f"none of {len(pods)} agents runs: kubectl -n {namespace} get pods")
    return str(running[0]["metadata"]["name"])


if __name__ == "__main__":
    main()
