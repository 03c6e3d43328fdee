"""flannel's own end-to-end list (its e2e/: connectivity_test.go, dns_test.go, resilience_test.go) on a real Kubernetes with our
image and manifest: pods across nodes by host-gw, wireguard (wireguard-go) and vxlan, names and Services by CoreDNS, pods made
anew, the DaemonSet restarted. The steps build on each other and run in this order."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import pytest

from overlay.lab import netns
from overlay.lab.cluster import CACHE
from overlay.lab.proof import NAMESPACE, Proof
from tests.cluster.backends import HOST_GW, VXLAN, WIREGUARD_GO, change
from tests.support.clusters import two_nodes
from tests.support.wait import until

pytestmark = pytest.mark.timeout(600)
DNS, ZONE = "10.96.0.10", "cluster.local"
WEB = f"web.default.svc.{ZONE}"
COREFILE = f"""\
.:53 {{
    errors
    health
    ready
    kubernetes {ZONE} in-addr.arpa
}}
"""


def coredns() -> str:
    """As a cluster has it: two of them behind the Service kube-dns."""
    about = {"name": "coredns", "namespace": "kube-system"}
    labels = {"k8s-app": "kube-dns"}
    rules = [
        {
            "apiGroups": [""],
            "resources": ["services", "pods", "namespaces", "nodes"],
            "verbs": ["list", "watch", "get"],
        },
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    container = {
        "name": "coredns", "image": "localhost/coredns:dev", "imagePullPolicy": "IfNotPresent",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }  # fmt: skip
    pod = {
        "serviceAccountName": "coredns", "containers": [container], "dnsPolicy": "Default", "terminationGracePeriodSeconds": 0,
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }  # fmt: skip
    ports = [{"name": name.lower(), "port": 53, "protocol": name} for name in ("UDP", "TCP")]
    account = {"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "coredns"}
    items = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": about},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "coredns"}, "rules": rules},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "coredns"},
         "subjects": [account], "roleRef": role},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"Corefile": COREFILE}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": about, "spec": {
            "replicas": 2, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
         "spec": {"selector": labels, "clusterIP": DNS, "ports": ports}},
    ]  # fmt: skip
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def asked(name: str) -> str:
    """The address that the cluster's DNS gives (RFC 1035), by UDP. Raises OSError, LookupError: it gives none."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
    question = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(2)
        made.connect((DNS, 53))
        made.send(question)
        answer = made.recv(512)
    count = struct.unpack_from("!H", answer, 6)[0]
    if not count:
        raise LookupError(f"{name} has no address")
    return socket.inet_ntoa(answer[-4:])


def http(address: str, port: int) -> str:
    with socket.create_connection((address, port), 5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.makefile().read()


@pytest.fixture(scope="module")
def proof() -> Iterator[Proof]:
    if not (CACHE / "coredns.tar").exists():
        pytest.fail("no image of CoreDNS: .ci/coredns-image (make cluster-test)", pytrace=False)
    with two_nodes("e") as made:
        for node in made.names:
            made.cluster.import_image(node, CACHE / "coredns.tar")
        made.install()
        made.pods()
        yield made


def test_a_service_is_found_by_name_and_by_address(proof):
    proof.cluster.kubectl("apply", "-f", "-", input=coredns())
    proof.cluster.wait_running("k8s-app=kube-dns", 2, 120, "kube-system")
    service = proof.cluster.objects("service", "web")[0]["spec"]["clusterIP"]
    pods = [end for end in proof.ends() if end.kind == "pod"]
    for end in pods:

        def found(end=end) -> str:
            return netns.inside(end.namespace, lambda: asked(WEB))

        until(f"{end.name} gets an answer", lambda found=found: found() == service, 30)
        for where in (service, found()):
            assert "web-" in netns.inside(end.namespace, lambda where=where: http(where, 80))
    with pytest.raises(LookupError):
        netns.inside(pods[0].namespace, lambda: asked(f"nobody.default.svc.{ZONE}"))


def test_a_pod_that_is_deleted_and_made_anew_is_reached_both_ways(proof):
    for name in proof.names:
        before = {end.name for end in proof.ends() if end.kind == "pod" and end.node == name}
        victim = next(pod for pod in before if pod.startswith("everywhere-"))
        proof.cluster.kubectl("delete", "pod", victim)
        proof.cluster.wait_running("app=everywhere", len(proof.names), 60)
        after = {end.name for end in proof.ends() if end.kind == "pod" and end.node == name}
        assert victim not in after
        assert len(after) == len(before)
        until("every pair reaches each other", lambda: bool(proof.reach()), 30)


def subnets(proof) -> dict[str, str]:
    files = {name: proof.cluster.node_path(name, "/run/flannel/subnet.env").read_text() for name in proof.names}
    return {
        name: next(line for line in text.splitlines() if line.startswith("FLANNEL_SUBNET="))
        for name, text in files.items()
    }


def test_a_restart_of_the_daemonset_changes_no_subnet_and_pods_go_on(proof):
    before, pods = subnets(proof), {end.name for end in proof.ends() if end.kind == "pod"}
    proof.cluster.kubectl("-n", NAMESPACE, "rollout", "restart", "daemonset/overlay")
    proof.cluster.kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/overlay", "--timeout=120s")
    assert subnets(proof) == before
    assert {end.name for end in proof.ends() if end.kind == "pod"} == pods
    assert proof.reach()


@pytest.mark.parametrize("backend", [HOST_GW, WIREGUARD_GO, VXLAN], ids=["host-gw", "wireguard-go", "vxlan"])
def test_another_backend_connects_the_same_pods(proof, backend):
    """The ConfigMap is changed while all runs; new pods have the MTU of the backend. (ipip, and the kernel's WireGuard, are in
    tests/kernels/test_cluster.py.)"""
    change(proof, backend)
