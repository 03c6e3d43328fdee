"""The FORWARD chain of the old iptables (ip_tables, not nftables), where a node still uses it: by iptables-legacy."""

from __future__ import annotations

from overlay.kernel.netlink import KernelError

_NAMES = {4: "/proc/self/net/ip_tables_names", 6: "/proc/self/net/ip6_tables_names"}
"""By family, the tables in use in this network namespace; the file is missing where the kernel has no ip_tables."""
_PROGRAMS = {4: "iptables-legacy", 6: "ip6tables-legacy"}
WAIT_S = "5"


class NoProgram(KernelError):
    """The old tables are in use here, and there is no program to read them."""


def forward_chain(family: int) -> list[str] | None:
    """`-P FORWARD ...` and its rules as `iptables -S` writes them; None where the old filter table is not in use.

    Raises KernelError, NoProgram.
    """
    try:
        with open(_NAMES[family], encoding="ascii") as file:
            if "filter" not in file.read().split():
                return None
    except OSError:
        return None
    return _run(family, "-S", "FORWARD").splitlines()


def change_rules(family: int, remove: list[str], add: list[str]) -> None:
    """Rules as `-S` writes them (`-A FORWARD ...`). Raises KernelError."""
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


def _run(family: int, *arguments: str) -> str:
    import subprocess

    program = _PROGRAMS[family]
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
