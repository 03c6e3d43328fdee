"""What `overlay uninstall` says where it cannot begin; what it removes: tests/agent/test_process.py."""

from __future__ import annotations

import pytest

from overlay.settings.settings import Settings
from overlay.teardown import uninstall


def test_a_kernel_that_cannot_be_asked_is_one_line_and_nothing_is_removed(tmp_path, monkeypatch):
    (tmp_path / "device").write_text("flannel.1")

    def no_netlink(*_: object) -> None:
        raise OSError(93, "Protocol not supported")

    monkeypatch.setattr(uninstall, "withdraw", no_netlink)
    with pytest.raises(uninstall.UninstallError, match=r"cannot talk to the kernel.*nothing was removed"):
        list(uninstall.uninstall(Settings(run_dir=str(tmp_path), cni_conf_dir="")))
    assert (tmp_path / "device").exists(), "it can be tried again"


@pytest.mark.parametrize("kube", [False, True])
def test_the_file_that_release_needs_stays_while_etcd_has_a_record(tmp_path, monkeypatch, kube):
    """Of a Node the annotations are gone by then, and there is nothing to release."""
    for name in ("device", "lease.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(uninstall, "withdraw", lambda *_: iter(()))
    settings = Settings(run_dir=str(tmp_path), cni_conf_dir="", kube=kube)
    assert list(uninstall.uninstall(settings)) == []
    assert (tmp_path / "lease.json").exists() is not kube
    assert uninstall.leased(settings) is not kube
    assert not (tmp_path / "device").exists()
