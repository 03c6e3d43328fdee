"""`overlay leases` against a real etcd, and what agents make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from overlay.lab import netns
from tests.support.wait import until
from tests.support.world import made_up_peer


@pytest.fixture
def leases(world) -> Any:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", "overlay.cli.app", "leases", *words, f"--etcd-endpoints={world.etcd.endpoint}")
        return subprocess.run(
            ["nsenter", f"--net={netns.path(world.namespace('underlay'))}", *command],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return run


def test_what_there_is_is_listed_shown_and_checked(world, leases):
    world.config(SubnetMin="10.244.100.0")
    one, two = world.nodes(2)
    listed = json.loads(leases("list", "--json").stdout)["leases"]
    assert [(each["node"], each["subnet"]) for each in listed] == sorted(
        [("node1", str(one.subnet())), ("node2", str(two.subnet()))], key=lambda each: each[1].replace("/", "-")
    )
    assert all(86_000 < each["left_s"] <= 86_400 for each in listed)
    for word in ("node1", "192.168.1.2", str(one.subnet()), str(one.subnet()).replace(".0/24", ".7")):
        (found,) = json.loads(leases("show", word, "--json").stdout)
        assert found["node"] == "node1", word
    assert "node1" in leases("list").stdout
    well = leases("check")
    assert (well.returncode, "2 of 156 subnets are taken (1%), 0 of them reserved" in well.stdout) == (0, True)
    world.put_record("10.244.7.0-24", "rubbish")
    world.put_record("10.244.8.0-24", made_up_peer(8, BackendData={"VNI": 1, "VtepMAC": one.mac()}))
    world.put_record("10.244.8.0-25", made_up_peer(9))
    world.put_record("10.99.0.0-24", made_up_peer(10))
    bad = leases("check")
    assert bad.returncode == 1
    for words in (
        "10.244.7.0-24: it cannot be read", f"10.244.8.0-24: it has the MAC {one.mac()} of", "10.244.8.0-25: it overlaps 10.244.8.0-24",
        "10.99.0.0-24: it is outside of Network",
    ):  # fmt: skip
        assert words in bad.stdout
    assert leases("show", "nobody").returncode == 1


def test_a_reservation_is_taken_by_its_node_and_keeps_no_end(world, leases):
    world.config()
    wrong = leases("reserve", "10.99.0.0/24", "--public-ip=192.168.1.2")
    assert (wrong.returncode, "is no subnet of the range" in wrong.stderr) == (1, True)
    assert (
        leases("reserve", "10.244.77.0/24", "--public-ip=192.168.1.2").stdout
        == "reserved 10.244.77.0-24 for 192.168.1.2\n"
    )
    again = leases("reserve", "10.244.77.0/24", "--public-ip=192.168.1.3")
    assert (again.returncode, "10.244.77.0-24 is taken already" in again.stderr) == (1, True)
    assert json.loads(leases("check", "--json").stdout)["reserved"] == 1
    one, two = world.nodes(2)
    assert str(one.subnet()) == "10.244.77.0/24"
    assert str(two.subnet()) != "10.244.77.0/24"
    (found,) = json.loads(leases("show", "node1", "--json").stdout)
    assert (found["left_s"], found["vtep_mac"]) == (None, one.mac())


def test_the_lease_of_a_node_that_is_gone_is_released(world, leases):
    world.config()
    one, two = world.nodes(2)
    key = str(two.subnet()).replace("/", "-")
    two.kill()
    assert leases("release", "node2").stdout == f"released {key} of node2\n"
    until("nobody sends there any more", lambda: one.status()["peers"] == [])
    gone = leases("release", "node2")
    assert (gone.returncode, "no lease; nothing was released" in gone.stderr) == (1, True)
    world.put_record("10.244.8.0-24", made_up_peer(8))
    world.put_record("10.244.9.0-24", {**made_up_peer(9), "PublicIP": made_up_peer(8)["PublicIP"]})
    assert "several leases" in leases("release", made_up_peer(8)["PublicIP"]).stderr


def test_what_cannot_be_done_is_one_line(world, leases):
    empty = leases("check")
    assert (empty.returncode, empty.stderr) == (0, "")
    away = subprocess.run(
        [sys.executable, "-m", "overlay.cli.app", "leases", "list", "--etcd-endpoints=http://127.0.0.1:1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (away.returncode, away.stderr.count("\n")) == (1, 1), away.stderr
    wrong = leases("list", "--no-such-flag=1")
    assert (wrong.returncode, "there is no flag" in wrong.stderr) == (2, True)
