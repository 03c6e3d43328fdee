"""The network namespace of the agent: what looks at the kernel, or sends packets, must be in it."""

from __future__ import annotations

import os
from typing import Any

import click

from overlay.cli.status import ask
from overlay.kernel import namespaces


def ask_in_place(run_dir: str) -> dict[str, Any]:
    """An agent's status, and from now on this process is in its network namespace. Raises ClickException: it is in another,
    which cannot be entered."""
    found = ask(run_dir)
    go_to(found)
    return found


def go_to(found: dict[str, Any]) -> None:
    """The same, of a status that is there. An agent of before says nothing of it."""
    process = found.get("process") or {}
    theirs = process.get("network_namespace")
    if not theirs or theirs == os.readlink(namespaces.OWN):
        return
    path = f"/proc/{process['pid']}/ns/net"
    try:
        if os.readlink(path) != theirs:
            raise FileNotFoundError(path)
        namespaces.enter(path)
    except OSError as error:
        command = click.get_current_context().command_path
        raise click.ClickException(
            f"the agent's network is not the one of this shell ({theirs}), and it cannot be entered: run this where the"
            f" agent runs (kubectl exec; nsenter -t PID -n; of a lab: overlay lab exec NODE -- {command})"
        ) from error
