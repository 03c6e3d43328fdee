"""The status as Prometheus reads it (text format 0.0.4). Pure.

Not prometheus_client: a registry of its own and 4 MiB, for what is one picture written out.
"""

from __future__ import annotations

from typing import Any

from overlay.api.status import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(status: Status) -> str:
    """Gauges of how it is, and each counter of the status as overlay_NAME_total."""
    found: Any = status.sections
    lease = found.get("lease")
    refused = {**found.get("unreadable_records", {}), **found.get("refused_records", {})}
    store_up = found.get("store", {}).get("up", True)
    gauges = {
        "ready": ("1 when the lease is held and the kernel is as it should be", int(status.ready)),
        "store_down": ("1 while the store is unavailable", int(not store_up)),
        "peers": ("peers accepted", len(found.get("peers", ()))),
        "refused_records": ("records that cannot be used; the status says why", len(refused)),
        "problems": ("what is wrong just now; the status says what", len(status.problems)),
        "differing_entries": ("kernel entries that are not as they should be", found.get("differing_entries", 0)),
        "conflicting_routes": ("routes of others that are preferred to ours", len(found.get("conflicting_routes", ()))),
        "retained_subnets": (
            "subnets lost, on which pods of this node still run",
            len(found.get("retained_subnets", ())),
        ),
        "uptime_seconds": ("since the agent started", status.uptime_s),
    }
    if lease is not None and lease["left_s"] is not None:
        gauges["lease_left_seconds"] = ("until the lease in etcd ends", lease["left_s"])
    lines = [f'# TYPE overlay_info gauge\noverlay_info{{version="{status.version}"}} 1']
    for name, (text, value) in gauges.items():
        lines.append(f"# HELP overlay_{name} {text}\n# TYPE overlay_{name} gauge\noverlay_{name} {value}")
    for name, value in sorted(status.counters.items()):
        full, kind = (f"{name}_total", "counter") if "longest" not in name else (name, "gauge")
        lines.append(f"# TYPE overlay_{full} {kind}\noverlay_{full} {value}")
    return "\n".join(lines) + "\n"
