"""The Netpol specs of Kubernetes' e2e.test."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import outside

from overlay.lab.cluster import Cluster
from overlay.lab.processes import LabError


def judge(it: Cluster, focus: str, report: Path) -> Counter[str]:
    """How many specs ended how. Raises LabError."""
    found, log = report / "e2e.json", report / "e2e.log"
    found.unlink(missing_ok=True)
    command = [
        outside.program("e2e.test"), "--provider=local", f"--kubeconfig={it.folder}/admin.kubeconfig", "--num-nodes=2",
        "--allowed-not-ready-nodes=0", "--disable-log-dump", f"--ginkgo.focus={focus}", "--ginkgo.timeout=6h",
        "--ginkgo.no-color", "--ginkgo.v", f"--ginkgo.json-report={found}",
    ]  # fmt: skip
    outside.run(it, command, log, lambda line: line if line.startswith("• ") else "")
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
