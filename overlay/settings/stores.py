"""The store that the settings name: etcd, or the Nodes of a Kubernetes cluster. Imports only the one that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lease.records.annotations import Names
from overlay.settings.settings import Settings, SettingsError

if TYPE_CHECKING:
    from lease.stores.etcd import EtcdStore
    from lease.stores.kubernetes import NodeStore


def etcd_store(settings: Settings) -> EtcdStore:
    """Raises SettingsError."""
    from lease.etcd.client import EtcdSettings, EtcdSettingsError
    from lease.stores.etcd import EtcdStore

    where = EtcdSettings(
        settings.etcd_endpoints,
        settings.etcd_cafile,
        settings.etcd_certfile,
        settings.etcd_keyfile,
        settings.etcd_username,
        settings.etcd_password,
    )
    try:
        return EtcdStore(where, settings.etcd_prefix)
    except EtcdSettingsError as error:
        raise SettingsError(f"--{error}") from error


def node_store(settings: Settings) -> tuple[NodeStore, Names]:
    """The store, and the names of its annotations. Raises SettingsError."""
    from lease.kube.client import KubeSettings, KubeSettingsError
    from lease.stores.kubernetes import NodeStore

    names = Names.of(settings.annotation_prefix)
    where = KubeSettings(settings.kube_api_url, settings.kubeconfig)
    try:
        return NodeStore(where, names, settings.node_name, settings.net_config_path), names
    except KubeSettingsError as error:
        raise SettingsError(str(error)) from error
