"""Whom a target of `overlay check` names, and which record that is refused."""

from __future__ import annotations

import pytest

from overlay.check.refused import refused_record
from overlay.check.run import RefusedRecord, Unknown, resolve
from overlay.control.health import rank

KEY, REASON = "10.244.9.0-24&fd00:9::-64", "PublicIP 192.168.1.9 is also 10.244.8.0-24's (node8)"
FOUND = {
    "family": 4,
    "families": [4],
    "device": {"name": "flannel.1"},
    "lease": {"subnet": "10.244.1.0/24"},
    "network": {"subnets": {"ipv4": {"network": "10.244.0.0/16"}}, "backend": {"type": "vxlan"}},
    "peers": [{"node_name": "node2", "public_ip": "192.168.1.3", "subnet": "10.244.2.0/24"}],
    "refused_records": [{"key": KEY, "reason": REASON}, {"key": "node7", "reason": "no VtepMAC"}],
}


@pytest.mark.parametrize(
    "target",
    [KEY, "10.244.9.0/24", "10.244.9.7", "10.244.9.0", "fd00:9::7", "192.168.1.9", "node8"],
)
def test_a_refused_record_is_named_by_all_that_names_it(target):
    line = refused_record(FOUND, target)
    assert line is not None
    assert KEY in line
    assert REASON in line


@pytest.mark.parametrize(
    "target", ["10.244.90.1", "192.168.1.90", "192.168.1", "node", "10.244.0.0/16", "", "fd00:90::1"]
)
def test_nobody_else_is(target):
    assert refused_record(FOUND, target) is None or not target


def test_check_says_why_it_is_not_known():
    with pytest.raises(RefusedRecord, match=r"10\.244\.9\.7: record .* is refused.*PublicIP"):
        resolve("10.244.9.7", FOUND)
    with pytest.raises(RefusedRecord, match=r"node7: record node7 is refused.*no VtepMAC"):
        resolve("node7", FOUND)
    with pytest.raises(Unknown, match="no node holds it"):
        resolve("10.244.77.7", FOUND)
    assert resolve("10.244.2.9", FOUND)[0][0].peer["node_name"] == "node2"


def test_causes_stand_before_what_follows_from_them():
    said = ["unreachable", "unreachable IPv6", "ways", "cni", "carrier IPv6", "carrier", "loss"]
    assert sorted(said, key=rank) == [
        "carrier IPv6",
        "carrier",
        "cni",
        "ways",
        "unreachable",
        "unreachable IPv6",
        "loss",
    ]
