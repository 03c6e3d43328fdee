"""The conformance tests of network-policy-api: ClusterNetworkPolicy, in both tiers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import outside

from overlay.lab.cluster import Cluster
from overlay.lab.processes import LabError

SUITE = "TestConformance"
CRD, KIND = "clusternetworkpolicies.yaml", "clusternetworkpolicies.policy.networking.k8s.io"
FEATURES = "ClusterNetworkPolicy,ClusterNetworkPolicyNamedPorts"
"""Not ClusterNetworkPolicyEgressNodePeers."""
HOST_PORTS = "34345-34352"
"""Of its pods on the nodes' network."""
FLAGS = {"cluster-network-policy": True}
"""What switches the agent on for this."""
_STATES = {"PASS": "passed", "FAIL": "failed", "SKIP": "skipped"}


@dataclass
class Part:
    """A test, or a part of one."""

    state: str = ""
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)
    """Of probes."""
    errors: list[str] = field(default_factory=list)
    """What ended it."""

    def reason(self) -> str:
        """Why it failed: its error, of the probe that it asked last."""
        return ": ".join([*self.errors[:1], *self.complaints[-1:]]) or "no reason given: see the log"


class Tests:
    """What `go test -v` says, line by line. In the form for test2json each end stands by itself, as it comes: else the ends
    of all come after the last. A test complains of each probe that is not as it must be, and asks again for 10 s."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        """By test/part, and test; as they began."""
        self.suite = Part()
        self._speaks = self.suite

    def told(self, line: str) -> str:
        """Take a line in; what is to be said of it: of the end of a test alone."""
        text = line.replace("\x16", "").strip()
        if found := re.match(r"=== (?:RUN|NAME|CONT|PAUSE)\s+(\S+)", text):
            self._speaks = self._part(found[1])
        elif found := re.match(rf"--- (PASS|FAIL|SKIP): ({SUITE}\S*) \(([\d.]+)s\)", text):
            self._speaks = part = self._part(found[2])
            part.state, part.seconds = _STATES[found[1]], float(found[3])
            name = found[2].removeprefix(SUITE).removeprefix("/")
            return "\n".join(self._lines(name)) if name and "/" not in name else ""
        elif found := re.search(r": (Expected connection .*|FAILED to execute .*)", text):
            self._speaks.complaints.append(found[1])
        elif found := re.match(r"(?:Error:\s+|(?=panic: ))(\S.*)|\S+\.go:\d+: ([Ee]rror .*)", text):
            self._speaks.errors.append(found[1] or found[2])
        return ""

    def ended(self) -> dict[str, Part]:
        """The tests that ended, and were not of a feature that nobody asked for."""
        tests = {name: part for name, part in self.parts.items() if "/" not in name}
        return {name: part for name, part in tests.items() if part.state in ("passed", "failed")}

    def verdict(self, last: str) -> Counter[str]:
        """How many tests ended how; last: the last line that was said. Raises LabError where they came to no end."""
        why = (self.suite.errors or [last])[0][:300]
        if unended := [name for name, part in self.parts.items() if not part.state]:
            raise LabError(f"the tests ended within {unended[-1]}: {why}")
        found = Counter(part.state for part in self.ended().values())
        if not found:
            raise LabError(f"no test was run: {why}")
        if self.suite.errors or self.suite.state != ("failed" if found["failed"] else "passed"):
            raise LabError(f"all tests ended, and beside them the suite did not pass: {why}")
        return found

    def asked_again(self) -> int:
        """How many probes of parts that passed were not at once as they must be."""
        return sum(len(part.complaints) for part in self.parts.values() if part.state == "passed")

    def text(self) -> list[str]:
        """All that is known, in the order of the tests."""
        return [line for name in self.parts if "/" not in name for line in self._lines(name)]

    def _part(self, name: str) -> Part:
        if name == SUITE or not name.startswith(f"{SUITE}/"):
            return self.suite
        return self.parts.setdefault(name.removeprefix(f"{SUITE}/"), Part())

    def _lines(self, test: str) -> list[str]:
        parts = {name: part for name, part in self.parts.items() if name.startswith(f"{test}/")}
        passed = sum(part.state == "passed" for part in parts.values())
        again = sum(len(part.complaints) for part in parts.values() if part.state == "passed")
        it = self.parts[test]
        count = f": {passed} of {len(parts)}" if parts else ""
        lines = [f"{it.state:8} {it.seconds:5.0f} s  {test}{count}{f', asked again: {again}' if again else ''}"]
        failed = {name: part for name, part in {test: it, **parts}.items() if part.state == "failed"}
        for name, part in failed.items():
            if name != test:
                lines.append(f"{'':17} {name.removeprefix(f'{test}/').replace('_', ' ')}")
            if name != test or not parts:
                lines.append(f"{'':17}   {part.reason()}")
        return lines


def prepare(it: Cluster) -> None:
    """Make the API server know the kind, before an agent asks for it; and keep the ports of the tests' host-network pods.
    They lie where connections get theirs: one that a kubelet's probe had a minute ago is in use, and a pod not Ready."""
    for node in it.nodes():
        it.run(node["metadata"]["name"], ["sysctl", "-q", "-w", f"net.ipv4.ip_local_reserved_ports={HOST_PORTS}"])
    it.kubectl("apply", "--server-side", "-f", outside.program(CRD))
    # it is asked for some: `kubectl wait` fails where the definition has no conditions yet
    it.wait(f"the API server serves {KIND}", lambda: it.objects(KIND) == [], 60)


def judge(it: Cluster, focus: str, features: str, report: Path) -> Counter[str]:
    """How many tests ended how. Raises LabError."""
    command = [
        outside.program("conformance.test"), "-test.v=test2json", "-test.timeout=3h", f"-test.run=^{SUITE}$/{focus}",
        f"-supported-features={features}",
    ]  # fmt: skip
    # what a run before left on a kept cluster is on its way out, and must not be taken for ours
    it.kubectl("delete", "namespaces", "-l", "conformance-house", "--wait", "--timeout=120s", timeout=130)
    tests = Tests()
    last = outside.run(it, command, report / "conformance.log", tests.told)
    (report / "conformance.txt").write_text("\n".join(tests.text()) + "\n")
    states = [part.state for name, part in tests.parts.items() if "/" in name]
    print(
        f"conformance: {states.count('passed')} of {len(states)} parts of tests passed; asked again: {tests.asked_again()}"
    )
    return tests.verdict(last)
