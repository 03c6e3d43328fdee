"""What a peer's own agent says, where agents may ask each other; else that it must be asked, and how."""

from __future__ import annotations

from typing import Any, NamedTuple

from lease.families import FAMILIES, V6, Family
from lease.model import prefix
from overlay.ask.client import NoAnswer, ask_agent, path_of, secret_in
from overlay.page.gather import ROUTE

MOST = 5
_OF_PEERS = ("unreachable", "path mtu", "loss")
"""Problems of the way between the two, which this side has already."""


_OF_PODS = (
    "foreign rules",
    "ways",
    "routes",
    "carrier",
    "forward chain",
    "duplicate address",
    "kernel",
    "device",
    "sysctl",
)
"""Problems that keep packets from pods; the others (its store, its renewal...) do not, whatever that node is."""


def _plain(subject: str) -> str:
    """A problem's subject without its family (control.health.name_of)."""
    return subject.removesuffix(f" {V6.text}")


def _is_of(subject: str, family: Family) -> bool:
    """Whether a problem is a family's, or no family's."""
    return (subject != _plain(subject)) == (family is V6) or _plain(subject) not in (*_OF_PODS, *_OF_PEERS)


class Said(NamedTuple):
    """lines: for the operator; problem: the first that its pods may meet, "": none, or it was not asked."""

    lines: list[str]
    problem: str = ""


def said(found: dict[str, Any], peer: dict[str, Any], silent: bool = False) -> Said:
    """found: this agent's status; peer: of it; silent: all is well, so that of what concerns the way between the two only an
    agent that does not answer is worth a line."""
    name, asking = peer["node_name"] or peer["public_ip"], found.get("asking")
    if not asking:
        ask = f"it must be asked there: on {name}: overlay status (with --ask-secret-file agents ask each other)"
        return Said([] if silent else [ask])
    own = found["lease"]["subnet"]
    try:
        answer = ask_agent(
            (peer["subnet"].partition("/")[0], peer["public_ip"]), asking["port"], secret_in(asking["secret_file"]),
            path_of(ROUTE, {"of": own}),
        )  # fmt: skip
    except NoAnswer as error:
        why = "flannel runs there, or it is dead (the datapath stays, and learns of nobody who joins), or cannot be reached"
        return Said([f"the agent of {name} was asked, and gives no answer ({error}): {why}"])
    family = FAMILIES[prefix(peer["subnet"]).family]
    its = [(each["subject"], each["text"]) for each in answer["problems"]]
    its = [(subject, text) for subject, text in its if _is_of(subject, family)]
    lines = [f"{name} says: {subject}: {text}" for subject, text in its[:MOST] if _plain(subject) not in _OF_PEERS]
    theirs, mine = (answer.get("mtus") or {}).get(str(family.number)), found["device"]["mtu"]
    if theirs not in (None, mine):
        smaller = name if theirs < mine else "this node"
        lines.append(
            f"MTU of pods: {theirs} on {name}, {mine} on this node: packets above {min(theirs, mine)} bytes do not pass both"
            f" ways, by {smaller}'s underlay; give both underlays one MTU, or set Backend.MTU"
        )
    problem = next((f"{subject}: {text}" for subject, text in its if _plain(subject) in _OF_PODS), "")
    if silent:
        return Said(lines, problem)
    ours = next((each for each in answer["reaches"] if each[0] == own), None)
    if ours is None:
        lines.append(f"{name} does not know this node: its record has not come there, or is refused")
    elif ours[1] != "ok":
        lines.append(f"{name} says of this node: {ours[4]}")
    else:
        lines.append(f"{name} says that this node answers its probes")
    return Said(lines, problem)
