"""`overlay flows`: connections of pods of this node, those that policies deny and those that begin, as they happen."""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import click

from overlay.cli.here import ask_in_place
from overlay.cli.policy import ask_or_end
from overlay.kernel.netlink import error_text
from overlay.kernel.nftables.flows import Connections, Denials, Flow
from overlay.policy.ask import NotTold, ask_policies
from overlay.policy.compile import Compiled, compile_node
from overlay.policy.model import PROTOCOL_NAMES
from overlay.policy.table import BY_RULE, LOGGED_BYTES, log_group
from overlay.policy.words import address_text
from overlay.settings.flags import DEFAULT_RUN_DIR

T = TypeVar("T")
AGAIN_S = 5.0
"""What pods and policies there are is asked again so often."""
_OTHER_NAMES = {1: "ICMP", 58: "ICMPv6"}


class Told(NamedTuple):
    """A flow. policies: those that isolate the pod that it was denied at, where it was denied."""

    allowed: bool
    flow: Flow
    policies: tuple[str, ...] = ()


@click.command()
@click.option("--denied", is_flag=True, help="those alone that policies deny")
@click.option("--pod", default="", help="those alone of a pod, namespace/name or an address")
@click.option("--follow", is_flag=True, help="go on until Ctrl-C")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="end after so long")
@click.option("--json", "as_json", is_flag=True, help="a line of JSON for each")
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
def flows(denied: bool, pod: str, follow: bool, seconds: float, as_json: bool, run_dir: str) -> None:
    """Show connections of pods of this node as they begin, and packets that policies deny, with the policies that decided.

    Of denied packets the kernel tells ten a second for each list of policies; the others are counted (overlay status).

    Exit: 0 there were some, 1 none, 2 no agent answers, or the kernel does not tell.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root may listen: run it with sudo")
    ask_in_place(run_dir)
    names = _Names(run_dir)
    shown = 0
    try:
        for told in _told(denied, None if follow else seconds, names):
            if not pod or pod in names.of_ends(told.flow):
                click.echo(json.dumps(_values(told, names)) if as_json else _line(told, names))
                shown += 1
    except KeyboardInterrupt:
        pass
    except OSError as error:
        why = "; does another `overlay flows` run here?" if error.errno == errno.EBUSY else ""
        click.echo(f"overlay flows: {error_text(error)}{why}", err=True)
        sys.exit(2)
    sys.exit(0 if shown else 1)


class _Names:
    """Whose addresses are, and what chains mean: asked of the agent now and then."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._asked = -AGAIN_S
        self.pods: dict[bytes, str] = {}
        self.compiled: Compiled | None = None
        self.network = 1
        self.refresh()

    def refresh(self) -> None:
        """Ask, where it is time."""
        if time.monotonic() - self._asked < AGAIN_S:
            return
        try:
            # the first time it must answer; later it may be on its way to be another
            snapshot = ask_or_end(self._run_dir) if self.compiled is None else ask_policies(self._run_dir)
        except (OSError, NotTold, LookupError, TypeError, ValueError):
            self._asked = time.monotonic()
            return
        self._asked = time.monotonic()
        self.pods, self.network = snapshot.names, snapshot.network
        self.compiled = compile_node(snapshot.indexed(), snapshot.policies, snapshot.node, nodes=snapshot.nodes)

    def policies_of(self, prefix: str) -> tuple[str, ...]:
        """Those that denied what a rule with that prefix logged."""
        name, _, place = prefix.partition(BY_RULE)
        chain = self.compiled.chains.get(name) if self.compiled is not None else None
        if chain is None:
            return ()
        if place.isdecimal() and int(place) < len(chain.rules):
            return (chain.rules[int(place)].policy,)
        return chain.policies

    def of(self, address: bytes) -> str:
        """A pod's name and address, or the address."""
        text = address_text(address)
        return f"{self.pods[address]} ({text})" if address in self.pods else text

    def of_ends(self, flow: Flow) -> set[str]:
        """All by which the ends may be called."""
        ends = (flow.source, flow.target)
        return {*map(address_text, ends), *(self.pods[each] for each in ends if each in self.pods)}


def _told(denied_only: bool, seconds: float | None, names: _Names) -> Iterator[Told]:
    denials = Denials(log_group(names.network), LOGGED_BYTES)
    try:
        connections = None if denied_only else Connections()
        try:
            yield from _listen(denials, connections, seconds, names)
        finally:
            if connections is not None:
                connections.close()
    finally:
        denials.close()


def _listen(denials: Denials, connections: Connections | None, seconds: float | None, names: _Names) -> Iterator[Told]:
    end = None if seconds is None else time.monotonic() + seconds
    listening = [denials.socket, *([connections.socket] if connections is not None else [])]
    while end is None or time.monotonic() < end:
        left = AGAIN_S if end is None else max(0.0, min(AGAIN_S, end - time.monotonic()))
        ready = select.select(listening, [], [], left)[0]
        names.refresh()
        if denials.socket in ready:
            for packet in _unless_lost(denials.read):
                yield Told(False, packet.flow, names.policies_of(packet.prefix))
        if connections is not None and connections.socket in ready:
            for flow in _unless_lost(connections.read):
                if flow.source in names.pods or flow.target in names.pods:
                    yield Told(True, flow)


def _unless_lost(read: Callable[[], list[T]]) -> list[T]:
    """What came; where more came than the socket holds, the next of it."""
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        click.echo("overlay flows: more came than could be shown; some are missing here", err=True)
        return []


def _protocol(flow: Flow) -> str:
    name = PROTOCOL_NAMES.get(flow.protocol) or _OTHER_NAMES.get(flow.protocol) or f"protocol {flow.protocol}"
    return f"{name} {flow.port}" if flow.port else name


def _line(told: Told, names: _Names) -> str:
    at = datetime.now(UTC).astimezone().strftime("%H:%M:%S")
    ends = f"{names.of(told.flow.source)} -> {names.of(told.flow.target)} {_protocol(told.flow)}"
    by = f" by {', '.join(told.policies)}" if told.policies else ""
    return f"{at} {'allowed' if told.allowed else 'denied '} {ends}{by}"


def _values(told: Told, names: _Names) -> dict[str, Any]:
    flow = told.flow
    return {
        "time": datetime.now(UTC).isoformat(),
        "verdict": "allowed" if told.allowed else "denied",
        "source": address_text(flow.source),
        "source_pod": names.pods.get(flow.source, ""),
        "source_port": flow.source_port,
        "destination": address_text(flow.target),
        "destination_pod": names.pods.get(flow.target, ""),
        "protocol": PROTOCOL_NAMES.get(flow.protocol) or _OTHER_NAMES.get(flow.protocol) or str(flow.protocol),
        "port": flow.port,
        "policies": list(told.policies),
    }
