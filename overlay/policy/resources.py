"""Objects of the Kubernetes API, as JSON or YAML was read, into the values of model.py. Pure.

Each raises ValueError where an object is not as the API demands, with the field and what it must be: the API server refuses
such an object itself, a file of a standalone node is judged here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

from lease.model import Prefix
from overlay.policy.model import (
    DOES_NOT_EXIST,
    EXISTS,
    IN,
    LAST_PORT,
    NOT_IN,
    PROTOCOLS,
    Block,
    ContainerPort,
    Expression,
    Labels,
    Pod,
    PodPeer,
    Policy,
    Port,
    Rule,
    Selector,
    in_order,
)

NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""A label that the API server gives each Namespace."""
_MAPPED = bytes(10) + b"\xff\xff"
_ENDED = ("Succeeded", "Failed")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_TYPES = ("Ingress", "Egress")


def pod_of(item: Mapping[str, Any]) -> Pod:
    """A Pod. Raises ValueError."""
    meta, spec, status = item["metadata"], item.get("spec") or {}, item.get("status") or {}
    texts = [each.get("ip", "") for each in status.get("podIPs") or ()] or [status.get("podIP") or ""]
    named = [
        ContainerPort(
            text_of(port["name"], "ports.name"),
            _protocol(port.get("protocol"), "ports.protocol"),
            port_number(port["containerPort"], "containerPort"),
        )
        for container in _containers(spec)
        for port in container.get("ports") or ()
        if port.get("name")
    ]
    namespace = str(meta.get("namespace") or "default")
    return Pod(
        f"{namespace}/{meta['name']}",
        namespace,
        str(spec.get("nodeName") or ""),
        _labels(meta),
        in_order(packed(text) for text in texts if text),
        tuple(named),
        bool(spec.get("hostNetwork")) or status.get("phase") in _ENDED,
        _owner(meta),
    )


def _owner(meta: Mapping[str, Any]) -> str:
    """What controls a pod: `deployment/web`, by the name that a Deployment gives its ReplicaSet (pkg/controller/deployment);
    `statefulset/db`..."""
    for each in meta.get("ownerReferences") or ():
        if each.get("controller"):
            kind, name = str(each.get("kind") or ""), str(each["name"])
            template = (meta.get("labels") or {}).get("pod-template-hash", "")
            if kind == "ReplicaSet" and template and name.endswith(f"-{template}"):
                return f"deployment/{name.removesuffix(f'-{template}')}"
            return f"{kind.lower()}/{name}"
    return ""


def _containers(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that serve for as long as the pod lives: an init container that is restarted always is one (a sidecar)."""
    sidecars = [each for each in spec.get("initContainers") or () if each.get("restartPolicy") == "Always"]
    return [*(spec.get("containers") or ()), *sidecars]


def namespace_of(item: Mapping[str, Any]) -> Labels:
    """The labels of a Namespace."""
    labels = _labels(item["metadata"])
    return labels if NAMESPACE_NAME in labels else {**labels, NAMESPACE_NAME: str(item["metadata"]["name"])}


def policy_of(item: Mapping[str, Any]) -> Policy:
    """A NetworkPolicy. Raises ValueError."""
    meta, spec = item["metadata"], mapping(item.get("spec"), "spec")
    types = spec.get("policyTypes")
    if types is None or types == []:
        types = ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    for each in types:
        if each not in _TYPES:
            raise ValueError(f"spec.policyTypes: {shown(each)} must be Ingress or Egress")
    ingress = _rules(spec, "ingress", "from") if "Ingress" in types else None
    egress = _rules(spec, "egress", "to") if "Egress" in types else None
    name, namespace = str(meta["name"]), str(meta.get("namespace") or "default")
    subject = PodPeer(None, selector_of(spec.get("podSelector"), "spec.podSelector"))
    return Policy(namespace, name, subject, ingress, egress)


def _rules(spec: Mapping[str, Any], direction: str, peers: str) -> tuple[Rule, ...]:
    where = f"spec.{direction}"
    return tuple(
        Rule(
            _peers(mapping(each, f"{where}[{place}]").get(peers), f"{where}[{place}].{peers}"),
            ports_of(each.get("ports"), f"{where}[{place}].ports"),
        )
        for place, each in enumerate(listed(spec.get(direction), where))
    )


def _peers(items: Any, where: str) -> tuple[PodPeer | Block, ...] | None:
    """None, where the rule is for anybody."""
    return tuple(_peer(each, f"{where}[{place}]") for place, each in enumerate(listed(items, where))) or None


def _peer(item: Any, where: str) -> PodPeer | Block:
    item = mapping(item, where)
    block, pods, namespaces = (item.get(name) for name in ("ipBlock", "podSelector", "namespaceSelector"))
    if block is not None:
        if pods is not None or namespaces is not None:
            raise ValueError(f"{where}: ipBlock must stand alone, without podSelector and namespaceSelector")
        return _block(mapping(block, f"{where}.ipBlock"), f"{where}.ipBlock")
    if pods is None and namespaces is None:
        raise ValueError(f"{where}: must have a podSelector, a namespaceSelector or an ipBlock")
    return PodPeer(
        None if namespaces is None else selector_of(namespaces, f"{where}.namespaceSelector"),
        None if pods is None else selector_of(pods, f"{where}.podSelector"),
    )


def _block(item: Mapping[str, Any], where: str) -> Block:
    cidr = prefix_of(item.get("cidr"), f"{where}.cidr")
    excepted = [
        prefix_of(each, f"{where}.except[{place}]")
        for place, each in enumerate(listed(item.get("except"), f"{where}.except"))
    ]
    for each in excepted:
        if each.family != cidr.family or not cidr.holds(each.base) or each.length <= cidr.length:
            raise ValueError(f"{where}.except: {each} must be within {cidr}")
    return Block(cidr, tuple(excepted))


def ports_of(items: Any, where: str) -> tuple[Port, ...] | None:
    """None, where the rule is for any."""
    return tuple(_port(each, f"{where}[{place}]") for place, each in enumerate(listed(items, where))) or None


def _port(item: Any, where: str) -> Port:
    item = mapping(item, where)
    protocol, port, end = _protocol(item.get("protocol"), f"{where}.protocol"), item.get("port"), item.get("endPort")
    if isinstance(port, str):
        if end is not None:
            raise ValueError(f"{where}.endPort: must not stand beside a port by name")
        if len(port) > 15 or not _PORT_NAME.fullmatch(port):
            raise ValueError(f"{where}.port: {shown(port)} must be a port's name: at most 15 of a-z, 0-9 and -")
        return Port(protocol, name=port)
    if port is None:
        if end is not None:
            raise ValueError(f"{where}.endPort: must stand beside a port")
        return Port(protocol)
    first = port_number(port, f"{where}.port")
    last = first if end is None else port_number(end, f"{where}.endPort")
    if last < first:
        raise ValueError(f"{where}.endPort: {last} must not be below the port, {first}")
    return Port(protocol, first, last)


def selector_of(item: Any, where: str) -> Selector:
    """A LabelSelector; absent, it matches everything. Raises ValueError."""
    item = mapping(item or {}, where)
    labels = mapping(item.get("matchLabels") or {}, f"{where}.matchLabels")
    found = [Expression(text_of(key, where), IN, (text_of(value, where),)) for key, value in labels.items()]
    for place, expression in enumerate(listed(item.get("matchExpressions"), f"{where}.matchExpressions")):
        here = f"{where}.matchExpressions[{place}]"
        each = mapping(expression, here)
        operator = each.get("operator")
        values = tuple(
            sorted({text_of(value, f"{here}.values") for value in listed(each.get("values"), f"{here}.values")})
        )
        if operator not in (IN, NOT_IN, EXISTS, DOES_NOT_EXIST):
            raise ValueError(f"{here}.operator: {shown(operator)} must be In, NotIn, Exists or DoesNotExist")
        if (operator in (IN, NOT_IN)) != bool(values):
            need = "must name some" if operator in (IN, NOT_IN) else "must be empty"
            raise ValueError(f"{here}.values: {need} with {operator}")
        found.append(Expression(text_of(each.get("key"), f"{here}.key"), operator, values))
    return tuple(sorted(set(found)))


def packed(text: str) -> bytes:
    """An address. Raises ValueError."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{shown(text)} must be an IP address") from error


def _labels(meta: Mapping[str, Any]) -> Labels:
    return {str(key): str(value) for key, value in (meta.get("labels") or {}).items()}


def prefix_of(text: Any, where: str) -> Prefix:
    """Host bits are allowed in the API, and mean nothing (Go's net.ParseCIDR)."""
    try:
        address, _, length = str(text).partition("/")
        if ":" not in address:  # Kubernetes takes leading zeros as decimal (ParseCIDRSloppy)
            address = ".".join(str(int(part)) for part in address.split("."))
        elif length.isdecimal() and int(length) >= 96 and (mapped := packed(address))[:12] == _MAPPED:
            address, length = ".".join(map(str, mapped[12:])), str(int(length) - 96)  # ::ffff:10.0.0.0/104 (RFC 4291)
        family = 6 if ":" in address else 4
        bits, base = (128 if family == 6 else 32), int.from_bytes(packed(address), "big")
        if not length.isdecimal() or int(length) > bits:
            raise ValueError
        return Prefix(family, base >> (bits - int(length)) << (bits - int(length)), int(length))
    except ValueError as error:
        raise ValueError(f"{where}: {shown(text)} must be a prefix like 10.0.0.0/8 or fd00::/64") from error


def _protocol(value: Any, where: str) -> int:
    if value is None:
        return PROTOCOLS["TCP"]
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise ValueError(f"{where}: {shown(value)} must be TCP, UDP or SCTP")
    return PROTOCOLS[value]


def port_number(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LAST_PORT:
        raise ValueError(f"{where}: {shown(value)} must be a port number, 1 to {LAST_PORT}")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {shown(value)} must be an object")
    return value


def listed(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{where}: {shown(value)} must be a list")
    return value


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {shown(value)} must be text")
    return value


def shown(value: Any) -> str:
    return repr(value)[:60]
