"""What one agent says of itself and of some peers, from its status: small enough to be asked of many."""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from overlay.api.family import primary, views
from overlay.control.health import FIRST

MOST_ASKED, WORST, MOST_PROBLEMS = 128, 20, 20
"""So many peers are named in a question; so many that do not answer, and problems, in an answer."""
UNTRIED = "untried"
_BAD = ("refused", "unreachable", "path_mtu")


def summary(found: Mapping[str, Any], subnets: Iterable[str]) -> dict[str, Any]:
    """found: the agent's status; subnets: of the peers that are asked about.

    `reaches`: of each of those [subnet, state, rtt_us, loss, text]; `worst`: the same of peers that do not answer.
    """
    whole = dict(found)
    found = {**primary(found), "reachability_ipv6": found.get("reachability_ipv6")}
    six = found.get("reachability_ipv6") if found["family"] == FIRST else None
    reachability = [*(found.get("reachability") or ()), *(six or ())]
    by_subnet = {each["subnet"]: each for each in reachability}
    lease, device = found["lease"] or {}, found["device"] or {}
    bad = [each for each in reachability if each["state"] in _BAD]
    return {
        "node": found["node_name"] or lease.get("public_ip", ""),
        "public_ip": lease.get("public_ip", ""),
        "subnet": lease.get("subnet", ""),
        "subnet_ipv6": lease.get("subnet_ipv6", ""),
        "version": found["version"],
        "ready": found["ready"],
        "uptime_s": found["uptime_s"],
        "mtu": device.get("mtu"),
        "mtus": {str(view["family"]): view["device"]["mtu"] for view in views(whole, None) if view.get("device")},
        "zone": found.get("zone", ""),
        "time_s": int(time.time()),
        "config": config_of(found),
        "peers": len(found["peers"]),
        "problems": [
            {
                "subject": each["subject"],
                "text": each["text"],
                "since": each["since"],
                "keeps_unready": each["keeps_unready"],
            }
            for each in found["problems"][:MOST_PROBLEMS]
        ],
        "refused": found["refused_records"][:MOST_PROBLEMS],
        "refused_count": len(found["refused_records"]),
        "mended": _named(found, "mended_"),
        "dropped": _named(found, "dropped_"),
        "mends_per_minute": found.get("mends_per_minute", []),
        "history": found.get("history", []),
        "states": dict(Counter(each["state"] for each in reachability)),
        "probes": bool(reachability) or not found["peers"],
        "reaches": [_reach(by_subnet[subnet]) for subnet in list(subnets)[:MOST_ASKED] if subnet in by_subnet],
        "worst": [_reach(each) for each in bad[:WORST]],
    }


def _reach(each: Mapping[str, Any]) -> list[Any]:
    return [each["subnet"], each["state"], each["rtt_us"], each["loss"], each["text"]]


def _named(found: Mapping[str, Any], start: str) -> dict[str, int]:
    return {
        name.removeprefix(start): count for name, count in found["counters"].items() if name.startswith(start) and count
    }


def config_of(found: Mapping[str, Any]) -> str:
    """The network config in a few characters: two that differ have other ones."""
    return f"{zlib.crc32(json.dumps(found['network'], sort_keys=True).encode()):08x}"
