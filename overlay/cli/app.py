"""The operator's command `overlay`."""

from __future__ import annotations

import os
import sys

import click

from overlay import __version__
from overlay.cli.capture import capture
from overlay.cli.check import check
from overlay.cli.cluster import cluster
from overlay.cli.complete import completion
from overlay.cli.doctor import doctor
from overlay.cli.flows import flows
from overlay.cli.lab import lab
from overlay.cli.leases import leases
from overlay.cli.man import man
from overlay.cli.page import page
from overlay.cli.policy import policy
from overlay.cli.report import report
from overlay.cli.rotate import rotate_key
from overlay.cli.status import status
from overlay.cli.trace import trace


class WrongFlag(click.ClickException):
    """Of overlayd's flags."""

    exit_code = 2


def _on_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty()


def _only_root() -> None:
    """Raises ClickException."""
    if os.geteuid() != 0:
        raise click.ClickException("only root may do this: run it with sudo")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def app() -> None:
    """Inspect, try out and remove a VXLAN overlay network."""


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.option("--dry-run", is_flag=True, help="only say what would be released")
@click.option("--yes", is_flag=True, help="do not ask")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def release(dry_run: bool, yes: bool, flags: tuple[str, ...]) -> None:
    """Give up this node's lease (takes overlayd's flags and environment)."""
    from overlay.settings.settings import SettingsError, read_settings
    from overlay.teardown.release import ReleaseError
    from overlay.teardown.release import release as give_up

    try:
        settings, _ = read_settings(flags, os.environ, "overlay release")
        _only_root()
        if dry_run:
            click.echo(f"would release {give_up(settings, dry_run=True)}")
            return
        if not yes and _on_terminal():
            key = give_up(settings, dry_run=True)
            click.confirm(f"release {key}? Other nodes stop sending to this one at once", abort=True)
        click.echo(f"released {give_up(settings)}")
        click.echo(
            "device, routes, subnet.env and CNI list stay as they are; no pod should run here any more", err=True
        )
    except SettingsError as error:
        raise WrongFlag(str(error)) from error
    except ReleaseError as error:
        raise click.ClickException(str(error)) from error


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.option("--force", is_flag=True, help="also where the run directory has no trace of an agent")
@click.option("--vni", type=click.IntRange(0), help="with --force: which network, where there is more than one")
@click.option("--dry-run", is_flag=True, help="only say what would be removed")
@click.option("--yes", is_flag=True, help="do not ask")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def uninstall(force: bool, vni: int | None, dry_run: bool, yes: bool, flags: tuple[str, ...]) -> None:
    """Take everything of ours off this node (takes overlayd's flags and environment). Running pods lose their network."""
    from overlay.process.rundir import RunDirError
    from overlay.settings.settings import SettingsError, read_settings
    from overlay.teardown.uninstall import UninstallError, leased
    from overlay.teardown.uninstall import uninstall as remove

    try:
        settings, _ = read_settings(flags, os.environ, "overlay uninstall")
        _only_root()
        if not dry_run and not yes and _on_terminal():
            click.confirm("remove overlay from this node? Running pods lose their network", abort=True)
        removed = 0
        for line in remove(settings, force, dry_run, vni):
            click.echo(f"{'would remove' if dry_run else 'removed'} {line}")
            removed += 1
        if dry_run:
            click.echo(f"nothing was removed ({removed} things would be)", err=True)
            return
    except SettingsError as error:
        raise WrongFlag(str(error)) from error
    except (UninstallError, RunDirError) as error:
        raise click.ClickException(str(error)) from error
    if leased(settings):
        click.echo(
            "its lease is still in etcd, so other nodes go on sending here until it expires: `overlay release` with the"
            " same flags gives it up",
            err=True,
        )
    if removed:
        click.echo("nothing of overlay is left on this node; pods that run here have no network any more", err=True)
    elif force:
        click.echo("nothing of overlay was found on this node", err=True)
    else:
        click.echo(f"no trace of an agent in {settings.run_dir}; --force looks for its parts anyway", err=True)


@app.command("install-cni")
@click.option("--to", required=True, type=click.Path(), help="where the container runtime looks for CNI plugins")
@click.option(
    "--from", "source", default="", type=click.Path(), help="where they are; empty = where Debian or we put them"
)
def install_cni(to: str, source: str) -> None:
    """Put the CNI plugins we use where the host has none; those that are there stay."""
    from overlay.cni.plugins import install_plugins

    try:
        for name, did in install_plugins(source, to).items():
            click.echo(f"{name}: {did}")
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


app.add_command(capture)
app.add_command(check)
app.add_command(cluster)
app.add_command(completion)
app.add_command(doctor)
app.add_command(flows)
app.add_command(lab)
app.add_command(leases)
app.add_command(man)
app.add_command(page)
app.add_command(policy)
app.add_command(report)
app.add_command(rotate_key)
app.add_command(status)
app.add_command(trace)


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
