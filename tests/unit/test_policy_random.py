"""Random clusters and policies: what is compiled judges as the specification reads, and what changes alone ends in what is
compiled anew."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lease.kube.changes import Changed, Listed
from lease.model import prefix
from overlay.kernel.nftables.content import takes_away
from overlay.policy.cluster import Cluster
from overlay.policy.cluster_wide import cluster_policy_of
from overlay.policy.compile import Compiled, compile_node, with_pods
from overlay.policy.explain import Flow, judge
from overlay.policy.feeds import CLUSTER_WIDE, CONTRACTS, NAMESPACES, PODS, POLICIES
from overlay.policy.groups import LABEL, MODES, Contract, contract_of
from overlay.policy.model import EGRESS, INGRESS, PROTOCOLS
from overlay.policy.resources import namespace_of, packed, pod_of, policy_of
from overlay.policy.table import Maker
from tests.support.policy import Evaluator

SPACES = ("x", "y", "z")
KEYS, VALUES = ("app", LABEL), ("a", "b")
PORTS = (80, 81, 8080)
NODES = ("node1", "node2")

labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)
expressions = st.one_of(
    st.builds(
        lambda key, operator, values: {"key": key, "operator": operator, "values": sorted(values)},
        st.sampled_from(KEYS), st.sampled_from(["In", "NotIn"]), st.sets(st.sampled_from(VALUES), min_size=1),
    ),
    st.builds(
        lambda key, operator: {"key": key, "operator": operator},
        st.sampled_from(KEYS), st.sampled_from(["Exists", "DoesNotExist"]),
    ),
)  # fmt: skip
selectors = st.fixed_dictionaries(
    {}, optional={"matchLabels": labels, "matchExpressions": st.lists(expressions, max_size=2)}
)


@st.composite
def blocks(draw: Any) -> dict[str, Any]:
    six = draw(st.booleans())
    base = int(ipaddress.ip_address("fd00::")) if six else int(ipaddress.ip_address("10.0.0.0"))
    bits = 128 if six else 32
    length = draw(st.integers(bits - 5, bits))
    cidr = ipaddress.ip_network((base + draw(st.integers(0, 31)), length), strict=False)
    inner = list(cidr.subnets(new_prefix=bits))[:4] if length < bits else []
    excepted = draw(st.lists(st.sampled_from(inner), max_size=2, unique=True)) if inner else []
    return {"cidr": str(cidr), "except": [str(each) for each in excepted]}


peers = st.one_of(
    st.builds(lambda block: {"ipBlock": block}, blocks()),
    st.builds(lambda pods: {"podSelector": pods}, selectors),
    st.builds(lambda spaces: {"namespaceSelector": spaces}, selectors),
    st.builds(lambda pods, spaces: {"podSelector": pods, "namespaceSelector": spaces}, selectors, selectors),
)
protocols = st.sampled_from(["TCP", "UDP"])
ports = st.one_of(
    st.builds(lambda protocol: {"protocol": protocol}, protocols),
    st.builds(lambda number: {"port": number}, st.sampled_from(PORTS)),
    st.builds(lambda protocol, name: {"protocol": protocol, "port": name}, protocols, st.sampled_from(["http", "dns"])),
    st.builds(lambda protocol: {"protocol": protocol, "port": 80, "endPort": 81}, protocols),
)


def rules(direction: str) -> Any:
    return st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "from" if direction == "ingress" else "to": st.lists(peers, max_size=2),
                "ports": st.lists(ports, max_size=2),
            },
        ),
        max_size=2,
    )


@st.composite
def policies(draw: Any, number: int) -> dict[str, Any]:
    spec = {"podSelector": draw(selectors)}
    for direction in ("ingress", "egress"):
        if draw(st.booleans()):
            spec[direction] = draw(rules(direction))
    types = draw(st.sampled_from([None, ["Ingress"], ["Egress"], ["Ingress", "Egress"]]))
    if types is not None:
        spec["policyTypes"] = types
    return {"metadata": {"namespace": draw(st.sampled_from(SPACES)), "name": f"p{number}"}, "spec": spec}


wide_pods = st.one_of(
    st.builds(lambda spaces: {"namespaces": spaces}, selectors),
    st.builds(
        lambda spaces, chosen: {"pods": {"namespaceSelector": spaces, "podSelector": chosen}}, selectors, selectors
    ),
)
wide_peers = {
    "ingress": wide_pods,
    "egress": st.one_of(
        wide_pods,
        st.builds(
            lambda some: {"networks": [each["cidr"] for each in some]}, st.lists(blocks(), min_size=1, max_size=2)
        ),
    ),
}
destinations = st.one_of(
    st.builds(lambda number: {"number": number}, st.sampled_from(PORTS)),
    st.just({"range": {"start": 80, "end": 81}}),
)
wide_protocols = st.one_of(
    st.builds(lambda name, port: {name: {"destinationPort": port}}, st.sampled_from(["tcp", "udp"]), destinations),
    st.builds(lambda name: {"destinationNamedPort": name}, st.sampled_from(["http", "dns"])),
)  # fmt: skip


@st.composite
def wide_policies(draw: Any, number: int) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "tier": draw(st.sampled_from(["Admin", "Baseline"])),
        "priority": draw(st.integers(0, 2)),
        "subject": draw(wide_pods),
    }
    for direction, ends in (("ingress", "from"), ("egress", "to")):
        if draw(st.booleans()):
            rule = st.fixed_dictionaries(
                {
                    "action": st.sampled_from(["Accept", "Deny", "Pass"]),
                    ends: st.lists(wide_peers[direction], min_size=1, max_size=2),
                },
                optional={"protocols": st.lists(wide_protocols, min_size=1, max_size=2)},
            )
            spec[direction] = draw(st.lists(rule, max_size=3))
    return {"metadata": {"name": f"c{number}"}, "spec": spec}


@st.composite
def pods(draw: Any, number: int, places: int = 0) -> dict[str, Any]:
    """places: so many addresses there are for all pods; 0: each has its own."""
    named = [
        {"name": name, "containerPort": draw(st.sampled_from(PORTS)), "protocol": protocol}
        for name, protocol in (("http", "TCP"), ("dns", "UDP"))
        if draw(st.booleans())
    ]
    at = draw(st.integers(1, places)) if places else number + 1
    addresses = [f"10.0.0.{at}", f"fd00::{at:x}"]
    shown = addresses if draw(st.booleans()) else addresses[:1]
    phase = draw(st.sampled_from(["Running", "Running", "Running", "Succeeded"]))
    return {
        "metadata": {"namespace": draw(st.sampled_from(SPACES)), "name": f"pod{number}", "labels": draw(labels)},
        "spec": {"nodeName": draw(st.sampled_from(NODES)), "containers": [{"ports": named}], "hostNetwork": draw(st.integers(0, 9)) == 0},
        "status": {"phase": phase, "podIPs": [{"ip": each} for each in shown]},
    }  # fmt: skip


@st.composite
def worlds(draw: Any) -> tuple[dict[str, dict[str, str]], list[Any], list[Any], list[Any]]:
    spaces = {name: {**draw(labels), "kubernetes.io/metadata.name": name} for name in SPACES}
    some = [draw(pods(number)) for number in range(draw(st.integers(1, 6)))]
    wide = [draw(wide_policies(number)) for number in range(draw(st.integers(0, 3)))]
    return spaces, some, [draw(policies(number)) for number in range(draw(st.integers(0, 4)))], wide


def key(item: dict[str, Any]) -> str:
    return f"{item['metadata']['namespace']}/{item['metadata']['name']}"


contracts = st.builds(
    lambda provider, consumer, some: {"spec": {"provider": provider, "consumer": consumer, "ports": some}},
    *[st.sampled_from(["a", "b", "namespace:x", "namespace:y", "*"])] * 2, st.lists(ports, max_size=2),
)  # fmt: skip


def contract(item: dict[str, Any], number: int) -> Contract:
    return contract_of({"metadata": {"name": f"k{number}"}, **item})


def known(node: str, spaces, some, rules_, wide, groups: str = "off") -> Cluster:
    cluster = Cluster(node, alone=False)
    cluster.enforce(True, groups, SUBNETS)
    cluster.take(Listed(CLUSTER_WIDE, 1, {each["metadata"]["name"]: cluster_policy_of(each) for each in wide}))
    cluster.take(Listed(POLICIES, 1, {key(each): policy_of(each) for each in rules_}))
    cluster.take(Listed(NAMESPACES, 1, {name: namespace_of({"metadata": {"name": name, "labels": given}}) for name, given in spaces.items()}))  # fmt: skip
    cluster.take(Listed(PODS, 1, {key(each): pod_of(each) for each in some}))
    return cluster


@given(worlds())
@settings(max_examples=120, deadline=None)
def test_it_judges_as_the_specification_reads(world):
    spaces, some, _, _ = world
    slow = Evaluator(*world)
    compiled = {node: compile_node((cluster := known(node, *world)).index, cluster.policies, node) for node in NODES}
    addresses = [each["ip"] for pod in some for each in pod["status"]["podIPs"]]
    ends = [*addresses, "10.0.0.30", "fd00::1e"]
    for source in ends:
        for target in ends:
            if (":" in source) != (":" in target) or source == target:
                continue
            for protocol in ("TCP", "UDP"):
                for port in PORTS:
                    flow = Flow(packed(source), packed(target), PROTOCOLS[protocol], port)
                    for direction, own in ((EGRESS, source), (INGRESS, target)):
                        pod = slow.pod_at(own)
                        if pod is not None:
                            found = judge(compiled[pod["spec"]["nodeName"]], direction, flow)
                            assert found.known
                            assert found.allowed == slow.one_way(direction, source, target, protocol, port)


SUBNETS = (prefix("10.0.0.0/24"), prefix("fd00::/64"))
ADDRESSES = [packed(f"10.0.0.{number}") for number in range(1, 9)]
FLOWS = [
    (direction, Flow(source, target, PROTOCOLS["TCP"], port))
    for direction in (EGRESS, INGRESS) for source in ADDRESSES for target in ADDRESSES if source != target
    for port in (80, 8080)
]  # fmt: skip


def passes(compiled, way) -> bool:
    verdict = judge(compiled, *way)
    return verdict.known and verdict.allowed


def evolving(world, data) -> Iterator[tuple[Compiled, Compiled]]:
    """A cluster that changes by chance: what is compiled of each change alone, and of the whole anew."""
    groups = data.draw(st.sampled_from(MODES))
    cluster = known("node1", *world, groups=groups)
    compiled = compile_node(cluster.index, cluster.policies, "node1")
    cluster.taken()
    yield compiled, compiled
    there = {key(pod): pod for pod in world[1]}
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(
            st.sampled_from(["pod", "pod", "pod", "gone", "policy", "wide", "contract", "groups", "namespace"])
        )
        if kind == "pod":
            pod = data.draw(pods(data.draw(st.integers(0, 7)), 4))
            there[key(pod)] = pod
            cluster.take(Changed(PODS, 2, {key(pod): pod_of(pod)}))
        elif kind == "gone" and there:
            name = data.draw(st.sampled_from(sorted(there)))
            del there[name]
            cluster.take(Changed(PODS, 2, {name: None}))
        elif kind == "policy":
            policy = data.draw(policies(data.draw(st.integers(0, 4))))
            cluster.take(Changed(POLICIES, 2, {key(policy): policy_of(policy)}))
        elif kind == "wide":
            wide = data.draw(wide_policies(data.draw(st.integers(0, 3))))
            cluster.take(Changed(CLUSTER_WIDE, 2, {wide["metadata"]["name"]: cluster_policy_of(wide)}))
        elif kind == "contract":
            number = data.draw(st.integers(0, 2))
            cluster.take(Changed(CONTRACTS, 2, {f"k{number}": contract(data.draw(contracts), number)}))
        elif kind == "groups":
            groups = data.draw(st.sampled_from(MODES))
            cluster.enforce(True, groups, SUBNETS)
        elif kind == "namespace":
            name = data.draw(st.sampled_from(SPACES))
            made = namespace_of({"metadata": {"name": name, "labels": data.draw(labels)}})
            cluster.take(Changed(NAMESPACES, 2, {name: made}))
        if cluster.whole:
            compiled = compile_node(cluster.index, cluster.policies, "node1")
        else:
            compiled = with_pods(compiled, cluster.index, cluster.changes)
        cluster.taken()
        anew = known("node1", dict(cluster.index.namespaces), [*there.values()], [], [], groups)
        yield compiled, compile_node(anew.index, cluster.policies, "node1")


@given(worlds(), st.data())
@settings(max_examples=120, deadline=None)
def test_what_changes_alone_ends_in_what_is_compiled_anew(world, data):
    maker, before = Maker(), None
    passing: set[tuple[str, Flow]] = set()
    for compiled, fresh in evolving(world, data):
        assert compiled == fresh
        content = maker.content(compiled, SUBNETS, 1)
        assert content == Maker().content(fresh, SUBNETS, 1)
        if less := {flow for flow in passing if not passes(compiled, flow)}:
            assert before is not None
            assert takes_away(before, content, compiled.turned), less
        before, passing = content, {flow for flow in FLOWS if passes(compiled, flow)}
