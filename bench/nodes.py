"""What many Nodes cost an agent: `.venv/bin/python -m bench.nodes [--nodes 5000] [--kinds ours,flanneld]`.

N Nodes of 12 to 13 kB on a real API server. Of ours and of the real flanneld, one after the other beside the same Nodes:
exec to the last peer in the kernel, memory, CPU per foreign status update (alone, and when many come), a Node's creation to
its route. Beside the updates stands the floor: a watch of the same metadata, received and thrown away. Then ours beside N
leases in etcd: what Kubernetes costs more.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import ssl
import statistics
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bench import rig
from lease.model import Endpoint, Lease, Prefix, ip_text, mac_text
from lease.records.codec import encode_key, encode_value
from overlay.lab import netns, topology
from tests.support.world import ROOT, KubeWorld, World

LIMIT_MIB = 20.0
NETWORK = "10.0.0.0/8"
SETTLE_S, JOINS, HANDS = 20.0, 40, 8
BEATS, BEATS_PER_S, MANY_BEATS, MANY_PER_S = 500, 20, 2000, 200
PATCH = "application/strategic-merge-patch+json"
ALL = "application/json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
Request = tuple[str, str, Any]
"""Method, path, body."""


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--nodes", type=int, default=5000)
    arguments.add_argument("--kinds", default="ours,flanneld")
    given = arguments.parse_args()
    print(rig.machine())
    rig.compile_sources()
    folder = Path(tempfile.mkdtemp(prefix="overlay-bench-"))
    on_nodes = kubernetes(KubeWorld(folder / "kube"), given.nodes, given.kinds.split(","))
    on_etcd = etcd(World(folder / "etcd"), given.nodes)
    folder.rmdir()
    if on_nodes is not None:
        for what, more in (("idle RSS", on_nodes.rss - on_etcd.rss), ("peak RSS", on_nodes.peak - on_etcd.peak)):
            verdict = "ok" if more <= LIMIT_MIB else "ABOVE"
            say("ours", f"Kubernetes - etcd, {what}", f"{more:+.1f} MiB; limit {LIMIT_MIB:.0f}: {verdict}")


def kubernetes(world: KubeWorld, count: int, kinds: list[str]) -> rig.Memory | None:
    """All figures on Nodes; memory of ours when idle."""
    found = None
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
        say("", "Nodes", f"{count} of {sizes[0]} bytes, {sizes[1]} of them metadata (made in {took:.0f} s)")
        for place, kind in enumerate(kinds, start=1):
            node = world.node(place, f"10.255.{place}.0/24")
            joining = range(count + JOINS * (place - 1), count + JOINS * place)
            others = count + JOINS * (place - 1) + place - 1
            with launched(world, node, kind, others) as (program, memory):
                found = memory if kind == "ours" else found
                times = joins(world, hands, node, joining)
                say(
                    kind,
                    "creation to route",
                    f"median {statistics.median(times):.1f}, max {max(times):.1f} ms ({JOINS})",
                )
                updates(kind, program.pid, hands, hand if place == 1 else None, count)
                say(kind, "  then", str(rig.Memory.of(program.pid)))
        return found
    finally:
        world.close()


def updates(
    kind: str, pid: int, hands: Hands, receiver: Callable[[], http.client.HTTPConnection] | None, count: int
) -> None:
    """CPU for each status update of a foreign Node; with a receiver also the floor of it."""
    floor = Floor(hands, receiver) if receiver is not None else None
    for number, per_s in ((BEATS, BEATS_PER_S), (MANY_BEATS, MANY_PER_S)):
        before, below, began = rig.cpu_s(pid), floor.cpu_s if floor else 0.0, time.perf_counter()
        hands.all(paced((beat(n % count) for n in range(number)), per_s))
        took = time.perf_counter() - began
        time.sleep(2.0)
        spent = rig.cpu_s(pid) - before
        bare = f"; bare receipt {(floor.cpu_s - below) / number * 1e6:.0f} us" if floor else ""
        what = f"{number} at {per_s}/s in {took:.1f} s"
        say(kind, "foreign status updates", f"{what}: {spent / number * 1e6:.0f} us of CPU each{bare}")
    if floor is not None:
        floor.close()


class Floor:
    """A watch of the metadata of all Nodes, received and thrown away, as cheaply as this language can."""

    def __init__(self, hands: Hands, connect: Callable[[], http.client.HTTPConnection]) -> None:
        version = json.loads(hands.one("GET", "/api/v1/nodes?limit=1", None))["metadata"]["resourceVersion"]
        self.cpu_s = 0.0
        self._connection = hands.inside(connect)
        self._connection.request(
            "GET", f"/api/v1/nodes?watch=true&resourceVersion={version}", headers=hands.headers | {"Accept": METADATA}
        )
        self._socket = self._connection.sock
        self._connection.getresponse()
        self._ending = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._socket.settimeout(1.0)
        while not self._ending:
            with contextlib.suppress(TimeoutError):
                self._socket.recv(1 << 16)
            self.cpu_s = time.thread_time()

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        self._connection.close()


def etcd(world: World, count: int) -> rig.Memory:
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
        node = world.node(1)
        with launched(world, node, "ours", count, "etcd") as (_, memory):
            return memory
    finally:
        world.close()


@contextlib.contextmanager
def launched(
    world: World, node: str, kind: str, count: int, where: str = "Kubernetes"
) -> Iterator[tuple[rig.Program, rig.Memory]]:
    """An agent, when its peers are in the kernel and it has settled."""
    watch = rig.RouteWatch(world.namespace(node))
    program = rig.Program(world, node, kind, world.folder / f"bench-{kind}")
    try:
        whole = watch.until(came=count, limit_s=120) - program.began
        until_then = rig.cpu_s(program.pid)
        time.sleep(SETTLE_S / 2)
        spent = rig.cpu_s(program.pid)
        time.sleep(SETTLE_S / 2)
        idle, memory = rig.cpu_s(program.pid) - spent, rig.Memory.of(program.pid)
        idling = f"idle {idle / (SETTLE_S / 2) * 1000:.1f} ms a second"
        say(kind, f"{where}: exec to the last peer", f"{whole:.2f} s, CPU {until_then:.2f} s; later {idling}")
        say(kind, f"{where}: after {SETTLE_S:.0f} s", str(memory))
        yield program, memory
    finally:
        watch.close()
        program.kill()


def joins(world: World, hands: Hands, node: str, numbers: range) -> list[float]:
    """Milliseconds from the POST of a Node until the kernel routes to it by our device."""
    index = world.index(node)

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

    return world.ipr(node, act)


def routed_by(ipr: IPRoute, address: str) -> int:
    """The device the kernel would send by, 0: none."""
    try:
        return int(next(iter(ipr.route("get", dst=address))).get_attr("RTA_OIF"))
    except NetlinkError:
        return 0


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
        self._where = topology.underlay_name(world.lab)
        self._connections = [self.inside(make) for _ in range(HANDS)]
        self.headers = headers

    def inside(self, make: Callable[[], http.client.HTTPConnection]) -> http.client.HTTPConnection:
        """A connection made in the underlay."""

        def connected() -> http.client.HTTPConnection:
            connection = make()
            connection.connect()
            return connection

        return netns.inside(self._where, connected)

    def one(self, method: str, path: str, content: Any, accept: str = ALL, hand: int = 0) -> bytes:
        """What the server answers. Raises SystemExit when it refuses."""
        connection = self._connections[hand]
        kind = PATCH if method == "PATCH" else ALL
        data = None if content is None else json.dumps(content).encode()
        connection.request(method, path, data, self.headers | {"Content-Type": kind, "Accept": accept})
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


def say(kind: str, what: str, figure: str) -> None:
    print(f"{kind:<9} {what:<34} {figure}", flush=True)


if __name__ == "__main__":
    main()
