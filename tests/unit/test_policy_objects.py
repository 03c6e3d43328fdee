"""Objects that are not as the API demands: each is refused with what is wrong, and nothing else happens."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lease.kube.changes import Changed, Listed, Unusable
from overlay.cni.results import CniResult
from overlay.policy.cluster import Cluster
from overlay.policy.cluster_wide import cluster_policy_of
from overlay.policy.compile import compile_node
from overlay.policy.feeds import CLUSTER_WIDE, LARGEST, NAMESPACES, PODS, POLICIES, FolderFeed, read_all
from overlay.policy.model import Rule
from overlay.policy.resources import packed, pod_of, policy_of
from overlay.policy.snapshot import Snapshot, as_json, from_json

GOOD = {"podSelector": {}}


def policy(**spec):
    return {"metadata": {"namespace": "x", "name": "p"}, "spec": {**GOOD, **spec}}


BAD = {
    "a type that is none": (policy(policyTypes=["Egres"]), "spec.policyTypes: 'Egres' must be Ingress or Egress"),
    "a spec that is none": ({"metadata": {"name": "p"}, "spec": 7}, "spec: 7 must be an object"),
    "rules that are no list": (policy(ingress={}), "spec.ingress: {} must be a list"),
    "an empty peer": (policy(ingress=[{"from": [{}]}]), "spec.ingress[0].from[0]: must have a podSelector"),
    "a block beside a selector": (
        policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]),
        "spec.ingress[0].from[0]: ipBlock must stand alone",
    ),
    "a block that is none": (
        policy(egress=[{"to": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}], policyTypes=["Egress"]),
        "spec.egress[0].to[0].ipBlock.cidr: '10.0.0.0/33' must be a prefix",
    ),
    "an exception outside": (
        policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]),
        "spec.ingress[0].from[0].ipBlock.except: 11.0.0.0/16 must be within 10.0.0.0/8",
    ),
    "a port above all": (policy(ingress=[{"ports": [{"port": 65536}]}]), "65536 must be a port number"),
    "a port that is true": (policy(ingress=[{"ports": [{"port": True}]}]), "True must be a port number"),
    "a protocol": (policy(ingress=[{"ports": [{"protocol": "ICMP"}]}]), "'ICMP' must be TCP, UDP or SCTP"),
    "an end without a beginning": (policy(ingress=[{"ports": [{"endPort": 5}]}]), "endPort: must stand beside a port"),
    "an end before it": (policy(ingress=[{"ports": [{"port": 9, "endPort": 5}]}]), "5 must not be below the port, 9"),
    "an end of a name": (policy(ingress=[{"ports": [{"port": "web", "endPort": 5}]}]), "must not stand beside a port by name"),
    "an operator": (
        policy(podSelector={"matchExpressions": [{"key": "a", "operator": "Is"}]}), "'Is' must be In, NotIn, Exists",
    ),
    "In without values": (
        policy(podSelector={"matchExpressions": [{"key": "a", "operator": "In"}]}), "values: must name some with In",
    ),
    "Exists with values": (
        policy(podSelector={"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}),
        "values: must be empty with Exists",
    ),
    "a label that is a number": (policy(podSelector={"matchLabels": {"a": 7}}), "7 must be text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_is_refused_with_what_is_wrong(name):
    item, words = BAD[name]
    with pytest.raises(ValueError) as refused:
        policy_of(item)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        ({}, True, False),
        ({"egress": []}, True, False),
        ({"egress": [{}]}, True, True),
        ({"policyTypes": ["Egress"]}, False, True),
        ({"policyTypes": [], "egress": [{}]}, True, True),
        ({"policyTypes": ["Ingress"], "egress": [{}]}, True, False),
    ],
)
def test_policy_types_default(spec, ingress, egress):
    """Ingress always, Egress where there is at least one rule of it."""
    found = policy_of(policy(**spec))
    assert (found.ingress is not None, found.egress is not None) == (ingress, egress)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["10.0.0.0/8", "In", "TCP", "x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "metadata", "spec", "status", "name", "namespace", "labels", "podSelector", "namespaceSelector", "matchLabels",
            "matchExpressions", "key", "operator", "values", "ingress", "egress", "from", "to", "ports", "port", "endPort",
            "protocol", "ipBlock", "cidr", "except", "policyTypes", "podIPs", "ip", "containers", "containerPort", "kind",
        ]),
        inner, max_size=6,
    ),
    max_leaves=30,
)  # fmt: skip
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What a list or a watch takes for an object that cannot be used (lease/kube/objects.py)."""


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status", "kind"]), values, max_size=4))
@settings(max_examples=400, deadline=None)
def test_whatever_an_object_is_it_is_used_or_refused(item):
    for decode, resource in ((policy_of, POLICIES), (pod_of, PODS), (cluster_policy_of, CLUSTER_WIDE)):
        try:
            made = decode(item)
        except MALFORMED as error:
            made = Unusable(str(error))
        cluster = Cluster("node1", alone=True)
        cluster.enforce(True, "off")
        cluster.take(Listed(NAMESPACES, 1, {"x": {}}))
        cluster.take(Listed(resource, 1, {"x/p": made}))
        cluster.take(Changed(resource, 2, {"x/p": made, "x/q": None}))
        compiled = compile_node(cluster.index, cluster.policies, "node1")
        assert compiled.isolated is not None
    read_all({"a.json": json.dumps(item).encode()}, {})


def test_what_a_snapshot_says_comes_back():

    item = policy(
        ingress=[
            {
                "from": [
                    {"podSelector": {"matchLabels": {"a": "b"}}},
                    {"ipBlock": {"cidr": "fd00::/64", "except": ["fd00::/65"]}},
                ]
            },
            {"ports": [{"port": "web"}, {"port": 5, "endPort": 9}]},
        ],
        egress=[{"to": [{"namespaceSelector": {}}]}],
    )
    pod = {
        "metadata": {"namespace": "x", "name": "a", "labels": {"a": "b"}},
        "spec": {"nodeName": "n", "containers": [{"ports": [{"name": "web", "containerPort": 5}]}]},
        "status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
    }
    both = policy_of(item), cluster_policy_of(wide({**RULE, "to": [{"nodes": {}}, {"networks": ["fd00::/8"]}]}))
    one = Snapshot(7, "n", True, True, (pod_of(pod),), {"x": {"k": "v"}}, both, {"x/bad": "why"}, {4: ((1, 2),), 6: ()})
    assert from_json(json.loads(json.dumps(as_json(one)))) == one


@pytest.mark.parametrize(
    "text", ["a: !!bool foo", "a: !!timestamp foo", "a: !!int ''", "kind: List\nitems: 5", "{", "kind: []"]
)
def test_whatever_a_file_is_the_others_count(text):
    good = json.dumps({"kind": "NetworkPolicy", **policy()}).encode()
    found = read_all({"a.yaml": text.encode(), "b.yaml": good}, {})
    assert "x/p" in found[POLICIES]
    assert isinstance(found[POLICIES]["x/p"], type(policy_of(policy())))
    assert len(found[POLICIES]) == 2, "and the other is named"
    kept = read_all({"a.yaml": text.encode()}, {"a.yaml": [json.loads(good)]})
    assert "x/p" in kept[POLICIES] or text in ("kind: []", "kind: List\nitems: 5"), "what it said last stays"


def test_what_is_no_file_is_named_and_the_others_count(tmp_path):
    (tmp_path / "good.yaml").write_text(json.dumps({"kind": "NetworkPolicy", **policy()}))
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(LARGEST + 1)
    told: list = []
    feed = FolderFeed(str(tmp_path), told.append)
    feed.look()
    feed.look()  # what is the same a moment later is believed
    found = {event.resource: event.items for event in told}[POLICIES]
    assert not isinstance(found.pop("x/p"), Unusable)
    assert {key: each.reason for key, each in found.items()} == {
        "folder.yaml": "folder.yaml: not a regular file",
        "pipe.yaml": "pipe.yaml: not a regular file",
        "gone.yaml": "gone.yaml: No such file or directory",
        "large.yaml": "large.yaml: larger than 16 MiB",
    }


@pytest.mark.parametrize(
    ("text", "means"),
    [("010.0.0.0/8", "10.0.0.0/8"), ("::ffff:10.0.0.0/104", "10.0.0.0/8"), ("10.1.2.3/8", "10.0.0.0/8")],
)
def test_blocks_mean_what_kubernetes_takes_them_for(text, means):
    found = policy_of(policy(ingress=[{"from": [{"ipBlock": {"cidr": text}}]}]))
    assert str(found.ingress[0].peers[0].cidr) == means


def result_of(pod: str, address: str) -> CniResult:
    return CniResult(0, {4: frozenset({int.from_bytes(packed(address), "big")}), 6: frozenset()}, pod)


def test_an_address_that_another_pod_was_given_is_no_more_the_first_ones():
    """Whatever comes first: the API goes on to say that the old pod has it, until it is gone."""
    item = {
        "metadata": {"namespace": "x", "name": "old"}, "spec": {"nodeName": "node1"}, "status": {"podIPs": [{"ip": "10.0.0.5"}]},
    }  # fmt: skip
    new = {"metadata": {"namespace": "x", "name": "new"}, "spec": {"nodeName": "node1"}}
    cluster = Cluster("node1", alone=False)
    cluster.take(Listed(PODS, 1, {"x/old": pod_of(item)}))
    cluster.results([result_of("x/old", "10.0.0.5")])
    cluster.results([])
    cluster.take(Changed(PODS, 2, {"x/new": pod_of(new)}))
    cluster.results([result_of("x/new", "10.0.0.5")])
    having = {pod.key: pod.addresses for pod in cluster.index}
    assert having == {"x/old": (), "x/new": (packed("10.0.0.5"),)}


def test_a_policy_that_becomes_unusable_stays_as_it_was():
    cluster = Cluster("node1", alone=False)
    good = policy_of(policy())
    cluster.take(Listed(POLICIES, 1, {"x/p": good}))
    cluster.take(Changed(POLICIES, 2, {"x/p": Unusable("why")}))
    assert (cluster.policies, cluster.refused) == ([good], {"x/p": "why"})
    cluster.take(Listed(POLICIES, 3, {"x/p": Unusable("why")}))
    assert (cluster.policies, cluster.refused) == ([good], {"x/p": "why"})
    cluster.take(Changed(POLICIES, 4, {"x/p": None}))
    assert (cluster.policies, cluster.refused) == ([], {})


# --- cluster-wide ones

RULE = {"action": "Accept", "to": [{"networks": ["10.0.0.0/8"]}]}


def wide(*egress, **spec):
    base = {"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "egress": list(egress)}
    return {"metadata": {"name": "c"}, "spec": {**base, **spec}}


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (wide(tier="Top"), "spec.tier: 'Top' must be Admin or Baseline"),
        (wide(priority=1001), "spec.priority: 1001 must be a number, 0 to 1000"),
        (wide(priority=True), "spec.priority: True must be a number"),
        (wide(subject={"nodes": {}}), "spec.subject: nodes is not known here; it must be namespaces or pods"),
        (wide(subject={}), "spec.subject: a peer of no kind is not known here; it must be"),
        (wide({**RULE, "action": "Allow"}), "spec.egress[0].action: 'Allow' must be Accept, Deny or Pass"),
        (wide({**RULE, "to": []}), "spec.egress[0].to: must name at least one"),
        (wide({**RULE, "protocols": []}), "spec.egress[0].protocols: must name at least one, or be left out"),
        (wide({**RULE, "to": [{"networks": ["x"]}]}), "spec.egress[0].to[0].networks[0]: 'x' must be a prefix"),
        (wide({**RULE, "to": [{"networks": ["::/0"], "pods": {}}]}), "must have one of networks, pods alone"),
        (
            wide({**RULE, "protocols": [{"tcp": {"destinationPort": {"range": {"start": 9, "end": 9}}}}]}),
            "spec.egress[0].protocols[0].tcp.destinationPort.range.end: 9 must be above the start, 9",
        ),
        (
            wide({**RULE, "protocols": [{"udp": {"destinationPort": {"number": 0}}}]}),
            "protocols[0].udp.destinationPort.number: 0 must be a port number",
        ),
    ],
)
def test_a_cluster_policy_that_is_not_as_the_api_demands_is_refused_with_what_is_wrong(item, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        cluster_policy_of(item)


@pytest.mark.parametrize(
    "unknown",
    [
        {"to": [{"domainNames": ["a.b"]}, {"networks": ["10.0.0.0/8"]}]},
        {"to": [{"nodes": {}}, {"networks": ["10.0.0.0/8"]}]},
        {"to": [{}, {"networks": ["10.0.0.0/8"]}]},
    ],
)
def test_a_peer_of_another_version_fails_closed(unknown):
    """ "For Accept rules: treat the rule as matching no traffic. For Deny and Pass rules: as a 'Deny all' rule." """
    accept, deny, passing = (
        cluster_policy_of(wide({**RULE, **unknown, "action": action})) for action in ("Accept", "Deny", "Pass")
    )
    assert accept.egress == (Rule((), None, "Accept"),), "nor by its other peers"
    for made in (deny, passing):
        assert made.egress == (Rule(None, None, "Deny"),)
    assert all("not known here" in made.notes[0] for made in (accept, deny, passing))


@pytest.mark.parametrize("protocol", [{"icmp": {}}, {"destinationNamedPort": ""}, {}])
def test_a_protocol_of_another_version_fails_closed(protocol):
    accept, deny = (
        cluster_policy_of(wide({**RULE, "protocols": [protocol], "action": action})) for action in ("Accept", "Deny")
    )
    assert accept.egress[0].peers == ()
    assert deny.egress == (Rule(None, None, "Deny"),)


def test_an_own_namespace_s_policy_never_has_the_name_of_a_cluster_s():
    """A namespace's admin chooses both names."""
    mine = policy_of({"metadata": {"namespace": "clusternetworkpolicy", "name": "c"}, "spec": GOOD})
    assert mine.key != cluster_policy_of(wide()).key
