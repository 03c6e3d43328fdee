"""`overlay report`: all that somebody else needs to see, in one file, without secrets."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from overlay import __version__
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.cli.here import go_to
from overlay.cli.status import NoAgent, asked
from overlay.settings.flags import DEFAULT_CNI_CONF_DIR, DEFAULT_RUN_DIR, DEFAULT_SUBNET_FILE

PROGRAM_S, MOST_BYTES = 15.0, 4 << 20
COMMANDS = {
    "uname.txt": ("uname", "-a"),
    "links.txt": ("ip", "-d", "-s", "link"),
    "addresses.txt": ("ip", "address"),
    "rules.txt": ("ip", "rule"),
    "routes.txt": ("ip", "route", "show", "table", "all"),
    "neighbours.txt": ("ip", "neigh"),
    "fdb.txt": ("bridge", "fdb"),
    "bridge-ports.txt": ("bridge", "-d", "link"),
    "nftables.txt": ("nft", "-t", "list", "ruleset"),  # without the elements of sets
    "queues.txt": ("tc", "-s", "qdisc", "show"),
    "wireguard.txt": ("wg", "show", "all"),  # which hides keys that are secret
    "xfrm.txt": ("ip", "xfrm", "policy"),  # no state: that has keys
    "iptables.txt": ("iptables-save",),
    "iptables-legacy.txt": ("iptables-legacy-save",),
    "sockets.txt": ("ss", "-Hanup"),
    "conntrack.txt": ("conntrack", "-S"),
    "offloads.txt": ("sh", "-c", "for it in /sys/class/net/*; do ethtool -k ${it##*/}; done"),
    "kernel-log.txt": ("sh", "-c", "dmesg | tail -300"),
    "log.txt": ("journalctl", "-u", "overlayd", "-n", "5000", "--no-pager", "-o", "cat"),
    "clock.txt": ("timedatectl",),
}
SYSCTLS = re.compile(
    r"^net\.(ipv4\.(ip_forward|conf\..*\.(forwarding|rp_filter|arp_\w+))|bridge\..*|netfilter\.nf_conntrack_\w+) "
)
_SECRET = re.compile(
    r"""(?ix) ( ["']? [\w.-]* (?:password|passwd|secret|token|private[-_]?key|psk|authorization|bearer) [\w.-]* ["']?
    \s* [:=\s] \s* ) ("[^"]*" | '[^']*' | [^\s,;}"']+ )"""
)
_IN_URL = re.compile(r"(\w+://[^/\s:@]*:)[^@\s/]+@")


def without_secrets(text: str) -> str:
    """What stands behind words like password, or in an address before the @, is taken out."""
    return _IN_URL.sub(r"\1(removed)@", _SECRET.sub(r"\1(removed)", text))


@click.command()
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(dir_okay=False),
    help="the file; else overlay-report-NODE-TIME.tar.gz here",
)
@click.option(
    "--log", "log_file", type=click.Path(dir_okay=False), help="a log of the agent, where systemd's journal has none"
)
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
@click.option("--subnet-file", default=DEFAULT_SUBNET_FILE, show_default=True, help="the agent's")
@click.option("--cni-conf-dir", default=DEFAULT_CNI_CONF_DIR, show_default=True, help="the agent's")
def report(path: str | None, log_file: str | None, run_dir: str, subnet_file: str, cni_conf_dir: str) -> None:
    """Pack what is known of this node into one file: status, metrics, doctor's findings, interfaces, routes, rules, filters,
    logs. Words that look like secrets are taken out; no key, token or environment is read.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root can read all of it: run it with sudo")
    with suppress(NoAgent):
        try:
            go_to(asked(run_dir))
        except click.ClickException as error:
            click.echo(f"{error.message}; what this shell's network has is in the report instead", err=True)
    at = time.strftime("%Y%m%d-%H%M%S")
    where = path or f"overlay-report-{os.uname().nodename}-{at}.tar.gz"
    count = 0
    try:
        with tarfile.open(where, "w:gz") as bundle:
            for name, text in parts(run_dir, subnet_file, cni_conf_dir, log_file):
                data = without_secrets(text).encode()[:MOST_BYTES]
                entry = tarfile.TarInfo(f"overlay-report/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                bundle.addfile(entry, io.BytesIO(data))
                count += 1
        os.chmod(where, 0o600)
    except OSError as error:
        raise click.ClickException(f"{where}: {error.strerror or error}") from error
    click.echo(f"{where}: {count} files; it has addresses and names of your network: read it before you give it away")


def parts(run_dir: str, subnet_file: str, cni_conf_dir: str, log_file: str | None) -> Iterator[tuple[str, str]]:
    """Name and content of each file; of what cannot be had, why."""
    yield "version.txt", f"overlay {__version__}\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
    for route in ("status", "metrics", "readyz"):
        yield f"{route}.{'json' if route == 'status' else 'txt'}", _asked(run_dir, route)
    yield "wireguard.json", _wireguard(run_dir)
    yield "doctor.json", _doctor(run_dir, subnet_file, cni_conf_dir)
    for name, command in COMMANDS.items():
        yield name, _output(command)
    yield (
        "sysctls.txt",
        "\n".join(line for line in _output(("sysctl", "-a")).splitlines() if SYSCTLS.match(line)) + "\n",
    )
    files = [
        Path(subnet_file),
        *sorted(Path(cni_conf_dir).glob("*.conf*")),
        *(Path(run_dir) / name for name in ("device", "lease.json")),
    ]
    for each in [*files, *([Path(log_file)] if log_file else [])]:
        yield f"files/{each.name}", _content(each)


def _asked(run_dir: str, route: str) -> str:
    try:
        return ask_unix(f"{run_dir}/{SOCKET_NAME}", f"/{route}")[1]
    except OSError as error:
        return f"no agent answers at {run_dir}/{SOCKET_NAME}: {error.strerror or error}\n"


def _wireguard(run_dir: str) -> str:
    """What the devices have: no key that is secret."""
    from lease.model import Prefix, ip_text, key_text
    from overlay.kernel.wireguard.genl import KernelWireguard
    from overlay.kernel.wireguard.userspace import UserspaceWireguard
    from overlay.node.device import userspace_folder

    try:
        devices = asked(run_dir).get("wireguard") or {}
        made: dict[str, Any] = {}
        for name, about in devices.items():
            device = (
                UserspaceWireguard(name, userspace_folder(run_dir)) if about.get("program") else KernelWireguard(name)
            )
            there = device.read()
            device.close()
            made[name] = {"port": there.port, "program": about.get("program", ""), "peers": {
                key_text(key): {
                    "allowed_ips": sorted(str(Prefix(*net)) for net in peer.allowed),
                    "endpoint": peer.place and f"{ip_text(peer.place.family, peer.place.address)} {peer.place.port}",
                }
                for key, peer in there.peers.items()
            }}  # fmt: skip
        return json.dumps(made, indent=2)
    except (NoAgent, OSError) as error:
        return f"WireGuard's devices could not be read: {error}\n"


def _doctor(run_dir: str, subnet_file: str, cni_conf_dir: str) -> str:
    from overlay.cli.doctor import as_values, findings

    subnet_given = None if subnet_file == DEFAULT_SUBNET_FILE else subnet_file  # else the agent says where it writes
    cni_given = None if cni_conf_dir == DEFAULT_CNI_CONF_DIR else cni_conf_dir
    found = findings(run_dir, subnet_given, cni_given, Path("/"))
    return json.dumps([as_values(each, None) for each in found], indent=2)


def _output(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROGRAM_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}: {error}\n"
    return (done.stdout + done.stderr).decode(errors="replace")


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - MOST_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"{path}: {error.strerror}\n"
