"""`overlay check`: does a peer, a node or a pod answer, and if not, why."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from overlay.api.family import views
from overlay.check.run import NotYet, RefusedRecord, Unknown, ask_all, local, resolve
from overlay.cli import terminal
from overlay.cli.complete import TARGET
from overlay.cli.here import ask_in_place
from overlay.cli.status import rtt_text
from overlay.kernel.netlink import error_text
from overlay.probes.verdict import Kind
from overlay.settings.flags import DEFAULT_RUN_DIR


@click.command()
@click.argument("target", required=False, shell_complete=TARGET)
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
@click.option("-o", "--output", type=click.Choice(["json"]), help="everything, as JSON")
@click.option("--json", "as_json", is_flag=True, help="the same as -o json")
def check(target: str | None, run_dir: str, output: str | None, as_json: bool) -> None:
    """Ask the kernel and the peers: does TARGET answer, and if not, why.

    TARGET is a node's name, a public IP, a subnet, or the address of a pod; without one all peers are asked. Probes are
    pings from this node, beside the tunnel and through it, small and of full size: peers that run flannel answer as well.

    Exit status: 0 all answer, 1 not, 2 a wrong argument, 3 no agent answers here.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root may send probes: run it with sudo")
    found = ask_in_place(run_dir)
    try:
        results = _results(found, target)
    except (NotYet, RefusedRecord) as error:
        raise click.ClickException(str(error)) from error
    except Unknown as error:
        raise click.UsageError(str(error)) from error
    except PermissionError as error:
        raise click.ClickException(f"no probe can be sent: {error.strerror}; it needs CAP_NET_RAW") from error
    except OSError as error:
        raise click.ClickException(f"the kernel could not be asked: {error_text(error)}") from error
    if output == "json" or as_json:
        click.echo(json.dumps(results if target is None or len(results) > 1 else results[0], indent=2))
    else:
        console = terminal.console()
        if results and target is not None:
            for result in results:
                _show(console, found, result)
        else:
            _show_all(console, found, results)
    sys.exit(0 if all(result["state"] == "ok" for result in results) else 1)


def _results(found: dict[str, Any], target: str | None) -> list[dict[str, Any]]:
    """Of each family that the target has. Raises Unknown, RefusedRecord, NotYet, OSError."""
    results: list[dict[str, Any]] = []
    unknown: list[Unknown | RefusedRecord | NotYet] = []
    for view in views(found, target):
        try:
            goals, own = resolve(target, view)
        except (Unknown, RefusedRecord, NotYet) as error:
            unknown.append(error)
            continue
        results += [local(view, own)] if own else ask_all(view, goals)
    if unknown and not results:
        raise next((each for each in unknown if isinstance(each, RefusedRecord)), unknown[0])
    return results


# --- showing


def _show(console: Console, found: dict[str, Any], result: dict[str, Any]) -> None:
    peer = result["peer"]
    where = "this node"
    if peer is not None:
        way = "directly" if peer["path"] == "direct" else "through the tunnel"
        where = f"{peer['node_name'] or peer['public_ip']} ({peer['public_ip']}, {peer['subnet']}), {way}"
    table = terminal.table(
        console, "probe", "to", "answered", "rtt", title=f"{found['node_name']} to {result['target']} of {where}"
    )
    for probe in result["probes"]:
        ok = probe["answered"] > 0
        answered = f"{probe['answered']} of {probe['sent']}" if not probe["refused"] else probe["refused"]
        shown = answered if ok else Text(answered, style="red")
        table.add_row(probe["name"], probe["address"], shown, rtt_text(probe["rtt_us"]))
    console.print(table)
    for line in result["look_ups"]:
        console.print(Text(f"look-up: {line}", style="red"))
    style = "green" if result["state"] == "ok" else "red"
    console.print(
        Text(f"{result['target']} {result['verdict']}" if result["state"] == "ok" else result["verdict"], style=style)
    )
    if result["remedy"]:
        console.print(Text(f"do: {result['remedy']}"))
    for line in result["far_side"]:
        console.print(Text(f"far side: {line}"))
    for problem in found["problems"] if result["state"] != "ok" else ():
        if problem["subject"] not in ("unreachable", "path mtu", "loss"):
            console.print(Text(f"this node also says: {problem['subject']}: {problem['text']}"))


def _show_all(console: Console, found: dict[str, Any], results: list[dict[str, Any]]) -> None:
    count = len(found["peers"])
    if not results:
        console.print("there is no peer to ask")
        return
    table = terminal.table(
        console,
        "node",
        "public ip",
        "subnet",
        "state",
        "rtt",
        "why",
        title=f"{len(results)} were asked, {sum(each['state'] == 'ok' for each in results)} answer",
    )
    for result in results:
        peer, vtep = result["peer"], result["probes"][Kind.VTEP_FULL]
        rtt = rtt_text(vtep["rtt_us"])
        why = "" if result["state"] == "ok" else f"{result['verdict']}; {result['remedy']}"
        style = "" if result["state"] == "ok" else "red"
        table.add_row(
            *map(Text, (peer["node_name"], peer["public_ip"], peer["subnet"], result["state"], rtt, why)), style=style
        )
    console.print(table)
    if count > len(results):
        console.print(f"... {count - len(results)} more were not asked: name them")
