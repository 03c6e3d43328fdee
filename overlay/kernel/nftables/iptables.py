"""What iptables' programs say: the old tables (ip_tables, not nftables), where a node still uses them, by iptables-legacy;
and those in nftables whose rules nft cannot write out."""

from __future__ import annotations

from collections.abc import Mapping

from overlay.kernel.netlink import KernelError
from overlay.process.dry import dry

_NAMES = {4: "/proc/self/net/ip_tables_names", 6: "/proc/self/net/ip6_tables_names"}
"""By family, the tables in use in this network namespace; the file is missing where the kernel has no ip_tables."""
_PROGRAMS = {4: "iptables-legacy", 6: "ip6tables-legacy"}
_NFT_PROGRAMS = {4: "iptables-nft", 6: "ip6tables-nft"}
WAIT_S = "5"


class NoProgram(KernelError):
    """The old tables are in use here, and there is no program to read them."""


def forward_chain(family: int) -> list[str] | None:
    """`-P FORWARD ...` and its rules as `iptables -S` writes them; None where the old filter table is not in use.

    Raises KernelError, NoProgram.
    """
    return chain_lines(family, "filter", "FORWARD") if "filter" in legacy_tables(family) else None


def legacy_tables(family: int) -> list[str]:
    """The tables of the old iptables that are in use here."""
    try:
        with open(_NAMES[family], encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []


def chain_lines(family: int, table: str, chain: str, by_nft: bool = False) -> list[str]:
    """A chain as `iptables -S` writes it, of the old tables or of those in nftables. Raises KernelError, NoProgram."""
    return _run(family, "-t", table, "-S", chain, programs=_NFT_PROGRAMS if by_nft else _PROGRAMS).splitlines()


def change_rules(family: int, remove: list[str], add: list[str]) -> None:
    """Rules as `-S` writes them (`-A FORWARD ...`). Raises KernelError."""
    if dry.run:
        return
    for rule in remove:
        _run(family, *_words(rule.replace("-A ", "-D ", 1)))
    for rule in add:
        _run(family, *_words(rule))


def accept_rule(direction: str, network: str, tag: str) -> str:
    """direction: `-s` or `-d`."""
    return f'-A FORWARD {direction} {network} -m comment --comment "{tag}" -j ACCEPT'


def _words(rule: str) -> list[str]:
    """A rule of ours as arguments: only the comment is quoted."""
    before, comment, after = rule.split('"')
    return [*before.split(), comment, *after.split()]


def _run(family: int, *arguments: str, programs: Mapping[int, str] = _PROGRAMS) -> str:
    import subprocess

    program = programs[family]
    command = [program, "-w", WAIT_S, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError as error:
        raise NoProgram(2, f"{program}: not found; install it: apt-get install iptables") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(110, f"{program}: no answer") from error
    if done.returncode != 0:
        raise KernelError(5, f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout
