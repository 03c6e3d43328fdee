"""`overlay policy`: what policies say of two pods, and what is odd about them."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NamedTuple, NoReturn

import click

from overlay.api.serve import SOCKET_NAME
from overlay.cli import terminal
from overlay.policy.ask import NotTold, ask_policies
from overlay.policy.compile import compile_node
from overlay.policy.explain import Flow, Verdict, judge
from overlay.policy.model import EGRESS, INGRESS, NAMESPACED, PASS, PROTOCOL_NAMES, PROTOCOLS, Pod
from overlay.policy.resources import packed
from overlay.policy.snapshot import Snapshot
from overlay.policy.words import address_text, findings, rule_words
from overlay.settings.flags import DEFAULT_RUN_DIR

_RUN_DIR = click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
_JSON = click.option("--json", "as_json", is_flag=True, help="everything, as JSON")


@click.group()
def policy() -> None:
    """What NetworkPolicies say, as the agent enforces them."""


class _End(NamedTuple):
    """An end of a flow. pod: None, it is no pod's address."""

    address: bytes
    pod: Pod | None

    @property
    def words(self) -> str:
        text = address_text(self.address)
        return text if self.pod is None else f"{self.pod.key} ({text}, {self.pod.node or 'no node yet'})"


@policy.command()
@click.argument("source")
@click.argument("destination")
@click.argument("port", default="")
@_RUN_DIR
@_JSON
def explain(source: str, destination: str, port: str, run_dir: str, as_json: bool) -> None:
    """Say whether SOURCE may open a connection to DESTINATION at PORT, and which policies decide that.

    SOURCE and DESTINATION are pods (`namespace/name`) or addresses; PORT is `80`, `udp/53`, or left out: any protocol, as a
    ping is judged. It is the pods' own port, not that of a Service. The same compiled rules judge here as in the kernel.
    Exit: 0 it may, 1 it may not, 2 there is no such pod, or no agent answers.
    """
    snapshot = ask_or_end(run_dir)
    if not snapshot.known:
        _fail("the agent has not read all policies yet; what was enforced stays: overlay status says what it waits for")
    protocol, number = _port(port)
    pairs = _pairs(_ends(snapshot, source), _ends(snapshot, destination))
    if not pairs:
        _fail(f"{source} and {destination} have no addresses of one family")
    index = snapshot.indexed()
    nodes = {end.pod.node for pair in pairs for end in pair if end.pod is not None}
    compiled = {node: compile_node(index, snapshot.policies, node, nodes=snapshot.nodes) for node in nodes}
    found: list[tuple[_End, _End, dict[str, Verdict]]] = []
    for one, other in pairs:
        flow = Flow(one.address, other.address, protocol, number)
        verdicts = {
            direction: judge(compiled[end.pod.node], direction, flow)
            for direction, end in ((EGRESS, one), (INGRESS, other))
            if end.pod is not None and not end.pod.alone
        }
        if one.pod is not None and other.pod is not None and one.pod.key == other.pod.key:
            verdicts = {direction: each._replace(itself=True, allowed=True) for direction, each in verdicts.items()}
        found.append((one, other, verdicts))
    allowed = all(each.allowed for _, _, verdicts in found for each in verdicts.values())
    if as_json:
        click.echo(json.dumps(_values(found, snapshot, allowed, protocol, number), indent=2))
    else:
        _show(found, snapshot, allowed, protocol, number)
    sys.exit(0 if allowed else 1)


def _show(found: list[Any], snapshot: Snapshot, allowed: bool, protocol: int, number: int) -> None:
    console = terminal.console()
    what = f"{PROTOCOL_NAMES[protocol]} {number}" if protocol else "any protocol without ports"
    for one, other, verdicts in found:
        console.print(f"{one.words} -> {other.words}, {what}", markup=False)
        for direction, end in ((EGRESS, one), (INGRESS, other)):
            for line in _lines(verdicts.get(direction), direction, end, snapshot):
                console.print(f"  {line}", markup=False)
    if not snapshot.enforced and snapshot.policies:
        console.print("the agent of this node enforces none of this: see overlay status", markup=False)
    console.print("allowed" if allowed else "denied", style="green" if allowed else "red")


def _lines(verdict: Verdict | None, direction: str, end: _End, snapshot: Snapshot) -> list[str]:
    name = end.pod.key if end.pod is not None else end.words
    if verdict is None:
        why = "it is no pod's address" if end.pod is None else "it has the node's network, or has ended"
        return [f"{direction} of {name}: {why}: not judged"]
    if not verdict.known:
        return [f"{direction} of {name}: it is not known yet, and is held until then: denied"]
    if not verdict.policies:
        return [f"{direction} of {name}: no policy selects it: allowed"]
    by = f"{direction} of {name}: selected by {', '.join(verdict.policies)}"
    if verdict.itself:
        return [f"{by}; a pod reaches itself: allowed"]
    policies = {each.key: each for each in snapshot.policies}
    deciding = [f"  {rule.policy} {rule_words(policies[rule.policy], direction, rule.place)}" for rule in verdict.rules]
    decided = bool(verdict.rules) and verdict.rules[-1].action != PASS
    if verdict.allowed:
        why = "allowed by" if decided else f"no rule decides: allowed{', after' if deciding else ''}"
        return [f"{by}: {why}", *deciding]
    if decided:
        return [f"{by}: denied by", *deciding]
    accepting = [
        f"  {key} {rule_words(policies[key], direction, place)}"
        for key in verdict.policies
        for place in range(len(policies[key].rules(direction) or ()))
        if policies[key].tier == NAMESPACED
    ]
    if not accepting:
        return [f"{by}, which allow nothing: denied", *deciding]
    return [f"{by}: denied, for none of their rules allows it:", *deciding, *accepting]


def _values(found: list[Any], snapshot: Snapshot, allowed: bool, protocol: int, number: int) -> dict[str, Any]:
    return {
        "allowed": allowed,
        "enforced": snapshot.enforced,
        "protocol": PROTOCOL_NAMES.get(protocol, ""),
        "port": number,
        "ways": [
            {
                "source": one.words,
                "destination": other.words,
                **{
                    direction: {
                        "allowed": each.allowed,
                        "policies": list(each.policies),
                        "rules": [{"policy": it.policy, "rule": it.place, "action": it.action} for it in each.rules],
                    }
                    for direction, each in verdicts.items()
                },
            }
            for one, other, verdicts in found
        ],
    }


@policy.command()
@_RUN_DIR
@_JSON
def check(run_dir: str, as_json: bool) -> None:
    """Name policies that select nothing, mean nobody, name ports that nobody has, or cannot be used.

    Exit: 0 nothing was found, 1 something was, 2 no agent answers.
    """
    snapshot = ask_or_end(run_dir)
    found = [(key, f"cannot be used: {why}") for key, why in sorted(snapshot.refused.items())]
    found += list(findings(snapshot.indexed(), snapshot.policies))
    if as_json:
        click.echo(json.dumps([{"policy": key, "finding": words} for key, words in found], indent=2))
    else:
        console = terminal.console()
        for key, words in found:
            console.print(f"{key}: {words}", markup=False)
        if not found:
            console.print(f"{len(snapshot.policies)} policies: nothing odd")
    sys.exit(1 if found else 0)


def ask_or_end(run_dir: str) -> Snapshot:
    """What the agent knows of policies; ends the program where it does not answer."""
    try:
        return ask_policies(run_dir)
    except NotTold as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"no agent answers at {run_dir}/{SOCKET_NAME}: {error.strerror or error}; --run-dir names its folder")
    except (LookupError, TypeError, ValueError) as error:
        _fail(f"the agent's answer is not of this version: {error!r}")


def _ends(snapshot: Snapshot, text: str) -> list[_End]:
    """A pod's addresses, or one address and whose it is."""
    if "/" in text:
        pods = [pod for pod in snapshot.pods if pod.key == text]
        if not pods:
            known = " (pods are known only while there is a policy)" if not snapshot.policies else ""
            _fail(f"there is no pod {text}{known}")
        if not pods[0].addresses:
            _fail(f"the pod {text} has no address yet")
        return [_End(address, pods[0]) for address in pods[0].addresses]
    try:
        address = packed(text)
    except ValueError:
        _fail(f"{text}: must be an address, or a pod as namespace/name")
    whose = [pod for pod in snapshot.pods if address in pod.addresses and not pod.alone]
    return [_End(address, whose[0] if whose else None)]


def _pairs(sources: list[_End], targets: list[_End]) -> list[tuple[_End, _End]]:
    return [(one, other) for one in sources for other in targets if len(one.address) == len(other.address)]


def _port(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(?:(tcp|udp|sctp)/)?(\d{1,5})", text, re.IGNORECASE)
    if not text:
        return 0, 0
    if found is None or not 1 <= int(found[2]) <= 65535:
        _fail(f"{text}: must be a port like 80, tcp/80, udp/53 or sctp/9")
    return PROTOCOLS[(found[1] or "tcp").upper()], int(found[2])


def _fail(words: str) -> NoReturn:
    click.echo(f"overlay: {words}", err=True)
    sys.exit(2)
