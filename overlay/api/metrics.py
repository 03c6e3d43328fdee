"""The status as Prometheus reads it (text format 0.0.4). Pure.

By hand, not by prometheus_client: importing that costs the agent 9.4 MiB and 40 ms of its start (docs/dependencies.md);
tests compare what is written here with the library's parser and with promtool's rules.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from overlay.api.family import families, of_family
from overlay.api.status import Status
from overlay.control.health import FIRST

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = Mapping[str, str]
_ENTRIES = ("route", "neighbour", "fdb", "wireguard")
_MENDED = (*_ENTRIES, "device", "nat", "guard", "pods", "policy", "file", "sysctl")
_DROPPED = {
    "from_unknown_senders": "unknown_sender",
    "from_pods": "from_pod",
    "forwarded": "forwarded",
    "beside_the_tunnel": "beside_the_tunnel",
    "spoofed": "spoofed",
    "by_policy": "policy",
    "of_unknown_pods": "unknown_pod",
}
REASONS = (
    ("overlaps", "overlap"), ("PublicIP", "public_ip"), ("OverlaySource", "public_ip"), ("VtepMAC", "vtep_mac"),
    ("PublicKey", "public_key"),    ("MAC", "vtep_mac"), ("VNI", "vni"), ("BackendType", "backend"), ("subnet", "subnet"),
)  # fmt: skip
"""A word of a refusal's text, and the label it gets; the first that is found counts."""


class Traffic(NamedTuple):
    """Of the tunnel's device, since it was made (/proc/net/dev): bytes, packets, errors, dropped; in, and out."""

    device: str
    received: tuple[int, int, int, int]
    sent: tuple[int, int, int, int]


class Process(NamedTuple):
    """Of this process: CPU seconds, bytes, counts, seconds since the epoch (proc(5))."""

    cpu_s: float
    resident: int
    virtual: int
    open_fds: int
    max_fds: int
    started_at: float


class Passes(NamedTuple):
    """How long the loop's passes took. buckets: how many, by upper bounds, and one more for those above; total_s: of all;
    bounds: in seconds."""

    buckets: tuple[int, ...]
    total_s: float
    bounds: tuple[float, ...]


class Outside(NamedTuple):
    """What no controller knows. used_addresses: of this node's subnet, by the CNI plugin's files; None: they cannot be
    seen."""

    process: Process
    passes: Passes
    traffic: Sequence[Traffic] = ()
    """Of each family's device."""
    used_addresses: int | None = None


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A family with its samples. kind: counter (its name ends in _total), gauge."""
        self._head(name, kind, text)
        for labels, value in samples:
            self._lines.append(f"{name}{_labels(labels)} {_number(value)}")

    def one(self, name: str, kind: str, text: str, value: float) -> None:
        """A family of one sample."""
        self.add(name, kind, text, [({}, value)])

    def histogram(self, name: str, text: str, passes: Passes) -> None:
        """Cumulative buckets, sum and count."""
        self._head(name, "histogram", text)
        so_far = 0
        for bound, count in zip((*passes.bounds, None), passes.buckets, strict=True):
            so_far += count
            le = "+Inf" if bound is None else _number(bound)
            self._lines.append(f'{name}_bucket{{le="{le}"}} {so_far}')
        self._lines += [f"{name}_sum {_number(passes.total_s)}", f"{name}_count {so_far}"]

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def text(self) -> str:
        """All of it."""
        return "\n".join(self._lines) + "\n"


def exposition(status: Status, outside: Outside) -> str:
    """Everything, each counter from the start with 0."""
    page = _Page()
    build = {"version": status.version, "python": platform.python_version()}
    page.add("overlay_build_info", "gauge", "The agent's version.", [(build, 1)])
    _state(page, status)
    _network(page, status, outside)
    _work(page, status, outside)
    _traffic(page, status, outside.traffic or ())
    _process(page, outside.process)
    return page.text()


def _state(page: _Page, status: Status) -> None:
    found: Any = status.sections
    page.one("overlay_ready", "gauge", "1 when the lease is held and the kernel is as it should be.", int(status.ready))
    page.add(
        "overlay_problem",
        "gauge",
        "1 for each thing that is wrong just now; the status says what.",
        [({"subject": subject}, 1) for subject in sorted(status.problems)],
    )
    page.one("overlay_problems", "gauge", "How many things are wrong just now.", len(status.problems))
    store = found.get("store") or {}
    page.one("overlay_store_up", "gauge", "1 while the store answers.", int(store.get("up", True)))
    if (age := store.get("contact_age_s")) is not None:
        page.one("overlay_store_contact_age_seconds", "gauge", "Since the store last said anything.", age)
    if (policy := found.get("policy")) is not None:
        _policies(page, policy)
    lease = found.get("lease")
    if lease is not None and lease["left_s"] is not None:
        page.one("overlay_lease_left_seconds", "gauge", "Until the lease in etcd ends.", lease["left_s"])
    refused = dict(found.get("unreadable_records", {}))
    for _, view in _views(status):
        refused |= view.get("refused_records", {})
    counts = Counter(reason_label(key in found.get("unreadable_records", {}), text) for key, text in refused.items())
    labels = ["unreadable", *dict.fromkeys(label for _, label in REASONS), "other"]
    page.add(
        "overlay_records_refused",
        "gauge",
        "Records that are not used; the status says why.",
        [({"reason": label}, counts[label]) for label in labels],
    )


def _policies(page: _Page, policy: Mapping[str, Any]) -> None:
    for name, text, value in (
        ("network_policies", "NetworkPolicies and ClusterNetworkPolicies that can be used.", policy["policies"]),
        ("network_policies_refused", "Those that cannot; the status says why.", len(policy["refused"])),
        ("network_policies_enforced", "1 while the kernel has a table of them.", int(policy["enforced"])),
        ("isolated_addresses", "Addresses of pods of this node that a policy selects.", policy["isolated_addresses"]),
    ):
        page.one(f"overlay_{name}", "gauge", text, value)
    page.add(
        "overlay_policy_packets_total",
        "counter",
        "Packets that policies' rules judged: the first of a connection, and again when something was taken away.",
        [
            ({name: each[name] for name in ("policies", "direction", "verdict")}, each["packets"])
            for each in policy["decided"]
        ],
    )


def reason_label(unreadable: bool, text: str) -> str:
    """One of few words for why a record is refused."""
    if unreadable:
        return "unreadable"
    return next((label for word, label in REASONS if word in text), "other")


def _network(page: _Page, status: Status, outside: Outside) -> None:
    views = _views(status)

    def each(name: str, text: str, value: Callable[[Any], float | None]) -> None:
        samples = ((labels, value(view)) for labels, view in views)
        page.add(name, "gauge", text, [(labels, count) for labels, count in samples if count is not None])

    for name, text in (
        ("peers", "Peers accepted."),
        ("conflicting_routes", "Routes of others that are preferred to ours."),
        ("retained_subnets", "Subnets lost, on which pods of this node still run."),
    ):
        each(f"overlay_{name}", text, lambda view, name=name: len(view.get(name, ())))  # type: ignore[misc]
    states = [(labels, view["reachability"].counts()) for labels, view in views if view.get("reachability") is not None]
    if states:
        page.add(
            "overlay_peers_reachable",
            "gauge",
            "Peers by what their probes say.",
            [({**labels, "state": state}, count) for labels, counts in states for state, count in counts.items()],
        )
    each(
        "overlay_differing_entries",
        "Kernel entries that are not as they should be.",
        lambda view: view.get("differing_entries", 0),
    )
    if any(_pool(view) for _, view in views):
        each("overlay_network_subnets", "Subnets that the network has.", lambda view: (_pool(view) or {}).get("size"))
        each("overlay_network_subnets_used", "Subnets that nodes hold, this one's among them.", _used)
    lease = of_family(status.sections, FIRST).get("lease")
    if lease is not None:
        bits = 32 - int(lease["subnet"].rpartition("/")[2])
        page.one(
            "overlay_subnet_addresses", "gauge", "Addresses for pods that this node's subnet has.", max(0, 2**bits - 3)
        )
    if outside.used_addresses is not None:
        page.one("overlay_subnet_addresses_used", "gauge", "Addresses of it that pods have.", outside.used_addresses)


def _views(status: Status) -> list[tuple[Labels, dict[str, Any]]]:
    """The sections of each family that the network has; those of IPv4 without a label."""
    found = families(status.sections)
    return [
        ({} if number == FIRST else {"family": f"ipv{number}"}, of_family(status.sections, number)) for number in found
    ]


def _pool(view: Mapping[str, Any]) -> Mapping[str, Any] | None:
    pool: Mapping[str, Any] | None = ((view.get("network") or {}).get("subnets") or {}).get(f"ipv{view['family']}")
    return pool if pool and "size" in pool else None


def _used(view: Mapping[str, Any]) -> int | None:
    return len(view.get("peers", ())) + (view.get("lease") is not None) if _pool(view) else None


def _work(page: _Page, status: Status, outside: Outside) -> None:
    counters = status.counters
    page.add(
        "overlay_kernel_writes_total",
        "counter",
        "Entries of peers that were written or removed.",
        [
            ({"kind": kind, "op": op}, counters.get(f"writes_{op}_{kind}", 0))
            for kind in _ENTRIES
            for op in ("put", "remove")
        ],
    )
    page.add(
        "overlay_mended_total",
        "counter",
        "What others changed or removed, put back.",
        [({"kind": kind}, counters.get(f"mended_{kind}", 0)) for kind in _MENDED],
    )
    page.add(
        "overlay_probes_total",
        "counter",
        "Probes of peers, by what became of them; refused: this node's kernel did not send it.",
        [({"result": result}, counters.get(f"probes_{result}", 0)) for result in ("answered", "lost", "refused")],
    )
    page.add(
        "overlay_dropped_packets_total",
        "counter",
        "Packets that the guard, anti-spoofing and policies dropped.",
        [({"reason": label}, counters.get(f"dropped_{name}", 0)) for name, label in _DROPPED.items()],
    )
    for name, text in (
        ("monitor_overruns", "Times that notifications of the kernel were lost, and all was read again."),
        ("full_checks", "Times that all entries were read and compared."),
    ):
        page.one(f"overlay_{name}_total", "counter", text, counters.get(name, 0))
    cpu_s = counters.get("full_checks_cpu_ms", 0) / 1000
    page.one("overlay_full_checks_cpu_seconds_total", "counter", "CPU time of those.", cpu_s)
    longest = counters.get("full_check_longest_slice_us", 0) / 1e6
    page.one(
        "overlay_full_check_longest_slice_seconds", "gauge", "The longest an event waited for one of them.", longest
    )
    page.histogram("overlay_pass_duration_seconds", "How long passes of the loop took.", outside.passes)


def _traffic(page: _Page, status: Status, traffic: Sequence[Traffic]) -> None:
    device = (status.sections.get("device") or {}).get("name", "")
    traffic = traffic or [Traffic(device, (0, 0, 0, 0), (0, 0, 0, 0))]
    for place, (name, text) in enumerate(
        (("bytes", "Bytes"), ("packets", "Packets"), ("errors", "Errors"), ("dropped", "Packets dropped"))
    ):
        for way, words in (("received", "received by"), ("sent", "sent by")):
            page.add(
                f"overlay_device_{way}_{name}_total",
                "counter",
                f"{text} {words} the tunnel's device.",
                [({"device": each.device}, getattr(each, way)[place]) for each in traffic],
            )


def _process(page: _Page, process: Process) -> None:
    for name, kind, text, value in (
        ("process_cpu_seconds_total", "counter", "User and system CPU time.", process.cpu_s),
        ("process_resident_memory_bytes", "gauge", "Resident memory.", process.resident),
        ("process_virtual_memory_bytes", "gauge", "Virtual memory.", process.virtual),
        ("process_open_fds", "gauge", "Open file descriptors.", process.open_fds),
        ("process_max_fds", "gauge", "The most of them.", process.max_fds),
        ("process_start_time_seconds", "gauge", "When it started, since the epoch.", process.started_at),
    ):
        page.one(name, kind, text, value)


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return repr(value) if isinstance(value, int) else repr(round(value, 6))
