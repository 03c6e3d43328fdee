"""`overlay page`: where the page is, and how it is opened."""

from __future__ import annotations

import click

from overlay.ask.client import NoAnswer, secret_in
from overlay.cli.status import ask
from overlay.page.token import token_of
from overlay.settings.flags import DEFAULT_RUN_DIR


@click.command()
@click.option("--run-dir", default=DEFAULT_RUN_DIR, show_default=True, help="the agent's --run-dir")
def page(run_dir: str) -> None:
    """Say the address of this node's page, with the token by which it may also send probes.

    The agent serves it with --page; `overlay status --html FILE` writes it as a file instead.
    """
    found = ask(run_dir)
    if not found.get("page"):
        raise click.ClickException(
            "the agent serves no page: start it with --page=127.0.0.1:8474, or write one: overlay status --html FILE"
        )
    click.echo(address(found, found["page"]["address"], found["page"]["port"]))


def address(found: dict[str, object], host: str, port: int) -> str:
    """The URL. found: the agent's status. Raises ClickException: its secret cannot be read."""
    asking = found.get("asking")
    if not isinstance(asking, dict):
        return f"http://{host}:{port}/"
    try:
        return f"http://{host}:{port}/?token={token_of(secret_in(asking['secret_file']))}"
    except NoAnswer as error:
        raise click.ClickException(str(error)) from error
