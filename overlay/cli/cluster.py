"""`overlay cluster`: a real two-node Kubernetes on this machine, our manifest on it, and what must hold.

Needs the checkout (manifests, Kubernetes programs, images): `make cluster` prepares them.
"""

from __future__ import annotations

import sys
import time

import click
from rich.text import Text

from overlay.cli import terminal
from overlay.cli.lab import print_matrix
from overlay.lab.cluster import Cluster
from overlay.lab.lab import locked
from overlay.lab.processes import LabError
from overlay.lab.proof import Proof

NAME = click.option("--name", default="cluster", show_default=True)


@click.group()
def cluster() -> None:
    """A real two-node Kubernetes on this machine (make cluster)."""


@cluster.command()
@NAME
@click.option("--keep", is_flag=True, help="leave it running, with the network installed")
@click.option(
    "--family", type=click.Choice(["ipv4", "dual"]), default="ipv4", show_default=True, help="of pods and Services"
)
@click.option("--outage", default=60.0, show_default=True, help="seconds that the API server is away")
def prove(name: str, keep: bool, family: str, outage: float) -> None:
    """Bring it up, apply the manifest, show who reaches whom, then do to it what operators do.

    Exit status: 0 all checks passed, 1 one failed.
    """
    console = terminal.console()
    it, began = Cluster(name, families=(4, 6) if family == "dual" else (4,)), time.monotonic()

    def progress(line: str) -> None:
        console.print(Text(f"{time.monotonic() - began:6.1f} s  {line}"))

    try:
        with locked(name):
            it.down()
            it.up(2, plugins=False)
            proof = Proof(it)
            progress(f"{len(proof.names)} nodes are registered, none Ready: {', '.join(proof.names)}")
            progress(proof.install())
            pods = [end for end in proof.pods() if end.kind == "pod"]
            progress(f"{len(pods)} pods run: {', '.join(f'{end.name} {end.address} on {end.node}' for end in pods)}")
            cells = proof.reach()
            for kinds in ("pod-pod", "node-pod", "pod-node"):
                print_matrix(console, kinds, [cell for cell in cells if cell.kinds == kinds])
            progress(f"Service: {proof.service()}")
            if keep:
                progress(f"it stays up; try: overlay cluster kubectl --name {name} -- get pods -A -o wide")
                return
            for step in (
                proof.rolling_restart,
                proof.agent_killed,
                lambda: proof.node_returns("node2"),
                lambda: proof.outage(outage),
                proof.uninstall,
            ):
                progress(step())
            it.down()
            progress("all checks passed; the cluster is removed")
    except LabError as error:
        progress(f"failed: {error}")
        progress(f"it is left as it is; inspect it with: overlay cluster kubectl --name {name} -- get pods -A -o wide")
        progress(f"logs: {it.folder}/*.log; remove it: overlay cluster down --name {name}")
        sys.exit(1)


@cluster.command()
@NAME
def down(name: str) -> None:
    """Remove it with everything in it, also what a crash left."""
    try:
        with locked(name):
            Cluster(name).down()
    except LabError as error:
        raise click.ClickException(str(error)) from error


@cluster.command(context_settings={"ignore_unknown_options": True})
@NAME
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def kubectl(name: str, arguments: tuple[str, ...]) -> None:
    """kubectl as its administrator."""
    try:
        click.echo(Cluster(name).kubectl(*arguments, input=None if sys.stdin.isatty() else sys.stdin.read()), nl=False)
    except LabError as error:
        raise click.ClickException(str(error)) from error
