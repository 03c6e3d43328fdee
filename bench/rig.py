"""What the benchmarks share: an etcd full of leases, agents of three kinds beside it, a watch on the kernel, and tables.

Everything is made in namespaces of its own and removed again. The kinds: `ours` (this checkout's overlayd), `flanneld`
(the real one, built by bench/flanneld/build), and what a single benchmark adds as a baseline.
"""

from __future__ import annotations

import compileall
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from lease.etcd.client import EtcdClient, EtcdSettings, rpc
from lease.model import Endpoint, Lease, Prefix, ip_text
from lease.records.codec import encode_key, encode_value
from overlay.kernel.route import wire
from overlay.lab import netns, topology
from tests.support.world import ROOT, KubeWorld, World

FLANNELD = Path(os.environ.get("FLANNELD", Path(__file__).parents[1] / ".venv/flanneld"))
NETWORK = "10.0.0.0/8"
LENGTH = 25
"""Of a subnet: a /8 of them holds 131,072."""
CONFIG = {"Network": NETWORK, "SubnetLen": LENGTH, "EnableNFTables": True, "Backend": {"Type": "vxlan"}}
NETWORK6, LENGTH6 = Prefix(6, 0xFD00_0010 << 96, 32), 64
BOTH = {"EnableIPv6": True, "IPv6Network": str(NETWORK6)}
"""Of a dual-stack network, beside CONFIG."""
TICK = os.sysconf("SC_CLK_TCK")


def lease(number: int, both: bool = False) -> Lease:
    """Of peer `number`: subnet 10.x.y.z/25, public IP 172.16.0.0 + number, as flannel would write it; and (both) of IPv6."""
    subnet = Prefix(4, (10 << 24) + ((number + 2) << (32 - LENGTH)), LENGTH)
    end = Endpoint(subnet, (172 << 24 | 16 << 16) + number, 1, 0x0E2A << 32 | number)
    if not both:
        return Lease(encode_key(subnet), "vxlan", end, None, "", 0, 0, 0)
    subnet6 = Prefix(6, NETWORK6.base + ((number + 2) << 64), LENGTH6)
    end6 = Endpoint(subnet6, (0xFD01 << 112) + number + 1, 1, 0x0E2B << 32 | number)
    return Lease(encode_key(subnet, subnet6), "vxlan", end, end6, "", 0, 0, 0)


class Records:
    """The records in a world's etcd, written by a client of this process."""

    BATCH = 120

    def __init__(self, world: World) -> None:
        self.world = world
        self._client = EtcdClient(EtcdSettings((world.etcd.endpoint,)))

        def connect() -> list[int]:  # in the thread that asks; the connection stays
            return [self._client.grant(86_400) for _ in range(20)]

        self._handles = netns.inside(topology.underlay_name(world.lab), connect)

    def put(self, leases: Iterable[Lease]) -> int:
        """Write them, 120 in a transaction; the last revision."""
        batch: list[object] = []
        revision = 0
        for place, item in enumerate(leases):
            key = f"{ROOT}/subnets/{item.key}".encode()
            put = rpc.PutRequest(key=key, value=encode_value(item), lease=self._handles[place % len(self._handles)])
            batch.append(rpc.RequestOp(request_put=put))
            if len(batch) == self.BATCH:
                revision = int(self._client.txn([], batch).header.revision)
                batch = []
        if batch:
            revision = int(self._client.txn([], batch).header.revision)
        return revision

    def growing(self, counts: str, both: bool = False) -> Iterator[int]:
        """Each of these numbers of peers (`10,200`), the smallest first, when so many are there."""
        there = 0
        for count in sorted(int(text) for text in counts.split(",")):
            self.put(lease(number, both) for number in range(there, count))
            there = count
            yield count

    def drop(self, leases: Iterable[Lease]) -> None:
        """Delete them, 120 in a transaction."""
        batch: list[object] = []
        for item in leases:
            key = f"{ROOT}/subnets/{item.key}".encode()
            batch.append(rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key)))
            if len(batch) == self.BATCH:
                self._client.txn([], batch)
                batch = []
        if batch:
            self._client.txn([], batch)

    def close(self) -> None:
        """End the client."""
        self._client.close()


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
        return f"RSS {self.rss:.1f}, anonymous {self.anon:.1f}, peak {self.peak:.1f} MiB"


def cpu_s(pid: int) -> float:
    """utime + stime, with those of children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICK


class RouteWatch:
    """Counts the routes to subnets that come and go in a namespace, as the kernel tells them, with the time of the last."""

    def __init__(self, namespace: str, family: int = 4) -> None:
        self._lengths = (LENGTH, 24) if family == 4 else (LENGTH6,)

        def listen() -> socket.socket:
            made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
            made.setsockopt(socket.SOL_SOCKET, 33, 512 << 20)  # SO_RCVBUFFORCE
            made.bind((0, 0))
            made.setsockopt(270, 1, 7 if family == 4 else 11)  # NETLINK_ADD_MEMBERSHIP, RTNLGRP_IPV4_ROUTE, _IPV6_ROUTE
            made.settimeout(0.05)
            return made

        self._socket = netns.inside(namespace, listen)
        self.came = self.went = 0
        self.first = self.last = 0.0
        """perf_counter() at the first and the last that were counted."""

    def until(self, came: int = 0, went: int = 0, limit_s: float = 120.0) -> float:
        """perf_counter() at the last of so many; they are counted since the last call. Raises SystemExit."""
        end = time.perf_counter() + limit_s
        self.first = 0.0
        recv, lengths = self._socket.recv, self._lengths
        while self.came < came or self.went < went:
            try:
                data = recv(1 << 16)
            except TimeoutError:
                if time.perf_counter() > end:
                    raise SystemExit(f"{self.came} of {came} routes came, {self.went} of {went} went") from None
                continue
            if data[17] in lengths and data[21] != 2:  # rtm_dst_len, and none of an address (RTPROT_KERNEL)
                kind = data[4]
                self.came += kind == wire.RTM_NEWROUTE
                self.went += kind == wire.RTM_DELROUTE
                self.last = time.perf_counter()
                self.first = self.first or self.last
        self.came = self.went = 0
        return self.last

    def forget(self) -> None:
        """What is waiting is of no interest."""
        with suppress(TimeoutError):
            while True:
                self._socket.recv(1 << 16)

    def close(self) -> None:
        """End it."""
        self._socket.close()


_DEFER = "from overlay.process import defer\ndefer.install()\n"


FLANNELS = ("--etcd-endpoints", "--kube-subnet-mgr", "--kubeconfig-file", "--net-config-path")
"""The flags of a world that flanneld has, too."""


class Program:
    """An agent of some kind on a node."""

    def __init__(self, world: World, node: str, kind: str, folder: Path, *flags: str, before: str = "") -> None:
        """before: Python that ours runs before it starts."""
        self.kind = kind
        command = ["nsenter", f"--net={netns.path(world.namespace(node))}"]
        if isinstance(world, KubeWorld):
            where, environment = world.store_flags(node), {**os.environ, "NODE_NAME": node}
        else:
            where, environment = [f"--etcd-endpoints={world.etcd.endpoint}"], dict(os.environ)
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "flanneld":
            if not FLANNELD.exists():
                raise SystemExit("no flanneld: bench/flanneld/build makes it")
            its = [flag for flag in where if flag.startswith(FLANNELS)]
            command += [str(FLANNELD), *its, "-iface=eth0", f"-subnet-file={folder}/subnet.env", *flags]
        else:
            start = ["-c", f"{_DEFER}{before}\nfrom overlay.main import main\nmain()"] if before else ["-m", "overlay"]
            command += [
                sys.executable, *start, *where, f"--run-dir={folder}", f"--subnet-file={folder}/subnet.env",
                f"--cni-conf-dir={folder}/cni", "--log-format=json", *flags,
            ]  # fmt: skip
        with (folder / "log").open("ab") as log:
            self.began = time.perf_counter()
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.pid = self.process.pid
        self.folder = folder

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def end(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(20)


_made: dict[str, int] = {}


def compile_sources() -> None:
    """As setup does: without it each start compiles them."""
    for package in ("lease", "overlay"):
        compileall.compile_dir(Path(__file__).parents[1] / package, quiet=1)


@contextmanager
def world(both: bool = False) -> Iterator[World]:
    """An underlay, an etcd and the network config in it; all gone afterwards."""
    compile_sources()
    made = World(Path(tempfile.mkdtemp(prefix="overlay-bench-")) / "world")
    try:
        made.families = (4, 6) if both else (4,)
        made.config(**CONFIG, **(BOTH if both else {}))
        yield made
    finally:
        made.close()
        made.folder.parent.rmdir()


def fresh_node(where: World) -> str:
    """Another node, with an empty kernel; those before it go."""
    for name in netns.existing(where.namespace("node")):
        netns.delete(name)
    _made[where.lab] = _made.get(where.lab, 0) + 1
    return where.node(_made[where.lab])


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """`median (min .. max)`."""
    shown = [value * scale for value in (statistics.median(values), min(values), max(values))]
    return "{:.{d}f} ({:.{d}f} .. {:.{d}f})".format(*shown, d=digits)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Columns, as wide as they must be."""
    lines = [head, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    for line in lines:
        print(
            "  ".join(
                f"{cell:>{width}}" if place else f"{cell:<{width}}"
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ),
            flush=True,
        )


def timed(act: Callable[[], object]) -> float:
    """Seconds it took."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def machine() -> str:
    """One line for a results page."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    load, python = Path("/proc/loadavg").read_text().split()[0], sys.version.split()[0]
    return f"{os.cpu_count()} cores of {model}, Linux {os.uname().release}, CPython {python}, load {load} before"


def ip(number: int) -> str:
    return ip_text(4, number)


_HEADER = struct.Struct("=LHHLL")
