"""Completion of words on the command line: names of nodes, public IPs, subnets; and the script that a shell needs for it."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from overlay.settings.flags import DEFAULT_RUN_DIR

SHELLS = ("bash", "zsh", "fish")
MOST = 500


def TARGET(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: N802 (a value)
    """What a peer is called by, of the agent that --run-dir names."""
    from overlay.cli.status import NoAgent, asked

    try:
        found = asked(str(ctx.params.get("run_dir") or DEFAULT_RUN_DIR))
    except NoAgent:
        return []
    return [CompletionItem(word, help=about) for word, about in words(found) if word.startswith(incomplete)][:MOST]


def words(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Each with what it stands for."""
    named = []
    for peer in found["peers"]:
        about = f"{peer['node_name'] or peer['public_ip']} {peer['subnet']}"
        named += [(word, about) for word in (peer["node_name"], peer["public_ip"], peer["subnet"]) if word]
    return named


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what SHELL needs to complete commands, options and names of peers.

    bash: overlay completion bash > /etc/bash_completion.d/overlay; zsh: into a file _overlay of $fpath; fish: into
    ~/.config/fish/completions/overlay.fish.
    """
    from overlay.cli.app import app

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(app, {}, "overlay", "_OVERLAY_COMPLETE").source())
