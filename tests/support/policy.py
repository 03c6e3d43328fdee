"""The truth table of ../shared/netpol, kept in tests/policy/cases.json.gz, and an evaluator written as the specification
reads: slow, and sharing nothing with what it judges but the objects themselves."""

from __future__ import annotations

import gzip
import ipaddress
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CASES = Path(__file__).parents[1] / "policy" / "cases.json.gz"
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


class Step(NamedTuple):
    """One state of a case: its name, the cluster, the policies, and who may talk to whom by `TCP/80`..."""

    name: str
    world: Mapping[str, Any]
    policies: list[dict[str, Any]]
    allowed: Mapping[str, list[str]]
    ingress: Mapping[str, list[str]]
    egress: Mapping[str, list[str]]


def cases() -> Iterator[list[Step]]:
    """Each case, step by step."""
    data = json.loads(gzip.decompress(CASES.read_bytes()))
    for case in data["cases"]:
        yield [
            Step(
                f"{case['id']} {case['description']}, step {number}", step.get("world", data["world"]), step["policies"],
                step["allowed"], step["ingress"], step["egress"],
            )
            for number, step in enumerate(case["steps"])
        ]  # fmt: skip


def sixth(text: str) -> str:
    """The IPv6 address or prefix that stands for an IPv4 one: the same 32 bits at the end of fd00::/96."""
    address, slash, length = text.partition("/")
    made = ipaddress.IPv6Address(int(ipaddress.IPv6Address("fd00::")) | int(ipaddress.IPv4Address(address)))
    return f"{made}/{96 + int(length)}" if slash else str(made)


def in_ipv6(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy with its blocks of IPv6."""

    def turned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: turned(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [turned(each, key) for each in value]
        return sixth(value) if key in ("cidr", "except") else value

    return dict(turned(policy))


def pod_object(pod: Mapping[str, Any], address: str) -> dict[str, Any]:
    """A pod of the table as the API shows it."""
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"namespace": pod["namespace"], "name": pod["name"], "labels": pod["labels"]},
        "spec": {"nodeName": pod["node"], "containers": [{"name": "c", "ports": pod["ports"]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]},
    }


# --- the specification, as it reads


def labels_match(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """ "A label selector is a label query over a set of resources. The result of matchLabels and matchExpressions are ANDed.
    An empty label selector matches all objects." """
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions") or []:
        there, value = each["key"] in labels, labels.get(each["key"])
        fits = {
            "In": there and value in (each.get("values") or []),
            "NotIn": not there or value not in (each.get("values") or []),
            "Exists": there,
            "DoesNotExist": not there,
        }[each["operator"]]
        if not fits:
            return False
    return True


class Evaluator:
    """Says of two addresses whether a policy of either side forbids them to talk."""

    def __init__(
        self, namespaces: Mapping[str, Mapping[str, str]], pods: list[dict[str, Any]], policies: list[dict[str, Any]],
        wide: list[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        """wide: ClusterNetworkPolicies."""
        self.namespaces, self.pods, self.policies, self.wide = namespaces, pods, policies, wide or []

    def pod_at(self, address: str) -> dict[str, Any] | None:
        for pod in self.pods:
            spec, status = pod["spec"], pod["status"]
            if spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
                continue
            if any(ipaddress.ip_address(each["ip"]) == ipaddress.ip_address(address) for each in status["podIPs"]):
                return pod
        return None

    def allowed(self, source: str, target: str, protocol: str, port: int) -> bool:
        return self.one_way("ingress", source, target, protocol, port) and self.one_way(
            "egress", source, target, protocol, port
        )

    def one_way(self, direction: str, source: str, target: str, protocol: str, port: int) -> bool:
        """ "If no policy selects a pod in a direction, all is allowed; else what any of them allows." """
        own, other = (target, source) if direction == "ingress" else (source, target)
        pod = self.pod_at(own)
        if pod is None or source == target:
            return True
        said = self.tier_says("Admin", direction, pod, other, target, protocol, port)
        if said in ("Accept", "Deny"):
            return said == "Accept"
        selecting = [each for each in self.policies if self.selects(each, pod, direction)]
        if not selecting:
            return self.tier_says("Baseline", direction, pod, other, target, protocol, port) != "Deny"
        for policy in selecting:
            for rule in policy["spec"].get(direction) or []:
                peers = rule.get("from" if direction == "ingress" else "to") or []
                ports = rule.get("ports") or []
                if (not peers or any(self.is_peer(peer, policy, other) for peer in peers)) and (
                    not ports or any(self.is_port(each, target, protocol, port) for each in ports)
                ):
                    return True
        return False

    def tier_says(
        self, tier: str, direction: str, pod: Mapping[str, Any], other: str, target: str, protocol: str, port: int
    ) -> str:
        """ "Policies with lower priority values have higher precedence, and are checked before policies with higher priority
        values in the same tier. ... A rule that appears at the top of the rules would take the highest precedence." """
        for policy in sorted((each for each in self.wide if each["spec"]["tier"] == tier), key=_precedence):
            if not self.is_wide_peer(policy["spec"]["subject"], pod):
                continue
            for rule in policy["spec"].get(direction) or []:
                peers = rule["from" if direction == "ingress" else "to"]
                protocols = rule.get("protocols")
                if any(self.is_at(peer, other) for peer in peers) and (
                    protocols is None or any(self.is_protocol(each, target, protocol, port) for each in protocols)
                ):
                    return str(rule["action"])
        return "nothing"

    def is_at(self, peer: Mapping[str, Any], address: str) -> bool:
        if "networks" in peer:
            return any(ipaddress.ip_address(address) in ipaddress.ip_network(each) for each in peer["networks"])
        pod = self.pod_at(address)
        return pod is not None and self.is_wide_peer(peer, pod)

    def is_wide_peer(self, peer: Mapping[str, Any], pod: Mapping[str, Any]) -> bool:
        labels = self.namespaces[pod["metadata"]["namespace"]]
        if "namespaces" in peer:
            return labels_match(peer["namespaces"], labels)
        chosen = peer["pods"]
        return labels_match(chosen["namespaceSelector"], labels) and labels_match(
            chosen["podSelector"], pod["metadata"].get("labels") or {}
        )

    def is_protocol(self, wanted: Mapping[str, Any], target: str, protocol: str, port: int) -> bool:
        if (name := wanted.get("destinationNamedPort")) is not None:
            return self.is_port({"protocol": protocol, "port": name}, target, protocol, port)
        said = wanted.get(protocol.lower())
        if said is None:
            return False
        there = said["destinationPort"]
        first, last = (there["number"],) * 2 if "number" in there else (there["range"]["start"], there["range"]["end"])
        return bool(first <= port <= last)

    def selects(self, policy: Mapping[str, Any], pod: Mapping[str, Any], direction: str) -> bool:
        types = policy["spec"].get("policyTypes") or (
            ["Ingress", "Egress"] if policy["spec"].get("egress") else ["Ingress"]
        )
        return (
            direction.capitalize() in types
            and policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
            and labels_match(policy["spec"].get("podSelector") or {}, pod["metadata"].get("labels") or {})
        )

    def is_peer(self, peer: Mapping[str, Any], policy: Mapping[str, Any], address: str) -> bool:
        if peer.get("ipBlock") is not None:
            there = ipaddress.ip_address(address)
            inside = there in ipaddress.ip_network(peer["ipBlock"]["cidr"], strict=False)
            out = any(there in ipaddress.ip_network(each, strict=False) for each in peer["ipBlock"].get("except") or [])
            return inside and not out
        pod = self.pod_at(address)
        if pod is None:
            return False
        namespace = pod["metadata"]["namespace"]
        if peer.get("namespaceSelector") is None:
            if namespace != policy["metadata"]["namespace"]:
                return False
        elif not labels_match(peer["namespaceSelector"], self.namespaces[namespace]):
            return False
        chosen = peer.get("podSelector")
        return chosen is None or labels_match(chosen, pod["metadata"].get("labels") or {})

    def is_port(self, wanted: Mapping[str, Any], target: str, protocol: str, port: int) -> bool:
        if (wanted.get("protocol") or "TCP") != protocol:
            return False
        number = wanted.get("port")
        if number is None:
            return True
        if isinstance(number, int):
            return number <= port <= (wanted.get("endPort") or number)
        pod = self.pod_at(target)
        return pod is not None and any(
            each.get("name") == number and (each.get("protocol") or "TCP") == protocol and each["containerPort"] == port
            for container in pod["spec"]["containers"]
            for each in container.get("ports") or []
        )


def _precedence(policy: Mapping[str, Any]) -> tuple[int, str]:
    """Of equals the API leaves it open: we take them by name."""
    return policy["spec"]["priority"], policy["metadata"]["name"]
