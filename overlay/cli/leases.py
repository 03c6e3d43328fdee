"""`overlay leases`: list, show, check, reserve and release leases of a network, by its store alone."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.text import Text

from lease.backend_config import VxlanConfig, WireguardConfig
from lease.config import NetworkConfig, parse_config
from lease.fields import ConfigError
from lease.model import KEY_SIZE, Endpoint, Lease, Prefix, ip_number, ip_text, prefix
from lease.records.codec import encode_key
from lease.store import LeaseExpired, RecordChanged, Snapshot, StoreUnavailable, SubnetTaken
from lease.stores.etcd import EtcdStore
from lease.tenure.allocate import choose_mac
from overlay.cli import terminal
from overlay.leases import view
from overlay.leases.view import Held
from overlay.settings.settings import SettingsError, read_settings
from overlay.settings.stores import etcd_store

_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.group()
def leases() -> None:
    """Leases of a network in etcd: list, show, check, reserve, release. No agent is needed; overlayd's --etcd-... flags and
    environment say where. On Kubernetes subnets are the Nodes' podCIDRs: kubectl get nodes.
    """


_STORE = click.argument("flags", nargs=-1, type=click.UNPROCESSED)


@leases.command("list", context_settings=_FLAGS)
@click.option("--json", "as_json", is_flag=True, help="everything, as JSON")
@_STORE
def list_(as_json: bool, flags: tuple[str, ...]) -> None:
    """All leases: whose, until when."""
    with _store(flags) as store:
        found = _read(store)
        held = list(_held(store, found))
    if as_json:
        refused = [{"key": each.key, "reason": each.reason} for each in found.refused.values()]
        click.echo(json.dumps({"leases": [view.as_values(each) for each in held], "refused": refused}, indent=2))
        return
    console = terminal.console()
    console.print(_table(held))
    for each in found.refused.values():
        console.print(Text(f"{each.key} cannot be read: {each.reason}", style="red"))
    if not held:
        console.print(f"{store.place} has no lease")


@leases.command(context_settings=_FLAGS)
@click.argument("word")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
@_STORE
def show(word: str, as_json: bool, flags: tuple[str, ...]) -> None:
    """The leases that WORD names: a key, a subnet, a node, a public IP, or the address of a pod."""
    with _store(flags) as store:
        found = _read(store)
        named = view.find((found.leases[key] for key in found.leases), word)
        held = list(_held(store, found, named))
    if word in found.refused:
        raise click.ClickException(f"{word} cannot be read: {found.refused[word].reason}")
    if not held:
        raise click.ClickException(f"{store.place} has no lease that {word} names")
    if as_json:
        click.echo(json.dumps([view.as_values(each) for each in held], indent=2))
        return
    for each in held:
        for name, value in view.as_values(each).items():
            click.echo(f"{name.replace('_', ' ')}: {'-' if value in (None, '') else value}")


@leases.command(context_settings=_FLAGS)
@click.option("--json", "as_json", is_flag=True, help="as JSON")
@_STORE
def check(as_json: bool, flags: tuple[str, ...]) -> None:
    """What is wrong among the leases: conflicts, unreadable records, leases that nobody renews; the use of the range.

    Exit status: 0 nothing serious, 1 something is, 2 a wrong flag.
    """
    with _store(flags) as store:
        found = _read(store)
        held = list(_held(store, found))
    config = _config(found)
    faults = list(view.faults(config, held, found.refused.values()))
    used = view.use(config, held) if config is not None else None
    if as_json:
        values: dict[str, Any] = {"faults": [each._asdict() for each in faults], "leases": len(held)}
        if used is not None:
            values |= {"range": str(used.pool), "size": used.pool.size, "taken": used.taken, "reserved": used.reserved}
        click.echo(json.dumps(values, indent=2))
    else:
        for each in faults:
            click.echo(f"{each.key}: {each.text}")
        if config is None:
            click.echo(f"{store.config_place} has no network config that can be used")
        if used is not None:
            click.echo(
                f"{used.taken} of {used.pool.size} subnets are taken ({used.share:.0%}), {used.reserved} of them reserved"
            )
            if used.share >= view.FULL:
                click.echo(
                    "the range is nearly full: widen SubnetMin..SubnetMax, or release leases of nodes that are gone"
                )
        if not faults:
            click.echo("nothing is wrong among them")
    sys.exit(1 if any(each.serious for each in faults) or config is None else 0)


@leases.command(context_settings=_FLAGS)
@click.argument("subnet")
@click.option("--public-ip", required=True, help="of the node that is to have it")
@_STORE
def reserve(subnet: str, public_ip: str, flags: tuple[str, ...]) -> None:
    """Reserve SUBNET for the node with that public IP: a record without an end, which the node takes when it starts."""
    try:
        wanted, address = prefix(subnet), ip_number(public_ip, 4)
    except ValueError:
        raise click.UsageError(f"{subnet}, {public_ip}: an IPv4 subnet and an address are needed") from None
    with _store(flags) as store:
        found = _read(store)
        config = _config(found)
        if fault := view.reservation_fault(config, wanted, (found.leases[key] for key in found.leases)):
            raise click.ClickException(fault)
        assert config is not None, "that is a fault"
        try:
            made = store.create(_reserved(config, wanted, address, found), 0)
        except SubnetTaken as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"reserved {made.key} for {ip_text(4, address)}")


def _reserved(config: NetworkConfig, subnet: Prefix, public_ip: int, found: Snapshot) -> Lease:
    """The node that comes for it writes its own MAC (or public key); until then it has one of nobody: no agent reads a
    record without."""
    backend = config.backend
    end = Endpoint(subnet, public_ip, None, None)
    if isinstance(backend, VxlanConfig):
        used = {lease.first.mac for lease in map(found.leases.__getitem__, found.leases) if lease.first.mac is not None}
        end = end._replace(vni=backend.vni, mac=choose_mac(used, random.SystemRandom()))
    elif isinstance(backend, WireguardConfig):
        end = end._replace(key=os.urandom(KEY_SIZE), port=backend.port)
    return Lease.of(encode_key(subnet), backend.type, [end], "")


@leases.command(context_settings=_FLAGS)
@click.argument("word")
@click.option("--yes", is_flag=True, help="do not ask")
@_STORE
def release(word: str, yes: bool, flags: tuple[str, ...]) -> None:
    """Delete the lease that WORD names: of a node that is gone, or a reservation. A living node takes it again at once."""
    with _store(flags) as store:
        found = _read(store)
        named = view.find((found.leases[key] for key in found.leases), word)
        if len(named) != 1:
            which = ", ".join(lease.key for lease in named)
            raise click.ClickException(
                f"{word} names {f'several leases: {which}' if named else 'no lease'}; nothing was released"
            )
        (lease,) = named
        end = lease.first
        whose = view.node_of(lease) or ip_text(end.subnet.family, end.public_ip)
        if not yes and sys.stdin.isatty():
            click.confirm(f"release {lease.key} of {whose}? Other nodes stop sending there at once", abort=True)
        try:
            store.remove(lease)
        except RecordChanged as error:
            raise click.ClickException(f"{error}; run it again") from error
    click.echo(f"released {lease.key} of {whose}")


@contextmanager
def _store(flags: tuple[str, ...]) -> Iterator[EtcdStore]:
    try:
        settings, _ = read_settings(flags, os.environ, "overlay leases")
        if settings.kube:
            raise click.ClickException("on Kubernetes subnets are the Nodes' podCIDRs: kubectl get nodes -o wide")
        store = etcd_store(settings)
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    try:
        yield store
    except StoreUnavailable as error:
        raise click.ClickException(f"{store.place}: {error}") from error
    finally:
        store.close()


def _read(store: EtcdStore) -> Snapshot:
    return store.read()


def _held(store: EtcdStore, found: Snapshot, named: list[Lease] | None = None) -> Iterator[Held]:
    """With what is left of each."""
    every = named if named is not None else [found.leases[key] for key in sorted(found.leases)]
    for lease in every:
        try:
            left = store.lifetime(lease).left_s
        except LeaseExpired:
            left = 0.0
        yield Held(lease, left, view.node_of(lease))


def _config(found: Snapshot) -> NetworkConfig | None:
    try:
        return None if found.config is None else parse_config(found.config.decode())
    except (ConfigError, UnicodeDecodeError):
        return None


def _table(held: list[Held]) -> Any:
    table = terminal.table(terminal.console(), "key", "node", "public ip", "backend", "MAC or key", "left", title="")
    for each in held:
        values = {**view.as_values(each), "vtep": each.lease.first.vtep}
        left = "reserved" if each.reserved else "no end" if each.left_s is None else f"{each.left_s / 3600:.1f} h"
        table.add_row(
            *(Text(str(values[name] or "")) for name in ("key", "node", "public_ip", "backend", "vtep")), Text(left)
        )
    return table
