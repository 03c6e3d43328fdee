"""Bring up a cluster, give its nodes the image of the tests' pods, run a judge beside its API server, say what it found.

The judges: e2e, the Netpol specs of Kubernetes' e2e.test; cyclonus, whose cases ask pods by their own addresses and change
pods, namespaces and policies under way; conformance, network-policy-api's tests of ClusterNetworkPolicy. Ends with 0 where
all passed, 1 where something failed, 2 where the judge did not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import conformance_judge
import cyclonus_judge
import e2e_judge

from overlay.lab.cluster import CACHE, SOURCES, Cluster
from overlay.lab.lab import locked
from overlay.lab.processes import LabError
from overlay.lab.proof import Proof

IMAGE = "registry.k8s.io/e2e-test-images/agnhost"
MADE, OTHERS = f"{IMAGE}:2.56", (f"{IMAGE}:2.43", f"{IMAGE}:2.45")
"""What .ci/netpol/build made, for e2e.test; the names that cyclonus and the conformance tests have for it."""


def flag(text: str) -> tuple[str, object]:
    """A flag of the agent as it is asked for: KEY=VALUE, the value as in JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> int:
    parser = argparse.ArgumentParser(prog="netpol/run")
    parser.add_argument("--name", default="netpol", help="of the cluster")
    parser.add_argument("--judge", choices=["e2e", "cyclonus", "conformance"], default="e2e")
    parser.add_argument("--focus", default="", help="e2e, conformance: a regular expression of specs, of tests")
    parser.add_argument("--include", default="", help="cyclonus: tags of cases, with commas; all of them if empty")
    parser.add_argument("--features", default=conformance_judge.FEATURES, help="conformance: those that are judged")
    parser.add_argument("--family", choices=["ipv4", "dual"], default="ipv4")
    parser.add_argument(
        "--agent", type=flag, action="append", default=[], metavar="KEY=VALUE",
        help="a flag of the agent, for its ConfigMap: with network-policy=false a judge must find faults",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the cluster as it is, for the next run to use")
    parser.add_argument("--report", type=Path, default=SOURCES / "build/netpol", help="folder of log and report")
    asked = parser.parse_args()
    asked.report.mkdir(parents=True, exist_ok=True)
    it = Cluster(asked.name, families=(4, 6) if asked.family == "dual" else (4,))
    try:
        with locked(asked.name):
            try:
                if not (asked.keep and it.started):
                    install(it, asked.judge == "conformance", dict(asked.agent))
                if asked.judge == "e2e":
                    states = e2e_judge.judge(it, asked.focus or "Netpol", asked.report)
                elif asked.judge == "cyclonus":
                    states = cyclonus_judge.judge(it, asked.include, asked.report)
                else:
                    states = conformance_judge.judge(it, asked.focus, asked.features, asked.report)
            finally:
                if not asked.keep:
                    it.down()
    except LabError as error:
        print(f"netpol/run: {error}", file=sys.stderr)
        return 2
    print(f"netpol: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}; {asked.report}")
    return 0 if set(states) == {"passed"} else 1


def install(it: Cluster, cluster_wide: bool, flags: dict[str, object]) -> None:
    """A cluster with the network of this checkout. cluster_wide: it knows ClusterNetworkPolicies."""
    it.down()
    it.up(2, plugins=False)
    if cluster_wide:
        conformance_judge.prepare(it)
        flags = {**conformance_judge.FLAGS, **flags}
    proof = Proof(it, flags)
    print(f"... {proof.install()}", flush=True)
    for node in proof.names:
        it.import_image(node, CACHE / "agnhost.tar")
        for name in OTHERS:
            it.run(node, ["ctr", "-n", "k8s.io", "images", "tag", MADE, name])


if __name__ == "__main__":
    sys.exit(main())
