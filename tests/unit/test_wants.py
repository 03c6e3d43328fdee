"""What each controller wants, as tables: what it waits for, what switches it off, by what it changes."""

from __future__ import annotations

from typing import Any

import pytest

from lease.config import parse_config
from lease.model import prefix
from overlay.control.controller import Waiting
from overlay.control.inputs import Inputs
from overlay.settings.settings import Settings
from tests.support.bench import OTHER_MTU, RETAINED
from tests.support.fakes import underlay

OFF = None


NOTHING: dict[str, Any] = {"config": None, "own": None, "underlays": {}, "tunnels": {}, "listed": False}
LACKS = {
    "the list": {"listed": False},
    "a config": {"config": None},
    "an underlay": {"underlays": {}},
    "a lease": {"own": None},
    "the device": {"tunnels": {}},
}


@pytest.mark.parametrize(
    ("name", "waits_without"),
    [
        ("underlay", []),
        ("ownership", ["the list", "a config", "an underlay"]),
        ("device", ["a config", "an underlay", "a lease"]),
        ("bridges", ["a config", "an underlay", "a lease"]),
        ("table", ["the list", "a config", "an underlay", "a lease", "the device"]),
        ("guard", ["a config", "a lease", "the device"]),
        ("peers", ["an underlay", "the device"]),
        ("nat", ["a config", "a lease", "the device"]),
        ("forward", ["a config", "a lease", "the device"]),
        ("sysctl", ["a config", "an underlay", "the device"]),
        ("reach", ["a config", "an underlay", "a lease", "the device"]),
        ("pods", ["a config", "a lease", "the device"]),
        ("cni", ["a config", "a lease", "the device"]),
    ],
)
def test_what_a_controller_waits_for(bench, name, waits_without):
    controller = getattr(bench, name)()
    assert not isinstance(controller.wants(bench.current.inputs), Waiting | None)
    for what, lack in LACKS.items():
        found = controller.wants(bench.current.inputs._replace(**lack))
        assert isinstance(found, Waiting) == (what in waits_without), what
    if waits_without:
        assert isinstance(controller.wants(Inputs(bench.settings)), Waiting), "nor at the start"
    assert controller.wants(bench.current.inputs) == controller.wants(bench.current.inputs), "it is a function of them"


def settings(**more: Any) -> dict[str, Any]:
    return {"settings": Settings(run_dir="/run/overlay-test", **more)}


DIRECT = {"config": parse_config('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}')}
INSIDE = {"underlays": {4: underlay(on_link=(prefix("10.244.200.0/24"),))}}
BRIDGE = {"bridges": frozenset({"cni0"})}


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        pytest.param(OTHER_MTU, {"ownership", "device", "bridges"}, id="the underlay's MTU"),
        pytest.param({"underlays": {4: underlay(up=False)}}, {"bridges", "peers", "reach"}, id="the underlay is down"),
        pytest.param(RETAINED, {"bridges", "table", "reach"}, id="a subnet is lost"),
        pytest.param(DIRECT, {"ownership", "device", "guard", "table", "sysctl"}, id="DirectRouting"),
        pytest.param(BRIDGE, {"bridges", "pods", "reach", "sysctl"}, id="a bridge of pods"),
        pytest.param({"synced_families": frozenset({4})}, {"cni", "reach"}, id="all peers are in the kernel"),
        pytest.param(INSIDE, {"ownership", "bridges", "guard", "table"}, id="an underlay inside the network"),
        pytest.param({"displaced": True}, {"peers", "cni"}, id="the lease is lost"),
        pytest.param({"cni_template": b"{}"}, {"cni"}, id="cni-conf.json"),
    ],
)
def test_a_change_of_the_inputs_concerns_those_alone(bench, change, concerned):
    names = [
        "ownership", "device", "bridges", "table", "guard", "peers", "nat", "forward", "sysctl", "reach", "pods", "cni",
    ]  # fmt: skip
    before, after = bench.current.inputs, bench.current.inputs._replace(**change)
    changed = {name for name in names if getattr(bench, name)().wants(before) != getattr(bench, name)().wants(after)}
    assert changed == concerned


def test_report_9_masquerade_knows_the_underlay_inside_the_network(bench):
    now = bench.current.inputs._replace(**settings(ip_masq=True))
    inside, cidr = now._replace(**INSIDE), prefix("10.244.201.0/24")
    assert "10.244.200.0" in str(bench.nat().wants(inside)) and "10.244.200.0" not in str(bench.nat().wants(now))
    said = now._replace(**settings(ip_masq=True, underlay_cidrs=(cidr, prefix("192.168.0.0/16"))))
    assert "10.244.201.0" in str(bench.nat().wants(said)) and "192.168.0.0" not in str(bench.nat().wants(said))


@pytest.mark.parametrize(
    ("name", "flags"), [("guard", {"vxlan_guard": False}), ("pods", {"pod_antispoof": False})], ids=["guard", "pods"]
)
def test_a_flag_switches_it_off(bench, name, flags):
    off = bench.current.inputs._replace(**settings(**flags))
    assert getattr(bench, name)().wants(off) is OFF
    assert getattr(bench, name)().wants(Inputs(Settings(**flags))) is OFF, "before anything is known, too"
