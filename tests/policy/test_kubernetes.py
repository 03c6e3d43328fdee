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
        "enforced": False, "policies": 0, "refused": {}, "pods": 0, "isolated_addresses": 0, "generation": 0,
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
    assert said == "1 NetworkPolicies exist, and none is enforced: --network-policy is false"
    kube.config_file("overlayd.json", {})
    until("others are kept out again", lambda: not any(asks(kube, field, "x/c", "x/a")))
    assert "policies not enforced" not in kube.agents[0].problems()
