"""The whole corpus of hostile records in one store at once, and rubbish at every door of a running agent."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from overlay.api.serve import ASKED_WITHIN_S, MOST_AT_ONCE, SOCKET_NAME, ask_unix
from overlay.lab import netns
from tests.support.wait import until
from tests.support.world import ROOT, vxlan_record
from tests.unit.hostile import GOOD_KEY, GOOD_VALUE, HOSTILE

CONFIG = {"SubnetMin": "10.244.1.0", "SubnetMax": "10.244.2.0"}


def refused_in(metrics: str) -> float:
    """How many records are refused, for all reasons."""
    found = {family.name: family for family in text_string_to_metric_families(metrics)}
    return sum(sample.value for sample in found["overlay_records_refused"].samples)


def test_the_corpus_costs_nobody_anything(world):
    """Under traffic: each is refused with its reason in status, log and metric; what is good beside it is a peer."""
    world.config(**CONFIG)
    flag = "--underlay-cidr=192.168.0.0/16"
    one, two = world.nodes(2, flag)
    world.put_record(GOOD_KEY, GOOD_VALUE)
    until("a good peer", lambda: world.peers("node1") == 2)
    before = world.kernel("node1")
    source, target = world.pod(one, "a"), world.pod(two, "a")
    keys = {}
    for name, key, value, words in HOSTILE:
        if key == "10.244.9.0-24" or "our own" in name or len(value) > 1_000_000:
            continue  # one key holds one record; etcd takes no more
        keys[key] = (name, words, value)
    with world.stream(source, target) as stream:
        for key, (_, _, value) in keys.items():
            world.put_record(key, value)
        until("all are refused", lambda: _refused(one, len(keys)))
        assert world.kernel("node1") == before
        for name, key, value, words in HOSTILE:
            if key != "10.244.9.0-24" or name == "our own MAC" or len(value) > 1_000_000:
                continue
            world.put_record(key, value)
            until(
                f"{name}: refused",
                lambda key=key, words=words: words.split(" 10.244")[0] in one.refused_records().get(key, ""),
            )
        assert world.kernel("node1") == before
        world.put_record("10.244.7.0-24", GOOD_VALUE.replace(b".1.5", b".1.7").replace(b":05", b":07"))
        until("a good one comes through all that", lambda: world.peers("node1") == 3)
    assert stream.lost() == 0
    assert one.ready()
    assert one.events("record.refused")
    code, text = ask_unix(str(one.run_dir / SOCKET_NAME), "/metrics")
    assert code == 200
    assert refused_in(text) == len(keys) + 1
    again = world.restart(one, flag).wait_ready()
    until("a start among them all", lambda: len(again.status()["peers"]) == 3)


GOOD_NOTES = {
    "kube_subnet_manager": "true",
    "backend_type": "vxlan",
    "backend_data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:09"}',
    "public_ip": "192.168.1.9",
}
NODES = {
    "no-json": ({"backend_data": "{"}, "not JSON"),
    "deep": ({"backend_data": "[" * 4000}, "not JSON"),
    "much": ({"backend_data": "x" * 100_000}, "has 100000 bytes"),
    "other-script": ({"public_ip": "\uff11\uff19\uff12.168.1.9"}, "must be an IPv4 address"),
    "no-address": ({"public_ip": ""}, "must be an IPv4 address"),
    "our-address": ({"public_ip": "192.168.1.2"}, "is our own"),
    "zero": ({"public_ip": "0.0.0.0"}, "cannot be a node's"),
    "broadcast": ({"public_ip": "192.168.1.255"}, "network or broadcast address"),
    "a-pods-address": ({"public_ip": "10.244.1.7"}, "is an address of Network"),
    "outside": ({"public_ip": "8.8.8.8"}, "outside --underlay-cidr"),
    "multicast-mac": ({"backend_data": '{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}'}, "multicast"),
    "zero-mac": ({"backend_data": '{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}'}, "all zero"),
    "other-vni": ({"backend_data": '{"VNI":7,"VtepMAC":"0a:00:00:00:00:09"}'}, "VNI 7 is not this network's 1"),
    "other-backend": ({"backend_type": "host-gw"}, "BackendType is 'host-gw'"),
    "a-source": ({"overlay_source": "127.0.0.1"}, "127.0.0.1 cannot be"),
}
"""Annotations of Nodes that are no peers, and words of the reason. Each has a podCIDR of its own."""
CIDRS = {
    "around-ours": ("10.244.0.0/22", "overlaps"),
    "all-of-it": ("10.244.0.0/16", "too large a part"),
    "the-underlay": ("192.168.1.0/24", "outside Network"),
    "services": ("10.96.0.0/24", "outside Network"),
}


def test_the_corpus_on_kubernetes_costs_nobody_anything(kube_world):
    """Under traffic, and at a start among all of them; the last of them has a peer's MAC, and is older than that."""
    world, flag = kube_world, "--underlay-cidr=192.168.0.0/16"
    world.kube.peer("an-older-thief", "10.244.99.0/24", "192.168.1.99", "0a:00:00:00:00:99")
    world.next_second()
    one, two = (world.agent(world.node(number), flag).wait_ready() for number in (1, 2))
    until("the later thief is a peer", lambda: world.peers("node1") == 2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    before = world.kernel("node1")
    world.next_second()
    with world.stream(source, target) as stream:
        for place, (name, (notes, _)) in enumerate(NODES.items()):
            world.kube.node(name, f"10.244.{100 + place}.0/24", **(GOOD_NOTES | notes))
        for name, (cidr, _) in CIDRS.items():
            world.kube.peer(name, cidr, "192.168.1.10", "0a:00:00:00:00:10")
        until("all are refused", lambda: _refused(one, len(NODES) + len(CIDRS)))
        assert world.kernel("node1") == before
        world.put_peer(42)
        until("a good one comes through all that", lambda: world.peers("node1") == 3)
    assert stream.lost() == 0
    told = one.refused_records()
    for name, (_, words) in {**NODES, **CIDRS}.items():
        assert words in told[name], (name, told[name])
    assert one.ready()
    assert refused_in(ask_unix(str(one.run_dir / SOCKET_NAME), "/metrics")[1]) == len(told)
    theirs = two.mac()
    words = f"VtepMAC {theirs} is already used by node2"
    with world.stream(source, target) as stream:
        with two.paused():  # it would take another before the first has looked
            world.kube.annotate("an-older-thief", backend_data=json.dumps({"VNI": 1, "VtepMAC": theirs}))
            until("it is refused", lambda: words in one.refused_records().get("an-older-thief", ""))
        until("the robbed one takes another MAC", lambda: two.mac() != theirs)
        until("all are peers", lambda: world.peers("node1") == 3)
    assert stream.lost() < 100, "those on their way while it changed"
    again = world.restart(one, flag).wait_ready()
    until("a start among them all", lambda: len(again.status()["peers"]) == 3)
    assert again.refused_records().keys() == NODES.keys() | CIDRS.keys()


def _refused(agent, count: int) -> bool:
    found = agent.refused_records()
    assert len(found) == count, (len(found), count)
    return True


def test_a_subnet_moves_only_by_the_stores_transaction(world):
    """Whoever writes a younger record over a part of a live lease, or around it, gets none of its traffic."""
    world.config(**CONFIG)
    one, two = world.nodes(2)
    before = world.kernel("node1")
    base = str(two.subnet()).removesuffix(".0/24")
    thief = vxlan_record("192.168.1.66", "0a:00:00:00:00:66")
    keys = [f"{base}.{part}-{length}" for part, length in ((0, 25), (128, 25), (64, 28), (10, 31))] + ["10.244.0.0-18"]
    for key in keys:
        world.put_record(key, thief)
    until("all are refused", lambda: _refused(one, len(keys)))
    assert world.kernel("node1") == before
    world.put_record(f"{base}.0-24", thief)
    until("its owner has it back", lambda: world.records()[f"{base}.0-24"]["PublicIP"] == "192.168.1.3")
    until("and the traffic", lambda: world.kernel("node1") == before)


def test_a_mac_is_taken_neither_in_place_nor_by_a_twin_that_waits(world):
    """Control: the record that does it is a peer until then, and older than the one it robs. Who runs keeps the first; the
    robbed node takes another MAC, since who starts later goes by the records' age."""
    world.config(SubnetMin="10.244.1.0", SubnetMax="10.244.3.0")
    world.put_record("10.244.9.0-24", vxlan_record("192.168.1.66", "0a:00:00:00:00:66"))
    one, two = (world.agent(world.node(number)).wait_ready() for number in (1, 2))
    until("the later thief is a peer", lambda: world.peers("node1") == 2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    theirs = two.mac()
    words = f"VtepMAC {theirs} is already used by"
    with world.stream(source, target) as stream:
        with two.paused():  # it would take another before the first has looked
            world.put_record("10.244.9.0-24", vxlan_record("192.168.1.66", theirs))
            until("it is refused", lambda: words in one.refused_records().get("10.244.9.0-24", ""))
        until("the robbed one takes another", lambda: two.mac() != theirs)
        until("both are peers", lambda: world.peers("node1") == 2)
    assert stream.lost() < 100, "those on their way while it changed"
    key = str(two.subnet()).replace("/", "-")
    second = two.mac()
    # a twin that waits beside it, and its record deleted: the twin is the first of the two now
    world.put_record("10.244.10.0-24", vxlan_record("192.168.1.67", second))
    until("the twin is refused", lambda: "10.244.10.0-24" in one.refused_records())
    world.etcd.delete(f"{ROOT}/subnets/{key}")
    until("its record is there again", lambda: key in world.records())
    until("with another MAC", lambda: json.loads(world.records()[key]["value"])["BackendData"]["VtepMAC"] != second)
    until("all are peers", lambda: world.peers("node1") == 3)
    until("its device has it, too", lambda: two.status()["device"]["ok"] and two.mac() != second)
    again = world.restart(one).wait_ready()
    until("who starts later sees the same", lambda: len(again.status()["peers"]) == 3)
    with world.stream(source, target) as stream:
        time.sleep(0.5)
    assert stream.lost() == 0


def with_door(world, kind):
    """An agent, and how to connect to it."""
    agent = world.agent(world.node(1), "--node-name=node1", "--healthz-port=10299").wait_ready()

    def connect() -> socket.socket:
        if kind == "tcp":
            return netns.inside(world.namespace("node1"), lambda: socket.create_connection(("127.0.0.1", 10299), 5))
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(agent.run_dir / SOCKET_NAME))
        return made

    return agent, connect


@pytest.mark.parametrize("door", ["unix", "tcp"])
def test_rubbish_on_the_status_socket(world, door):
    world.config()
    agent, connect = with_door(world, door)

    rubbish = [
        b"", b"\n", b"\0" * 70_000, b"GET", b"GET /healthz", b"GET " + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", b"POST /status HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
        b"\xff\xfe\xfd\r\n\r\n", b"GET /../../etc/passwd HTTP/1.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip
    open_ones = []
    for data in rubbish * 3:
        one = connect()
        try:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            one.settimeout(5)
            assert b"root:" not in one.recv(10_000)
        except (BrokenPipeError, ConnectionResetError, OSError):
            pass
        open_ones.append(one)
    threads = Path(f"/proc/{agent.process.pid}/task")
    before = len(list(threads.iterdir()))
    silent = [until("a connection", connect) for _ in range(100)]
    until("no more than so many threads", lambda: len(list(threads.iterdir())) <= before + MOST_AT_ONCE, 2)
    for one in (*open_ones, *silent):
        one.close()
    until("no thread is left behind", lambda: len(list(threads.iterdir())) < 14)
    assert until("it answers", agent.status)["problems"] == []


@pytest.mark.parametrize("door", ["unix", "tcp"])
def test_who_trickles_is_in_nobodys_way(world, door):
    """More of them than are served at once, each a byte now and then; and in the end each is let go."""
    world.config()
    _, connect = with_door(world, door)
    tricklers = [connect() for _ in range(MOST_AT_ONCE)]
    ended: set[int] = set()
    asked = 0
    for turn in range(40 * int(ASKED_WITHIN_S)):
        for number, one in enumerate(tricklers):
            try:
                one.send(b"G")
            except OSError:
                ended.add(number)
        if turn % 20 == 0:
            with connect() as honest:
                honest.settimeout(10)
                honest.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert honest.recv(1000).startswith(b"HTTP/1.0 200"), turn
                asked += 1
        if len(ended) == len(tricklers):
            break
        time.sleep(0.05)
    assert len(ended) == len(tricklers), "each has its time, and no more"
    assert asked
    for one in tricklers:
        one.close()


@pytest.mark.parametrize(
    "device", [b"\xff\xfe", "flannel.\u00b2".encode(), b"eth0", b"flannel.99999999999", b"../../eth0", b"x" * 100_000, None],
    ids=["no text", "a superscript", "the underlay", "a large VNI", "a path", "much", "a pipe"],
)  # fmt: skip
def test_rubbish_in_our_own_files_is_put_right(world, device):
    """At a start, and under a running agent: whoever waits for a pipe's writer waits for ever."""
    world.config()
    node = world.node(1)
    folder = world.folder / node
    (folder / "cni").mkdir(parents=True)
    for path in (folder / "subnet.env", folder / "cni/10-flannel.conflist"):
        os.mkfifo(path)
    if device is None:
        os.mkfifo(folder / "device")
    else:
        (folder / "device").write_bytes(device)
    agent = world.agent(node, "--node-name=node1").wait_ready()
    assert (folder / "device").read_text() == "flannel.1"
    assert "FLANNEL_SUBNET" in (folder / "subnet.env").read_text()
    assert "eth0" in world.run(node, "ip", "-o", "link")
    (folder / "subnet.env").unlink()
    os.mkfifo(folder / "subnet.env")
    until("it is mended", (folder / "subnet.env").is_file)
    assert agent.ready()


def test_no_secret_in_log_or_status(world):
    """A password by flag, by variable, and in the answer to a wrong flag beside it."""
    world.config()
    secret = "hunter2-is-not-a-password"
    agent = world.agent(
        world.node(1), "--node-name=node1", "--etcd-username=root", "--log-level=debug",
        environ={"FLANNELD_ETCD_PASSWORD": secret},
    )  # fmt: skip
    until("it says what is wrong", lambda: "authentication is not enabled" in agent.log() or agent.ready())
    wrong = world.agent(world.node(2), f"--etcd-password={secret}", "--healthz-port=99999999")
    wrong.process.wait(10)
    assert wrong.process.returncode == 2
    for one in (agent, wrong):
        assert secret not in one.log()
    if agent.process.poll() is None:
        _, body = ask_unix(str(agent.run_dir / SOCKET_NAME), "/status")
        assert secret not in body
