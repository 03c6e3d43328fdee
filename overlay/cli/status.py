"""`overlay status`: own lease, device, peers, and all that differs from what should be."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from overlay.api.family import families, network_of, of_family
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.cli import terminal
from overlay.settings.flags import DEFAULT_RUN_DIR

PEERS_SHOWN = 50
WATCH_S = 2.0
NO_AGENT = 3
"""Exit status: a usage error is 2 (click's)."""


@click.command()
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["wide", "json", "yaml"]),
    help="wide: all peers, nothing cut; json, yaml: everything",
)
@click.option("--json", "as_json", is_flag=True, help="the same as -o json")
@click.option("--all", "all_peers", is_flag=True, help=f"all peers, not the first {PEERS_SHOWN}")
@click.option("--watch", is_flag=True, help="again every two seconds, until ^C")
@click.option("--cluster", is_flag=True, help="ask the agents of all nodes (100 at most), and say who reaches whom")
@click.option("--html", type=click.Path(dir_okay=False), help="write the page of the cluster into a file")
def status(
    run_dir: str, output: str | None, as_json: bool, all_peers: bool, watch: bool, cluster: bool, html: str | None
) -> None:
    """This node's lease, device and peers, and all that is not as it should be.

    Exit status, of this node alone: 0 it is ready, 1 it is not, 2 a wrong flag, 3 no agent answers.
    """
    output = "json" if as_json else output
    if html is not None:
        _write_page(ask(run_dir), html)
        return
    while True:
        found = ask(run_dir)
        if cluster:
            from overlay.cli.here import go_to

            go_to(found)
            _show_cluster(found, output, watch)
        elif output == "json":
            click.echo(json.dumps(found, indent=2))
        elif output == "yaml":
            import yaml

            click.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)
        else:
            _clear(watch)
            show(terminal.console(), found, all_peers or output == "wide")
        if not watch:
            sys.exit(0 if found["ready"] else 1)
        time.sleep(WATCH_S)


def _clear(watch: bool) -> None:
    if watch and sys.stdout.isatty():
        click.clear()


def _show_cluster(found: dict[str, Any], output: str | None, watch: bool) -> None:
    from overlay.cli import matrix
    from overlay.page.gather import gather

    gathered = gather(found)
    if output in ("json", "yaml"):
        click.echo(json.dumps(gathered, indent=2))
        return
    _clear(watch)
    matrix.show(terminal.console(), gathered)


def _write_page(found: dict[str, Any], path: str) -> None:
    from overlay.page.gather import gather
    from overlay.page.render import render

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(render(gather(found)))
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    click.echo(f"{path}: the page, to be opened by a browser", err=True)


class NoAgent(Exception):
    """One line: why there is no status."""


def ask(run_dir: str) -> dict[str, Any]:
    """An agent's status. Where none answers, one line and the exit status for that."""
    try:
        return asked(run_dir)
    except NoAgent as error:
        click.echo(f"{click.get_current_context().command_path}: {error}", err=True)
        sys.exit(NO_AGENT)


def asked(run_dir: str) -> dict[str, Any]:
    """An agent's status. Raises NoAgent."""
    where = f"{run_dir}/{SOCKET_NAME}"
    try:
        code, body = ask_unix(where, "/status")
    except PermissionError as error:
        raise NoAgent(f"{where} is root's alone: run it with sudo") from error
    except OSError as error:
        raise NoAgent(f"no agent answers at {where} ({error.strerror or error}); does overlayd run?") from error
    if code != 200:
        raise NoAgent(body.strip())
    found: dict[str, Any] = json.loads(body)
    return found


def show(console: Console, found: dict[str, Any], all_peers: bool) -> None:
    """As tables. Others wrote some of the words: they are data (Text), never read as markup."""
    console.print(_node(console, found))
    for view in every(found):
        _peers(console, view, all_peers)
    wrong = list(differences(found))
    if not wrong:
        console.print(f"all that the agent manages is as it should be; {tried(found)}")
        return
    table = terminal.table(console, "what", "why", title="not as it should be", style="red")
    for what, why in wrong:
        table.add_row(Text(what), Text(why))
    console.print(table)
    pages = ["docs/operations.md"] * bool(found["problems"]) + ["docs/refused-records.md"] * bool(
        found["refused_records"]
    )
    if pages and console.is_terminal:
        console.print(f"what to do about each: {', '.join(pages)}")


def every(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The views of all families of the network."""
    return [of_family(found, family) for family in families(found)]


def _peers(console: Console, found: dict[str, Any], all_peers: bool) -> None:
    """Those of a family. found: its view."""
    peers = found["peers"]
    reach = {each["subnet"]: each for each in found.get("reachability", ())}
    vtep = [name for name in ("vtep_mac", "public_key") if any(peer.get(name) for peer in peers)]
    columns = [
        "subnet",
        "public_ip",
        *(vtep if all_peers else vtep[:1] if vtep != ["public_key"] else ()),
        "node_name",
        "path",
        "missing",
        *(("answers", "rtt") if reach else ()),
        *(("heard", "mtu") if reach and all_peers else ()),
    ]
    table = terminal.table(
        console,
        *(column.replace("_", " ") for column in columns),
        title=f"{len(peers)} peer{'' if len(peers) == 1 else 's'}{' by IPv6' if found['family'] == 6 else ''}",
    )
    for peer in peers if all_peers else peers[:PEERS_SHOWN]:
        known = reach.get(peer["subnet"], _UNTRIED)
        words = {
            **peer,
            "missing": ", ".join(peer["missing"]),
            "answers": _answers(known),
            "rtt": rtt_text(known["rtt_us"]),
            "heard": "" if known["heard_age_s"] is None else f"{known['heard_age_s']:.0f}s ago",
            "mtu": _mtu(known, found["device"]),
        }
        well = peer["ok"] and known["state"] in ("ok", "untried")
        table.add_row(*(Text(words[column]) for column in columns), style="" if well else "red")
    if peers:
        console.print(table)
    if len(peers) > PEERS_SHOWN and not all_peers:
        console.print(f"... and {len(peers) - PEERS_SHOWN} more: --all")


_UNTRIED = {"state": "untried", "answered_age_s": None, "heard_age_s": None, "rtt_us": None}


def _mtu(known: dict[str, Any], device: dict[str, Any]) -> str:
    """The size of the packets that pass, as far as it was tried."""
    mtu, path = (device or {}).get("mtu", ""), known.get("path_mtu")
    return {"ok": str(mtu), "path_mtu": str(path) if path else f"below {mtu}"}.get(known["state"], "?")


def _answers(known: dict[str, Any]) -> str:
    age = known["answered_age_s"]
    if known["state"] == "ok":
        return f"{age:.0f}s ago"
    if known["state"] == "untried":
        return "not tried"
    return {"path_mtu": "small only", "silent": "never"}.get(known["state"], "no")


def rtt_text(rtt_us: int | None) -> str:
    """In milliseconds; "" where there is none."""
    return "" if rtt_us is None else f"{rtt_us / 1000:.2f} ms"


def tried(found: dict[str, Any]) -> str:
    """What is known of the peers themselves: nothing is called well that was not tried."""
    views = every(found)
    if len(views) == 1:
        return _tried(views[0])
    return "; ".join(f"IPv{view['family']}: {_tried(view)}" for view in views)


def _tried(found: dict[str, Any]) -> str:
    count = len(found["peers"])
    if not count:
        return "there is no peer"
    states = Counter(each["state"] for each in found.get("reachability", ()))
    if not states:
        return "whether peers answer is not asked (--probes=false)"
    untried = states["untried"] + count - states.total()
    words = [f"{states['ok']} of {count} peers answer"]
    words += [f"of {untried} it is not known"] if untried else []
    words += [f"{states['silent']} never answered, nor did their public IPs"] if states["silent"] else []
    return ", ".join(words)


def differences(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """All that needs an operator's attention, as (what, why)."""
    for problem in found["problems"]:
        yield problem["subject"], f"{problem['text']} (since {problem['since']})"
    if not found["store"]["up"] and "store" not in {problem["subject"] for problem in found["problems"]}:
        yield "store", f"{found['store']['error']} (datapath and peers stay as they are)"
    for record in found["refused_records"]:
        yield f"record {record['key']}", f"not used: {record['reason']}"
    for view in every(found):
        for item in view["differences"]:
            tries = f", refused {item['tries']} times: {item['error']}" if item["tries"] else ""
            yield f"{item['table']} {item['entry']}", f"{item['state']}{tries}"
        for route in view["conflicting_routes"]:
            yield f"route {route_text(route)}", "not ours, but preferred to ours"
        for subnet in view["retained_subnets"]:
            yield f"subnet {subnet}", "not ours any more; pods made before still use it here"


def route_text(route: dict[str, Any]) -> str:
    """A route as `ip route` writes it."""
    via = f" via {route['via']}" if route["via"] else ""
    device = f" dev {route['device']}" if route["device"] else " to nowhere, or to several gateways"
    return f"{route['destination']}{via}{device} metric {route['metric']} proto {route['protocol']}"


def _family_rows(found: dict[str, Any], second: bool) -> dict[str, str]:
    """What the table says of a family. found: its view."""
    end = f" (IPv{found['family']})" if second else ""
    lease, device, under = found["lease"], found["device"], found["underlay"]
    rows = {f"underlay{end}": "none chosen yet", f"lease{end}": "none"}
    if under:
        rows[f"underlay{end}"] = f"{under['interface']} {under['address']} (MTU {under['mtu']}): {under['reason']}"
    if lease:
        left = "never expires" if lease["left_s"] is None else f"{lease['left_s'] // 60} min left"
        network = network_of(found) if found["network"] else "?"
        rows[f"lease{end}"] = f"{lease['subnet']} of {network} ({lease['method']}; {left})"
        rows[f"public IP{end}"] = lease["public_ip"]
    if device:
        of_wireguard = (found.get("wireguard") or {}).get(device["name"]) or {}
        rows[f"device{end}"] = _device(device, of_wireguard.get("program", ""))
    if (key := found.get("key")) and not second:
        rows["public key"] = key["public_key"]
    guard = None if device and device.get("kind") == "host-gw" else found.get("guard")  # nothing to guard there
    protection = (("guard", guard), ("pod anti-spoofing", found.get("antispoof")))
    if off := [name for name, of in protection if of is not None and not of["on"]]:
        rows[f"not in force{end}"] = ", ".join(off)
    if found.get("direct_routing"):
        rows[f"direct routes{end}"] = found["direct_routing"]
    return rows


def policy_words(policy: dict[str, Any]) -> str:
    """What is enforced of NetworkPolicies."""
    wide, refused = policy["cluster_wide"], len(policy["refused"])
    kinds = (
        (policy["policies"] - wide, "NetworkPolicy", "NetworkPolicies"),
        (wide, "ClusterNetworkPolicy", "ClusterNetworkPolicies"),
        (policy["groups"], "group", "groups"),
    )
    words = ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in kinds if count)
    if not words:
        words = "no NetworkPolicy" if policy["revision"] else "NetworkPolicies are not read yet"
    elif policy["enforced"]:
        words += f" enforced: {policy['isolated_addresses']} addresses of pods here are isolated"
    else:
        words += ", not enforced"
    return f"{words}; {refused} cannot be used" if refused else words


def _device(device: dict[str, Any], program: str) -> str:
    if device.get("kind") == "host-gw":
        words = [f"none: plain routes by {device['lower']}"]
    else:
        words = [device["name"], device["mac"], f"local {device['local']} dev {device['lower']}"]
        words += [f"port {device['port']}"] if device["port"] else []
        words += [f"(by {program}: this kernel has no WireGuard)"] if program else []
    words += [f"MTU {device['mtu']}", "" if device["ok"] else "(not as it should be)"]
    return " ".join(word for word in words if word)


def _node(console: Console, found: dict[str, Any]) -> Table:
    title = f"overlayd {found['version']} {found['node_name']}".strip()
    table = terminal.table(console, "", "", title=title, show_header=False)
    table.add_row("ready", Text("yes", style="green") if found["ready"] else Text("no", style="red"))
    rows = {"store": found["store"]["address"]}
    for view in every(found):
        rows |= _family_rows(view, len(rows) > 1)
    if policy := found.get("policy"):
        rows["policies"] = policy_words(policy)
    for row in ("mended", "dropped"):
        counts = {
            name.removeprefix(f"{row}_"): n for name, n in found["counters"].items() if name.startswith(f"{row}_")
        }
        if any(counts.values()):
            rows[row] = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items() if n)
    for name, words in rows.items():
        table.add_row(name, Text(words))
    return table
