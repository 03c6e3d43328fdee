"""subnet.env as flannel writes it, the CNI list, the nat table as data."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

from lease import regular
from lease.config import parse_config
from lease.families import V4
from lease.model import prefix
from overlay.backends.vxlan import Vxlan
from overlay.cni import lists as cni
from overlay.firewall.nat import nat_table
from overlay.process.files import read, up_to_date, write_atomically
from tests.unit import recordings

NETWORK, SUBNET = prefix("10.244.0.0/16"), prefix("10.244.76.0/24")
PODS = [cni.PodNetwork(NETWORK, SUBNET)]


@pytest.mark.parametrize(
    "name", ["etcd-vxlan.txt", "etcd-vxlan-direct-vni42.txt", "etcd-vxlan-dualstack.txt", "kube-vxlan.txt"]
)
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_subnet_env_is_the_recorded_one(name, node):
    recording = recordings.read(name)
    recorded = recording.sections[f"{node}: subnet.env"].rstrip("\n") + "\n"
    fields = dict(line.split("=") for line in recorded.splitlines())
    config = parse_config(recording.config)
    mtu, _ = Vxlan(config.backend, V4).tunnel.mtu(1500)
    names = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
    pods = [cni.PodNetwork(pool.network, prefix(fields[names[family]])) for family, pool in config.pools.items()]
    ours = cni.subnet_env(pods, mtu, fields["FLANNEL_IPMASQ"] == "true")
    assert ours == recorded


def test_the_previous_subnet_is_read_back(tmp_path):
    path = tmp_path / "subnet.env"
    path.write_text(cni.subnet_env(PODS, 1450, True))
    assert cni.previous_subnet(str(path), 4) == SUBNET


@pytest.mark.parametrize(
    "content",
    [
        "",
        "FLANNEL_SUBNET=",
        "FLANNEL_SUBNET=rubbish",
        "FLANNEL_SUBNET=10.1.1.1/24,10.1.2.1/24",
        "FLANNEL_SUBNET=fd00::1/64",
        "\x00\xff",
        "FLANNEL_SUBNET",
    ],
)
def test_a_broken_subnet_env_is_no_preference(tmp_path, content):
    path = tmp_path / "subnet.env"
    path.write_bytes(content.encode("latin1"))
    assert cni.previous_subnet(str(path), 4) is None


def test_no_subnet_env_is_no_preference(tmp_path):
    assert cni.previous_subnet(str(tmp_path / "none"), 4) is None


def test_files_are_put_in_place_whole_with_flannels_modes(tmp_path):
    path = tmp_path / "new" / "deep" / "subnet.env"
    old = os.umask(0o077)
    try:
        write_atomically(str(path), "a=1\n")
    finally:
        os.umask(old)
    assert path.read_text() == "a=1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    write_atomically(str(path), "a=2\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "an existing file's mode is kept"
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"], "no temporary file is left"
    assert up_to_date(str(path), "a=2\n")
    assert not up_to_date(str(path), "a=1\n")


def test_the_network_list():
    found = json.loads(cni.network_list(PODS, 1450, "cni0", "/run/x"))
    bridge, portmap = found["plugins"]
    assert (found["name"], found["cniVersion"]) == ("cbr0", "0.3.1")
    assert bridge["mtu"] == 1450
    assert bridge["ipMasq"] is False, "the bridge plugin would masquerade pod to pod"
    assert bridge["ipam"] == {
        "type": "host-local",
        "ranges": [[{"subnet": "10.244.76.0/24"}]],
        "routes": [{"dst": "10.244.0.0/16"}],
        "dataDir": "/run/x",
    }
    assert portmap == {"type": "portmap", "capabilities": {"portMappings": True}}
    assert "resolvConf" not in found["plugins"][0]["ipam"]
    waiting = json.loads(cni.network_list(PODS, 1450, "cni0", "", "/run/flannel/subnet.env"))
    assert waiting["plugins"][0]["ipam"]["resolvConf"] == "/run/flannel/subnet.env"
    assert "dataDir" not in json.loads(cni.network_list(PODS, 1450, "cni0", ""))["plugins"][0]["ipam"]


GATEWAY, ELSEWHERE = SUBNET.base + 1, SUBNET.base - 255


@pytest.mark.parametrize(
    ("there", "name"),
    [
        ({}, "cni0"),
        ({"cni0": frozenset()}, "cni0"),
        ({"cni0": frozenset({GATEWAY})}, "cni0"),
        ({"cni0": frozenset({ELSEWHERE})}, "cni1"),
        ({"cni0": frozenset({ELSEWHERE}), "cni1": frozenset({GATEWAY})}, "cni1"),
        ({"cni1": frozenset({GATEWAY})}, "cni1"),
    ],
    ids=["none", "one without an address", "ours", "one of another subnet", "ours is the second", "only the second is left"],
)  # fmt: skip
def test_a_new_subnet_gets_a_bridge_of_its_own_while_old_pods_use_the_other(there, name):
    assert cni.bridge_name(SUBNET, there.items()) == name


def rules(table, chain):
    return [json.dumps(item["rule"]["expr"]) for item in table if item.get("rule", {}).get("chain") == chain]


def test_the_nat_rules_are_those_that_flannel_left():
    """Rule by rule, with the text of the recorded iptables chain beside it."""
    table = nat_table("overlay-1", NETWORK, SUBNET, True, True, True, 8472)
    recorded = [
        line.split("--comment", 1)[0].removeprefix("-A FLANNEL-POSTRTG ").removesuffix(" -m comment ")
        + " "
        + line.split("-j ", 1)[1]
        for line in recordings.read("etcd-vxlan.txt").sections["node1 (192.168.1.2): iptables-save"].splitlines()
        if line.startswith("-A FLANNEL-POSTRTG")
    ]
    assert recorded == [
        "-m mark --mark 0x4000/0x4000 RETURN",
        "-s 10.244.76.0/24 -d 10.244.0.0/16 RETURN",
        "-s 10.244.0.0/16 -d 10.244.76.0/24 RETURN",
        "! -s 10.244.0.0/16 -d 10.244.76.0/24 RETURN",
        "-s 10.244.0.0/16 ! -d 224.0.0.0/4 MASQUERADE --random-fully",
        "! -s 10.244.0.0/16 -d 10.244.0.0/16 MASQUERADE --random-fully",
    ]
    every = rules(table, "postrouting")
    ours = [rule for rule in every if '"l4proto"' not in rule]
    for udp in (rule for rule in every if '"l4proto"' in rule):  # ours alone: off VXLAN's port; else as the next
        plain = json.loads(every[every.index(udp) + 1])
        assert json.loads(udp)[: len(plain) - 1] == plain[:-1]
        assert json.loads(udp)[-1]["masquerade"].pop("port") == {"range": [8473, 65535]}
    assert len(every) == len(ours) + 2
    assert len(ours) == len(recorded)
    for mine, theirs in zip(ours, recorded, strict=True):
        assert ("masquerade" in mine) == ("MASQUERADE" in theirs)
        assert ("fully-random" in mine) == ("--random-fully" in theirs)
        assert mine.count('"!="') == theirs.count("!")
        for flag, field in (("-s ", "saddr"), ("-d ", "daddr")):
            assert (field in mine) == (flag in theirs)
    assert '"&"' in ours[0], "kube-proxy's mark is a mask, not a value"


@pytest.mark.parametrize(("port", "kept"), [(4789, [4790, 65535]), (51820, [1024, 51819]), (65535, [1024, 65534])])
def test_masquerade_keeps_off_the_port_of_vxlan(port, kept):
    table = nat_table("overlay-1", NETWORK, SUBNET, True, True, True, port)
    assert all(json.dumps(kept) in rule for rule in rules(table, "postrouting") if '"l4proto"' in rule)


def test_report_9_an_underlay_inside_the_network_is_the_nodes_not_pods():
    """Else a pod's packet to a node that has no route to pods (a router) has no way back."""
    under = prefix("10.244.200.0/24")
    every = rules(nat_table("overlay-1", NETWORK, SUBNET, True, False, True, 8472, (under,)), "postrouting")
    to_nodes = [place for place, rule in enumerate(every) if "10.244.200.0" in rule]
    never = next(place for place, rule in enumerate(every) if '"return"' in rule and "10.244.0.0" in rule)
    assert len(to_nodes) == 2
    assert max(to_nodes) < never, "before what is never masqueraded"
    assert all("masquerade" in every[place] for place in to_nodes)
    without = rules(nat_table("overlay-1", NETWORK, SUBNET, True, False, True, 8472), "postrouting")
    assert [rule for place, rule in enumerate(every) if place not in to_nodes] == without


def test_what_is_not_wanted_is_not_there():
    assert nat_table("overlay-1", NETWORK, SUBNET, False, True, False, 8472) == []
    assert rules(nat_table("overlay-1", NETWORK, SUBNET, False, True, True, 8472), "postrouting") == []
    assert not any(
        "fully-random" in rule
        for rule in rules(nat_table("overlay-1", NETWORK, SUBNET, True, False, True, 8472), "postrouting")
    )


LOST = """
import os, sys
from overlay.process.log import log
log.warning("first")
log.warning("second", text="x" * 9000)
os.dup2(1, 2)
log.warning("third")
"""


def test_a_log_that_cannot_be_written_ends_nobody():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", LOST], stderr=full, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    said = [json.loads(line) for line in done.stdout.splitlines() if line]
    assert [line["event"] for line in said[-2:]] == ["third", "log.lost"]
    assert said[-1]["lines"] == 2
    assert "No space left" in said[-1]["reason"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing", "file"])
def test_a_file_that_is_none_keeps_nobody_waiting(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"x" * (regular.LONGEST + 1))
        assert len(regular.content(str(path))) == regular.LONGEST
        return
    with pytest.raises(OSError):
        regular.content(str(path))
    assert cni.previous_subnet(str(path), 4) is None
    assert cni.listed_subnet(str(path), 4) is None
    assert not up_to_date(str(path), "")
    assert read(str(path)) is None


def test_a_storm_of_one_line_is_summed_up(monkeypatch):
    from overlay.process import log as module

    said: list[tuple[str, dict]] = []
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.Log, "_write", lambda _self, _level, event, fields: said.append((event, fields)))
    log = module.Log()
    for number in range(1000):
        log.warning("storm", number=number)
        log.warning("other") if number == 500 else None
    assert len(said) == module.BURST + 1
    now[0] += module.EVERY_S
    log.info("storm", number=1000)
    assert said[-1][1] == {"number": 1000, "suppressed_before": 980, "timestamp": said[-1][1]["timestamp"]}
    log.info("storm", number=1001)
    log.sum_up()
    assert said[-1][1]["number"] == 1000, "it may go on"
    now[0] += module.EVERY_S * 3
    log.sum_up()
    assert (said[-1][0], said[-1][1]["of"], said[-1][1]["lines"]) == ("log.suppressed", "storm", 1)
    log.sum_up()
    assert len(said) == module.BURST + 3
