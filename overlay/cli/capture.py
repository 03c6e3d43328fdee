"""`overlay capture`: packets to and from a peer or a pod, decoded, or as a file."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import click

from lease.families import FAMILIES, V6
from lease.model import Prefix, ip_number, prefix
from overlay.api.family import views
from overlay.capture import frames
from overlay.capture.frames import Frame
from overlay.cli.complete import TARGET
from overlay.cli.status import ask
from overlay.settings.flags import DEFAULT_RUN_DIR

ETH_P_ALL, ETH_P_IP = 3, 0x0800
_SO_TIMESTAMPNS, _BUFFER = 35, 4 << 20


class Goal(NamedTuple):
    """Which packets: those with one end within `inner`, or (None) between this node and the peer at `outer`."""

    inner: Prefix | None
    outer: str

    def wants(self, found: Frame) -> bool:
        """Whether a frame is one of them."""
        if self.inner is not None:
            family = self.inner.family
            ends = [
                end for end in (found.inner.source, found.inner.destination) if (":" in end) == (family == V6.number)
            ]
            return any(self.inner.holds(ip_number(end, family)) for end in ends)
        return found.outer is not None and self.outer in (found.outer.source, found.outer.destination)


@click.command()
@click.argument("target", required=False, shell_complete=TARGET)
@click.option("-n", "--count", type=click.IntRange(1), help="end after so many packets")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="end after so long")
@click.option(
    "-w", "--write", "path", type=click.Path(dir_okay=False, allow_dash=True), help="write a pcap file (-: to stdout)"
)
@click.option("--json", "as_json", is_flag=True, help="a line of JSON for each packet")
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
def capture(
    target: str | None, count: int | None, seconds: float, path: str | None, as_json: bool, run_dir: str
) -> None:
    """Show the packets of the tunnel that pass this node's underlay.

    TARGET is a node's name, a public IP or a subnet (packets of that peer), or the address of a pod; without one all of the
    tunnel's are shown. In a network of both families a name means the peer's IPv4. Packets of peers that are reached
    directly are seen by their pods' addresses.

    Exit status: 0 there were some, 1 none passed, 2 a wrong argument, 3 no agent answers here.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root may capture: run it with sudo")
    there = [view for view in views(ask(run_dir), None) if view.get("device") and view.get("underlay")]
    if not there:
        raise click.ClickException("this node has no device yet: overlay status says what it waits for")
    goal, view = _goal(target, there)
    interface, port = view["underlay"]["interface"], view["device"]["port"]
    try:
        file: BinaryIO | None = None if path is None else sys.stdout.buffer if path == "-" else open(path, "wb")  # noqa: SIM115
        passed = _run(interface, port, goal, count, seconds, file, as_json)
    except OSError as error:
        raise click.ClickException(f"{error.filename or interface}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        passed = 1
    if not passed:
        click.echo(f"no packet of that kind passed {interface} within {seconds:.0f} s", err=True)
    sys.exit(0 if passed else 1)


def _goal(target: str | None, there: list[dict[str, Any]]) -> tuple[Goal | None, dict[str, Any]]:
    """What is meant, and the view of its family. there: views of the status, by family."""
    if target is None:
        return None, there[0]
    for view in there:
        for peer in view.get("peers") or ():
            if target in (peer["node_name"], peer["public_ip"], peer["subnet"]):
                direct = peer["path"] == "direct"
                inner = prefix(peer["subnet"]) if direct or target == peer["subnet"] else None
                return Goal(inner, peer["public_ip"]), view
    try:
        family = FAMILIES[6 if ":" in target else 4]
        inner = prefix(target if "/" in target else f"{target}/{family.bits}")
        return Goal(inner, ""), next((view for view in there if view["family"] == family.number), there[0])
    except ValueError:
        raise click.UsageError(f"{target}: no peer has that name, public IP or subnet, and it is no address") from None


def _run(
    interface: str,
    port: int,
    goal: Goal | None,
    count: int | None,
    seconds: float,
    file: BinaryIO | None,
    as_json: bool,
) -> int:
    passed = 0
    if file is not None:
        file.write(frames.pcap_head())
    for frame, at_ns, outgoing in _frames(interface, seconds):
        decoded = frames.parse(frame, port)
        if decoded is None or not (goal.wants(decoded) if goal is not None else decoded.outer is not None):
            continue
        passed += 1
        if file is not None:
            file.write(frames.pcap_record(frame, at_ns))
        else:
            click.echo(_json(decoded, at_ns, outgoing) if as_json else _text(decoded, at_ns, outgoing))
        if count is not None and passed >= count:
            break
    if file is not None:
        file.flush()
    return passed


def _frames(interface: str, seconds: float) -> Iterator[tuple[bytes, int, bool]]:
    """Frames as they pass, when (ns since the epoch), and whether they leave. Raises OSError."""
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        listening.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        listening.bind((interface, ETH_P_ALL))
        while (left := end - time.monotonic()) > 0 and select.select([listening], [], [], left)[0]:
            frame, extra, _, where = listening.recvmsg(1 << 16, 64)
            stamps = [
                struct.unpack("qq", value) for _, kind, value in extra if kind == _SO_TIMESTAMPNS and len(value) == 16
            ]
            at_ns = stamps[0][0] * 1_000_000_000 + stamps[0][1] if stamps else time.time_ns()
            yield frame, at_ns, where[2] == socket.PACKET_OUTGOING


def _text(found: Frame, at_ns: int, outgoing: bool) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(at_ns // 1_000_000_000))
    return f"{at}.{at_ns % 1_000_000_000 // 1000:06d} {'out' if outgoing else 'in '} {frames.line(found)}"


def _json(found: Frame, at_ns: int, outgoing: bool) -> str:
    outer = found.outer
    return json.dumps(
        {
            "at_ns": at_ns,
            "direction": "out" if outgoing else "in",
            "outer": None
            if outer is None
            else {"source": outer.source, "destination": outer.destination, "vni": found.vni},
            "source": found.inner.source,
            "destination": found.inner.destination,
            "source_mac": found.inner_macs[0],
            "destination_mac": found.inner_macs[1],
            "what": found.inner.what,
            "bytes": found.inner.length,
        }
    )
