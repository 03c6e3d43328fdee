"""Bring up a cluster, give its nodes the image of the tests' pods, run e2e.test beside its API server, say what it found.

Ends with 0 where every spec passed that this kernel can run, 1 where one failed, 2 where the tests did not run.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from overlay.lab import netns, topology
from overlay.lab.cluster import CACHE, SOURCES, Cluster
from overlay.lab.lab import locked
from overlay.lab.processes import LabError
from overlay.lab.proof import Proof

BINARY = SOURCES / ".venv/netpol/e2e.test"
NEEDS_SCTP = "SCTPConnectivity"
"""The word in the names of specs whose pods open SCTP sockets."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="netpol/run")
    parser.add_argument("--name", default="netpol", help="of the cluster")
    parser.add_argument("--focus", default="Netpol", help="a regular expression of specs")
    parser.add_argument("--family", choices=["ipv4", "dual"], default="ipv4")
    parser.add_argument("--keep", action="store_true", help="leave the cluster as it is, for the next run to use")
    parser.add_argument("--report", type=Path, default=SOURCES / "build/netpol", help="folder of log and report")
    asked = parser.parse_args()
    it = Cluster(asked.name, families=(4, 6) if asked.family == "dual" else (4,))
    try:
        with locked(asked.name):
            try:
                if not (asked.keep and it.started):
                    install(it)
                specs = judge(it, asked.focus, asked.report)
            finally:
                if not asked.keep:
                    it.down()
    except LabError as error:
        print(f"netpol/run: {error}", file=sys.stderr)
        return 2
    return say(specs, asked.report)


def install(it: Cluster) -> None:
    """A cluster with the network of this checkout."""
    it.down()
    it.up(2, plugins=False)
    proof = Proof(it)
    print(f"... {proof.install()}", flush=True)
    for node in proof.names:
        it.import_image(node, CACHE / "agnhost.tar")


def judge(it: Cluster, focus: str, report: Path) -> list[dict[str, Any]]:
    """Run the specs; what ginkgo says of each one that it chose. Raises LabError."""
    report.mkdir(parents=True, exist_ok=True)
    found, log = report / "report.json", report / "e2e.log"
    found.unlink(missing_ok=True)
    skip = [] if sctp() else [f"--ginkgo.skip={NEEDS_SCTP}"]
    command = [
        "nsenter", f"--net={netns.path(topology.node_netns(it.name, 'underlay'))}", str(BINARY),
        "--provider=local", f"--kubeconfig={it.folder}/admin.kubeconfig", "--num-nodes=2", "--allowed-not-ready-nodes=0",
        "--disable-log-dump", f"--ginkgo.focus={focus}", *skip, "--ginkgo.timeout=6h", "--ginkgo.no-color", "--ginkgo.v",
        f"--ginkgo.json-report={found}",
    ]  # fmt: skip
    began, ended = time.monotonic(), 0
    with (
        log.open("w") as writer,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        assert run.stdout is not None
        for line in run.stdout:
            writer.write(line)
            if line.startswith("• "):  # the end of a spec
                ended += 1
                print(f"{time.monotonic() - began:7.0f} s  {ended:3} {line.strip()}", flush=True)
    if not found.exists():
        last = log.read_text().strip().splitlines()[-1:]
        raise LabError(f"e2e.test did not run: {' '.join(last)}; {log}")
    return [spec for suite in json.loads(found.read_text()) for spec in suite["SpecReports"] or []]


def sctp() -> bool:
    """Whether this kernel has SCTP sockets."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


def say(specs: list[dict[str, Any]], report: Path) -> int:
    """What was found, in lines."""
    specs = [spec for spec in specs if spec["LeafNodeType"] == "It" and spec["State"] != "skipped"]
    lines = []
    for spec in specs:
        name = " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
        lines.append(f"{spec['State']:8} {spec['RunTime'] / 1e9:5.0f} s  {name}")
        if spec["State"] != "passed":
            failure = spec.get("Failure", {})
            lines.append(f"         {(failure.get('Message') or 'no message').strip().splitlines()[0]}")
    (report / "specs.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    states = Counter(spec["State"] for spec in specs)
    print(f"netpol: {', '.join(f'{count} {state}' for state, count in sorted(states.items())) or 'no spec'}; {report}")
    if not sctp():
        print(f"netpol: this kernel has no SCTP sockets: the specs of Feature:{NEEDS_SCTP} were left out")
    return 0 if specs and set(states) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
