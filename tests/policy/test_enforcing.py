"""What policies must do beside judging: end what they forbid, hold what is not known, lose nothing, survive their agent."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from lease.model import prefix
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.lab import netns
from overlay.policy.ask import ask_policies
from overlay.policy.compile import compile_node
from overlay.policy.table import SUFFIX, Maker, table
from tests.support.probing import Field, Probe
from tests.support.wait import until

SO_RCVBUFFORCE = 33
DENY_ALL = {
    "kind": "NetworkPolicy",
    "metadata": {"namespace": "x", "name": "deny"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
}
FROM_B = {
    "kind": "NetworkPolicy",
    "metadata": {"namespace": "x", "name": "from-b"},
    "spec": {
        "podSelector": {"matchLabels": {"app": "a"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}], "ports": [{"port": 80}]}],
    },
}
ELSEWHERE = {
    "kind": "NetworkPolicy",
    "metadata": {"namespace": "elsewhere", "name": "deny"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
}
LABELS = {"x/a": {"app": "a"}, "x/b": {"app": "b"}, "x/c": {"app": "c"}}


@pytest.fixture
def three(world, field: Field):
    """x/a and x/c on node1, x/b on node2, each serving TCP and UDP 80 and 81 in both families."""
    world.begin(2)
    one, two = world.agents
    for agent, name in ((one, "a"), (two, "b"), (one, "c")):
        for end in world.named_pod(agent, "x", name):
            for protocol in ("TCP", "UDP"):
                for port in (80, 81):
                    field.serve(end, protocol, port)
    world.pods_settled(field)
    return world


def objects(world, *policies):
    return [*world.pod_objects(LABELS, {}), *policies]


def asks(world, field, source: str, target: str, port: int = 80) -> list[bool]:
    """In each family, by each protocol."""
    return field.ask(
        Probe(one, two, protocol, port)
        for one, two in zip(world.ends[source], world.ends[target], strict=True)
        for protocol in ("TCP", "UDP")
    )


class Conversation:
    """A TCP connection whose server sends all the time; how much came, now."""

    def __init__(self, source, target, port: int = 7000) -> None:
        family = socket.AF_INET6 if target.family == 6 else socket.AF_INET

        def listen() -> socket.socket:
            made = socket.socket(family, socket.SOCK_STREAM)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((target.address, port))
            made.listen(1)
            return made

        listening = netns.inside(target.namespace, listen)

        def connect() -> socket.socket:
            made = socket.socket(family, socket.SOCK_STREAM)
            made.settimeout(5)
            made.connect((target.address, port))
            return made

        self._client = netns.inside(source.namespace, connect)
        self._server = listening.accept()[0]
        listening.close()
        self.got = 0
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        self._server.settimeout(0.2)
        while not self._ending.is_set():
            with suppress(OSError):
                self._server.send(b"x" * 100)
            time.sleep(0.005)

    def _receive(self) -> None:
        self._client.settimeout(0.2)
        while not self._ending.is_set():
            try:
                self.got += len(self._client.recv(4096))
            except OSError:
                continue

    def flows(self) -> bool:
        before = self.got
        time.sleep(0.25)
        return self.got > before

    def close(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        self._server.close()


def test_a_new_deny_ends_a_connection_at_its_next_packet_and_an_allow_lets_it_go_on(three, field):
    world = three
    world.apply(objects(world, FROM_B))
    port_7000 = json.loads(json.dumps(FROM_B))
    port_7000["spec"]["ingress"][0]["ports"].append({"port": 7000})
    world.apply(objects(world, port_7000))
    for one, two in zip(world.ends["x/b"], world.ends["x/a"], strict=True):
        with closing(Conversation(one, two)) as there:
            until("it flows", there.flows)
            world.apply(objects(world, FROM_B))
            time.sleep(0.1)
            got = there.got
            time.sleep(1)
            assert there.got == got, "the server keeps sending"
            world.apply(objects(world, port_7000))
            until("it goes on", there.flows, 20)


def test_a_pod_that_no_policy_knows_yet_is_held_and_others_wait_for_nothing(three, field):
    """While its agent is stopped a pod gets nothing and gives nothing; with it, at once. Elsewhere there is a policy."""
    world = three
    world.apply(objects(world, ELSEWHERE))
    assert all(asks(world, field, "x/b", "x/a"))
    one = world.agents[0]
    with one.paused():
        for end in world.named_pod(one, "x", "late"):
            for protocol in ("TCP", "UDP"):
                field.serve(end, protocol, 80)
        time.sleep(2.5)  # IPv6 has checked its address
        assert not any(asks(world, field, "x/b", "x/late"))
        assert not any(asks(world, field, "x/c", "x/late")), "on the same node"
        assert not any(asks(world, field, "x/late", "x/b"))
        assert all(asks(world, field, "x/b", "x/a")), "others go on"
    until(
        "it is let through", lambda: all(asks(world, field, "x/b", "x/late") + asks(world, field, "x/late", "x/c")), 15
    )


def test_a_restart_and_a_kill_write_nothing_and_open_nothing(three, field):
    world = three
    with_7001 = json.loads(json.dumps(FROM_B))
    with_7001["spec"]["ingress"][0]["ports"].append({"protocol": "UDP", "port": 7001})
    world.apply(objects(world, with_7001))
    one = world.agents[0]
    before = ruleset(world)
    streams = [Datagrams(a, b, 7001) for a, b in zip(world.ends["x/b"], world.ends["x/a"], strict=True)]
    leaks = [Leak(a, b) for a, b in zip(world.ends["x/c"], world.ends["x/a"], strict=True)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        one.stop(number)
        assert not any(asks(world, field, "x/c", "x/a")), "no agent runs"
        assert asks(world, field, "x/b", "x/a") == [True, False, True, False]
        one = world.restart(
            one, f"--policy-dir={world.objects}", f"--cni-results-dir={world.folder}/{one.node}-results"
        ).wait_ready()
        until("it has the policies", lambda one=one: one.status()["policy"]["enforced"])
        assert one.status()["counters"]["policy_commits"] == 0
        assert one.status()["counters"]["mended_policy"] == 0
        assert ruleset(world) == before
    for leak in leaks:
        assert leak.ended() == 0, "never one packet of what is forbidden"
    for stream in streams:
        assert stream.ended() == 0, "never one lost of what is allowed"


def test_a_table_that_is_made_anew_loses_and_leaks_nothing(three, field):
    """As an agent of another version does it, whose table has another form; in one transaction some packets are lost."""
    world = three
    with_7001 = json.loads(json.dumps(FROM_B))
    with_7001["spec"]["ingress"][0]["ports"].append({"protocol": "UDP", "port": 7001})
    world.apply(objects(world, with_7001))
    one = world.agents[0]
    snapshot, status = ask_policies(str(one.run_dir)), one.status()
    subnets = [prefix(status["lease"][name]) for name in ("subnet", "subnet_ipv6")]
    compiled = compile_node(snapshot.indexed(), snapshot.policies, "node1")
    content = Maker(snapshot.network).content(compiled, subnets, status["policy"]["generation"])
    one.stop(signal.SIGKILL)
    sets = netns.inside(world.namespace("node1"), NetfilterSocket)
    stream = Datagrams(world.ends["x/b"][0], world.ends["x/a"][0], 7001, gap_s=0)
    leak = Datagrams(world.ends["x/c"][1], world.ends["x/a"][1], 7002, gap_s=0)
    which = table(snapshot.network)
    with closing(sets):
        assert sets.read_content(which, content) == content, "as the agent made it"
        for _ in range(150):
            sets.replace_content(which, content)
            time.sleep(0.02)
        assert sets.read_content(which, content) == content
        assert sorted(each for each in world.run("node1", "nft", "list", "tables").splitlines() if SUFFIX in each) == [
            f"table inet overlay-1{SUFFIX}"
        ]
    assert leak.came() == 0, "never one packet of what is forbidden"
    assert stream.ended() == 0, "never one lost of what is allowed"


def test_what_a_killed_agent_left_beside_its_table_goes(three, field):
    world = three
    world.apply(objects(world, DENY_ALL))
    one = world.agents[0]
    one.stop(signal.SIGKILL)
    for family, name in (("inet", "policy"), ("bridge", "pods")):
        world.run("node1", "nft", "add", "table", family, f"overlay-1-{name}-beside")
    one = world.restart(one, f"--policy-dir={world.objects}", world.results(one.node)).wait_ready()
    until("none is left", lambda: "beside" not in world.run("node1", "nft", "list", "tables"))
    assert not any(asks(world, field, "x/b", "x/a"))


def ruleset(world) -> str:
    """Without what its counters say."""
    import re

    text = world.run("node1", "nft", "-s", "list", "table", "inet", f"overlay-1{SUFFIX}")
    return re.sub(r"counter packets \d+ bytes \d+", "counter", text)


def udp_pair(source, target, port: int, patience_s: float) -> tuple[socket.socket, socket.socket]:
    """One that listens at the target for so long at a time, and one of the source that sends there. port 0: any."""
    family = socket.AF_INET6 if target.family == 6 else socket.AF_INET

    def listen() -> socket.socket:
        made = socket.socket(family, socket.SOCK_DGRAM)
        made.bind((target.address, port))
        made.settimeout(patience_s)
        return made

    listening = netns.inside(target.namespace, listen)

    def connect() -> socket.socket:
        made = socket.socket(family, socket.SOCK_DGRAM)
        made.connect((target.address, listening.getsockname()[1]))
        return made

    return listening, netns.inside(source.namespace, connect)


class Datagrams:
    """Numbered ones to a port of an address, all the time; how many never came, or did."""

    def __init__(self, source, target, port: int, gap_s: float = 0.005) -> None:
        self._listening, self._sending = udp_pair(source, target, port, 0.5)
        self._listening.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._gap_s = gap_s
        self._ending, self._sent, self._came = threading.Event(), 0, set()
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._ending.is_set():
            self._sending.send(self._sent.to_bytes(8, "big"))
            self._sent += 1
            if self._gap_s:
                time.sleep(self._gap_s)

    def _receive(self) -> None:
        while True:
            try:
                self._came.add(self._listening.recv(8))
            except TimeoutError:
                if self._ending.is_set():
                    return

    def came(self) -> int:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._listening.close()
        self._sending.close()
        assert self._sent > 200
        return len(self._came)

    def ended(self) -> int:
        came = self.came()
        return self._sent - came


class Leak:
    """Datagrams that a policy forbids, all the time; how many came."""

    def __init__(self, source, target) -> None:
        self._got, self._sent, self._ending = 0, 0, threading.Event()
        self._listening, self._sending = udp_pair(source, target, 0, 0.05)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._sending.send(b"x")
                self._sent += 1
                self._listening.recv(8)
                self._got += 1
            except OSError:
                continue

    def ended(self) -> int:
        self._ending.set()
        self._thread.join()
        self._listening.close()
        self._sending.close()
        assert self._sent > 30
        return self._got


def test_what_somebody_does_to_the_table_is_put_back(three, field):
    world = three
    world.apply(objects(world, FROM_B))
    table = f"inet overlay-1{SUFFIX}"
    for command in (
        f"delete table {table}",
        f"flush chain {table} forward",
        f"flush chain {table} ingress",
        f"insert rule {table} forward accept",
        f"flush map {table} in4",
        "flush ruleset",
    ):
        before = mended(world)
        subprocess.run(
            ["nsenter", f"--net={netns.path(world.namespace('node1'))}", "nft", *command.split()], check=True
        )
        until(f"{command}: it was put back", lambda before=before: mended(world) > before)
        until("it is enforced", lambda: not any(asks(world, field, "x/c", "x/a")))
        assert asks(world, field, "x/b", "x/a") == [True, False, True, False]


def mended(world) -> int:
    return int(world.agents[0].status()["counters"]["mended_policy"])


def test_without_a_policy_there_is_no_table_and_nothing_is_lifted(three, field):
    world = three
    tables = sorted(world.run("node1", "nft", "list", "tables").splitlines())
    assert not any(SUFFIX in each for each in tables)
    assert "between" not in world.run("node1", "nft", "list", "table", "bridge", "overlay-1-pods")
    world.apply(objects(world, DENY_ALL))
    assert not any(asks(world, field, "x/c", "x/a"))
    assert "between" in world.run("node1", "nft", "list", "table", "bridge", "overlay-1-pods")
    world.apply(objects(world))
    until("all is as before", lambda: sorted(world.run("node1", "nft", "list", "tables").splitlines()) == tables)
    assert all(asks(world, field, "x/c", "x/a") + asks(world, field, "x/b", "x/a"))


def test_the_node_reaches_its_own_pods_and_a_pod_itself(three, field):
    world = three
    world.apply(objects(world, DENY_ALL))
    node = world.namespace("node1")
    for end in world.ends["x/a"]:
        for protocol in ("TCP", "UDP"):
            gateway = replace(end, namespace=node, address=gateway_of(end))
            assert field.ask([Probe(gateway, end, protocol, 80), Probe(end, end, protocol, 80)]) == [True, True]


def gateway_of(end) -> str:
    import ipaddress

    address = ipaddress.ip_address(end.address)
    length = 64 if end.family == 6 else 24
    return str(ipaddress.ip_network(f"{address}/{length}", strict=False)[1])


def test_bad_objects_cost_themselves_alone(three, field):
    world = three
    bad = {"kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": "bad"}, "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": "NO WAY"}]}]}}  # fmt: skip
    (world.objects / "broken.yaml").write_text("{unclosed: [")
    world.apply(objects(world, FROM_B, bad, {"kind": "Deployment", "metadata": {"name": "d"}}))
    until("they are told of", lambda: "policies refused" in world.agents[0].problems())
    text = world.agents[0].problems()["policies refused"]
    assert "broken.yaml: not YAML" in text
    assert "x/bad: all.json: spec.ingress[0].ports[0].port: 'NO WAY' must be a port's name" in text
    assert asks(world, field, "x/b", "x/a") == [True, False, True, False], "the good one is enforced"


def test_an_ip_block_of_a_node_means_it_by_the_tunnel_too(three, field):
    """From the node's own network to a pod of another node the kernel sends from the node's address in the pod network."""
    world = three
    blocks = {4: ("192.168.1.3/32", "192.168.1.77/32"), 6: ("fd00:192:168:1::3/128", "fd00:192:168:1::77/128")}
    node = world.namespace("node2")

    def policy(place: int):
        peers = [{"ipBlock": {"cidr": those[place]}} for those in blocks.values()]
        return {**FROM_B, "spec": {"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": peers}]}}

    def from_node() -> list[bool]:
        wild = {4: "0.0.0.0", 6: "::"}
        ends = [(replace(end, namespace=node, address=wild[end.family]), end) for end in world.ends["x/a"]]
        return field.ask([Probe(one, two, "TCP", 80) for one, two in ends])

    world.apply(objects(world, policy(0)))
    assert from_node() == [True, True]
    assert not any(asks(world, field, "x/b", "x/a"))
    world.apply(objects(world, policy(1)))
    assert from_node() == [False, False]
