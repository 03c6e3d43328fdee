"""docs/migration.md on a whole cluster: flannel as its users have it, node by node to ours under traffic, back, and to the end.

The steps build on each other and run in this order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from overlay.lab.cluster import CACHE
from overlay.lab.processes import LabError
from overlay.lab.proof import AGENTS, NAMESPACE, Proof, manifest
from tests.support.clusters import two_nodes
from tests.support.wait import until
from tests.support.world import Stream

pytestmark = pytest.mark.timeout(600)
FLANNEL, SELECTOR = "kube-flannel", "app=flannel"
LABEL = "overlay/agent"
KEEP_APART = [
    {"op": "add", "path": "/spec/updateStrategy", "value": {"type": "OnDelete"}},
    {
        "op": "add",
        "path": "/spec/template/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution"
        "/nodeSelectorTerms/0/matchExpressions/-",
        "value": {"key": LABEL, "operator": "NotIn", "values": ["overlayd"]},
    },
]
"""As the page has it."""


def flannels_manifest() -> str:
    """Their kube-flannel.yml with the image that was built here."""
    path = CACHE / "kube-flannel.yml"
    if not path.exists():
        pytest.fail(f"{path} is missing: .ci/flannel-image", pytrace=False)
    found = list(yaml.safe_load_all(path.read_text()))
    for item in found:
        if item["kind"] == "DaemonSet":
            spec = item["spec"]["template"]["spec"]
            for container in (*spec["initContainers"], *spec["containers"]):
                container |= {"image": "localhost/flannel:dev", "imagePullPolicy": "IfNotPresent"}
    return yaml.safe_dump_all(found)


def ours(selector: bool) -> str:
    """Our manifest; selector: on labelled nodes only."""
    found = list(yaml.safe_load_all(manifest("overlay.yaml")))
    for item in found:
        if item["kind"] == "DaemonSet" and selector:
            item["spec"]["template"]["spec"]["nodeSelector"] = {LABEL: "overlayd"}
    return yaml.safe_dump_all(found)


@pytest.fixture(scope="module")
def proof() -> Iterator[Proof]:
    with two_nodes("m", plugins=True) as made:
        cluster = made.cluster
        for node in made.names:
            cluster.import_image(node, CACHE / "flannel.tar")
        cluster.kubectl("apply", "-f", "-", input=flannels_manifest())
        cluster.wait_running(SELECTOR, 2, 120, FLANNEL)
        cluster.wait_ready()
        made.pods()
        made.reach()
        yield made


def mac(proof: Proof, node: str) -> str:
    link = json.loads(proof.cluster.run(node, ["ip", "-j", "link", "show", "flannel.1"]))[0]
    return str(link["address"])


def records(proof: Proof) -> dict[str, tuple[dict[str, str], str]]:
    """What may not change: annotations and device of each node."""
    return {node: (proof.notes(node), mac(proof, node)) for node in proof.names}


def addresses(proof: Proof) -> dict[str, str]:
    return {end.name: end.address for end in proof.ends() if end.kind == "pod"}


@contextmanager
def traffic(proof: Proof) -> Iterator[None]:
    """Numbered datagrams both ways and a connection between pods of two nodes: none is lost."""
    source, target = (
        next(end for end in proof.ends() if end.kind == "pod" and end.node == node) for node in proof.names
    )
    with proof.connection():
        there, back = Stream(source, target, 0.005), Stream(target, source, 0.005)
        try:
            yield
        finally:
            there.stop()
            back.stop()
    assert (there.lost(), back.lost()) == (0, 0)
    assert there.sent > 100


def to_ours(proof: Proof, node: str) -> None:
    proof.cluster.kubectl("label", "node", node, f"{LABEL}=overlayd")
    until("flannel's pod ends", lambda: node not in nodes_of(proof, FLANNEL, SELECTOR), 60)
    until("ours is ready", lambda: node in nodes_of(proof, NAMESPACE, AGENTS), 60)


def to_flannel(proof: Proof, node: str) -> None:
    proof.cluster.kubectl("label", "node", node, f"{LABEL}-")
    until("ours ends", lambda: node not in nodes_of(proof, NAMESPACE, AGENTS), 60)
    until("flannel's is ready", lambda: node in nodes_of(proof, FLANNEL, SELECTOR), 90)


def nodes_of(proof: Proof, namespace: str, selector: str) -> set[str]:
    """The nodes on which such a pod is Ready, or still there without being deleted."""
    pods = proof.cluster.objects("pods", "-n", namespace, "-l", selector)
    return {
        pod["spec"]["nodeName"]
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
    }


def made_again(proof: Proof) -> None:
    """Every pod deleted and made anew: what another agent's list attached can be taken off, and new ones are in the network."""
    before = set(addresses(proof))
    proof.cluster.kubectl("delete", "pods", "-l", "app in (web, everywhere)", "--timeout=60s")
    proof.cluster.wait_running("app=web", 2, 90)
    proof.cluster.wait_running("app=everywhere", 2, 90)
    assert not before & set(addresses(proof))
    proof.reach()


def test_our_manifest_beside_flannel_starts_nothing_yet(proof):
    before = nodes_of(proof, FLANNEL, SELECTOR), proof.cluster.objects("pods", "-n", FLANNEL)
    proof.cluster.kubectl("apply", "-f", "-", input=ours(selector=True))
    proof.cluster.kubectl(
        "-n", FLANNEL, "patch", "daemonset", "kube-flannel-ds", "--type=json", "-p", json.dumps(KEEP_APART)
    )
    after = nodes_of(proof, FLANNEL, SELECTOR), proof.cluster.objects("pods", "-n", FLANNEL)
    assert after[0] == before[0] == set(proof.names)
    assert [pod["metadata"]["uid"] for pod in after[1]] == [pod["metadata"]["uid"] for pod in before[1]]
    assert proof.cluster.objects("pods", "-n", NAMESPACE) == []


def test_node_by_node_to_ours_under_traffic(proof):
    before = records(proof)
    with traffic(proof):
        for node in proof.names:
            to_ours(proof, node)
            assert records(proof) == before, "the same MAC, the same annotations: the other nodes see no change"
            said = proof.cluster.kubectl(
                "-n", NAMESPACE, "exec", agent(proof, node), "-c", "overlayd", "--", "overlay", "status"
            )
            assert "all that the agent manages is as it should be" in said, said
    proof.reach()
    for node in proof.names:
        assert "proto 111" in proof.cluster.run(node, ["ip", "route"])
        assert "onlink" in proof.cluster.run(node, ["ip", "route", "show", "proto", "111"])
        assert "onlink" not in proof.cluster.run(node, ["ip", "route", "show", "proto", "boot"]), "flannel's are swept"


def agent(proof: Proof, node: str) -> str:
    pods = proof.cluster.objects("pods", "-n", NAMESPACE, "-l", AGENTS, f"--field-selector=spec.nodeName={node}")
    return next(str(pod["metadata"]["name"]) for pod in pods if not pod["metadata"].get("deletionTimestamp"))


def test_pods_that_flannels_plugin_attached_are_deleted_by_ours(proof):
    assert '"type": "bridge"' in (proof.cluster.node_path("node1", "/etc/cni/net.d/10-flannel.conflist")).read_text()
    made_again(proof)


def test_the_way_back_under_traffic(proof):
    before = records(proof)
    with traffic(proof):
        for node in proof.names:
            to_flannel(proof, node)
            assert records(proof) == before
    proof.reach()
    assert '"type": "flannel"' in (proof.cluster.node_path("node1", "/etc/cni/net.d/10-flannel.conflist")).read_text()
    made_again(proof)


def test_to_ours_for_good(proof):
    with traffic(proof):
        for node in proof.names:
            to_ours(proof, node)
        proof.cluster.kubectl("-n", FLANNEL, "delete", "daemonset", "kube-flannel-ds")
        proof.cluster.kubectl("apply", "-f", "-", input=ours(selector=False))
        proof.cluster.kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/overlay", "--timeout=120s")
    proof.cluster.kubectl("delete", "namespace", FLANNEL, "--timeout=90s")
    made_again(proof)
    with pytest.raises(LabError, match="not found"):
        proof.cluster.kubectl("get", "namespace", FLANNEL)
