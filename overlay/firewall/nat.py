"""The nat and forward table as data. Pure; kernel/nft.py loads it.

The rules are flannel's (pkg/trafficmngr/iptables), in its iptables form: its nftables form cannot masquerade host to
pod, and compares kube-proxy's mark whole instead of as a mask (docs/compatibility.md).
"""

from __future__ import annotations

import re
from typing import Any

from lease.families import FAMILIES
from lease.model import Prefix

MARK = 0x4000
"""kube-proxy's masquerade mark; kube-proxy itself masquerades such packets."""
MULTICAST = {4: Prefix(4, 0xE0 << 24, 4), 6: Prefix(6, 0xFF << 120, 8)}
"""By family (RFC 5771, RFC 4291)."""
MIDDLE = 32768
"""Of the ports above and below VXLAN's the larger part is used."""
TABLE_PREFIX = "overlay-"
Rule = dict[str, Any]
_OURS = re.compile(rf"{TABLE_PREFIX}([0-9]{{1,8}})(-[a-z]+)*")


def table_name(network: int) -> str:
    """One table for each network on the node."""
    return f"{TABLE_PREFIX}{network}"


def network_of(name: str) -> int | None:
    """The network whose table (this one, or another of ours) has that name, None where it is no name of ours."""
    found = _OURS.fullmatch(name)
    return int(found[1]) if found is not None else None


def is_table_name(name: str) -> bool:
    """Whether a table is named as `table_name` names one."""
    return name.startswith(TABLE_PREFIX) and name.removeprefix(TABLE_PREFIX).isdecimal()


def nat_table(
    name: str,
    network: Prefix,
    subnet: Prefix,
    masq: bool,
    fully_random: bool,
    forward: bool,
    port: int | None,
    underlay: tuple[Prefix, ...] = (),
) -> list[Rule]:
    """The table as `nft -j` lists it (without handles): chains and rules in order. [] when nothing is wanted.

    port: of the tunnel's UDP, None where it has none. No masqueraded packet leaves from it: conntrack would take a peer's
    frames for the answers, and hand them to a pod. underlay: prefixes inside the network that are the nodes', not pods'.
    """
    family, multicast = FAMILIES[network.family].nft, MULTICAST[network.family]
    chains: list[Rule] = []
    if masq:
        mark = _match({"&": [{"meta": {"key": "mark"}}, MARK]}, "==", MARK)
        go: Rule = {"masquerade": {"flags": "fully-random"}} if fully_random else {"masquerade": None}
        outwards = [_from(network), _to(multicast, "!=")]
        inwards = [_from(network, "!="), _to(network)]
        never_from_port = _udp_beside(port, fully_random) if port is not None else []
        leave: Rule = {"return": None}
        chains += _chain(
            family,
            name,
            "postrouting",
            {"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"},
            [
                ("packets that kube-proxy masquerades itself", [mark, leave]),
                *[
                    ("pods to nodes with addresses of the network", [_from(subnet), _to(there), *rule])
                    for there in underlay
                    for rule in (*never_from_port, [go])
                ],
                ("pod to pod: never", [_from(subnet), _to(network), leave]),
                ("pod to pod: never", [_from(network), _to(subnet), leave]),
                ("to local pods: keep the client's address", [_from(network, "!="), _to(subnet), leave]),
                *[("pods to the world, never from VXLAN's port", [*outwards, *rule]) for rule in never_from_port],
                ("pods to the world, multicast never", [*outwards, go]),
                *[("the world to remote pods, the same", [*inwards, *rule]) for rule in never_from_port],
                ("the world to remote pods", [*inwards, go]),
            ],
        )
    if forward:
        chains += _chain(
            family,
            name,
            "forward",
            {"type": "filter", "hook": "forward", "prio": 0, "policy": "accept"},
            [*zip(("from pods", "to pods"), accepts(network), strict=True)],
        )
    if not chains:
        return []
    chains.sort(key=lambda item: "rule" in item)  # as nft lists: chains, then rules
    return [{"table": {"family": family, "name": name}}, *chains]


def _udp_beside(port: int, fully_random: bool) -> list[list[Rule]]:
    """What masquerades UDP to any other port than that."""
    ports = {"port": {"range": [1024, port - 1] if port > MIDDLE else [port + 1, 65535]}}
    masquerade: Rule = {"masquerade": {**ports, "flags": "fully-random"} if fully_random else ports}
    return [[_match({"meta": {"key": "l4proto"}}, "==", "udp"), masquerade]]


def accepts(network: Prefix) -> list[list[Rule]]:
    """The expressions that let forwarded packets from and to pods through."""
    return [[_from(network), {"accept": None}], [_to(network), {"accept": None}]]


def _chain(family: str, table: str, name: str, hook: Rule, rules: list[tuple[str, list[Rule]]]) -> list[Rule]:
    made: list[Rule] = [{"chain": {"family": family, "table": table, "name": name, **hook}}]
    for comment, expr in rules:
        made.append({"rule": {"family": family, "table": table, "chain": name, "expr": expr, "comment": comment}})
    return made


def _match(left: Rule, op: str, right: object) -> Rule:
    return {"match": {"op": op, "left": left, "right": right}}


def _from(where: Prefix, op: str = "==") -> Rule:
    return _address("saddr", where, op)


def _to(where: Prefix, op: str = "==") -> Rule:
    return _address("daddr", where, op)


def _address(field: str, where: Prefix, op: str) -> Rule:
    base, length = str(where).split("/")
    return _match(
        {"payload": {"protocol": FAMILIES[where.family].nft, "field": field}},
        op,
        {"prefix": {"addr": base, "len": int(length)}},
    )
