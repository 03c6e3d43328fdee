"""Pods by CNI: the agents' own network list, run through the real plugins as any CNI caller does.

Source: the CNI specification, 1.0 (execution protocol; each plugin of a list gets its predecessor's result).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from overlay.lab import netns
from overlay.lab.processes import LabError

PLUGIN_FOLDERS = ("/opt/cni/bin", "/usr/lib/cni")
NEEDED = ("bridge", "host-local", "portmap")


def plugin_path() -> str:
    """CNI_PATH, or where distributions and Kubernetes put the plugins. Raises LabError."""
    path = os.environ.get("CNI_PATH") or ":".join(PLUGIN_FOLDERS)
    missing = [name for name in NEEDED if not _find(name, path)]
    if missing:
        raise LabError(
            f"CNI plugins {', '.join(missing)}: not in {path}; install them: apt-get install containernetworking-plugins"
        )
    return path


class Cache(NamedTuple):
    """Where what a pod was given is kept, as the runtime's library does (libcni/api.go, cachedInfo), and the pod's name."""

    folder: Path
    namespace: str
    name: str

    def path(self, pod: str) -> Path:
        """The file of an attachment."""
        return self.folder / f"cbr0-{pod}-eth0"

    def keep(self, pod: str, result: dict[str, Any]) -> None:
        """Write it."""
        names = [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", self.namespace], ["K8S_POD_NAME", self.name]]
        cached = {"kind": "cniCacheV1", "containerId": pod, "ifName": "eth0", "cniArgs": names, "result": result}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path(pod).write_text(json.dumps(cached))


def attach(node: str, conflist: Path, pod: str, cache: Cache | None = None) -> list[str]:
    """Attach a pod's namespace to a node's network; its addresses, of each family one. node, pod: names of namespaces.
    Raises LabError."""
    result = _run_list("ADD", node, conflist, pod)
    if cache is not None:
        cache.keep(pod, result)
    try:
        found = [str(each["address"]).split("/")[0] for each in result["ips"]]
    except (KeyError, TypeError):
        found = []
    if not found:
        raise LabError(f"CNI gave {pod} no address: {json.dumps(result)}")
    return found


def detach(node: str, conflist: Path, pod: str, cache: Cache | None = None) -> None:
    """Take a pod off its node's network. Raises LabError."""
    _run_list("DEL", node, conflist, pod)
    if cache is not None:
        cache.path(pod).unlink(missing_ok=True)


def _run_list(command: str, node: str, conflist: Path, pod: str) -> dict[str, Any]:
    network = json.loads(conflist.read_text())
    result: dict[str, Any] = {}
    plugins = network["plugins"] if command == "ADD" else reversed(network["plugins"])
    for plugin in plugins:
        config = {"name": network["name"], "cniVersion": network["cniVersion"], **plugin}
        if result:
            config["prevResult"] = result
        result = _run(command, node, pod, config) or result
    return result


def _run(command: str, node: str, pod: str, config: dict[str, Any]) -> dict[str, Any]:
    path = plugin_path()
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod,
        "CNI_NETNS": netns.path(pod),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": path,
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    }
    done = subprocess.run(
        ["nsenter", f"--net={netns.path(node)}", _find(config["type"], path) or config["type"]],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise LabError(f"CNI plugin {config['type']} {command} for {pod}: {(done.stdout or done.stderr).strip()[:300]}")
    return json.loads(done.stdout) if done.stdout.strip() else {}


def _find(name: str, path: str) -> str | None:
    return next((f"{folder}/{name}" for folder in path.split(":") if os.access(f"{folder}/{name}", os.X_OK)), None)
