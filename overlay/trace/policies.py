"""What NetworkPolicies say of a probe, by the agent's own compiled form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from overlay.policy.ask import NotTold, ask_policies
from overlay.policy.compile import compile_node
from overlay.policy.explain import Flow, judge
from overlay.policy.model import DENY, EGRESS, INGRESS
from overlay.policy.words import address_text
from overlay.trace.points import Gap
from overlay.trace.probe import Probe


def denials(found: Mapping[str, Any], probe: Probe, local: tuple[bool, bool]) -> Iterator[tuple[Gap, str]]:
    """Why this node's policies drop it. found: the agent's status; local: whether source and destination are pods of this
    node."""
    if not (found.get("policy") or {}).get("generation"):  # there is no table
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
    for direction, own, ours in zip((EGRESS, INGRESS), ends, local, strict=True):
        verdict = judge(compiled, direction, flow)
        if verdict.allowed or not ours:
            continue
        if not verdict.known:
            held = "the agent does not know that pod yet, and policies exist: it gets and sends nothing until then"
            yield Gap.FORWARD, f"{address_text(own)} is held: {held}: overlay policy check"
            continue
        whose = names.get(own, "the pod")
        denying = [rule.policy for rule in verdict.rules if rule.action == DENY]
        by = f"denied by {denying[0]}" if denying else f"isolated by {', '.join(verdict.policies)}"
        ask = f"overlay policy explain {names.get(ends[0], '...')} {names.get(ends[1], '...')}"
        yield Gap.FORWARD, f"a NetworkPolicy denies it: {direction} of {whose} is {by}: {ask}"
