"""Groups and contracts: within a group all may talk, between groups what a contract says."""

from __future__ import annotations

import itertools
import json

import pytest

from lease.kube.changes import Listed, Unusable
from lease.model import prefix
from overlay.policy.cluster import Cluster
from overlay.policy.compile import compile_node
from overlay.policy.explain import Flow, judge
from overlay.policy.feeds import CONTRACTS, NAMESPACES, PODS, POLICIES, read_all
from overlay.policy.groups import LABEL, contract_of
from overlay.policy.model import EGRESS, INGRESS
from overlay.policy.resources import packed, pod_of

PORTS = (80, 5432)
PODS_THERE = {
    "shop/web-1": ("10.0.0.1", {"app": "web"}, "web"),
    "shop/web-2": ("10.0.0.2", {"app": "web"}, "web"),
    "shop/db-1": ("10.0.0.3", {LABEL: "db"}, "db"),
    "pay/db-2": ("10.0.0.4", {LABEL: "db"}, "db"),
    "pay/api-1": ("10.0.0.5", {}, "api"),
}
GROUPS = {
    "one": {"shop/web-1": "all:", "shop/web-2": "all:", "pay/api-1": "all:"},
    "namespace": {"shop/web-1": "namespace:shop", "shop/web-2": "namespace:shop", "pay/api-1": "namespace:pay"},
    "deployment": {
        "shop/web-1": "deployment:shop/web", "shop/web-2": "deployment:shop/web", "pay/api-1": "statefulset:pay/api",
    },
}  # fmt: skip
"""Of pods without the label, by mode."""


def pod(key: str):
    address, labels, owner = PODS_THERE[key]
    namespace, name = key.split("/")
    template = {"pod-template-hash": "5d4f"} if owner == "web" else {}
    controller = {"kind": "ReplicaSet", "name": f"{owner}-5d4f"} if template else {"kind": "StatefulSet", "name": owner}
    return pod_of({
        "metadata": {
            "namespace": namespace, "name": name, "labels": {**labels, **template},
            "ownerReferences": [{"kind": "Other", "name": "x"}, {**controller, "controller": True}],
        },
        "spec": {"nodeName": "n"}, "status": {"podIPs": [{"ip": address}]},
    })  # fmt: skip


def contract(provider: str, consumer: str, *ports: int):
    spec = {
        "provider": provider,
        "consumer": consumer,
        **({"ports": [{"port": port} for port in ports]} if ports else {}),
    }
    return contract_of({"metadata": {"name": f"{consumer}-to-{provider}"}, "spec": spec})


def passing(mode: str, *contracts) -> set[tuple[str, str, int]]:
    cluster = Cluster("n", alone=False)
    cluster.enforce(False, mode, (prefix("10.0.0.0/24"),))
    cluster.take(Listed(POLICIES, 1, {}))
    cluster.take(Listed(CONTRACTS, 1, {each.name: each for each in contracts}))
    cluster.take(Listed(NAMESPACES, 1, {"shop": {}, "pay": {}}))
    cluster.take(Listed(PODS, 1, {key: pod(key) for key in PODS_THERE}))
    compiled = compile_node(cluster.index, cluster.policies, "n")
    found = set()
    for source, target in itertools.permutations(PODS_THERE, 2):
        for port in PORTS:
            flow = Flow(packed(PODS_THERE[source][0]), packed(PODS_THERE[target][0]), 6, port)
            if all(judge(compiled, way, flow).allowed for way in (EGRESS, INGRESS)):
                found.add((source, target, port))
    return found


@pytest.mark.parametrize("mode", GROUPS)
def test_who_is_in_one_group_and_whom_a_contract_joins(mode):
    group = {key: GROUPS[mode].get(key, "db") for key in PODS_THERE}
    every = [(*pair, port) for pair in itertools.permutations(PODS_THERE, 2) for port in PORTS]
    within = {way for way in every if group[way[0]] == group[way[1]]}
    assert passing(mode) == within
    web = group["shop/web-1"]
    joined = {way for way in every if (group[way[0]], group[way[1]], way[2]) == (web, "db", 5432)}
    assert passing(mode, contract("db", web, 5432)) == within | joined, "the consumer begins, and not the provider"
    assert passing(mode, contract("db", "*")) == within | {way for way in every if group[way[1]] == "db"}
    assert passing("off", contract("db", "*")) == set(every)


def test_who_is_not_known_yet_is_of_no_group_and_nodes_and_others_are_no_pods():
    cluster = Cluster("n", alone=False)
    cluster.enforce(False, "namespace", (prefix("10.0.0.0/24"),))
    cluster.take(Listed(PODS, 1, {key: pod(key) for key in PODS_THERE}))
    nodes = {4: ((int.from_bytes(packed("192.168.1.3"), "big"), int.from_bytes(packed("10.0.0.128"), "big")),)}
    compiled = compile_node(cluster.index, cluster.policies, "n", nodes=nodes)
    web = packed(PODS_THERE["shop/web-1"][0])

    def allowed(way: str, other: str) -> bool:
        ends = (packed(other), web) if way == INGRESS else (web, packed(other))
        return judge(compiled, way, Flow(*ends, 6, 80)).allowed

    for way in (INGRESS, EGRESS):
        assert not allowed(way, "10.0.0.77"), "an address of the pod network that no known pod has"
        assert allowed(way, "10.0.0.128"), "a node's own"
        assert allowed(way, "192.168.1.3")
        assert allowed(way, "8.8.8.8")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"consumer": "a"}, "spec.provider: None must be a group"),
        ({"provider": "a", "consumer": 7}, "spec.consumer: 7 must be a group"),
        ({"provider": "a", "consumer": "b", "ports": [{"port": 0}]}, "spec.ports[0].port: 0 must be a port number"),
    ],
)
def test_a_contract_that_is_none_is_refused(spec, words):
    item = {"kind": "Contract", "metadata": {"name": "c"}, "spec": spec}
    refused = read_all({"a.json": json.dumps(item).encode()}, {})[CONTRACTS]["c"]
    assert isinstance(refused, Unusable)
    assert words in refused.reason
