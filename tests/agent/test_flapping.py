"""Records that somebody writes again and again, under traffic: the datapath does not follow, the loop goes on, it is told."""

from __future__ import annotations

import time

from tests.support.wait import meanwhile, until
from tests.support.world import vxlan_record

FLAPPING_S = 15.0


def test_a_record_that_is_overwritten_without_end_keeps_its_pods(world):
    """Twenty times a second by somebody who would lead its traffic to himself: its node puts it right each second."""
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    key, thief = str(two.subnet()).replace("/", "-"), vxlan_record("192.168.1.66", "0a:00:00:00:00:66")
    before = world.kernel("node1")
    with world.stream(source, target) as stream, meanwhile(lambda _: world.put_record(key, thief), 0.05) as written:
        told = until("it is told to peers' operators", lambda: one.problems().get("flapping records"), 20)
        until("and to its own", lambda: two.problems().get("disputed record"), 30)
        since = stream.sent
        time.sleep(FLAPPING_S)
        assert world.kernel("node1") == before
    assert stream.lost(since) == 0, "it is not followed any more"
    assert written[0] > 100
    assert key in told
    assert stream.lost() < 1000, "some 200 a second, in the first seconds"
    assert one.ready()
    until("its owner has it", lambda: world.records()[key]["PublicIP"] == "192.168.1.3", 20)
    until("it is over", lambda: "flapping records" not in one.problems(), 60)
    assert world.kernel("node1") == before
    with world.stream(source, target) as stream:
        time.sleep(0.5)
    assert stream.lost() == 0


def test_a_record_that_follows_our_mac_is_not_followed(world):
    """It is an older one, and a peer."""
    world.config(SubnetMin="10.244.1.0", SubnetMax="10.244.3.0")
    world.put_record("10.244.9.0-24", vxlan_record("192.168.1.66", "0a:00:00:00:00:66"))
    one, two = (world.agent(world.node(number)).wait_ready() for number in (1, 2))
    until("the later thief is a peer", lambda: world.peers("node1") == 2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    macs = [two.mac()]

    def follow(_count: int) -> None:
        if (mac := two.mac()) != macs[-1]:
            macs.append(mac)
        world.put_record("10.244.9.0-24", vxlan_record("192.168.1.66", mac))

    with world.stream(source, target) as stream, meanwhile(follow, 0.3):
        time.sleep(FLAPPING_S)
        since = stream.sent
        time.sleep(5)
    assert stream.lost(since) == 0
    assert 1 < len(macs) <= 5, macs
    assert stream.lost() < 100 * len(macs)
    until("all know each other", lambda: "192.168.1.3" in str(one.status()["peers"]))


def test_a_wide_record_that_changes_all_the_time_keeps_nobody_waiting(world):
    """An older one over thousands, which are peers whenever it is none: each change turns them all."""
    world.config(Network="10.0.0.0/8", SubnetMin="10.244.1.0", SubnetMax="10.244.9.0")
    wide, good = vxlan_record("192.168.1.66", "0a:00:00:00:00:66"), vxlan_record("192.168.1.67", "0a:00:00:00:00:67")
    world.put_record("10.64.0.0-10", wide)
    count = 2000
    for number in range(count):
        key = f"10.{64 + (number >> 8)}.{number & 255}.0-24"
        mac = f"0a:00:00:01:{number >> 8:02x}:{number & 255:02x}"
        world.put_record(key, vxlan_record(f"192.168.{10 + (number >> 8)}.{number & 255}", mac))
    agent = world.agent(world.node(1)).wait_ready()
    assert len(agent.refused_records()) == count
    other = [wide, {**wide, "PublicIP": "127.0.0.1"}]
    with meanwhile(lambda number: world.put_record("10.64.0.0-10", other[number % 2]), 1 / 45):
        until("it is told", lambda: "10.64.0.0-10" in agent.problems().get("flapping records", ""), 20)
        for number in range(3):
            world.put_record(f"10.250.{number}.0-24", {**good, "PublicIP": f"192.168.1.{70 + number}", "BackendData": {"VNI": 1, "VtepMAC": f"0a:00:00:00:00:{70 + number}"}})  # fmt: skip
            until("a good join is seen", lambda number=number: f"192.168.1.{70 + number}" in str(world.run("node1", "bridge", "fdb", "show", "dev", "flannel.1")), 5)  # fmt: skip
        assert agent.status()["ready"]
    until("it is over", lambda: "flapping records" not in agent.problems(), 60)
