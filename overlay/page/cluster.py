"""The cluster as one value, from what agents answered: nodes, pairs, what is wrong. Pure.

`pairs` are directed: each is what the first says of the second. A node that was not asked, or runs flannel, is known by what
others say of it; nothing is called well that was not tried.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lease.model import around, ip_number

SAMPLE = 100
"""So many nodes are asked at most, and shown with all their pairs."""
SCHEMA = 1


def sample(own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], rng: random.Random) -> list[Mapping[str, Any]]:
    """The peers to be asked: all where they are few; else those of which something is wrong, and others at random. own: this
    node's summary, with `worst`."""
    if len(peers) < SAMPLE:
        return list(peers)
    bad = {each[0] for each in own["worst"]}
    first = [peer for peer in peers if peer["subnet"] in bad][: SAMPLE // 2]
    rest = [peer for peer in peers if peer["subnet"] not in bad]
    chosen = {peer["subnet"] for peer in (*first, *rng.sample(rest, min(len(rest), SAMPLE - 1 - len(first))))}
    return [peer for peer in peers if peer["subnet"] in chosen]


def cluster(
    own: Mapping[str, Any],
    found: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, Any] | str],
    made_at: str,
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """own: this node's summary; found: its status; answers: by subnet of each peer that was asked its summary, or why there
    is none; others: of subnets those of the same node in the other family."""
    names = {each["subnet"]: each["node_name"] or each["public_ip"] for each in found["peers"]}
    names[own["subnet"]] = own["node"]
    seen = {each["subnet"]: each for each in found.get("reachability") or ()}
    nodes = [_node(own, own, "answered", "")]
    for peer in found["peers"]:
        answer = answers.get(peer["subnet"])
        base = {"node": names[peer["subnet"]], "public_ip": peer["public_ip"], "subnet": peer["subnet"]}
        if answer is None:
            nodes.append(_node(base, None, "not asked", ""))
        elif isinstance(answer, str):
            nodes.append(_node(base, None, "no answer", answer))
        else:
            nodes.append(_node(base, answer, "answered", ""))
        nodes[-1]["from_here"] = seen.get(peer["subnet"], {}).get("state", "untried")
    places = {node["subnet"]: place for place, node in enumerate(nodes)}
    for subnet, other in {own["subnet"]: own.get("subnet_ipv6", ""), **(others or {})}.items():
        if other and subnet in places:
            places[other] = places[subnet]
            names[other] = names[subnet]
    shown = [0, *(places[subnet] for subnet in answers if subnet in places)]
    said = [own, *(each for each in answers.values() if not isinstance(each, str))]
    return {
        "schema": SCHEMA,
        "made_at": made_at,
        "from": own["node"],
        "network": _network(found),
        "nodes": nodes,
        "shown": shown,
        "pairs": [pair for summary in said for pair in _worse(_pairs(summary, places))],
        "counts": own["states"],
        "worst": _worst(said, names, places),
        "versions": _count(said, "version"),
        "configs": _count(said, "config"),
        "mtus": _count(said, "mtu"),
        "problems": [{"node": each["node"], **problem} for each in said for problem in each["problems"]],
        "refused": _refused(said),
        "mends_per_minute": _sum([each["mends_per_minute"] for each in said]),
    }


def _node(base: Mapping[str, Any], summary: Mapping[str, Any] | None, asked: str, why: str) -> dict[str, Any]:
    public_ip = base["public_ip"]
    group = (summary or {}).get("zone", "")
    if public_ip and not group:
        family, length = (6, 64) if ":" in public_ip else (4, 24)
        group = str(around(family, ip_number(public_ip, family), length))
    made: dict[str, Any] = {"name": base["node"], "public_ip": public_ip, "subnet": base["subnet"], "group": group}
    made |= {"asked": asked, "why": why, "from_here": "here" if summary is base else "untried"}
    if summary is not None:
        made |= {
            name: summary[name]
            for name in (
                "version", "ready", "uptime_s", "mtu", "config", "problems", "mended", "dropped", "history",
                "refused_count", "probes",
            )
        }  # fmt: skip
    return made


_ORDER = ("unreachable", "refused", "path_mtu", "silent", "untried", "ok")
"""Of two families what is worse stands for a pair."""


def _worse(pairs: list[list[Any]]) -> list[list[Any]]:
    """One of each two nodes; that of IPv6 says so."""
    found: dict[tuple[int, int], list[Any]] = {}
    for pair in pairs:
        before = found.get((pair[0], pair[1]))
        if before is None or _rank(pair) < _rank(before):
            found[pair[0], pair[1]] = pair
    return list(found.values())


def _rank(pair: list[Any]) -> int:
    return _ORDER.index(pair[2]) if pair[2] in _ORDER else len(_ORDER)


def _pairs(summary: Mapping[str, Any], places: Mapping[str, int]) -> list[list[Any]]:
    here = places.get(summary["subnet"])
    if here is None:
        return []
    second = ":" not in summary["subnet"]
    return [
        [here, places[subnet], *rest, f"IPv6: {text}" if second and ":" in subnet else text]
        for subnet, *rest, text in summary["reaches"]
        if subnet in places
    ]


def _worst(
    said: Sequence[Mapping[str, Any]], names: Mapping[str, str], places: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Peers that do not answer, those first of which most agents say so."""
    by_subnet: dict[str, dict[str, Any]] = {}
    for summary in said:
        for subnet, state, _, _, text in summary["worst"]:
            entry = by_subnet.setdefault(
                subnet,
                {"subnet": subnet, "name": names.get(subnet, subnet), "state": state, "text": text, "said_by": []},
            )
            entry["said_by"].append(summary["node"])
    ordered = sorted(by_subnet.values(), key=lambda each: -len(each["said_by"]))
    return [{**each, "place": places.get(each["subnet"])} for each in ordered[:20]]


def _refused(said: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[str]] = {}
    for summary in said:
        for each in summary["refused"]:
            found.setdefault((each["key"], each["reason"]), []).append(summary["node"])
    return [{"key": key, "reason": reason, "said_by": by} for (key, reason), by in found.items()]


def _count(said: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for summary in said:
        found.setdefault(str(summary[name]), []).append(summary["node"])
    return found


def _sum(rows: Sequence[Sequence[int]]) -> list[int]:
    longest = max((len(row) for row in rows), default=0)
    return [
        sum(row[place] for row in ([0] * (longest - len(row)) + list(row) for row in rows)) for place in range(longest)
    ]


def _network(found: Mapping[str, Any]) -> dict[str, Any]:
    subnets = ((found["network"] or {}).get("subnets") or {}).get(f"ipv{found.get('family', 4)}") or {}
    network, length, size = subnets.get("network", ""), subnets.get("length", 24), subnets.get("size", 0)
    taken = [peer["subnet"] for peer in found["peers"]] + ([found["lease"]["subnet"]] if found["lease"] else [])
    return {"prefix": network, "subnet_len": length, "subnets": size, "taken": len(taken)}
