"""`overlay status --cluster`: all agents that can be asked, and who reaches whom."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from overlay.cli import terminal

WIDE, WORST = 12, 20
_WORDS = {"ok": "ok", "path_mtu": "small", "unreachable": "NO", "refused": "NO", "silent": "never", "untried": "?"}
_STYLES = {"path_mtu": "yellow", "unreachable": "red", "refused": "red"}


def show(console: Console, found: dict[str, Any]) -> None:
    """As tables. found: of page.gather."""
    nodes, shown = found["nodes"], found["shown"]
    asked = [node for node in nodes if node["asked"] == "answered"]
    network = found["network"]["prefix"] or "no network"
    console.print(Text(f"{len(nodes)} nodes of {network}; {len(asked)} of {len(shown)} agents answered"))
    _nodes(console, [nodes[place] for place in shown])
    if len(shown) <= WIDE:
        _matrix(console, found)
    _worst(console, found)
    for what, name in (("versions", "versions"), ("configs", "configs"), ("mtus", "MTUs of pods")):
        if len(found[what]) > 1:
            said = "; ".join(f"{value}: {', '.join(who[:4])}" for value, who in found[what].items())
            console.print(Text(f"{name} differ: {said}", style="yellow"))
    for record in found["refused"]:
        said = f"{len(record['said_by'])} agents: {', '.join(record['said_by'][:3])}"
        console.print(Text(f"record {record['key']} is not used: {record['reason']} (said by {said})", style="red"))
    for problem in found["problems"]:
        console.print(
            Text(f"{problem['node']}: {problem['subject']}: {problem['text']} (since {problem['since']})", style="red")
        )


def _nodes(console: Console, nodes: list[dict[str, Any]]) -> None:
    table = terminal.table(console, "node", "public ip", "subnet", "version", "ready", "problems", "asked", title="")
    for node in nodes:
        ready = "?" if node.get("ready") is None else "yes" if node["ready"] else "no"
        problems = str(len(node["problems"])) if "problems" in node else "?"
        why = f"{node['asked']}: {node['why']}" if node["why"] else node["asked"]
        words = (node["name"], node["public_ip"], node["subnet"], node.get("version", "?"), ready, problems, why)
        table.add_row(*map(Text, words), style="red" if ready == "no" else "")
    console.print(table)


def _matrix(console: Console, found: dict[str, Any]) -> None:
    names = [found["nodes"][place]["name"] for place in found["shown"]]
    console.print(Text("who reaches whom (the row says it of the column): RTT; ?: not known", style="italic"))
    table = terminal.table(console, "from \\ to", *names, title="")
    pairs = {(pair[0], pair[1]): pair for pair in found["pairs"]}
    for one, name in zip(found["shown"], names, strict=True):
        cells = [_cell(pairs.get((one, other))) if one != other else Text("") for other in found["shown"]]
        table.add_row(Text(name), *cells)
    console.print(table)


def _cell(pair: list[Any] | None) -> Text:
    if pair is None:
        return Text("?", style="dim")
    state, rtt_us = pair[2], pair[3]
    if state == "ok" and rtt_us is not None:
        return Text(f"{rtt_us / 1000:.2f} ms", style="green")
    six = " (IPv6)" if str(pair[5]).startswith("IPv6: ") else ""
    return Text(f"{_WORDS.get(state, '?')}{six}", style=_STYLES.get(state, "dim"))


def _worst(console: Console, found: dict[str, Any]) -> None:
    counts = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in sorted(found["counts"].items()))
    console.print(Text(f"peers, as {found['from']} sees them: {counts or 'none'}"))
    if found["worst"]:
        table = terminal.table(console, "node", "subnet", "what", "said by", title="")
        for each in found["worst"][:WORST]:
            said = f"{len(each['said_by'])}: {', '.join(each['said_by'][:3])}"
            table.add_row(*map(Text, (each["name"], each["subnet"], each["text"], said)), style="red")
        console.print(table)
