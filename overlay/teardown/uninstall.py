"""`overlay uninstall`: take everything of ours off this node. Running pods lose their network."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lease.config import ConfigError, parse_config
from lease.store import StoreError
from lease.tenure.kubernetes import NodeTenure
from overlay.api.serve import SOCKET_NAME
from overlay.backends.vxlan import device_name, vni_of
from overlay.cni import lists as cni
from overlay.firewall import forward
from overlay.firewall import nat as masquerade
from overlay.firewall.worker import tables
from overlay.kernel import netlink
from overlay.kernel.nftables import program as nft
from overlay.kernel.route import wire
from overlay.kernel.route.entries import PROTOCOL, UNDERLAY, FoundRoute, RouteValue
from overlay.kernel.route.links import Links
from overlay.process.files import read, read_text
from overlay.process.rundir import hold
from overlay.settings.settings import Settings
from overlay.settings.stores import node_store

BATCH = 500
BEGUN = "uninstalling"


class UninstallError(Exception):
    """Something of ours could not be removed; the rest is. One line each."""


def uninstall(settings: Settings, force: bool = False) -> Iterator[str]:
    """Remove the network list first (no new pod starts here), then kernel, what the node says to others, and files; each
    thing removed, as a line. Nothing at all where no agent of ours left its mark in the run directory; and where flannel
    has the node (the network list names its plugin), its device, list, subnet.env and annotations stay.

    Raises:
        RunDirError: an agent still runs here; it would put everything back.
        UninstallError: after all else was done.
    """
    if not force and not _ours(settings):
        return
    with _held(settings):
        _begin(settings)
        failed: list[str] = []
        for what, remove in (
            ("CNI list", _network_list),
            ("kernel", _kernel),
            ("Node", _annotations),
            ("files", _files),
        ):
            try:
                yield from remove(settings)
            except (OSError, StoreError, ValueError) as error:
                failed.append(f"{what}: {error}")
        if failed:
            raise UninstallError("; ".join(failed))
        for mark in _marks(settings):
            if Path(mark).exists():
                cni.remove(mark)
        cni.remove(f"{settings.run_dir}/lock")
    with suppress(OSError):  # a mount point, or something that is not ours is in it
        Path(settings.run_dir).rmdir()


def _begin(settings: Settings) -> None:
    """Leave a mark, so that what fails is tried again; in it, the bridges that the network list names."""
    begun, conflist = f"{settings.run_dir}/{BEGUN}", f"{settings.cni_conf_dir}/{cni.CONFLIST}"
    there = {*_bridges(settings), *cni.bridges_in(read_text(conflist))}
    cni.write_atomically(begun, "\n".join(sorted(there)))


def _bridges(settings: Settings) -> list[str]:
    return read_text(f"{settings.run_dir}/{BEGUN}").split()


def _marks(settings: Settings) -> list[str]:
    """The files by which a later run knows that this node was ours, until all is done."""
    return [f"{settings.run_dir}/{name}" for name in ("device", cni.LEASE_FILE, BEGUN)]


def _ours(settings: Settings) -> bool:
    """By the marks, which a reboot takes away (they stand in /run), or by a network list that does without flannel's
    plugin, which outlives one."""
    conflist = f"{settings.cni_conf_dir}/{cni.CONFLIST}"
    listed = bool(settings.cni_conf_dir) and cni.listed_subnet(conflist) is not None
    return any(Path(mark).exists() for mark in _marks(settings)) or (listed and not _flannels(settings))


def _flannels(settings: Settings) -> bool:
    """Whether the node is flannel's (again)."""
    return bool(settings.cni_conf_dir) and cni.names_plugin(f"{settings.cni_conf_dir}/{cni.CONFLIST}", "flannel")


@contextmanager
def _held(settings: Settings) -> Iterator[TextIO]:
    file = hold(settings.run_dir)
    try:
        yield file
    finally:
        file.close()


def _network_list(settings: Settings) -> Iterator[str]:
    path = f"{settings.cni_conf_dir}/{cni.CONFLIST}"
    if settings.cni_conf_dir and Path(path).exists() and not _flannels(settings):
        cni.remove(path)
        yield path


def _annotations(settings: Settings) -> Iterator[str]:
    if not settings.kube or _flannels(settings):
        return  # a lease in etcd is given up by `overlay release`
    store, names = node_store(settings)
    try:
        tenure = NodeTenure(store, names, settings.node_name, settings.tell_condition, random.Random())  # noqa: S311
        for name in tenure.withdraw():
            yield f"annotation {name} of Node {settings.node_name}"
    finally:
        store.close()


def _kernel(settings: Settings) -> Iterator[str]:
    """Devices by our own file and by the network config, routes by our protocol number, tables by name."""
    devices = {read_text(f"{settings.run_dir}/device")}
    with suppress(ConfigError):
        devices.add(device_name(parse_config(read(settings.net_config_path) or b"").backend))
    links, requests = Links(), netlink.RequestSocket()
    try:
        for name in sorted(devices):
            vni = vni_of(name)
            if vni is None:
                continue
            there = links.read(name)
            if there is not None and there.kind == "vxlan" and not _flannels(settings):
                links.delete(there.ifindex)
                yield f"device {name}, with its routes, neighbours and FDB"
            for family, table in tables(vni):
                if nft.read_table(family, table):
                    nft.load_table(family, table, [])
                    yield f"nft table {family} {table}"
            yield from forward.remove(masquerade.table_name(vni))
        found = requests.links()
        for bridge in found:
            ours = bridge.kind == "bridge" and bridge.name in _bridges(settings) and not _flannels(settings)
            if ours and not any(link.master == bridge.ifindex for link in found):
                links.delete(bridge.ifindex)
                yield f"bridge {bridge.name}, which no pod uses"
        if direct := [route for route in requests.routes() if route.protocol == PROTOCOL]:
            _remove_routes(requests, direct)
            yield f"{len(direct)} routes of ours"
    finally:
        links.close()
        requests.close()


def _remove_routes(requests: netlink.RequestSocket, routes: list[FoundRoute]) -> None:
    for start in range(0, len(routes), BATCH):
        part = routes[start : start + BATCH]
        first = requests.take_seqs(len(part))
        messages = [
            wire.route_delete(first + place, route.key, RouteValue(UNDERLAY, route.via, False, PROTOCOL), route.oif)
            for place, route in enumerate(part)
        ]
        for refusal in requests.execute(messages, first).values():
            if refusal.errno != errno.ESRCH:
                raise netlink.KernelError(refusal.errno, f"deleting our routes: {refusal}")


def _files(settings: Settings) -> Iterator[str]:
    subnet_file = [] if _flannels(settings) else [settings.subnet_file]
    for path in (*subnet_file, f"{settings.run_dir}/{SOCKET_NAME}"):
        if Path(path).exists():
            cni.remove(path)
            yield path
