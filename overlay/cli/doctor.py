"""`overlay doctor`: what of this machine keeps, or may keep, pods from reaching each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from lease.families import V4
from overlay.api.family import family_of, primary, views
from overlay.ask.client import NoAnswer
from overlay.cli import terminal
from overlay.cli.here import go_to
from overlay.cli.status import NoAgent, asked
from overlay.doctor import agent, alone, host, network
from overlay.doctor.finding import Finding, Findings, State, unknown
from overlay.kernel.netlink import RequestSocket, error_text
from overlay.node.prober import who_answers
from overlay.settings.flags import DEFAULT_CNI_CONF_DIR, DEFAULT_RUN_DIR, DEFAULT_SUBNET_FILE
from overlay.trace import node as nodes
from overlay.trace.node import Node, NotTraceable

_STYLES = {State.OK: "green", State.WARN: "yellow", State.WRONG: "red", State.UNKNOWN: "dim"}


@click.command()
@click.option(
    "--fix",
    is_flag=True,
    help="mend what can be mended safely: sysctls, modules, drop-in files of networkd and NetworkManager",
)
@click.option("--all", "everything", is_flag=True, help="also what is as it should be")
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
@click.option("--subnet-file", help=f"the agent's; where it does not answer {DEFAULT_SUBNET_FILE}")
@click.option("--cni-conf-dir", help=f"the agent's; where it does not answer {DEFAULT_CNI_CONF_DIR}")
@click.option(
    "--root",
    default="/",
    show_default=True,
    type=click.Path(path_type=Path),
    help="where the host's files are, in a container",
)
@click.option("--json", "as_json", is_flag=True, help="everything, as JSON")
def doctor(
    fix: bool, everything: bool, run_dir: str, subnet_file: str | None, cni_conf_dir: str | None, root: Path, as_json: bool
) -> None:  # fmt: skip
    """Look at this machine: kernel, sysctls, firewalls and their order, MTUs, offloads (by real packets), the programs that
    see to interfaces beside us, duplicate addresses, clock, store, lease, CNI.

    Exit status: 0 nothing is wrong (there may be warnings), 1 something is, 2 a wrong flag.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root can look at all of it: run it with sudo")
    elsewhere = _entered(run_dir)
    if fix and elsewhere:
        raise click.ClickException(f"{elsewhere}; nothing was mended")
    found = list(findings(run_dir, subnet_file, cni_conf_dir, root, elsewhere))
    fixed = _fix(found) if fix else {}
    if as_json:
        click.echo(json.dumps([as_values(each, fixed.get(place)) for place, each in enumerate(found)], indent=2))
    else:
        _show(terminal.console(), found, fixed, everything)
    wrong = [each for place, each in enumerate(found) if each.state is State.WRONG and fixed.get(place) != ""]
    sys.exit(1 if wrong else 0)


def _entered(run_dir: str) -> str:
    """Go to the agent's network namespace; why not, "" where there is none to go to, or it is this one."""
    try:
        go_to(asked(run_dir))
    except NoAgent:
        return ""
    except click.ClickException as error:
        return error.message
    return ""


def findings(
    run_dir: str, subnet_given: str | None, cni_given: str | None, root: Path, elsewhere: str = ""
) -> Iterator[Finding]:
    """All of them. One that cannot be looked at costs no other. elsewhere: why the agent's network is not looked at."""
    try:
        found, silent = asked(run_dir), ""
    except NoAgent as error:
        found, silent = {}, str(error)
    files = found.get("process") or {}
    subnet_file = subnet_given or files.get("subnet_file") or DEFAULT_SUBNET_FILE
    cni_conf_dir = cni_given or files.get("cni_conf_dir") or DEFAULT_CNI_CONF_DIR
    yield from _guarded("kernel", host.kernel, *_backend(found))
    yield from _guarded("clock", host.clock)
    for of_host in (host.networkd, host.network_manager, host.mac_policy):
        yield from _guarded(of_host.__name__.replace("_", " "), of_host, root)
    yield from _guarded("CNI", agent.cni, root, cni_conf_dir)
    if silent:
        yield Finding(
            "agent",
            State.WRONG,
            f"{silent}; what follows of the network is what this shell's own network namespace has",
            "nobody sees to the ways to peers",
            "systemctl status overlayd, or kubectl -n kube-overlay get pods",
        )
        yield unknown("store and lease", "only the agent knows them")
        yield from _without_agent(subnet_file)
        return
    whole, found = found, primary(found)
    for of_agent in (agent.agent, agent.store, agent.lease, agent.clocks, network.counters):
        yield from _guarded(of_agent.__name__, of_agent, found)
    if elsewhere:
        yield unknown("network", elsewhere)
        return
    devices = {view["device"]["name"]: view["device"]["mtu"] for view in views(whole, None) if view.get("device")}
    for view in views(whole, None):
        end = f" {family_of(view).text}" if view["family"] != found["family"] else ""
        for each in _of_family(view, subnet_file, devices):
            yield each._replace(subject=f"{each.subject}{end}")


def _of_family(view: Mapping[str, Any], subnet_file: str, devices: Mapping[str, int]) -> Findings:
    """view: the status, as a view of the family."""
    requests = RequestSocket()
    try:
        node = nodes.read(view, requests, family_of(view))
    except (NotTraceable, OSError) as error:
        yield unknown("network", error_text(error))
        return
    finally:
        requests.close()
    yield from _of_network(node, subnet_file, devices)
    if explained := {"ways", "foreign rules"} & node.problems.keys():
        yield unknown(
            "offloads", f"TCP and pings are not compared while there is a problem {' and '.join(sorted(explained))}"
        )
    else:
        yield from _guarded("offloads", network.offloads, node)


def _of_network(node: Node, subnet_file: str, devices: Mapping[str, int]) -> Findings:
    """What can be looked at whether an agent runs or not. devices: each family's MTU, by its name."""
    for of_node in (network.firewalls, network.sysctls, network.deaf, network.held):
        yield from _guarded(of_node.__name__, of_node, node)
    yield from _guarded("MTU", network.mtus, node, subnet_file, devices)
    yield from _guarded("addresses", network.duplicates, node, who_answers)


def _without_agent(subnet_file: str) -> Findings:
    requests = RequestSocket()
    try:
        nodes_of = {family: alone.node_of(subnet_file, requests, family) for family in alone.families_of(subnet_file)}
        devices = {node.tunnel: node.mtu for node in nodes_of.values()}
        for family, node in nodes_of.items():
            end = "" if family is V4 else f" {family.text}"
            of_peers = (
                *_guarded("entries", alone.entries, node, requests),
                *_guarded("ways", alone.ways_of, node, requests),
            )
            for each in (*of_peers, *_of_network(node, subnet_file, devices)):
                yield each._replace(subject=f"{each.subject}{end}")
    except (NotTraceable, OSError) as error:
        yield unknown("network", error_text(error))
    finally:
        requests.close()


def _backend(found: Mapping[str, Any]) -> tuple[str, str]:
    """The backend's type, and the program that encrypts. found: the agent's status, empty where it does not answer."""
    of_wireguard = (found.get("wireguard") or {}).values()
    kind = ((found.get("network") or {}).get("backend") or {}).get("type") or "vxlan"
    return kind, next((each["program"] for each in of_wireguard if each.get("program")), "")


def _guarded(subject: str, check: Callable[..., Findings], *arguments: Any) -> Findings:
    try:
        yield from check(*arguments)
    except (OSError, ValueError, subprocess.SubprocessError, NoAnswer) as error:
        yield unknown(subject, f"could not be looked at: {error}")


def _fix(found: list[Finding]) -> dict[int, str]:
    """By the place of a finding that can be mended: why it was not, "" where it was."""
    done: dict[int, str] = {}
    for place, each in enumerate(found):
        if each.fix is not None:
            try:
                each.fix()
                done[place] = ""
            except (OSError, subprocess.SubprocessError) as error:
                done[place] = str(error)
    return done


def as_values(each: Finding, fixed: str | None) -> dict[str, Any]:
    """As JSON values. fixed: why it was not mended, "": it was, None: nobody tried."""
    return {
        "subject": each.subject,
        "state": each.state.value,
        "what": each.what,
        "why": each.why,
        "mend": each.mend,
        "can_be_fixed": each.fix is not None,
        "fixed": fixed == "",
        "not_fixed_because": fixed or "",
    }


def _show(console: Console, found: list[Finding], fixed: dict[int, str], everything: bool) -> None:
    for place, each in enumerate(found):
        if each.state is State.OK and not everything:
            continue
        console.print(Text(each.state.value, style=_STYLES[each.state]), Text(f"{each.subject}: {each.what}"))
        for word, line in (("why", each.why), ("do", each.mend)):
            if line:
                console.print(Text(f"  {word}: {line}"))
        if place in fixed:
            console.print(Text(f"  {'mended' if not fixed[place] else f'not mended: {fixed[place]}'}"))
        elif each.fix is not None:
            console.print(Text("  overlay doctor --fix does that"))
    counts = {state: sum(each.state is state for each in found) for state in State}
    words = [f"{counts[state]} {state.value}" for state in State if counts[state]]
    console.print(Text(f"{len(found)} looked at: {', '.join(words)}{'' if everything else ' (--all shows all)'}"))
