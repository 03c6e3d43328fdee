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
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple

import click

from lease.families import FAMILIES, V6
from lease.model import Prefix, ip_number, prefix
from overlay.api.family import network_of, views
from overlay.capture import frames
from overlay.capture.frames import Frame, Packet
from overlay.cli.complete import TARGET
from overlay.cli.here import ask_in_place
from overlay.settings.flags import DEFAULT_RUN_DIR

ETH_P_ALL, ETH_P_IP = 3, 0x0800
_SO_TIMESTAMPNS, _BUFFER = 35, 4 << 20
_ARPHRD_NONE = 0xFFFE
"""if_arp.h: a device without a link layer."""


class Goal(NamedTuple):
    """Which packets: those with one end within `inner` (None: by that none), and those between this node and the peer at
    `outer` ("": none)."""

    inner: Prefix | None
    outer: str

    def wants(self, found: Frame) -> bool:
        """Whether a frame is one of them."""
        if self.inner is not None and found.inner is not None and any(_within(found.inner, self.inner)):
            return True
        return found.outer is not None and self.outer in (found.outer.source, found.outer.destination)


class Every(NamedTuple):
    """All packets of the tunnel, and those from pod to pod that go without it. networks: of pods."""

    networks: tuple[Prefix, ...]

    def wants(self, found: Frame) -> bool:
        """Whether a frame is one of them."""
        if found.outer is not None:
            return True
        return found.inner is not None and any(all(_within(found.inner, each)) for each in self.networks)


def _within(packet: Packet, there: Prefix) -> Iterator[bool]:
    """Of each end of a packet."""
    for end in (packet.source, packet.destination):
        yield (":" in end) == (there.family == V6.number) and there.holds(ip_number(end, there.family))


class Seen(NamedTuple):
    """A frame as it passed an interface. at_ns: since the epoch; bare: it has no link layer."""

    interface: str
    frame: bytes
    at_ns: int
    outgoing: bool
    bare: bool


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
    """Show packets of pods, and what carries them, as they pass this node's underlay.

    TARGET is a node's name, a public IP or a subnet (packets of that peer), or the address of a pod; without one all of
    pods' packets are shown that go to peers or come from them. In a network of both families a name means the peer's IPv4.
    What WireGuard encrypts is shown twice: as it passes the WireGuard device, and (where no pod is named) as it passes the
    underlay, where only its length can be read.

    Exit status: 0 there were some, 1 none passed, 2 a wrong argument, 3 no agent answers here.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root may capture: run it with sudo")
    there = [view for view in views(ask_in_place(run_dir), None) if view.get("device") and view.get("underlay")]
    if not there:
        raise click.ClickException("this node has no device yet: overlay status says what it waits for")
    goal, shown = _goal(target, there)
    kind, ports = shown[0]["device"].get("kind", "vxlan"), frozenset(view["device"]["port"] for view in shown)
    interfaces = list(dict.fromkeys(view["underlay"]["interface"] for view in shown))
    if kind == "wireguard":
        interfaces += dict.fromkeys(view["device"]["name"] for view in shown)
    try:
        file: BinaryIO | None = None if path is None else sys.stdout.buffer if path == "-" else open(path, "wb")  # noqa: SIM115
        passed = _run(_decoded(interfaces, kind, ports, seconds), goal, count, file, as_json)
    except OSError as error:
        raise click.ClickException(f"{error.filename or ', '.join(interfaces)}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        passed = 1
    if not passed:
        click.echo(f"no packet of that kind passed {' or '.join(interfaces)} within {seconds:g} s", err=True)
    sys.exit(0 if passed else 1)


def _goal(target: str | None, there: list[dict[str, Any]]) -> tuple[Goal | Every, list[dict[str, Any]]]:
    """What is meant, and the views of its families. there: views of the status, by family."""
    if target is None:
        return Every(tuple(map(network_of, there))), there
    for view in there:
        for peer in view.get("peers") or ():
            if target in (peer["node_name"], peer["public_ip"], peer["subnet"]):
                tunnelled = peer["path"] != "direct" and target != peer["subnet"]
                return Goal(prefix(peer["subnet"]), peer["public_ip"] if tunnelled else ""), [view]
    try:
        family = FAMILIES[6 if ":" in target else 4]
        inner = prefix(target if "/" in target else f"{target}/{family.bits}")
        return Goal(inner, ""), [view for view in there if view["family"] == family.number] or there[:1]
    except ValueError:
        raise click.UsageError(f"{target}: no peer has that name, public IP or subnet, and it is no address") from None


def _decoded(interfaces: list[str], kind: str, ports: frozenset[int], seconds: float) -> Iterator[tuple[Seen, Frame]]:
    for seen in _frames(interfaces, seconds):
        decoded = frames.parse_bare(seen.frame) if seen.bare else frames.parse(seen.frame, ports, kind)
        if decoded is not None:
            yield seen, decoded


def _run(
    passing: Iterator[tuple[Seen, Frame]], goal: Goal | Every, count: int | None, file: BinaryIO | None, as_json: bool
) -> int:
    passed = 0
    if file is not None:
        file.write(frames.pcap_head())
    for seen, decoded in passing:
        if not goal.wants(decoded):
            continue
        passed += 1
        if file is not None:
            frame = frames.with_link_layer(seen.frame) if seen.bare else seen.frame
            file.write(frames.pcap_record(frame, seen.at_ns))
        else:
            click.echo(_json(decoded, seen) if as_json else _text(decoded, seen))
        if count is not None and passed >= count:
            break
    if file is not None:
        file.flush()
    return passed


def _frames(interfaces: list[str], seconds: float) -> Iterator[Seen]:
    """Frames as they pass. Raises OSError."""
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        listening = [stack.enter_context(_listening(name)) for name in interfaces]
        while (left := end - time.monotonic()) > 0:
            for each in select.select(listening, [], [], left)[0]:
                frame, extra, _, where = each.recvmsg(1 << 16, 64)
                stamps = [
                    struct.unpack("qq", value)
                    for _, kind, value in extra
                    if kind == _SO_TIMESTAMPNS and len(value) == 16
                ]
                at_ns = stamps[0][0] * 1_000_000_000 + stamps[0][1] if stamps else time.time_ns()
                yield Seen(where[0], frame, at_ns, where[2] == socket.PACKET_OUTGOING, where[3] == _ARPHRD_NONE)


def _listening(interface: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        made.bind((interface, ETH_P_ALL))
    except OSError as error:
        made.close()
        raise OSError(error.errno, error.strerror, interface) from error
    return made


def _text(found: Frame, seen: Seen) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(seen.at_ns // 1_000_000_000))
    by = f"{seen.interface} " if seen.bare else ""
    return f"{at}.{seen.at_ns % 1_000_000_000 // 1000:06d} {'out' if seen.outgoing else 'in '} {by}{frames.line(found)}"


def _json(found: Frame, seen: Seen) -> str:
    outer, shown = found.outer, found.inner or found.outer
    assert shown is not None  # one of both is there
    return json.dumps(
        {
            "at_ns": seen.at_ns,
            "direction": "out" if seen.outgoing else "in",
            "interface": seen.interface,
            "outer": None
            if outer is None
            else {"source": outer.source, "destination": outer.destination, "vni": found.vni},
            "encrypted": found.inner is None,
            "source": shown.source,
            "destination": shown.destination,
            "source_mac": found.inner_macs[0],
            "destination_mac": found.inner_macs[1],
            "what": shown.what,
            "bytes": shown.length,
        }
    )
