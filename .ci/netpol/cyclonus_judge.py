"""cyclonus: its cases ask pods by their own addresses, and change pods, namespaces and policies under way."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import outside

from overlay.lab.cluster import Cluster
from overlay.lab.processes import LabError


class Cases:
    """What its output says of its cases, line by line: they are named first, then each has its steps, one after the other.

    A step's line has the cells (a pod asks a pod) that are not as they must be: those of its last try. It asks a second
    time where the first try was wrong, so that a policy that comes late passes too: `asked_again` counts these.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.states: list[str] = []
        self.cells = self.asked_again = 0
        self._steps = self._wrong = self._right = self._again = 0

    def told(self, line: str) -> str:
        """Take a line in; what is to be said of it: of the end of a case alone."""
        if found := re.match(r"test #(\d+): (.*)", line):
            self.names[int(found[1])] = found[2]
        elif found := re.search(r"(?:^|Discrepancy found:)(\d+) wrong, \d+ ignored, (\d+) correct$", line):
            self._steps += 1
            self._wrong += int(found[1])
            self._right += int(found[2])
        elif found := re.search(r"running kube probe on try (\d+)", line):
            self._again += int(found[1]) > 1
        elif found := re.match(r"finished policy #(\d+)$", line):
            return self._end(int(found[1]))
        return ""

    def verdict(self, last: str) -> Counter[str]:
        """How many cases ended how; last: the last line that it said. Raises LabError where it did not come to its end."""
        if not self.states or len(self.states) < len(self.names):
            raise LabError(f"cyclonus ended after {len(self.states)} of {len(self.names)} cases: {last[:300]}")
        return Counter(self.states)

    def _end(self, number: int) -> str:
        # a case of which nothing was compared has not passed
        self.states.append("failed" if self._wrong or not self._steps else "passed")
        words = f"{self.states[-1]}  #{number} {self.names.get(number, '')}: {self._steps} steps, {self._right} cells"
        words += f", {self._wrong} wrong" if self._wrong else ""
        words += f", asked again: {self._again}" if self._again else ""
        self.cells += self._right + self._wrong
        self.asked_again += self._again
        self._steps = self._wrong = self._right = self._again = 0
        return words


def judge(it: Cluster, include: str, report: Path) -> Counter[str]:
    """How many cases ended how. Raises LabError. A pod that asks itself by its own address never leaves its namespace."""
    command = [
        outside.program("cyclonus"), "generate",
        *([f"--include={include}"] if include else []), "--destination-type=pod-ip", "--ignore-loopback",
        "--job-timeout-seconds=1", "--perturbation-wait-seconds=2", "--pod-creation-timeout-seconds=120",
    ]  # fmt: skip
    cases = Cases()
    last = outside.run(it, command, report / "cyclonus.log", cases.told, report / "cyclonus.txt")
    print(f"cyclonus: {cases.cells} cells; steps asked a second time: {cases.asked_again}")
    return cases.verdict(last)
