"""`overlay rotate-key`: another key of WireGuard for this node, without a lost packet."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import click

from lease.model import key_text
from overlay.cli.status import ask
from overlay.settings.flags import DEFAULT_RUN_DIR
from overlay.wireguard.keys import new_key, public_of, write_key

WAIT_S = 30.0


@click.command("rotate-key")
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
def rotate_key(run_dir: str) -> None:
    """Give this node another key of WireGuard.

    The new key is written to the key file. The agent gives it to its device, then writes it into the node's record; peers
    follow by themselves. Packets wait meanwhile, for a second at most; none is lost. Connections of pods go on.

    Exit status: 0 the record says the new key, 1 it does not yet, 3 no agent answers here.
    """
    found = ask(run_dir)
    if not found.get("key"):
        raise click.ClickException("this node has no key: the network's backend is not wireguard (overlay status)")
    if os.geteuid() != 0:
        raise click.ClickException("the key file is root's: run it with sudo")
    key, path = new_key(), found["key"]["file"]
    public = key_text(public_of(key))
    try:
        write_key(path, key)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}; the key of before goes on") from error
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if _published(ask(run_dir), public):
            click.echo(f"{found['key']['public_key']} was replaced by {public}")
            return
        time.sleep(0.1)
    click.echo(f"the agent has not published {public} within {WAIT_S:.0f} s: overlay status says why", err=True)
    sys.exit(1)


def _published(found: dict[str, Any], public: str) -> bool:
    lease = found.get("lease") or {}
    return lease.get("public_key") == public
