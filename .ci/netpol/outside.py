"""What the judges have in common: how one is run, beside the API server."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from overlay.lab import netns, topology
from overlay.lab.cluster import SOURCES, Cluster
from overlay.lab.processes import LabError

PROGRAMS = SOURCES / ".venv/netpol"
"""What .ci/netpol/build makes."""


def program(name: str) -> str:
    """One of its files. Raises LabError where it was not built."""
    path = PROGRAMS / name
    if not path.exists():
        raise LabError(f"no .venv/netpol/{name}: run .ci/netpol/build")
    return str(path)


def run(it: Cluster, command: list[str], log: Path, told: Callable[[str], str], seen: Path | None = None) -> str:
    """A judge's output into a log; what is told of its lines, as they come, into `seen` too. Returns its last line."""
    began, last, lines = time.monotonic(), "", []
    beside = ["nsenter", f"--net={netns.path(topology.node_netns(it.name, 'underlay'))}"]
    environment = {**os.environ, "KUBECONFIG": f"{it.folder}/admin.kubeconfig"}
    with (
        log.open("w") as writer,
        subprocess.Popen(
            [*beside, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as judge,
    ):
        assert judge.stdout is not None
        for line in judge.stdout:
            writer.write(line)
            last = line.strip() or last
            if words := told(line.rstrip()):
                lines.append(f"{time.monotonic() - began:7.0f} s  {words}")
                print(lines[-1], flush=True)
    if seen is not None:
        seen.write_text("\n".join(lines) + "\n")
    return last
