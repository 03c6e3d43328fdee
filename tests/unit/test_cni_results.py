"""What the container runtime's CNI library keeps of each attachment, as containerd and CRI-O leave it."""

from __future__ import annotations

import json
import os

import pytest

from lease.model import ip_number
from overlay.cni.results import CniResults

CACHED = {
    "kind": "cniCacheV1",
    "containerId": "7b0f",
    "config": "e30=",
    "ifName": "eth0",
    "networkName": "cbr0",
    "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web-1"], ["K8S_POD_UID", "x"]],
    "result": {
        "cniVersion": "0.3.1",
        "dns": {},
        "interfaces": [
            {"mac": "0a:58:0a:f4:01:01", "name": "cni0"},
            {"mac": "96:73:5b:3c:0d:5a", "name": "veth8a0b5c1d"},
            {"mac": "0a:58:0a:f4:01:07", "name": "eth0", "sandbox": "/var/run/netns/cni-1"},
        ],
        "ips": [
            {"address": "10.244.1.7/24", "gateway": "10.244.1.1", "interface": 2, "version": "4"},
            {"address": "fd00:1::7/64", "interface": 2},
        ],
        "routes": [{"dst": "0.0.0.0/0"}],
    },
}
MAC = 0x96735B3C0D5A


def test_it_is_read_as_it_comes_and_goes(tmp_path):
    results = CniResults(str(tmp_path))
    assert results.refreshed()("veth8a0b5c1d", MAC) is None
    file = tmp_path / "cbr0-7b0f-eth0"
    file.write_text(json.dumps(CACHED))
    found = results.refreshed()("veth8a0b5c1d", MAC)
    assert found is not None
    assert found.pod == "shop/web-1"
    assert found.addresses == {4: {ip_number("10.244.1.7", 4)}, 6: {ip_number("fd00:1::7", 6)}}
    assert results.refreshed()("eth0", MAC) is None, "that is the pod's end"
    assert results.refreshed()("veth8a0b5c1d", MAC + 1) is None, "another of the same name"
    file.unlink()
    assert results.refreshed()("veth8a0b5c1d", MAC) is None


def test_one_that_goes_while_the_folder_is_read_costs_itself_alone(tmp_path, monkeypatch):
    """The runtime removes it when the pod goes."""
    (tmp_path / "cbr0-7b0f-eth0").write_text(json.dumps(CACHED))
    (tmp_path / "gone").write_text(json.dumps(CACHED))
    plain = os.lstat

    def lstat(path, **more):
        if str(path).endswith("/gone"):
            raise FileNotFoundError(path)
        return plain(path, **more)

    monkeypatch.setattr(os, "lstat", lstat)
    assert CniResults(str(tmp_path)).refreshed()("veth8a0b5c1d", MAC) is not None


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "{}", '{"result": null}', '{"result": {"ips": 5, "interfaces": []}}',
        '{"result": {"ips": [{"address": "x"}], "interfaces": []}}', '{"result": {"ips": [], "interfaces": [5]}}', "[" * 5000,
        '{"result": {"ips": [], "interfaces": [{"name": "v", "mac": "x"}]}}',
    ],
)  # fmt: skip
def test_what_is_none_costs_itself_alone(tmp_path, content):
    (tmp_path / "bad").write_text(content)
    (tmp_path / "good").write_text(json.dumps(CACHED))
    (tmp_path / "pipe").mkdir()
    assert CniResults(str(tmp_path)).refreshed()("veth8a0b5c1d", MAC) is not None


def test_no_kubernetes_no_name(tmp_path):
    (tmp_path / "x").write_text(json.dumps({**CACHED, "cniArgs": None}))
    found = CniResults(str(tmp_path)).refreshed()("veth8a0b5c1d", MAC)
    assert found is not None
    assert found.pod == ""
