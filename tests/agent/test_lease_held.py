"""A lease that is held: deleted, expired, given away, written over, released; and the store away."""

import json
import subprocess
import sys
import threading
import time

from lease.model import mac_number
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.firewall import pods_table
from overlay.lab import matrix, netns, pods
from tests.agent.test_lease import other
from tests.support.wait import until
from tests.support.world import ROOT, number


def test_a_deleted_record_is_taken_again_while_traffic_flows(world):
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    key = str(one.subnet()).replace("/", "-")
    with world.stream(source, target) as stream:
        world.etcd.delete(f"{ROOT}/subnets/{key}")
        until("it is there again", lambda: key in world.records())
        until("for the peer, too", lambda: world.peers("node2") == 1)
    assert stream.lost() == 0
    assert [e for e in one.events("lease") if "taken again" in e["method"]]
    assert world.records()[key]["lease"], "with a lease under it"


def test_an_expired_lease_is_taken_again(world):
    one, _ = world.nodes(2)
    key = str(one.subnet()).replace("/", "-")
    world.etcd.revoke(world.records()[key]["lease"])
    until("it is there again", lambda: key in world.records())
    assert one.ready()


def given_away(world, agent) -> str:
    """Another node gets the agent's subnet while it cannot say a word; the key."""
    subnet = agent.subnet()
    key = str(subnet).replace("/", "-")
    with agent.paused():
        world.etcd.delete(f"{ROOT}/subnets/{key}")
        world.put_record(key, other())
    until("another subnet", lambda: agent.subnet() != subnet)
    agent.wait_ready()
    return key


def test_a_subnet_given_to_another_node_keeps_the_running_pods_and_takes_a_new_one(world):
    one, two = world.nodes(2)
    old_pod, local = world.pod(one, "a"), world.pod(one, "b")
    subnet = one.subnet()
    key = given_away(world, one)
    assert str(subnet) in one.status()["retained_subnets"]
    words = until("a lasting problem", lambda: one.problems().get("retained"))
    assert f"{subnet} is not ours any more ({key} is 192.168.1.50's)" in words
    assert "overlay_retained_subnets 1\n" in ask_unix(str(one.run_dir / SOCKET_NAME), "/metrics")[1]
    lost = [e for e in one.events("problem") if e["subject"] == "lease"]
    assert str(subnet) in lost[0]["what"]
    assert one.refused_records()[key].startswith(f"subnet {subnet} overlaps {subnet}, which we lost")
    until(
        "the list is the new subnet's",
        lambda: str(one.subnet()) in (one.run_dir / "cni" / "10-flannel.conflist").read_text(),
    )
    new_pod, far = world.pod(one, "c"), world.pod(two, "a")
    assert one.subnet().holds(number(new_pod.address))
    with matrix.Wires([old_pod, local, new_pod, far]) as wires:
        assert wires.measure(old_pod, local).ok, "old pods reach each other"
        assert wires.measure(old_pod, new_pod).ok, "and new ones"
        assert wires.measure(new_pod, far).ok, "new pods reach the world"
    assert world.records()[key]["PublicIP"] == "192.168.1.50", "the new owner keeps it"
    conflist = one.run_dir / "cni" / "10-flannel.conflist"
    for end in (old_pod, local):
        pods.detach(world.namespace("node1"), conflist, end.namespace)
    until(
        "once no pod is left, the new owner is a peer",
        lambda: key not in one.refused_records() and not one.status()["retained_subnets"],
    )
    until("in the kernel, too", lambda: world.peers("node1") == 2)
    until("the problem is solved", lambda: "retained" not in one.problems())
    links = world.run("node1", "ip", "-o", "link")
    assert "cni0" not in links, "its connected route would keep the new owner's pods from us"
    assert "cni1" in links


def test_a_subnet_that_was_lost_before_a_restart_is_known_by_its_bridge(world):
    one, two = world.nodes(2)
    old_pod = world.pod(one, "a")
    subnet = one.subnet()
    listing = ("nft", "list", "table", "bridge", pods_table.table_name(1))
    until("it is bound", lambda: old_pod.address in world.run("node1", *listing))
    key = given_away(world, one)
    one.stop()
    world.run("node1", "nft", "delete", "table", *listing[3:])  # as if bound by nobody yet
    again = world.restart(one).wait_ready()
    assert again.status()["retained_subnets"] == [str(subnet)]
    assert again.events("subnet.retained")
    assert again.refused_records()[key].startswith(f"subnet {subnet} overlaps {subnet}, which we lost")
    until("its pods are bound again", lambda: old_pod.address in world.run("node1", *listing))
    new_pod, far = world.pod(again, "c"), world.pod(two, "a")
    with matrix.Wires([old_pod, new_pod, far]) as wires:
        assert wires.measure(old_pod, new_pod).ok
        assert wires.measure(new_pod, far).ok
    pods.detach(world.namespace("node1"), again.run_dir / "cni" / "10-flannel.conflist", old_pod.namespace)
    until("the new owner is a peer", lambda: world.peers("node1") == 2)
    assert again.status()["retained_subnets"] == []
    assert "cni0" not in world.run("node1", "ip", "-o", "link")


def test_an_empty_bridge_of_an_earlier_cluster_keeps_no_peer_away(world):
    node = world.node(1)
    for name, address in (("cni0", "10.244.77.1/24"), ("lab0", "10.244.78.1/24"), ("cni7", "172.30.0.1/24")):
        world.run(node, "ip", "link", "add", name, "type", "bridge")
        world.run(node, "ip", "addr", "add", address, "dev", name)
        world.run(node, "ip", "link", "set", name, "up")
    world.put_record("10.244.77.0-24", other())
    one = world.agent(node).wait_ready()
    until("it is a peer", lambda: world.peers(node) == 1)
    assert "via 10.244.77.0 dev flannel.1" in world.run(node, "ip", "route", "get", "10.244.77.9")
    links = world.run(node, "ip", "-o", "link")
    assert "cni0" not in links
    assert "lab0" in links, "by its name it is not for pods"
    assert "cni7" in links, "nor this by its address"
    assert "cni0" in json.dumps(one.events("bridge.removed"))


def test_somebodys_change_of_our_record_is_put_right(world):
    one, _ = world.nodes(2)
    key = str(one.subnet()).replace("/", "-")
    record = json.loads(world.records()[key]["value"])
    for broken in (
        record | {"BackendType": "host-gw"},
        record | {"BackendData": {"VNI": 9, "VtepMAC": one.mac()}},
        # our own address, which no other machine answers for
        record | {"BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:77"}, "OverlayNode": "f/x/02:00:00:00:00:77"},
        "garbage",
    ):
        world.put_record(key, broken, world.records()[key]["lease"])
        until("it is as it was", lambda: json.loads(world.records()[key]["value"]) == record)
    assert one.subnet() == one.subnet()


def test_a_reservation_never_gets_a_ttl(world):
    node = world.node(1)
    world.put_record("10.244.44.0-24", other("192.168.1.2"))
    agent = world.agent(node).wait_ready()
    assert str(agent.subnet()) == "10.244.44.0/24"
    record = world.records()["10.244.44.0-24"]
    assert record["lease"] == 0
    assert "node" not in record
    assert agent.status()["lease"]["left_s"] is None
    again = world.restart(agent).wait_ready()
    assert world.records()["10.244.44.0-24"]["lease"] == 0
    assert str(again.subnet()) == "10.244.44.0/24"


def test_the_lease_is_renewed_long_before_its_end(world):
    agent = world.agent(world.node(1), "--subnet-lease-ttl=6", "--subnet-lease-renew-margin=1").wait_ready()
    key = str(agent.subnet()).replace("/", "-")
    created = world.records()[key]["create_revision"]
    lowest = 6
    end = time.monotonic() + 9
    while time.monotonic() < end:
        lowest = min(lowest, world.etcd.time_to_live(world.records()[key]["lease"]))
        time.sleep(0.2)
    assert lowest >= 2
    assert world.records()[key]["create_revision"] == created, "renewing writes no record: no peer hears of it"


def release(world, agent, *flags) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["nsenter", f"--net={netns.path(world.namespace(agent.node))}", sys.executable, "-m", "overlay.cli.app", "release",
         f"--etcd-endpoints={world.etcd.endpoint}", f"--run-dir={agent.run_dir}", *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_release_gives_the_lease_up(world):
    one, two = world.nodes(2)
    key = str(one.subnet()).replace("/", "-")
    refused = release(world, one)
    assert refused.returncode == 1
    assert "stop it first" in refused.stderr
    one.stop()
    assert key in world.records(), "a shutdown keeps it"
    done = release(world, one)
    assert (done.returncode, done.stdout) == (0, f"released {key}\n")
    assert key not in world.records()
    until("the peer is told", lambda: two.status()["peers"] == [])
    again = release(world, one)
    assert again.returncode == 1
    assert "no lease of this node is known" in again.stderr


def test_release_gives_nobody_elses_up(world):
    one, _ = world.nodes(2)
    key = str(one.subnet()).replace("/", "-")
    one.stop()
    world.put_record(key, other())
    done = release(world, one)
    assert done.returncode == 1
    assert "192.168.1.50" in done.stderr
    assert key in world.records()


def test_a_snapshot_of_a_vm_resumed_at_another_address_is_another_node(world):
    """Same device and MAC, same machine-id, another live address: two nodes, two MACs, two subnets."""
    one, _ = world.nodes(2)
    name = world.node(5)
    world.run(
        name,
        "ip",
        "link",
        "add",
        "flannel.1",
        "address",
        one.mac(),
        "type",
        "vxlan",
        "id",
        "1",
        "dstport",
        "8472",
        "dev",
        "eth0",
        "local",
        "192.168.1.6",
        "nolearning",
    )
    clone = world.agent(name, "--node-name=node1").wait_ready()
    assert clone.subnet() != one.subnet()
    assert clone.mac() != one.mac()
    assert world.device(name).mac == mac_number(clone.mac())
    assert one.ready()


def test_a_node_cut_off_for_a_while_is_not_robbed_by_clones(world):
    """One machine-id everywhere, no --node-name: nobody takes the record of a node that does not answer just now."""
    one, two = (world.agent(world.node(n)).wait_ready() for n in (1, 2))
    subnet, mac = two.subnet(), two.mac()
    world.run("underlay", "ip", "link", "set", "v2", "down")
    newcomer = world.agent(world.node(3)).wait_ready()
    assert newcomer.subnet() != subnet
    world.run("underlay", "ip", "link", "set", "v2", "up")
    until("everybody knows everybody", lambda: len(two.status()["peers"]) == len(one.status()["peers"]) == 2, 30)
    assert (two.subnet(), two.mac()) == (subnet, mac)


def test_garbage_beside_our_record_costs_no_storm(world):
    """A key that blocks our base and a deleted record: another subnet, not a loop."""
    (one,) = world.nodes(1)
    key = str(one.subnet()).replace("/", "-")
    world.put_record(f"{key}x", "junk")
    revision = world.etcd.delete(f"{ROOT}/subnets/{key}")
    until("another subnet", lambda: str(one.subnet()).replace("/", "-") != key)
    for _ in range(3):
        world.settled(one)
    assert world.etcd.revision() - revision < 10 + 6, "a handful of writes, no storm (six are the test's own)"


def test_an_endless_writer_against_us_is_answered_once_a_second_at_most(world):
    (one,) = world.nodes(1)
    key = str(one.subnet()).replace("/", "-")
    record = world.records()[key]
    end = time.monotonic() + 4
    written = 0
    while time.monotonic() < end:
        world.put_record(key, "garbage", record["lease"])
        written += 1
        time.sleep(0.02)
    until("ours stands at last", lambda: world.records()[key]["PublicIP"] == "192.168.1.2")
    ours = world.records()[key]
    assert int(ours["version"]) - written < 12


def test_etcd_away_is_no_harm_and_seen(world):
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    with world.stream(source, target) as stream:
        world.etcd.kill()
        until("it is seen", lambda: one.status()["store"]["error"], 20)
        world.run("node1", "ip", "link", "del", "flannel.1")
        until("repairs go on without a store", lambda: world.peers("node1") == 1)
        world.etcd.start()
        until("it is back", lambda: not one.status()["store"]["error"], 30)
    assert one.ready()
    assert stream.lost() < stream.sent / 2, "only while the device was gone"


def test_a_node_cut_off_from_etcd_notices_and_catches_up(world):
    """A black hole: packets vanish, no connection is refused."""
    one, two = world.nodes(2)
    world.run("underlay", "ip", "link", "set", "v1", "down")
    until("it is seen", lambda: one.status()["store"]["error"], 20)
    world.put_record("10.244.0.0-24", other())
    two.stop()
    world.etcd.delete(f"{ROOT}/subnets/{next(k for k, r in world.records().items() if r['PublicIP'] == '192.168.1.3')}")
    assert world.peers("node1") == 1, "what was known is kept"
    world.run("underlay", "ip", "link", "set", "v1", "up")
    until("it has caught up", lambda: [peer["public_ip"] for peer in one.status()["peers"]] == ["192.168.1.50"], 40)
    until("so has the kernel", lambda: world.peers("node1") == 1)


def test_a_join_storm_costs_each_node_the_same(world):
    """Ten at once: every one is ready, and everybody knows everybody."""
    names = [world.node(n) for n in range(1, 11)]
    agents: list = [None] * 10

    def start(i: int) -> None:
        agents[i] = world.agent(names[i])

    threads = [threading.Thread(target=start, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for agent in agents:
        agent.wait_ready(60)
    for agent in agents:
        until("nine peers", lambda agent=agent: world.peers(agent.node) == 9, 30)
