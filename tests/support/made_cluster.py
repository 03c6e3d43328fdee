"""Clusters as page.gather finds them, made up: some nodes, or thousands, with faults."""

from __future__ import annotations

import random
from typing import Any

from overlay.page.cluster import cluster, sample
from overlay.page.summary import summary

SINCE = "2026-11-28T03:00:00Z"
SILENT = "its underlay address answers, its VTEP does not: UDP 8472 is filtered on the way"


def subnet(number: int) -> str:
    return f"10.{100 + (number >> 8)}.{number & 255}.0/24"


def status(number: int, count: int, bad: set[tuple[int, int]], **more: Any) -> dict[str, Any]:
    """The status of a node of so many; bad: pairs of which the first says that the second does not answer."""
    others = [other for other in range(count) if other != number]
    return {
        "schema": 1,
        "version": "0.1.0" if number % 7 else "0.2.0",
        "node_name": f"n{number}",
        "uptime_s": 3600.0 + number,
        "ready": True,
        "problems": [],
        "refused_records": [],
        "history": [],
        "mends_per_minute": [0, 2, 0, number % 3],
        "counters": {"mended_routes": number % 5, "dropped_from_pods": 0},
        "lease": {"subnet": subnet(number), "public_ip": address(number)},
        "device": {"mtu": 1450},
        "network": {
            "subnets": {"ipv4": {"network": "10.64.0.0/10", "length": 24, "size": 16384}},
            "backend": {"type": "vxlan"},
        },
        "peers": [
            {
                "subnet": subnet(other),
                "public_ip": address(other),
                "node_name": f"n{other}",
                "path": "tunnel",
                "missing": [],
            }
            for other in others
        ],
        "reachability": [
            {
                "subnet": subnet(other),
                "state": "unreachable" if (number, other) in bad else "ok",
                "rtt_us": None if (number, other) in bad else 80 + other % 40,
                "loss": 0.0,
                "text": SILENT if (number, other) in bad else "answers",
            }
            for other in others
        ],
        **more,
    }


def address(number: int) -> str:
    return f"192.168.{number // 40}.{number % 40 + 2}"


def made(
    count: int, bad: set[tuple[int, int]] = frozenset(), silent: set[int] = frozenset(), **own: Any
) -> dict[str, Any]:  # type: ignore[assignment]
    """What node 0 gathers. silent: nodes whose agents do not answer when they are asked."""
    found = status(0, count, bad, **own)
    asked = sample(summary(found, ()), found["peers"], random.Random(1))
    names = [subnet(0), *(peer["subnet"] for peer in asked)]
    answers: dict[str, Any] = {}
    for peer in asked:
        number = int(peer["node_name"][1:])
        answers[peer["subnet"]] = (
            "connection refused" if number in silent else summary(status(number, count, bad), names)
        )
    return cluster(summary(found, names), found, answers, SINCE)
