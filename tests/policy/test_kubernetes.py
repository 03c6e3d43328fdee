"""Policies of the Kubernetes API, by a real API server and with the rights of our manifest."""

from __future__ import annotations

import pytest

from overlay.policy.table import SUFFIX
from tests.policy.test_enforcing import FROM_B, asks
from tests.support.wait import until


@pytest.fixture
def three(kube, field):
    """x/a and x/c on node1, x/b on node2."""
    kube.begin(2)
    kube.namespaces(x={"team": "one"}, y={"team": "two"})
    one, two = kube.agents
    for agent, name in ((one, "a"), (two, "b"), (one, "c")):
        for end in kube.pod_of_api(agent, "x", name, app=name):
            for protocol in ("TCP", "UDP"):
                for port in (80, 81):
                    field.serve(end, protocol, port)
    kube.pods_settled(field)
    return kube


def test_what_is_written_to_the_api_is_enforced_and_what_changes_too(three, field):
    kube = three
    one, two = kube.agents
    assert one.status()["policy"] == {
        "enforced": False, "policies": 0, "cluster_wide": 0, "groups": 0, "refused": {}, "pods": 0, "isolated_addresses": 0, "generation": 0,
        "decided": [],
        "revision": one.status()["policy"]["revision"],
    }, "no pods are watched while there is no policy"  # fmt: skip
    kube.policy({**FROM_B, "apiVersion": "networking.k8s.io/v1"})
    until("it is enforced", lambda: one.status()["policy"]["enforced"])
    until("others are kept out", lambda: not any(asks(kube, field, "x/c", "x/a")))
    assert asks(kube, field, "x/b", "x/a") == [True, False, True, False], "TCP 80 from x/b alone"
    assert all(asks(kube, field, "x/a", "x/b")), "x/b is not selected"
    kube.pod_patch("x", "c", {"metadata": {"labels": {"app": "b"}}})
    until("x/c is one of those now", lambda: asks(kube, field, "x/c", "x/a") == [True, False, True, False])
    kube.pod_patch("x", "b", {"metadata": {"labels": {"app": "z"}}})
    until("x/b is not any more", lambda: not any(asks(kube, field, "x/b", "x/a")))
    assert one.problems() == two.problems() == {}
    kube.no_policy("x", "from-b")
    until("all may again", lambda: all(asks(kube, field, "x/b", "x/a") + asks(kube, field, "x/c", "x/a")))
    assert SUFFIX not in kube.run("node1", "nft", "list", "tables")
    assert one.status()["policy"]["pods"] == 0, "and pods are watched no more"


def test_labels_of_namespaces(three, field):
    kube = three
    spec = {"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "two"}}}]}]}
    kube.policy({"metadata": {"namespace": "x", "name": "from-two"}, "spec": spec})
    until("others are kept out", lambda: not any(asks(kube, field, "x/b", "x/a")))
    kube.kube.ask(
        "PATCH", "/api/v1/namespaces/x", {"metadata": {"labels": {"team": "two"}}}, "application/merge-patch+json"
    )
    until("its own namespace is one of those now", lambda: all(asks(kube, field, "x/b", "x/a")))


def test_switched_off_live_it_is_told(three, field):
    kube = three
    kube.policy({**FROM_B, "apiVersion": "networking.k8s.io/v1"})
    until("others are kept out", lambda: not any(asks(kube, field, "x/c", "x/a")))
    kube.config_file("overlayd.json", {"network-policy": False})
    until("all may", lambda: all(asks(kube, field, "x/c", "x/a")))
    said = kube.agents[0].problems()["policies not enforced"]
    assert said == "1 policies exist, and none is enforced: --network-policy is false"
    kube.config_file("overlayd.json", {})
    until("others are kept out again", lambda: not any(asks(kube, field, "x/c", "x/a")))
    assert "policies not enforced" not in kube.agents[0].problems()


CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
GROUP, PLURAL = "policy.networking.k8s.io", "clusternetworkpolicies"


def crd(version: str) -> dict:
    """As network-policy-api's own, but for the schema's checks."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "metadata": {
            "name": f"{PLURAL}.{GROUP}", "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/network-policy-api"},
        },
        "spec": {
            "group": GROUP, "scope": "Cluster", "names": {"plural": PLURAL, "kind": "ClusterNetworkPolicy"},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }  # fmt: skip


@pytest.mark.parametrize("version", ["v1alpha2", "v1beta1"])
def test_cluster_wide_policies_come_and_go_with_their_definition(three, field, version):
    """NetworkPolicies never wait for them."""
    kube = three
    one = kube.agents[0]
    kube.config_file("overlayd.json", {"cluster-network-policy": True})
    until("it says what lacks", lambda: "CustomResourceDefinition" in one.problems().get("policies unread", ""))
    kube.policy({**FROM_B, "apiVersion": "networking.k8s.io/v1"})
    until("NetworkPolicies are enforced without", lambda: not any(asks(kube, field, "x/c", "x/a")))
    kube.create(CRDS, crd(version))
    until("it is there", lambda: "policies unread" not in one.problems(), 60)
    accept = {"name": "c", "action": "Accept", "from": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "c"}}}}]}  # fmt: skip
    spec = {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "ingress": [accept]}
    body = {
        "apiVersion": f"{GROUP}/{version}",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "let-c"},
        "spec": spec,
    }
    path = f"/apis/{GROUP}/{version}/{PLURAL}"
    until("the server takes them", lambda: created(kube, path, body), 20)
    until("it is accepted before", lambda: all(asks(kube, field, "x/c", "x/a")))
    kube.kube.ask("PATCH", f"{path}/let-c", {"spec": {"ingress": [{**accept, "action": "Deny"}]}}, "application/merge-patch+json")  # fmt: skip
    until("and denied", lambda: not any(asks(kube, field, "x/c", "x/b")))
    assert one.status()["policy"]["cluster_wide"] == 1
    kube.kube.ask("DELETE", f"{CRDS}/{PLURAL}.{GROUP}")
    until("they went with it", lambda: all(asks(kube, field, "x/c", "x/b")), 60)
    assert not any(asks(kube, field, "x/c", "x/a")), "the NetworkPolicy is enforced still"
    until("it says what lacks", lambda: "CustomResourceDefinition" in one.problems().get("policies unread", ""), 60)
    kube.config_file("overlayd.json", {"cluster-network-policy": False})
    until("nobody asks any more", lambda: "policies unread" not in one.problems(), 60)


def created(kube, path: str, body: dict) -> bool:
    try:
        kube.create(path, body)
    except AssertionError:
        return False
    return True
