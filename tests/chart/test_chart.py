"""The chart's defaults are manifests/overlay.yaml; its values arrive where they should."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HELM, CHART = ROOT / ".venv/helm", ROOT / "manifests/chart"


def run(*arguments: str) -> str:
    assert HELM.exists(), "build it: .ci/helm/build (make chart-test does)"
    done = subprocess.run([str(HELM), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rendered(*more: str) -> list[dict[str, Any]]:
    text = run("template", "overlay", str(CHART), "-n", "kube-overlay", *more)
    return [document for document in yaml.safe_load_all(text) if document]


def by_kind(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in documents}


def comparable(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The files of the ConfigMap by what they say, not by how they are indented."""
    found = by_kind(documents)
    found["ConfigMap"]["data"] = {name: json.loads(text) for name, text in found["ConfigMap"]["data"].items()}
    return found


def test_helm_finds_no_fault_with_it():
    assert "0 chart(s) failed" in run("lint", "--strict", str(CHART))


def test_the_defaults_are_the_manifest():
    manifest = list(yaml.safe_load_all((ROOT / "manifests/overlay.yaml").read_text()))
    assert comparable(rendered("--set", "namespace.create=true")) == comparable(manifest)


def test_without_its_namespace_all_else_is_the_same():
    with_it, without = rendered("--set", "namespace.create=true"), rendered()
    assert [document for document in with_it if document["kind"] != "Namespace"] == without


def test_values_arrive():
    found = by_kind(
        rendered(
            "--set", "image.repository=registry.example/overlayd,image.tag=1.2.3,health.ip=0.0.0.0,health.port=9999",
            "--set", "netConf.Network=10.50.0.0/16,netConf.Backend.VNI=42,live.log-level=debug",
            "--set", "extraArgs={--iface=eth1,--underlay-cidr=192.168.0.0/16},apiServer.host=192.168.1.2",
            "--set", "cniBinDir=/var/lib/cni/bin,podMonitor.enabled=true,resources.requests.cpu=1",
        )
    )  # fmt: skip
    pod = found["DaemonSet"]["spec"]["template"]["spec"]
    agent = pod["containers"][0]
    assert {each["image"] for each in (*pod["initContainers"], agent)} == {"registry.example/overlayd:1.2.3"}
    for flag in ("--healthz-ip=0.0.0.0", "--healthz-port=9999", "--iface=eth1", "--underlay-cidr=192.168.0.0/16"):
        assert flag in agent["args"]
    assert agent["livenessProbe"]["httpGet"] == {"host": "127.0.0.1", "port": 9999, "path": "/healthz"}
    assert agent["ports"][0]["containerPort"] == 9999
    assert {"name": "KUBERNETES_SERVICE_HOST", "value": "192.168.1.2"} in agent["env"]
    assert agent["resources"]["requests"]["cpu"] == 1
    assert {"name": "cni-bin-dir", "hostPath": {"path": "/var/lib/cni/bin", "type": "DirectoryOrCreate"}} in pod[
        "volumes"
    ]
    config = json.loads(found["ConfigMap"]["data"]["net-conf.json"])
    assert config == {"Network": "10.50.0.0/16", "Backend": {"Type": "vxlan", "VNI": 42}}
    assert json.loads(found["ConfigMap"]["data"]["overlayd.json"])["log-level"] == "debug"
    assert found["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == agent["ports"][0]["name"]


@pytest.mark.parametrize("namespace", ["kube-overlay", "elsewhere"])
def test_everything_is_in_the_release_namespace(namespace):
    documents = yaml.safe_load_all(run("template", "overlay", str(CHART), "-n", namespace))
    those = [document["metadata"] for document in documents if document]
    elsewhere = [each["name"] for each in those if each.get("namespace", namespace) != namespace]
    assert elsewhere == ["overlay-events"] * 2, "Events of Nodes are in the namespace default"
