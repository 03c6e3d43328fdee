"""`overlay trace`: the way of a packet, step by step, proven by probes that are counted at each."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from lease.model import ip_number, prefix
from overlay.api.family import has_vteps, of_family, primary
from overlay.check.refused import refused_record
from overlay.cli import terminal
from overlay.cli.complete import TARGET
from overlay.cli.here import ask_in_place
from overlay.cli.status import ask
from overlay.kernel.netlink import error_text
from overlay.settings.flags import DEFAULT_RUN_DIR
from overlay.trace import run
from overlay.trace.end import Passed
from overlay.trace.node import NotTraceable, WrongEnds
from overlay.trace.probe import PROTOCOLS, header_bytes
from overlay.trace.run import Request, Traced
from overlay.trace.values import as_values, came_through, flows_text, text_of, worst


@click.command()
@click.argument("source")
@click.argument("destination", shell_complete=TARGET)
@click.option("--proto", type=click.Choice(list(PROTOCOLS)), default="icmp", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), help="of the destination; with tcp and udp")
@click.option(
    "--size", type=click.IntRange(28, 65000), help="of the packets in bytes; else small ones, then full-size ones"
)
@click.option(
    "--flows",
    type=click.IntRange(1, 32),
    default=1,
    show_default=True,
    help="so many, each from another port; with tcp and udp: where some packets pass and others do not",
)
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
@click.option("-o", "--output", type=click.Choice(["json"]), help="everything, as JSON")
@click.option("--json", "as_json", is_flag=True, help="the same as -o json")
def trace(
    source: str, destination: str, proto: str, port: int | None, size: int | None, flows: int, run_dir: str,
    output: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Follow packets from SOURCE to DESTINATION, and say where they are dropped, and why.

    SOURCE is the address of a pod of this node, or `node` for this node itself; DESTINATION that of a pod anywhere, of
    another node's gateway, or outside. Three probes are sent from inside the pod, and counted at each step by nftables
    counters of their own, which are taken away again; what the kernel and the agent say of each step stands beside. The
    other node's agent counts there, where agents may ask each other (--ask-secret-file).

    Exit status: 0 delivered, 1 dropped, or not known, 2 a wrong argument, 3 no agent answers here.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)  # so that the counters are taken away
    if os.geteuid() != 0:
        raise click.ClickException("only root may send probes: run it with sudo")
    if (proto == "icmp") == (port is not None):
        raise click.UsageError("--port goes with --proto tcp or udp, and they need it")
    if flows > 1 and proto == "icmp":
        raise click.UsageError("--flows goes with --proto tcp or udp: all pings between two addresses take one way")
    found = ask_in_place(run_dir)
    family = _family(source) or _family(destination) or primary(found)["family"]
    if size is not None and size < header_bytes(proto, family):
        raise click.UsageError(f"--size {size}: the headers alone have {header_bytes(proto, family)} bytes")
    whole, found = found, of_family(found, family)
    if not found["lease"]:
        raise click.ClickException(f"this node has no subnet of IPv{family}: overlay status")
    ends = _address(source, found, family), _address(destination, found, family)
    request = Request(*ends, proto, port or 0, size, flows, family)
    try:
        traced = run.trace(found, request, lambda: ask(run_dir))
    except WrongEnds as error:
        raise click.UsageError(str(error)) from error
    except NotTraceable as error:
        raise click.ClickException(str(error)) from error
    except PermissionError as error:
        raise click.ClickException(
            f"{error.strerror}: it needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN"
        ) from error
    except OSError as error:
        raise click.ClickException(f"the kernel refuses: {error_text(error)}") from error
    if as_json or output == "json":
        click.echo(json.dumps(as_values(request, traced), indent=2))
    else:
        show(terminal.console(), whole, request, traced)
    sys.exit(0 if all(map(came_through, traced)) else 1)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _family(text: str) -> int | None:
    """Of an address; None: it is none, but a name."""
    for family in (4, 6):
        with suppress(ValueError):
            ip_number(text, family)
            return family
    return None


def _address(text: str, found: dict[str, Any], family: int) -> int:
    """found: the view of the family. A node is its VTEP; where there is none (host-gw) this one its underlay's address,
    another its pods' gateway."""
    vteps = has_vteps(found)
    if text == "node":
        own = found["lease"]["subnet"].partition("/")[0] if vteps else found["underlay"]["address"]
        return ip_number(own, family)
    named = [peer for peer in found["peers"] if text == peer["node_name"]]
    if named:
        return prefix(named[0]["subnet"]).base + (not vteps)
    try:
        return ip_number(text, family)
    except ValueError:
        if (refused := refused_record(found, text)) is not None:
            raise click.ClickException(f"{text}: {refused}") from None
        raise click.UsageError(f"{text}: it is no IPv{family} address, no peer's name, and not `node`") from None


def show(console: Console, found: dict[str, Any], request: Request, traced: Sequence[Traced]) -> None:
    """The steps of the size that does not come through, else of the last one, and what became of it."""
    shown = worst(traced)
    _table(console, request, shown)
    good = came_through(shown)
    console.print(Text(text_of(shown), style="green" if good else "red"))
    if flows := flows_text(request, traced):
        console.print(Text(flows, style="green" if good else "red"))
    for reason in shown.verdict.reasons:
        console.print(Text(f"because: {reason}" if not good else reason))
    for note in (*shown.verdict.notes, *shown.notes):
        console.print(Text(f"note: {note}"))
    for problem in found["problems"] if not good else ():
        console.print(Text(f"this node also says: {problem['subject']}: {problem['text']}"))


def _table(console: Console, request: Request, traced: Traced) -> None:
    """The steps of the answer where it came that far."""
    port = f" port {request.port}" if request.port else ""
    title = (
        f"{request.text(request.source)} to {request.text(request.destination)}, {request.protocol}{port}:"
        f" {traced.seen.sent} packets of {traced.size} bytes"
    )
    console.print(Text(title, style="italic"))
    table = terminal.table(console, "node", "step", "counted", title="")
    there = list(traced.seen.there)
    reached = max((place for place, each in enumerate(there) if each.total), default=-1)
    for place, each in enumerate(there):
        table.add_row(*_row(each, passed_over=place < reached))
    if any(each.total for each in traced.seen.back):
        for each in traced.seen.back:
            table.add_row(*_row(each, passed_over=False, style="dim"))
    console.print(table)


def _row(each: Passed, passed_over: bool, style: str = "") -> tuple[Text, Text, Text]:
    color = style or ("red" if not each.total and not passed_over else "")
    return Text(each.node), Text(each.point.what, style=color), Text(str(each.total), style=color)
