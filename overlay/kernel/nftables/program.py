"""Load one nftables table of ours atomically, read it back; read other programs' forward chains. By the distribution's
nft binary and its JSON."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from overlay.kernel.netlink import KernelError
from overlay.process.dry import dry

if TYPE_CHECKING:
    import subprocess  # when it is needed: peers come first

NFT_S = 8.0
MOST_MEMORY, MOST_BYTES = 256 << 20, 2 << 20
"""Of the program while it reads a set, and of what it writes then: sets of others may have millions of elements."""
Objects = list[dict[str, Any]]


def read_table(family: str, name: str) -> Objects:
    """The objects of a table in order, without handles and counters' values; [] where there is no such table.

    Raises KernelError.
    """
    done = _nft(["-j", "list", "table", family, name], "")
    if done.returncode != 0:
        if "No such file or directory" in done.stderr:
            return []
        raise KernelError(5, f"nft: listing table {family} {name}: {_last_line(done.stderr)}")
    found: Objects = []
    try:
        listed = json.loads(done.stdout)["nftables"]
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(5, f"nft: listing table {family} {name}: not understood: {error!r}") from error
    for item in listed:
        kind = next(iter(item))
        if kind != "metainfo":
            found.append({kind: {key: value for key, value in item[kind].items() if key != "handle"}})
    return found


def load_table(family: str, name: str, objects: Objects) -> None:
    """Replace a table by these objects, in one transaction; an empty list removes it. Raises KernelError."""
    table = {"table": {"family": family, "name": name}}
    commands: Objects = [{"add": table}, {"delete": table}, *({"add": item} for item in objects)]
    done = _nft(["-j", "-f", "-"], json.dumps({"nftables": commands}))
    if done.returncode != 0:
        raise KernelError(5, f"nft: loading table {family} {name}: {_last_line(done.stderr)}")


def tables() -> list[tuple[str, str]]:
    """Family and name of each table. Raises KernelError."""
    return [(item["family"], item["name"]) for item in _listed("table", "tables")]


_DEVICES = re.compile(r"\bdevices? (?:= )?\{? ?([^{}]*?) ?\}? priority\b")


BELOW = ("ingress", "egress")
"""Hooks of single devices, of families netdev and inet."""


class Chain(NamedTuple):
    """A base chain. kind: `filter`, `nat`...; hook: `forward`...; priority: by which the kernel asks them in turn; devices:
    what it is attached to, where its hook is one of BELOW."""

    family: str
    table: str
    name: str
    policy: str
    kind: str = "filter"
    hook: str = "forward"
    priority: int = 0
    devices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def base_chains(family: str) -> list[Chain]:
    """All chains that see packets of a family ("ip", "ip6") by themselves. Raises KernelError."""
    return [chain for chain in all_base_chains() if chain.family in (family, "inet")]


def all_base_chains() -> list[Chain]:
    """Of every family. Raises KernelError."""
    return [
        Chain(
            item["family"],
            item["table"],
            item["name"],
            item.get("policy", "accept"),
            str(item.get("type")),
            item["hook"],
            item.get("prio", 0),
            _devices(item) if item["hook"] in BELOW else (),
        )
        for item in _listed("chain", "chains")
        if item.get("hook")
    ]


def _devices(item: dict[str, Any]) -> tuple[str, ...]:
    """What a chain is attached to. nft writes it as JSON from 1.0.8 on, as text always."""
    there = item.get("dev")
    if there:
        return tuple(there) if isinstance(there, list) else (there,)
    text = _bounded(["nft", "-t", "list", "chain", item["family"], item["table"], item["name"]]).decode(
        "utf-8", "replace"
    )
    found = _DEVICES.search(text)
    return () if found is None else tuple(name.strip(' "') for name in found[1].split(","))


def forward_chains(family: str) -> list[Chain]:
    """The filter chains through which forwarded packets of a family ("ip", "ip6") go. Raises KernelError."""
    return [chain for chain in base_chains(family) if chain.hook == "forward" and chain.kind == "filter"]


def rules_of(family: str, table: str, chain: str) -> Objects:
    """The rules of a chain, with their handles. Raises KernelError."""
    return _listed("rule", "chain", family, table, chain)


def elements_of(family: str, table: str, name: str, most: int) -> list[Any] | None:
    """The elements of a named set or map, as nft lists them; None where there is none of that name, or it has more."""
    for kind in ("set", "map"):
        listed = _bounded(["nft", "-j", "list", kind, family, table, name])
        try:
            found = [item[kind] for item in json.loads(listed)["nftables"] if kind in item]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        elements = found[0].get("elem", []) if found else []
        return elements if isinstance(elements, list) and len(elements) <= most else None
    return None


def _bounded(command: list[str]) -> bytes:
    """What a program writes; b"" where it fails, takes too long, too much memory, or writes too much."""
    import resource
    import subprocess
    import threading

    try:
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return b""
    written = b""
    with program:
        assert program.stdout is not None
        with contextlib.suppress(OSError):  # it has ended already
            resource.prlimit(program.pid, resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        late = threading.Timer(NFT_S, program.kill)
        late.start()
        try:
            written = program.stdout.read(MOST_BYTES + 1)
        finally:
            late.cancel()
            if len(written) > MOST_BYTES:
                program.kill()
    return written if program.returncode == 0 else b""


def change_rules(chain: Chain, remove: Objects, add: Objects) -> None:
    """Delete rules (by their handles) and append others, in one transaction. Raises KernelError."""
    where = {"family": chain.family, "table": chain.table, "chain": chain.name}
    commands: Objects = [{"delete": {"rule": {**where, "handle": rule["handle"]}}} for rule in remove]
    commands += [{"add": {"rule": {**where, **rule}}} for rule in add]
    done = _nft(["-j", "-f", "-"], json.dumps({"nftables": commands}))
    if done.returncode != 0:
        raise KernelError(5, f"nft: changing chain {chain}: {_last_line(done.stderr)}")


def _listed(kind: str, *what: str) -> Objects:
    done = _nft(["-j", "list", *what], "")
    if done.returncode != 0:
        raise KernelError(5, f"nft: listing {' '.join(what)}: {_last_line(done.stderr)}")
    try:
        return [item[kind] for item in json.loads(done.stdout)["nftables"] if kind in item]
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(5, f"nft: listing {' '.join(what)}: not understood: {error!r}") from error


def _nft(arguments: list[str], text: str) -> subprocess.CompletedProcess[str]:
    import subprocess

    if dry.run and text:
        return subprocess.CompletedProcess(arguments, 0, "", "")
    try:
        return subprocess.run(
            ["nft", *arguments], input=text, capture_output=True, text=True, timeout=NFT_S, check=False
        )
    except FileNotFoundError as error:
        raise KernelError(2, "nft: not found; install it: apt-get install nftables") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(110, f"nft: no answer within {NFT_S:.0f} s") from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line), lines[-1] if lines else "failed without a message")
