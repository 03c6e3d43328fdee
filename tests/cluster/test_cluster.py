"""Our image and manifest on a real two-node Kubernetes. The steps build on each other and run in this order; each is
the proof that `make cluster` shows."""

from __future__ import annotations

import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.lab import netns, topology
from overlay.lab.cluster import SERVER
from overlay.lab.processes import LabError
from overlay.lab.proof import AGENTS, NAMESPACE, Proof, manifest
from tests.support.clusters import two_nodes
from tests.support.wait import until

UNBROKEN = re.compile(r"[1-9]\d* round trips on one connection, none lost")
"""What is said of a connection of which nothing was lost."""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def proof() -> Iterator[Proof]:
    with two_nodes() as made:
        yield made


def test_a_bare_cluster_has_no_network(proof):
    """The control: what makes the nodes Ready below is us."""
    assert [proof.cluster.ready(name) for name in proof.names] == [False, False]
    with pytest.raises(LabError, match="within 3 s"):
        proof.cluster.wait_ready(3)


def test_the_manifest_makes_every_node_ready(proof):
    proof.install()
    assert proof.cluster.node_path("node1", "/opt/cni/bin/bridge").exists(), "the init container brings the plugins"


def test_pods_and_nodes_reach_each_other(proof):
    proof.pods()
    cells = proof.reach()
    assert {cell.kinds for cell in cells} == {"pod-pod", "node-pod", "pod-node"}
    across = [cell for cell in cells if cell.kinds == "pod-pod" and cell.seen == cell.own]
    assert len(across) == 12


def test_a_service_answers(proof):
    assert re.search(r":80 answers [4-9] pods, by 2 pods$", proof.service())


def test_the_agent_has_the_rights_the_manifest_says_and_no_more(proof):
    for node in proof.names:
        pid = proof._pid(node, 'labels."io.kubernetes.container.name"==overlayd')
        said = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert int(said["CapEff"], 16) == 1 << 12 | 1 << 13, "NET_ADMIN and NET_RAW"  # linux/capability.h
        assert said["Seccomp"].strip() == "2"
        assert said["NoNewPrivs"].strip() == "1"
        with pytest.raises(OSError, match="Read-only"):
            Path(f"/proc/{pid}/root/etc/overlay-test").touch()
    assert proof.cluster.run("node1", ["cat", "/proc/sys/net/ipv4/ip_forward"]).strip() == "1"


def test_another_nodes_status_is_closed_by_the_admission_policy(proof):
    kubectl = proof.cluster.kubectl
    kubectl("apply", "-f", "-", input=manifest_text("admission-policy.yaml"))
    bound = ["--bound-object-kind=Node", "--bound-object-name=node1"]
    token = kubectl("-n", NAMESPACE, "create", "token", "overlay", *bound).strip()

    def write(node: str) -> int:
        """One patch of a node's status, as the agent of node1."""
        body = {"metadata": {"annotations": {"flannel.alpha.coreos.com/public-ip": "192.168.1.2"}}}
        request = urllib.request.Request(
            f"{SERVER}/api/v1/nodes/{node}/status",
            method="PATCH",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/strategic-merge-patch+json"},
        )
        trusted = ssl.create_default_context(cafile=str(proof.cluster.folder / "ca.crt"))

        def run() -> int:
            try:
                with urllib.request.urlopen(request, timeout=10, context=trusted) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        return netns.inside(topology.underlay_name(proof.cluster.name), run)

    until("another node's is refused", lambda: write("node2") == 403, 30)
    assert write("node1") == 200
    proof.cluster.kubectl("-n", NAMESPACE, "rollout", "restart", "daemonset/overlay")
    proof.cluster.kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/overlay", "--timeout=120s")
    until("the agents put right what was written", lambda: proof.notes("node2")["public-ip"] == "192.168.1.3", 30)


def test_a_changed_config_map_arrives(proof):
    """The kubelet brings it within two minutes; the agents take it without a restart."""
    before = proof._agents()
    text = manifest("overlay.yaml").replace('"Type": "vxlan"', '"Type": "vxlan", "MTU": 1400')
    proof.cluster.kubectl("apply", "-f", "-", input=text)
    until(
        "the device's MTU", lambda: "mtu 1350" in proof.cluster.run("node2", ["ip", "link", "show", "flannel.1"]), 180
    )
    proof.cluster.kubectl("apply", "-f", "-", input=manifest("overlay.yaml"))
    assert proof._agents() == before


def test_a_rolling_update_and_a_rollback_keep_connections(proof):
    before = proof._agents()
    assert UNBROKEN.search(proof.rolling_restart())
    after = proof._agents()
    assert len(after) == len(proof.names)
    assert not after & before, "each was replaced"


def test_killed_agents_keep_connections(proof):
    assert UNBROKEN.search(proof.agent_killed())
    assert min(proof._restarts()) >= 1
    assert len(proof.cluster.objects("pods", "-n", NAMESPACE, "-l", AGENTS)) == 2


def test_a_node_goes_and_returns(proof):
    proof.node_returns("node2")
    assert proof.cluster.ready("node2")
    cidr = proof.cluster.objects("node", "node2")[0]["spec"]["podCIDR"]
    assert f"{cidr} via" in proof.cluster.run("node1", ["ip", "route"])
    assert proof.notes("node2")["public-ip"] == "192.168.1.3"


def test_an_api_server_outage_of_a_minute(proof):
    agents = proof._agents()
    assert UNBROKEN.search(proof.outage(60))
    assert proof._agents() == agents, "none was started again"
    assert [proof.cluster.ready(name) for name in proof.names] == [True, True]


def test_uninstall_leaves_nothing(proof):
    proof.uninstall()
    for name in proof.names:
        assert "flannel.1" not in proof.cluster.run(name, ["ip", "link"])
        assert "overlay" not in proof.cluster.run(name, ["nft", "list", "tables"])
        assert not proof.notes(name)
    with pytest.raises(LabError, match="not found"):
        proof.cluster.kubectl("get", "namespace", NAMESPACE)


def manifest_text(name: str) -> str:
    from overlay.lab.cluster import SOURCES

    return (SOURCES / "manifests" / name).read_text()
