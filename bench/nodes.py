"""What many Nodes cost an agent: `.venv/bin/python -m bench.nodes [N]` (5000).

N Nodes of 12 to 13 kB on a real API server, one agent beside them: exec to ready, memory, CPU per foreign status
update, a Node's creation to its route; then the same agent beside N leases in etcd, the difference against the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import ssl
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from lease.codec import encode_key, encode_value
from lease.model import Endpoint, Lease, Prefix, ip_text, mac_text
from overlay.lab import netns, topology
from tests.support.wait import until
from tests.support.world import ROOT, Agent, KubeWorld, World

LIMIT_MIB = 20.0
NETWORK, OWN_SUBNET = "10.0.0.0/8", "10.255.255.0/24"
SETTLE_S, BEATS, BEATS_PER_S, JOINS, HANDS = 20.0, 500, 20, 20, 8
PATCH = "application/strategic-merge-patch+json"
ALL = "application/json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
Request = tuple[str, str, Any]
"""Method, path, body."""


class Memory(NamedTuple):
    """MiB, as /proc/PID/status has them."""

    rss: float
    anon: float
    peak: float

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Of a process now."""
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(*(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon", "VmHWM")))

    def __str__(self) -> str:
        return f"RSS {self.rss:6.1f}  anonymous {self.anon:6.1f}  peak {self.peak:6.1f} MiB"


def main(count: int) -> None:
    """Measure and print."""
    folder = Path(tempfile.mkdtemp(prefix="overlay-bench-"))
    on_nodes = kubernetes(KubeWorld(folder / "kube"), count)
    on_etcd = etcd(World(folder / "etcd"), count)
    folder.rmdir()
    for what, more in (("idle RSS", on_nodes.rss - on_etcd.rss), ("peak RSS", on_nodes.peak - on_etcd.peak)):
        verdict = "ok" if more <= LIMIT_MIB else "ABOVE"
        say(f"Kubernetes - etcd, {what}", f"{more:+.1f} MiB; limit {LIMIT_MIB:.0f}: {verdict}")


def kubernetes(world: KubeWorld, count: int) -> Memory:
    """All figures on Nodes; memory when idle."""
    try:
        world.config(Network=NETWORK)
        context = ssl.create_default_context(cafile=str(world.kube.folder / "tls.crt"))

        def hand() -> http.client.HTTPConnection:
            return http.client.HTTPSConnection(topology.GATEWAY, world.kube.port, context=context, timeout=60)

        hands = Hands(world, hand, {"Authorization": "Bearer admin-token"})
        began = time.perf_counter()
        hands.all(("POST", "/api/v1/nodes?fieldManager=kubelet", body(number)) for number in range(count))
        hands.all(beat(number) for number in range(count))  # a Node's second manager of fields
        took = time.perf_counter() - began
        sizes = [len(hands.one("GET", f"/api/v1/nodes/{name(count // 2)}", None, kind)) for kind in (ALL, METADATA)]
        say("Nodes", f"{count} of {sizes[0]} bytes, {sizes[1]} of them metadata (made in {took:.0f} s)")

        world.node(1, OWN_SUBNET)
        agent, memory = launch(world, count, "Kubernetes")
        pid = agent.process.pid
        for what, per_s in ((f"{BEATS} at {BEATS_PER_S}/s", BEATS_PER_S), (f"burst of {BEATS}", 0)):
            before, began = cpu_s(pid), time.perf_counter()
            hands.all(paced((beat(number % count) for number in range(BEATS)), per_s))
            took = time.perf_counter() - began
            time.sleep(2.0)
            spent = cpu_s(pid) - before
            say("foreign status updates", f"{what} in {took:.1f} s: {spent / BEATS * 1000:.2f} ms of CPU each")
        say("  then", str(Memory.of(pid)))
        times = joins(world, hands, range(count, count + JOINS))
        say("creation to route", f"{JOINS} joins: median {statistics.median(times):.1f}, max {max(times):.1f} ms")
        say("  then", str(Memory.of(pid)))
        return memory
    finally:
        world.close()


def etcd(world: World, count: int) -> Memory:
    """Memory when idle beside so many leases."""
    try:
        world.config(Network=NETWORK)
        hands = Hands(world, lambda: http.client.HTTPConnection(topology.GATEWAY, world.etcd.port, timeout=60), {})

        def records() -> Iterable[Request]:
            handles = itertools.cycle(world.etcd.grant(86_400) for _ in range(100))
            for number, handle in zip(range(count), handles, strict=False):
                found = lease(number)
                key = b64encode(f"{ROOT}/subnets/{found.key}".encode()).decode()
                value = b64encode(encode_value(found)).decode()
                yield "POST", "/v3/kv/put", {"key": key, "value": value, "lease": str(handle)}

        hands.all(records())
        world.node(1)
        return launch(world, count, "etcd")[1]
    finally:
        world.close()


def launch(world: World, count: int, what: str) -> tuple[Agent, Memory]:
    """An agent, when its peers are in the kernel and it has settled."""
    began = time.perf_counter()
    agent = world.agent("node1", "--node-name=node1")
    while not answers(agent):
        if agent.process.poll() is not None or time.perf_counter() - began > 120:
            raise SystemExit(f"does not become ready: {agent.log()[-2000:]}")
        time.sleep(0.02)
    took, there = time.perf_counter() - began, world.peers("node1")
    until("every peer is in the kernel", lambda: world.peers("node1") == count, 60)
    whole = time.perf_counter() - began
    time.sleep(SETTLE_S / 2)
    spent = cpu_s(agent.process.pid)
    time.sleep(SETTLE_S / 2)
    idle, memory = cpu_s(agent.process.pid) - spent, Memory.of(agent.process.pid)
    later = "" if there == count else f" with {there} peers, all after {whole:.2f} s"
    idling = f"idle {idle / (SETTLE_S / 2) * 1000:.1f} ms a second"
    say(f"{what}: exec to ready", f"{took:.2f} s{later}; CPU until settled {spent:.2f} s, {idling}")
    say(f"{what}: after {SETTLE_S:.0f} s", str(memory))
    return agent, memory


def answers(agent: Agent) -> bool:
    """Ready; its socket may not be there yet."""
    with contextlib.suppress(OSError):
        return agent.ready()
    return False


def joins(world: World, hands: Hands, numbers: range) -> list[float]:
    """Milliseconds from the POST of a Node until the kernel routes to it by our device."""
    index = world.index("node1")

    def act(ipr: IPRoute) -> list[float]:
        times = []
        for number in numbers:
            address = ip_text(4, subnet(number).base + 5)
            began = time.perf_counter()
            hands.one("POST", "/api/v1/nodes?fieldManager=kubelet", body(number))
            while routed_by(ipr, address) != index:
                if time.perf_counter() - began > 30:
                    raise SystemExit(f"no route to {address}")
                time.sleep(0.001)
            times.append((time.perf_counter() - began) * 1000)
            time.sleep(0.3)
        return times

    return world.ipr("node1", act)


def routed_by(ipr: IPRoute, address: str) -> int:
    """The device the kernel would send by, 0: none."""
    try:
        return int(next(iter(ipr.route("get", dst=address))).get_attr("RTA_OIF"))
    except NetlinkError:
        return 0


def cpu_s(pid: int) -> float:
    """utime + stime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def paced(requests: Iterable[Request], per_s: int) -> Iterable[Request]:
    """So many a second; 0: at once."""
    began = time.perf_counter()
    for place, request in enumerate(requests):
        if per_s:
            time.sleep(max(0.0, began + place / per_s - time.perf_counter()))
        yield request


class Hands:
    """Kept connections from the underlay to a server."""

    def __init__(self, world: World, make: Callable[[], http.client.HTTPConnection], headers: dict[str, str]) -> None:
        def connected() -> http.client.HTTPConnection:
            connection = make()
            connection.connect()
            return connection

        where = topology.underlay_name(world.lab)
        self._connections = [netns.inside(where, connected) for _ in range(HANDS)]
        self._headers = headers

    def one(self, method: str, path: str, content: Any, accept: str = ALL, hand: int = 0) -> bytes:
        """What the server answers. Raises SystemExit when it refuses."""
        connection = self._connections[hand]
        kind = PATCH if method == "PATCH" else ALL
        data = None if content is None else json.dumps(content).encode()
        connection.request(method, path, data, self._headers | {"Content-Type": kind, "Accept": accept})
        answer = connection.getresponse()
        found = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {found[:500]!r}")
        return found

    def all(self, requests: Iterable[Request]) -> None:
        """By all hands; each request is made in turn when a hand is free."""
        with ThreadPoolExecutor(HANDS) as pool:
            waiting: list[Any] = [None] * HANDS
            for place, (method, path, content) in enumerate(requests):
                hand = place % HANDS
                if waiting[hand] is not None:
                    waiting[hand].result()
                waiting[hand] = pool.submit(self.one, method, path, content, ALL, hand)
            for done in waiting:
                if done is not None:
                    done.result()


# --- what stands in the store
def name(number: int) -> str:
    return f"ip-172-16-{number >> 8}-{number & 255}.eu-central-1.compute.internal"


def subnet(number: int) -> Prefix:
    return Prefix(4, 10 << 24 | number << 8, 24)


def lease(number: int) -> Lease:
    """Of a peer."""
    end = Endpoint(subnet(number), 172 << 24 | 16 << 16 | number, 1, 0x0E2A << 32 | number)
    return Lease(encode_key(subnet(number)), "vxlan", end, None, name(number), 0, 0, 0)


def beat(number: int) -> Request:
    """What a kubelet does to its Node every five minutes."""
    path = f"/api/v1/nodes/{name(number)}/status?fieldManager=kubelet"
    return "PATCH", path, {"status": {"conditions": conditions()}}


def conditions() -> list[dict[str, str]]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = {
        "MemoryPressure": ("False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        "DiskPressure": ("False", "KubeletHasNoDiskPressure", f"kubelet has no disk pressure (seen {time.time_ns()})"),
        "PIDPressure": ("False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        "Ready": ("True", "KubeletReady", "kubelet is posting ready status"),
    }
    return [
        {
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": "2026-11-01T08:00:00Z",
        }
        for kind, (status, reason, message) in said.items()
    ]  # fmt: skip


def body(number: int) -> dict[str, Any]:
    """A Node as kubelet, cloud provider and flannel leave it."""
    end = lease(number).v4
    assert end is not None
    assert end.mac is not None
    ip, cidr = ip_text(4, end.public_ip), f"{ip_text(4, end.subnet.base)}/24"
    flannel = {
        "backend-data": json.dumps({"VNI": 1, "VtepMAC": mac_text(end.mac)}, separators=(",", ":")),
        "backend-type": "vxlan", "kube-subnet-manager": "true", "public-ip": ip,
    }  # fmt: skip
    room = {"cpu": "16", "memory": "64968328Ki", "ephemeral-storage": "101430960Ki", "hugepages-1Gi": "0",
            "hugepages-2Mi": "0", "pods": "110"}  # fmt: skip
    uuid = hashlib.md5(name(number).encode(), usedforsecurity=False).hexdigest()
    return {
        "metadata": {
            "name": name(number),
            "labels": {
                "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/instance-type": "m5.4xlarge",
                "beta.kubernetes.io/os": "linux", "failure-domain.beta.kubernetes.io/region": "eu-central-1",
                "failure-domain.beta.kubernetes.io/zone": "eu-central-1a", "kubernetes.io/arch": "amd64",
                "kubernetes.io/hostname": name(number), "kubernetes.io/os": "linux",
                "node.kubernetes.io/instance-type": "m5.4xlarge", "topology.kubernetes.io/region": "eu-central-1",
                "topology.kubernetes.io/zone": "eu-central-1a", "node-role.kubernetes.io/worker": "",
            },
            "annotations": {f"flannel.alpha.coreos.com/{key}": value for key, value in flannel.items()} | {
                "csi.volume.kubernetes.io/nodeid": '{"ebs.csi.aws.com":"i-0' + uuid[:16] + '"}',
                "node.alpha.kubernetes.io/ttl": "0",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            },
        },
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr], "providerID": f"aws:///eu-central-1a/i-0{uuid[:16]}"},
        "status": {
            "addresses": [{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": name(number)}],
            "allocatable": room, "capacity": room, "conditions": conditions(),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {
                "architecture": "amd64", "bootID": uuid, "machineID": uuid, "systemUUID": uuid,
                "containerRuntimeVersion": "containerd://2.0.4", "kernelVersion": "6.8.0-51-generic",
                "kubeProxyVersion": "v1.33.0", "kubeletVersion": "v1.33.0", "operatingSystem": "linux",
                "osImage": "Ubuntu 24.04.1 LTS",
            },
            "images": [image(place) for place in range(41)],
        },
    }  # fmt: skip


def image(place: int) -> dict[str, Any]:
    where = f"registry.example.com/platform/service-{place:02}"
    digest = hashlib.sha256(where.encode()).hexdigest()
    return {"names": [f"{where}@sha256:{digest}", f"{where}:v1.{place}.0"], "sizeBytes": 50_000_000 + place}


def say(what: str, figure: str) -> None:
    print(f"{what:32} {figure}", flush=True)


main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
