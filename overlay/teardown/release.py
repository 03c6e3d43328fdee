"""`overlay release`: give up this node's lease."""

from __future__ import annotations

import json
from pathlib import Path

from lease.model import ip_text
from lease.store import RecordChanged, StoreUnavailable
from overlay.cni.lists import LEASE_FILE
from overlay.process.files import remove
from overlay.process.rundir import RunDir, RunDirError
from overlay.settings.settings import Settings
from overlay.settings.stores import etcd_store


class ReleaseError(Exception):
    """Nothing was released: says why, and what to do."""


class NothingKnown(ReleaseError):
    """No agent of this run directory ever held a lease."""


def release(settings: Settings, dry_run: bool = False) -> str:
    """Delete the record that this node's agent held last; its key. The datapath stays as it is. dry_run: delete nothing.

    Raises:
        ReleaseError: the agent still runs (it would take the lease again), none is known here, or the record is not
            ours any more.
    """
    if settings.kube:
        raise ReleaseError(
            "on Kubernetes the subnet is the Node's podCIDR; `overlay uninstall` takes the node's annotations away"
        )
    if not Path(settings.run_dir).is_dir():
        raise NothingKnown(f"no lease of this node is known: there is no {settings.run_dir}; is --run-dir the agent's?")
    try:
        held = RunDir(settings.run_dir)
    except RunDirError as error:
        raise ReleaseError(f"{error} and would take the lease again; stop it first") from error
    with held:
        return _release(settings, dry_run)


def _release(settings: Settings, dry_run: bool) -> str:
    file = Path(settings.run_dir) / LEASE_FILE
    try:
        ours = json.loads(file.read_text())
        key, public_ip, vtep_mac = ours["key"], ours["public_ip"], ours["vtep_mac"]
    except FileNotFoundError as error:
        raise NothingKnown(
            f"no lease of this node is known: there is no {file}; was it released before, or is --run-dir not the agent's?"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NothingKnown(f"no lease of this node is known: {file}: {error}; is --run-dir the agent's?") from error
    store = etcd_store(settings)
    try:
        lease = store.read().leases.get(key)
        if lease is None:
            raise ReleaseError(
                f"{store.place} has no record {key}: are these the agent's --etcd-endpoints and --etcd-prefix?"
                f" If it expired, there is nothing to release (rm {file})"
            )
        end = lease.first
        there = (ip_text(end.subnet.family, end.public_ip), end.vtep)
        if there != (public_ip, vtep_mac):
            raise ReleaseError(f"{key} belongs to {there[0]} (VTEP {there[1]}) now; nothing was released")
        if not dry_run:
            store.remove(lease)
            remove(str(file))
    except StoreUnavailable as error:
        raise ReleaseError(f"the store cannot do it now: {error}") from error
    except RecordChanged as error:
        raise ReleaseError(f"{error}; run it again") from error
    finally:
        store.close()
    return str(key)
