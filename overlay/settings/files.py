"""Files and folders that flags name: what cannot work is refused before anything is started."""

from __future__ import annotations

import os

from overlay.settings.settings import Settings, SettingsError


def check_files(settings: Settings) -> None:
    """Whether what must be there is. (net-conf.json, cni-conf.json and --live-settings may come later: they are waited for.)

    Raises:
        SettingsError: names the flag, the file and what is wrong with it.
    """
    certificates = (
        ("etcd-cafile", settings.etcd_cafile),
        ("etcd-certfile", settings.etcd_certfile),
        ("etcd-keyfile", settings.etcd_keyfile),
    )
    for name, path in certificates if not settings.kube else (("kubeconfig-file", settings.kubeconfig),):
        if path:
            _readable(name, path)
    if not settings.kube and bool(settings.etcd_certfile) != bool(settings.etcd_keyfile):
        raise SettingsError("--etcd-certfile and --etcd-keyfile: give both or neither")
    for name, path in (("run-dir", settings.run_dir), ("cni-conf-dir", settings.cni_conf_dir)):
        if path and os.path.exists(path) and not os.path.isdir(path):
            raise SettingsError(f"--{name}: {path} must be a folder")
    if os.path.isdir(settings.subnet_file):
        raise SettingsError(f"--subnet-file: {settings.subnet_file} is a folder; give the file's own name")
    _can_be_made("subnet-file", os.path.dirname(settings.subnet_file))
    if not os.path.isdir(f"{settings.proc_sys_net}/ipv4"):
        raise SettingsError(f"--proc-sys-net: {settings.proc_sys_net} has no ipv4: it must be the node's /proc/sys/net")


def _can_be_made(name: str, folder: str) -> None:
    """A folder that is made when it is needed: whether the first that is there above it is one that takes files."""
    above = folder or "."
    while not os.path.exists(above) and os.path.dirname(above) not in ("", above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise SettingsError(f"--{name}: {above} is no folder")
    if os.path.realpath(above).split("/")[1:2] in (["proc"], ["sys"]):
        raise SettingsError(f"--{name}: {folder} cannot be made: {above} takes no files")


def _readable(name: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise SettingsError(f"--{name}: {path}: {error.strerror}") from None
