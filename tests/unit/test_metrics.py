"""The metrics, read by Prometheus' own library, and checked by its rules for names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from overlay.agent.loop import PASS_BOUNDS_S
from overlay.api import process
from overlay.api.metrics import REASONS, Outside, Passes, Process, Traffic, exposition, reason_label
from overlay.api.status import Status
from overlay.control.health import Problem

MONITORING = Path(__file__).parents[2] / "manifests/monitoring"
PROMTOOL = Path(__file__).parents[2] / ".venv/promtool"
PROCESS = Process(1.5, 30 << 20, 300 << 20, 21, 1024, 1.7e9)
OUTSIDE = Outside(
    PROCESS,
    Passes((4, 3, 2, 1, 0, 0, 0, 0, 1), 0.75, PASS_BOUNDS_S),
    (Traffic("flannel.1", (1, 2, 3, 4), (5, 6, 7, 8)),),
    9,
)
SECTIONS = {
    "lease": {"subnet": "10.244.1.0/24", "left_s": 3600},
    "store": {"up": False, "contact_age_s": 12},
    "network": {"subnets": {"ipv4": {"size": 255}}},
    "device": {"name": "flannel.1"},
    "peers": [1, 2, 3],
    "unreadable_records": {"a": "not JSON"},
    "refused_records": {"b": "subnet 10.244.1.0/24 overlaps our own", "c": "who knows"},
}
COUNTERS = {"mended_route": 2, "writes_put_fdb": 5, "dropped_from_pods": 3, "full_checks": 1, "full_checks_cpu_ms": 250}
PROBLEMS = {'a "quoted\\ one': Problem("text", 0.0, True)}


def families(status: Status, outside: Outside = OUTSIDE):
    return {family.name: family for family in text_string_to_metric_families(exposition(status, outside))}


def samples(found, name):
    return {tuple(sorted(s.labels.items())): s.value for s in found[name].samples}


def full() -> Status:
    return Status("0.1.0", "node1", 1.0, True, PROBLEMS, SECTIONS, COUNTERS)


def empty() -> Status:
    return Status("0.1.0", "node1", 1.0, False, {}, {}, {})


def test_prometheus_own_parser_reads_what_we_mean():
    found = families(full())
    assert samples(found, "overlay_ready") == {(): 1}
    assert samples(found, "overlay_problem") == {(("subject", 'a "quoted\\ one'),): 1}
    assert samples(found, "overlay_store_up") == {(): 0}
    assert samples(found, "overlay_store_contact_age_seconds") == {(): 12}
    refused = samples(found, "overlay_records_refused")
    assert {labels[0][1]: value for labels, value in refused.items() if value} == {
        "unreadable": 1,
        "overlap": 1,
        "other": 1,
    }
    writes = samples(found, "overlay_kernel_writes")
    assert writes[("kind", "fdb"), ("op", "put")] == 5
    assert writes[("kind", "route"), ("op", "remove")] == 0, "there from the start"
    assert samples(found, "overlay_mended")[("kind", "route"),] == 2
    assert samples(found, "overlay_dropped_packets")[("reason", "from_pod"),] == 3
    assert samples(found, "overlay_full_checks_cpu_seconds") == {(): 0.25}
    assert samples(found, "overlay_network_subnets_used") == {(): 4}
    assert samples(found, "overlay_subnet_addresses") == {(): 253}
    assert samples(found, "overlay_subnet_addresses_used") == {(): 9}
    assert samples(found, "overlay_device_sent_dropped") == {(("device", "flannel.1"),): 8}
    assert samples(found, "process_resident_memory_bytes") == {(): 30 << 20}
    buckets = [s for s in found["overlay_pass_duration_seconds"].samples if s.name.endswith("_bucket")]
    assert [s.value for s in buckets] == [4, 7, 9, 10, 10, 10, 10, 10, 11]
    assert buckets[-1].labels == {"le": "+Inf"}


def test_every_counter_is_there_before_anything_happened():
    before, after = families(empty(), OUTSIDE._replace(traffic=None, used_addresses=None)), families(full())
    counters = {name for name, family in after.items() if family.type == "counter"}
    assert len(counters) > 10
    for name in counters:
        assert before[name].type == "counter"
        assert len(before[name].samples) == len(after[name].samples)


@pytest.mark.parametrize("status", [empty(), full()], ids=["nothing yet", "everything"])
def test_promtool_finds_nothing_wrong_with_names_help_and_units(status):
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=exposition(status, OUTSIDE), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), "is it there? .ci/promtool .venv/promtool"


def test_promtool_accepts_the_alerting_rules_and_their_tests():
    for what in (["check", "rules", MONITORING / "rules.yaml"], ["test", "rules", MONITORING / "rules_test.yaml"]):
        done = subprocess.run([PROMTOOL, *map(str, what)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_name_metrics_that_there_are():
    told = set(re.findall(r"^# TYPE (\w+)", exposition(full(), OUTSIDE), re.M))
    told |= {f"{name}{end}" for name in told for end in ("_bucket", "_sum", "_count")}
    for page in ("rules.yaml", "dashboard.json"):
        used = set(re.findall(r"\b((?:overlay|process)_[a-z_]+)", (MONITORING / page).read_text()))
        assert used and used - told == set(), page


def test_each_refusal_has_one_of_few_labels():
    labels = {label for _, label in REASONS} | {"unreadable", "other"}
    assert reason_label(True, "anything") == "unreadable"
    for text in ("BackendType is 'udp'", "VNI 7 is not this network's 1", "PublicIP 1.2.3.4 is our own", "xyz"):
        assert reason_label(False, text) in labels


def test_what_is_read_of_this_process_and_of_its_network():
    of = process.process()
    assert of.resident > 1 << 20 and of.virtual >= of.resident
    assert 0 < of.open_fds < of.max_fds
    assert of.cpu_s > 0
    assert of.started_at > 1.6e9
    loopback = process.traffic("lo")
    assert loopback is not None and loopback.received == loopback.sent
    assert process.traffic("nothing0") is None


def test_addresses_in_use_are_host_locals_files(tmp_path):
    folder = tmp_path / "cbr0"
    folder.mkdir()
    for name in ("10.244.1.2", "10.244.1.3", "last_reserved_ip.0", "lock"):
        (folder / name).write_text("x")
    assert process.used_addresses(str(tmp_path), "cbr0") == 2
    assert process.used_addresses(str(tmp_path / "none"), "cbr0") is None


def test_what_is_of_ipv6_is_counted_and_labelled():
    """In a network of both families, and of IPv6 alone."""
    six = {
        "peers_ipv6": [1, 2],
        "refused_records_ipv6": {"d": "subnet fd00:1::/64 overlaps our own", "b": "who knows"},
    }
    own = {"subnet": "10.244.1.0/24", "subnet_ipv6": "fd00:1::/64", "left_s": 3600}
    both = {**SECTIONS, **six, "lease": own, "network": {"subnets": {"ipv4": {"size": 255}, "ipv6": {"size": 9}}}}
    found = families(full()._replace(sections=both))
    assert samples(found, "overlay_peers") == {(): 3, (("family", "ipv6"),): 2}
    assert samples(found, "overlay_network_subnets_used") == {(): 4, (("family", "ipv6"),): 3}
    refused = samples(found, "overlay_records_refused")
    assert sum(refused.values()) == 4, "a, b, c and d; b is refused by both and is one record"
    alone = {**six, "lease": {"subnet": "fd00:1::/64", "left_s": 3600}, "network": {"subnets": {"ipv6": {"size": 9}}}}
    found = families(full()._replace(sections=alone))
    assert samples(found, "overlay_peers") == {(("family", "ipv6"),): 2}
    assert sum(samples(found, "overlay_records_refused").values()) == 2
