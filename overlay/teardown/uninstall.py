"""`overlay uninstall`: take everything of ours off this node. Running pods lose their network."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lease.families import FAMILIES
from lease.store import StoreError
from lease.tenure.kubernetes import NodeTenure
from overlay.api.serve import SOCKET_NAME
from overlay.cni import lists
from overlay.cni.controller import bridges_listed
from overlay.compose import Outside, withdraw
from overlay.firewall import nat
from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables import program
from overlay.node.owned import Owned
from overlay.process.dry import dry
from overlay.process.files import read_text, remove, write_atomically
from overlay.process.rundir import LOCK_NAME, RunDir
from overlay.settings.settings import Settings
from overlay.settings.stores import node_store

BEGUN = "uninstalling"


class UninstallError(Exception):
    """Something of ours could not be removed; the rest is. One line each."""


def uninstall(
    settings: Settings, force: bool = False, dry_run: bool = False, network: int | None = None
) -> Iterator[str]:
    """Withdraw all controllers: the network list first (no new pod starts here), then kernel, what the node says to others,
    and files; each thing removed, as a line. Nothing at all where no agent of ours left its mark in the run directory; and
    where flannel has the node (the network list names its plugin), its device, list, subnet.env and annotations stay.

    force: also without a mark; where no file names the network then (network: its number, of a vxlan its VNI), the one whose
    nftables tables stand here is taken.
    dry_run: nothing is removed, the lines say what would be (for the rest of this process's life).

    Raises:
        RunDirError: an agent still runs here; it would put everything back.
        UninstallError: after all else was done; or there are several networks to choose from, and nothing was.
    """
    dry.run = dry_run
    owned = Owned(settings)
    if not force and not _ours(settings, owned):
        return
    with _locked(settings):
        networks = _networks(owned, force, network)
        _begin(settings)
        failed: list[str] = []
        outside = Outside(
            clock=time.monotonic,
            give_up=lambda: _annotations(settings, owned),
            bridges=tuple(read_text(f"{settings.run_dir}/{BEGUN}").split()),
            networks=networks,
        )
        try:
            withdrawing = list(withdraw(settings, outside))
        except OSError as error:
            raise UninstallError(f"cannot talk to the kernel: {error}; nothing was removed") from error
        for name, removing in withdrawing:
            try:
                yield from removing
            except (OSError, StoreError, ValueError) as error:
                failed.append(f"{name}: {error}")
        if failed:
            raise UninstallError("; ".join(failed))
        kept = {lease_file(settings)} if leased(settings) else set()
        for left in (*_marks(settings, owned), f"{settings.run_dir}/{SOCKET_NAME}", f"{settings.run_dir}/{LOCK_NAME}"):
            if left not in kept:
                remove(left)
    if dry_run:
        return
    with suppress(OSError):  # a mount point, or something that is not ours is in it
        Path(settings.run_dir).rmdir()


def _networks(owned: Owned, force: bool, network: int | None) -> tuple[int, ...]:
    """The networks that no file names. Raises UninstallError."""
    if network is not None:
        return (network,)
    if not force or owned.networks():
        return ()
    try:
        found = {number for _, name in program.tables() if (number := nat.network_of(name)) is not None}
    except KernelError as error:
        raise UninstallError(f"no file names this node's network, and its tables cannot be read: {error}") from error
    if len(found) > 1:
        numbers = ", ".join(map(str, sorted(found)))
        raise UninstallError(
            f"there are tables of several networks (VNI {numbers}) on this node, and no file says which is meant: --vni;"
            " nothing was removed"
        )
    return tuple(found)


def lease_file(settings: Settings) -> str:
    """The file that says which record is ours."""
    return f"{settings.run_dir}/{lists.LEASE_FILE}"


def leased(settings: Settings) -> bool:
    """Whether etcd may have a record of this node yet: `overlay release` gives it up, and needs the file."""
    return not settings.kube and Path(lease_file(settings)).exists()


def _begin(settings: Settings) -> None:
    """Leave a mark, so that what fails is tried again; in it, the bridges that the network list names."""
    begun = f"{settings.run_dir}/{BEGUN}"
    there = {*read_text(begun).split(), *bridges_listed(settings)}
    write_atomically(begun, "\n".join(sorted(there)))


def _marks(settings: Settings, owned: Owned) -> list[str]:
    """The files by which a later run knows that this node was ours, until all is done."""
    devices = (owned.device_file(family) for family in FAMILIES)
    return [*devices, lease_file(settings), f"{settings.run_dir}/{BEGUN}"]


def _ours(settings: Settings, owned: Owned) -> bool:
    """By the marks, which a reboot takes away (they stand in /run), or by a network list that does without flannel's
    plugin, which outlives one."""
    conflist = f"{settings.cni_conf_dir}/{lists.CONFLIST}"
    listed = bool(settings.cni_conf_dir) and any(lists.listed_subnet(conflist, family) for family in FAMILIES)
    return any(Path(mark).exists() for mark in _marks(settings, owned)) or (listed and not owned.flannel_has_it())


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """Nobody else works here. A dry run leaves no file and no folder where there was none."""
    folder, lock = Path(settings.run_dir), Path(settings.run_dir) / LOCK_NAME
    made_folder, made_lock = not folder.exists(), not lock.exists()
    held = RunDir(settings.run_dir)
    try:
        yield
    finally:
        held.close()
        if dry.run and made_lock:
            lock.unlink(missing_ok=True)
        if dry.run and made_folder:
            folder.rmdir()


def _annotations(settings: Settings, owned: Owned) -> Iterator[str]:
    if not settings.kube or owned.flannel_has_it():
        return  # a lease in etcd is given up by `overlay release`
    store, names = node_store(settings)
    try:
        tenure = NodeTenure(store, names, settings.node_name, settings.set_condition, random.Random())  # noqa: S311
        for name in tenure.withdraw(dry.run):
            yield f"annotation {name} of Node {settings.node_name}"
    finally:
        store.close()
