"""What NetworkPolicies say of a probe, by the agent's own compiled form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from overlay.policy.ask import NotTold, ask_policies
from overlay.policy.compile import compile_node
from overlay.policy.explain import Flow, judge
from overlay.policy.model import EGRESS, INGRESS
from overlay.trace.points import Gap
from overlay.trace.probe import Probe


def denials(found: Mapping[str, Any], probe: Probe) -> Iterator[tuple[Gap, str]]:
    """Why this node's policies drop it. found: the agent's status."""
    if not (found.get("policy") or {}).get("enforced"):
        return
    try:
        snapshot = ask_policies(found["process"]["run_dir"])
    except (OSError, NotTold, LookupError, TypeError, ValueError):
        return
    size = probe.family.size
    ends = [address.to_bytes(size, "big") for address in (probe.source, probe.destination)]
    compiled = compile_node(snapshot.indexed(), snapshot.policies, snapshot.node, (probe.version,), snapshot.nodes)
    flow = Flow(ends[0], ends[1], probe.number, probe.port)
    names = snapshot.names
    for direction, own in ((EGRESS, ends[0]), (INGRESS, ends[1])):
        verdict = judge(compiled, direction, flow)
        if not verdict.allowed:
            whose, by = names.get(own, "the pod"), ", ".join(verdict.policies)
            ask = f"overlay policy explain {names.get(ends[0], '...')} {names.get(ends[1], '...')}"
            yield Gap.FORWARD, f"a NetworkPolicy denies it: {direction} of {whose} is isolated by {by}: {ask}"
