"""`overlay lab`: a whole network on one machine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from lease.backend_config import VxlanConfig
from lease.fields import ConfigError
from overlay.cli import terminal
from overlay.cli.status import differences, every
from overlay.lab import netns
from overlay.lab.capture import Captured
from overlay.lab.lab import DEFAULT_NET_CONF, NET_CONFS, Lab, existing_labs, locked
from overlay.lab.matrix import Cell, summary
from overlay.lab.processes import LabError

_NAME = click.option("--name", default="lab", show_default=True, help="which lab, where there are several")
_JSON = click.option("--json", "as_json", is_flag=True, help="everything, for scripts")


@click.group()
def lab() -> None:
    """Nodes as network namespaces on this machine: real etcd, real VXLAN devices, pods by the real CNI plugins."""


@lab.command()
@_NAME
@_JSON
@click.option("--nodes", type=click.IntRange(1, 250), default=3, show_default=True)
@click.option("--pods", type=click.IntRange(0, 200), default=2, show_default=True, help="on each node")
@click.option(
    "--family", type=click.Choice(list(NET_CONFS)), default="ipv4", show_default=True, help="of nodes and pods"
)
@click.option("--net-conf", default="", help=f"the network config, else that of --family: {DEFAULT_NET_CONF}")
@click.option("--agent-flag", multiple=True, help="one more flag for each agent, e.g. --agent-flag=--ip-masq")
def up(
    name: str, as_json: bool, nodes: int, pods: int, family: str, net_conf: str, agent_flag: tuple[str, ...]
) -> None:
    """Bring a lab up and prove that every pod reaches every other. It stays up.

    An existing lab is shown again; what is left of a broken one is replaced. Exit status 0 only if all is reached.
    """
    if net_conf and family != "ipv4" and "EnableIPv6" not in net_conf:
        raise click.UsageError(
            f"--net-conf is used as it is, and has no EnableIPv6: --family {family} would make no IPv6"
        )
    net_conf = net_conf or NET_CONFS[family]
    with _working(name, as_json) as (found, progress):
        it = found
        if it.exists and not it.whole():
            progress("removing what is left of an earlier lab")
            it.down(progress)
            it = Lab(name)
        if not it.exists:
            try:
                it.up(nodes, pods, net_conf, list(agent_flag), progress)
            except LabError as error:
                left = (
                    f"; what it made is left to look at: `overlay lab status --name {name}`;"
                    f" `overlay lab down --name {name}` removes it"
                )
                raise LabError(f"{error}{left if it.exists else ''}") from error
        elif (len(it.nodes), it.net_conf, it.agent_flags) != (nodes, net_conf, list(agent_flag)):
            raise LabError(
                f"a lab {name!r} of {len(it.nodes)} nodes exists, with other options: `overlay lab down --name {name}`"
                " first, or take another --name; `overlay lab matrix` shows the existing one"
            )
        _prove(it, as_json, progress)


@lab.command("list")
def list_() -> None:
    """All labs of this machine, and whether they are whole."""
    found = existing_labs()
    for name in found:
        it = Lab(name)
        broken = it.broken()
        click.echo(
            f"{name}: {len(it.nodes)} nodes, {f'broken ({broken[0]})' if broken else 'whole'}, files in {it.folder}"
        )
    if not found:
        click.echo("there is no lab; `overlay lab up` makes one", err=True)


@lab.command("status")
@_NAME
@_JSON
def status_(name: str, as_json: bool) -> None:
    """Nodes with lease, VTEP MAC and device. Exit status 0 only if every agent is ready and all parts of the lab run."""
    with _working(name, as_json) as (it, _):
        _must_exist(it)
        statuses = _statuses(it)
        _print_nodes(it, statuses, as_json)
        sys.exit(0 if it.whole() and all(found.get("ready") for found in statuses.values()) else 1)


@lab.command("matrix")
@_NAME
@_JSON
def matrix_(name: str, as_json: bool) -> None:
    """Every pair of pods, and pods with nodes, measured again."""
    with _working(name, as_json) as (it, progress):
        _must_exist(it)
        _prove(it, as_json, progress)


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@_NAME
@click.argument("where")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, where: str, command: tuple[str, ...]) -> None:
    """Run a command in a node (node1) or a pod (node1-pod1)."""
    try:
        namespace = Lab(name).namespace(where)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    os.execvp("nsenter", ["nsenter", f"--net={netns.path(namespace)}", "--", *command])


@lab.command("add-node")
@_NAME
@_JSON
@click.option("--pods", type=click.IntRange(0, 200), default=2, show_default=True)
def add_node(name: str, as_json: bool, pods: int) -> None:
    """One more node; the matrix is measured again."""
    with _working(name, as_json) as (it, progress):
        it.add_node(pods, progress)
        _prove(it, as_json, progress)


@lab.command("remove-node")
@_NAME
@click.argument("node")
def remove_node(name: str, node: str) -> None:
    """Take a node away, and give up its lease."""
    with _working(name, False) as (it, progress):
        _must_exist(it)
        it.remove_node(node, progress)


@lab.command()
@_NAME
@click.argument("node")
def restart(name: str, node: str) -> None:
    """End a node's agent, if it runs, and start it again; pods keep their network meanwhile."""
    with _working(name, False) as (it, progress):
        _must_exist(it)
        it.restart(node, progress)


@lab.command()
@_NAME
def down(name: str) -> None:
    """Remove the lab and all that a crash left of it."""
    with _working(name, False) as (it, progress):
        was = it.exists
        it.down(progress)
        click.echo(f"the lab {name!r} is gone" if was else f"there is no lab {name!r}", err=True)


# --- how it is shown -----------------------------------------------------------------------------------------------------


@contextmanager
def _working(name: str, as_json: bool) -> Iterator[tuple[Lab, Callable[[str], None]]]:
    """The lab, locked, with its progress shown on stderr; errors as one line."""
    console = terminal.console(stderr=True)
    try:
        with locked(name):
            if as_json or not console.is_terminal:
                yield Lab(name), lambda line: click.echo(f"... {line}", err=True)
            else:
                with console.status("") as spinner:
                    yield Lab(name), spinner.update
    except (LabError, ConfigError) as error:
        raise click.ClickException(str(error)) from error


def _must_exist(it: Lab) -> None:
    if not it.exists:
        raise LabError(f"there is no lab {it.name!r}; `overlay lab up` makes it")


def _statuses(it: Lab) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for node in it.nodes:
        try:
            found[node.name] = it.agent_status(node)
        except LabError as error:
            found[node.name] = {"ready": False, "error": str(error)}
    return found


def _prove(it: Lab, as_json: bool, progress: Callable[[str], None]) -> None:
    """Show nodes, matrix and packet; end with their exit status."""
    progress("measuring who reaches whom")
    cells = it.prove()
    packet, missed = _capture(it)
    statuses = _statuses(it)
    all_reach = (
        bool(cells) and all(cell.ok for cell in cells) and not missed and (packet is None or _encapsulated(it, packet))
    )
    if as_json:
        value = {
            "all_reach": all_reach,
            "nodes": _node_values(it, statuses),
            "matrix": [dataclasses.asdict(cell) for cell in cells],
            "summary": list(summary(cells, {end.name: end.node for end in it.ends()})),
            "packet": dataclasses.asdict(packet) if packet is not None else None,
        }
        click.echo(json.dumps(value, indent=2))
    else:
        console = terminal.console()
        _print_nodes(it, statuses, False, console)
        for kinds in ("pod-pod", "node-pod", "pod-node"):
            for six in (False, True):
                print_matrix(console, kinds, [c for c in cells if c.kinds == kinds and (":" in c.own) == six])
        if packet is not None:
            _print_packet(console, packet)
        if missed:
            console.print(Text(missed, style="red"))
        _print_verdict(console, it, cells, all_reach)
    sys.exit(0 if all_reach else 1)


def _capture(it: Lab) -> tuple[Captured | None, str]:
    """A captured packet, or why there is none."""
    try:
        return it.capture(), ""
    except LabError as error:
        return None, str(error)


def _encapsulated(it: Lab, packet: Captured) -> bool:
    """Whether a captured packet is what it must be: between nodes outside, between pods inside."""
    nodes = {address for node in it.nodes for address in node.addresses}
    pods = {address for node in it.nodes for addresses in node.pods.values() for address in addresses}
    backend = it.config.backend
    ours = isinstance(backend, VxlanConfig) and packet.vni == backend.vni
    return {*packet.outer_ip} <= nodes and {*packet.inner_ip} <= pods and ours


def _node_values(it: Lab, statuses: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": node.name,
            "address": node.addresses[0],
            "addresses": node.addresses,
            "namespace": f"overlay-{it.name}-{node.name}",
            "pods": {pod: addresses[0] if addresses else "" for pod, addresses in node.pods.items()},
            "pod_addresses": node.pods,
            "log": str(it.log(node.name)),
            "status": statuses[node.name],
        }
        for node in it.nodes
    ]


def _print_nodes(it: Lab, statuses: dict[str, dict[str, Any]], as_json: bool, console: Console | None = None) -> None:
    if as_json:
        click.echo(json.dumps({"whole": it.whole(), "nodes": _node_values(it, statuses)}, indent=2))
        return
    console = console or terminal.console()
    table = terminal.table(console, title=f"lab {it.name}: {len(it.nodes)} nodes")
    with_mac = any((found.get("lease") or {}).get("vtep_mac") for found in statuses.values())
    for column in ("node", "underlay", "lease", "VTEP MAC", "device", "MTU", "peers", "ready", "pods"):
        if with_mac or column != "VTEP MAC":
            table.add_column(column)
    for node in it.nodes:
        found = statuses[node.name]
        views: list[dict[str, Any]] = every(found) if "error" not in found else [{"family": 4}]
        for view in views:
            number = view["family"]
            lease, device = view.get("lease") or {}, view.get("device") or {}
            own = [a for a in node.addresses if (":" in a) == (number == 6)] or node.addresses
            pods = [[a for a in those if (":" in a) == (number == 6)] or ["?"] for those in node.pods.values()]
            table.add_row(
                node.name,
                own[0],
                lease.get("subnet", "-"),
                *([lease.get("vtep_mac") or "-"] if with_mac else []),
                device.get("name") or "none",
                str(device.get("mtu", "-")),
                str(len(view.get("peers", ()))),
                "[green]yes[/]" if found.get("ready") else "[red]no[/]",
                " ".join(address for those in pods for address in those),
            )
    console.print(table)
    for line in it.broken():
        console.print(Text(line, style="red"))
    for name, found in statuses.items():
        if "error" in found:
            console.print(Text(found["error"], style="red"))
            continue
        for what, why in differences(found):
            console.print(Text(f"{name}: {what}: {why}", style="red"))


_TITLES = {
    "pod-pod": "pod to pod: round trip in microseconds / source that the far side saw",
    "node-pod": "node to pod",
    "pod-node": "pod to node",
}
WIDE = 9
"""Columns that fit; a larger matrix is shown as its failures and a summary."""


def print_matrix(console: Console, kinds: str, cells: list[Cell]) -> None:
    if not cells:
        return
    targets = sorted({cell.target for cell in cells}, key=_by_number)
    title = _TITLES[kinds]
    if len(targets) > WIDE:
        good = [cell.rtt_us for cell in cells if cell.ok and cell.rtt_us is not None]
        median = f", median {sorted(good)[len(good) // 2]:.0f} us" if good else ""
        console.print(f"{title}: {len(good)} of {len(cells)} pairs reach each other{median} (--json has each)")
        return
    table = terminal.table(console, title=title)
    table.add_column("from \\ to")
    for target in targets:
        table.add_column(target)
    by_pair = {(cell.source, cell.target): cell for cell in cells}
    sources = sorted({cell.source for cell in cells}, key=_by_number)
    for source in sources:
        row = []
        for target in targets:
            cell = by_pair.get((source, target))
            row.append(Text() if cell is None else _cell_text(cell))
        table.add_row(source, *row)
    console.print(table)


def _by_number(name: str) -> list[int]:
    """node10-pod1 behind node9-pod2."""
    return [int(part) for part in re.findall(r"\d+", name)]


def _cell_text(cell: Cell) -> Text:
    return Text(f"{cell.rtt_us:.0f} us\n{cell.seen}") if cell.ok else Text(cell.why, style="red")


def _print_packet(console: Console, packet: Captured) -> None:
    table = terminal.table(console, title=f"one packet, captured leaving by {packet.interface} ({packet.length} bytes)")
    for column in ("header", "from", "to", "what"):
        table.add_column(column)
    table.add_row("outer Ethernet", *packet.outer_mac, "the underlay's interfaces")
    table.add_row("outer IPv4", *packet.outer_ip, "the nodes")
    table.add_row("outer UDP", str(packet.outer_port[0]), str(packet.outer_port[1]), "VXLAN")
    table.add_row("VXLAN", "", "", f"VNI {packet.vni}")
    table.add_row("inner Ethernet", *packet.inner_mac, "the VTEPs")
    table.add_row("inner IPv4", *packet.inner_ip, "the pods, no NAT")
    table.add_row("inner UDP", str(packet.inner_port[0]), str(packet.inner_port[1]), f"payload {packet.payload}")
    console.print(table)


def _print_verdict(console: Console, it: Lab, cells: list[Cell], all_reach: bool) -> None:
    good = sum(cell.ok for cell in cells)
    if all_reach:
        sizes = sorted({cell.size for cell in cells})
        console.print(
            f"[green]all {good} pairs reach each other, with packets of up to {sizes[-1]} bytes,"
            " each seen with its own address[/]"
        )
    elif not cells:
        console.print("[yellow]no pods, so nothing to measure[/]")
    else:
        console.print(f"[red]{good} of {len(cells)} pairs reach each other[/]; see overlay lab status --name {it.name}")
        for line in summary(cells, {end.name: end.node for end in it.ends()}):
            console.print(Text(line, style="red"))
    command = sys.argv[0] if sys.argv[0].endswith("overlay") else "overlay"
    name = "" if it.name == "lab" else f" --name {it.name}"
    first = it.nodes[0].name if it.nodes else "node1"
    console.print(
        f"it stays up; try:\n  {command} lab exec{name} {first} -- ip route\n"
        f"  {command} lab exec{name} {first} -- {command} check --run-dir {it.folder}/{first}\n"
        f"  {command} status --run-dir {it.folder}/{first}\n  {command} lab down{name}"
    )
    if url := it.page_url():
        console.print(Text(f"its page, for a browser on this machine: {url}"))
