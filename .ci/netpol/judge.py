"""Bring up a cluster, give its nodes the image of the tests' pods, run a judge beside its API server, say what it found.

The judges: e2e, the Netpol specs of Kubernetes' e2e.test; cyclonus, whose cases ask pods by their own addresses and change
pods, namespaces and policies under way. Ends with 0 where all passed that this kernel can run, 1 where something failed, 2
where the judge did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overlay.lab import netns, topology
from overlay.lab.cluster import CACHE, SOURCES, Cluster
from overlay.lab.lab import locked
from overlay.lab.processes import LabError
from overlay.lab.proof import Proof

PROGRAMS = SOURCES / ".venv/netpol"
IMAGE = "registry.k8s.io/e2e-test-images/agnhost"
MADE, OLDER = f"{IMAGE}:2.56", f"{IMAGE}:2.43"
"""What .ci/netpol/build made, for e2e.test; the name that cyclonus has for it."""
NEEDS_SCTP = "SCTPConnectivity"
"""The word in the names of specs whose pods open SCTP sockets."""
NOT_CYCLONUS = "multi-peer,upstream-e2e,example,end-port,namespaces-by-default-label"
"""What it leaves out by itself."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="netpol/run")
    parser.add_argument("--name", default="netpol", help="of the cluster")
    parser.add_argument("--judge", choices=["e2e", "cyclonus"], default="e2e")
    parser.add_argument("--focus", default="Netpol", help="e2e: a regular expression of specs")
    parser.add_argument("--include", default="", help="cyclonus: tags of cases, with commas; all of them if empty")
    parser.add_argument("--sctp", action="store_true", help="also what needs SCTP sockets where this kernel has none")
    parser.add_argument("--family", choices=["ipv4", "dual"], default="ipv4")
    parser.add_argument("--keep", action="store_true", help="leave the cluster as it is, for the next run to use")
    parser.add_argument("--report", type=Path, default=SOURCES / "build/netpol", help="folder of log and report")
    asked = parser.parse_args()
    asked.report.mkdir(parents=True, exist_ok=True)
    it = Cluster(asked.name, families=(4, 6) if asked.family == "dual" else (4,))
    with_sctp = asked.sctp or sctp()
    try:
        with locked(asked.name):
            try:
                if not (asked.keep and it.started):
                    install(it)
                if asked.judge == "e2e":
                    states = e2e(it, asked.focus, with_sctp, asked.report)
                else:
                    states = cyclonus(it, asked.include, with_sctp, asked.report)
            finally:
                if not asked.keep:
                    it.down()
    except LabError as error:
        print(f"netpol/run: {error}", file=sys.stderr)
        return 2
    print(f"netpol: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}; {asked.report}")
    if not with_sctp:
        print("netpol: this kernel has no SCTP sockets: what needs them was left out")
    return 0 if set(states) == {"passed"} else 1


def install(it: Cluster) -> None:
    """A cluster with the network of this checkout."""
    it.down()
    it.up(2, plugins=False)
    proof = Proof(it)
    print(f"... {proof.install()}", flush=True)
    for node in proof.names:
        it.import_image(node, CACHE / "agnhost.tar")
        it.run(node, ["ctr", "-n", "k8s.io", "images", "tag", MADE, OLDER])


def e2e(it: Cluster, focus: str, with_sctp: bool, report: Path) -> Counter[str]:
    """How many specs ended how. Raises LabError."""
    found, log = report / "e2e.json", report / "e2e.log"
    found.unlink(missing_ok=True)
    skip = [] if with_sctp else [f"--ginkgo.skip={NEEDS_SCTP}"]
    command = [
        str(PROGRAMS / "e2e.test"), "--provider=local", f"--kubeconfig={it.folder}/admin.kubeconfig", "--num-nodes=2",
        "--allowed-not-ready-nodes=0", "--disable-log-dump", f"--ginkgo.focus={focus}", *skip, "--ginkgo.timeout=6h",
        "--ginkgo.no-color", "--ginkgo.v", f"--ginkgo.json-report={found}",
    ]  # fmt: skip
    run(it, command, log, lambda line: line if line.startswith("• ") else "")
    if not found.exists():
        raise LabError(f"e2e.test did not run: {log}")
    reports: list[dict[str, Any]] = [
        spec
        for suite in json.loads(found.read_text())
        for spec in suite["SpecReports"] or []
        if spec["LeafNodeType"] == "It" and spec["State"] != "skipped"
    ]
    lines = []
    for spec in reports:
        name = " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
        lines.append(f"{spec['State']:8} {spec['RunTime'] / 1e9:5.0f} s  {name}")
        if spec["State"] != "passed":
            message = (spec.get("Failure", {}).get("Message") or "no message").strip()
            lines.append(f"{'':17} {message.splitlines()[0]}")
    (report / "e2e.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if not reports:
        raise LabError(f"no spec has {focus!r} in its name")
    return Counter(spec["State"] for spec in reports)


def cyclonus(it: Cluster, include: str, with_sctp: bool, report: Path) -> Counter[str]:
    """How many cases ended how. Raises LabError. A pod that asks itself by its own address never leaves its namespace."""
    log, seen = report / "cyclonus.log", report / "cyclonus.txt"
    protocols, exclude = ("TCP,UDP,SCTP", NOT_CYCLONUS) if with_sctp else ("TCP,UDP", f"{NOT_CYCLONUS},sctp")
    command = [
        str(PROGRAMS / "cyclonus"), "generate", f"--server-protocol={protocols}", f"--exclude={exclude}",
        *([f"--include={include}"] if include else []), "--destination-type=pod-ip", "--ignore-loopback",
        "--job-timeout-seconds=1", "--perturbation-wait-seconds=2", "--pod-creation-timeout-seconds=120",
    ]  # fmt: skip
    states: list[str] = []
    names: dict[int, str] = {}
    wrong = 0

    def told(line: str) -> str:
        nonlocal wrong
        if found := re.match(r"test #(\d+): (.*)", line):
            names[int(found[1])] = found[2]
        if found := re.match(r"(?:Discrepancy found:)?(\d+) wrong, ", line):
            wrong += int(found[1])
        if not line.startswith("finished policy #"):
            return ""
        states.append("failed" if wrong else "passed")
        words = f"{states[-1]}  #{len(states)} {names.get(len(states), '')}{f': {wrong} wrong' if wrong else ''}"
        wrong = 0
        return words

    last = run(it, command, log, told, seen)
    if not states or len(states) < len(names):
        raise LabError(f"cyclonus ended after {len(states)} of {len(names)} cases: {last[:300]}; {log}")
    return Counter(states)


def run(it: Cluster, command: list[str], log: Path, told: Callable[[str], str], seen: Path | None = None) -> str:
    """A judge's output into a log; what is told of its lines, as they come. Returns its last one."""
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


def sctp() -> bool:
    """Whether this kernel has SCTP sockets."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
