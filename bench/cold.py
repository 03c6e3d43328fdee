"""Cold start, exec to the last peer in the kernel: `.venv/bin/python -m bench.cold [--peers 200,20000] [--rounds 3]`.

Beside it in the same run, in turn: the real flanneld, the raw kernel floor (prebuilt messages, sent in batches to a device
that is there already), and flannel's way of programming (one metric for all, a socket and a system call for each message, a
TTL call for each lease) as far as a program of ours can show it. For each agent also CPU until then, and memory when idle.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time

from bench import rig
from lease.backend_config import VxlanConfig
from lease.etcd.client import EtcdClient, EtcdSettings
from lease.families import V4
from lease.model import ip_number, prefix
from overlay.backends.base import View
from overlay.backends.vxlan import Vxlan
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route import wire
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, RouteKey, RouteValue
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.kernel.route.links import Links
from overlay.lab import netns, topology
from tests.support.world import ROOT, World

SETTLE_S = 6.0
BATCH = 1500
NLM_F_ACK = 4


class Row:
    """The figures of one program at one size."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.first: list[float] = []
        """Exec to the first peer's route: the first useful work."""
        self.cpu: list[float] = []
        self.memory: list[rig.Memory] = []


def agent(world: World, kind: str, count: int, row: Row, number: int) -> None:
    """One cold start."""
    node = rig.fresh_node(world)
    watches = [rig.RouteWatch(world.namespace(node), family) for family in world.families]
    watch = watches[0]
    program = rig.Program(world, node, kind, world.folder / f"{kind}-{count}-{number}")
    try:
        row.took.append(max(each.until(came=count, limit_s=240) for each in watches) - program.began)
        row.first.append(watch.first - program.began)
        row.cpu.append(rig.cpu_s(program.pid))
        time.sleep(SETTLE_S)
        row.memory.append(rig.Memory.of(program.pid))
    except SystemExit as error:
        raise SystemExit(f"{kind}: {error}\n{program.log()[-3000:]}") from None
    finally:
        program.kill()
        for each in watches:
            each.close()


def made_device(world: World, node: str) -> int:
    """flannel.1 as the agents make it; its number."""

    def make() -> int:
        links = Links()
        lower = next(link.ifindex for link in RequestSocket().links() if link.name == "eth0")
        local = ip_number(topology.node_address(int(node.removeprefix("node"))), 4)
        links.create(VxlanDevice("flannel.1", 1, 8472, local, lower, 1450, 0x0E2AFF000001, False, False))
        there = links.read("flannel.1")
        assert there is not None
        links.set_up(there.ifindex)
        links.close()
        return there.ifindex

    return netns.inside(world.namespace(node), make)


def floor(world: World, count: int, row: Row) -> None:
    """Three prebuilt messages a peer, in batches."""
    node = rig.fresh_node(world)
    index = made_device(world, node)
    requests = netns.inside(world.namespace(node), RequestSocket)
    first = requests.take_seqs(3 * count)
    messages = [message for place in range(count) for message in three(place, first + 3 * place, index)]

    def send() -> None:
        for start in range(0, len(messages), BATCH):
            part = messages[start : start + BATCH]
            refused = requests.execute(part, first + start)
            assert not refused, refused

    row.took.append(rig.timed(send))
    requests.close()


def three(place: int, seq: int, index: int, metric: int | None = None) -> list[bytes]:
    """Neighbour, FDB entry and route of a peer."""
    end = rig.lease(place).v4
    assert end is not None
    backend = Vxlan(VxlanConfig(), V4)
    (_, *neighbour), (_, *fdb), (_, own_key, _) = backend.entries(View(V4, NETWORK, ()), end)
    key = own_key if metric is None else RouteKey(end.subnet.base, end.subnet.length, metric)
    value = RouteValue(TUNNEL, end.subnet.base, True, PROTOCOL)
    return [
        wire.neighbour_add(V4, seq, *neighbour, index),
        wire.fdb_add(V4, seq + 1, *fdb, index),
        wire.route_add(V4, seq + 2, key, value, index, replace=True),
    ]


def flannels_way(world: World, count: int, row: Row) -> None:
    """A TTL call for each lease, then each message by a socket of its own, all routes of one metric."""
    node = rig.fresh_node(world)
    index = made_device(world, node)
    client = EtcdClient(EtcdSettings((world.etcd.endpoint,)))
    netns.inside(topology.underlay_name(world.lab), lambda: next(client.pages(b"x", b"", 1, 1)))  # the connection stays

    def run() -> None:
        pages = client.pages(f"{ROOT}/subnets/".encode(), f"{ROOT}/subnets0".encode(), count, 1)
        for kv in (kv for page in pages for kv in page.kvs):
            client.time_to_live(kv.lease)
        netns.inside(world.namespace(node), lambda: one_by_one(count, index))

    row.took.append(rig.timed(run))
    client.close()


def one_by_one(count: int, index: int) -> None:
    """Each message alone, on a fresh socket, waiting for its ACK."""
    for place in range(count):
        for message in three(place, 1, index, metric=0):
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as alone:
                alone.bind((0, 0))
                flags = int.from_bytes(message[6:8], sys.byteorder) | NLM_F_ACK
                alone.send(message[:6] + flags.to_bytes(2, sys.byteorder) + message[8:])
                alone.recv(4096)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--peers", default="200,1000,5000,20000")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--kinds", default="ours,flanneld,floor,flannels-way")
    arguments.add_argument(
        "--slow-up-to", type=int, default=20000, help="flanneld and flannel's way up to so many peers"
    )
    arguments.add_argument("--both", action="store_true", help="a dual-stack network (ours and flanneld)")
    given = arguments.parse_args()
    print(rig.machine())
    with rig.world(given.both) as world:
        records = rig.Records(world)
        for count in records.growing(given.peers, given.both):
            measure(world, count, given.rounds, given.kinds.split(","), given.slow_up_to)
        records.close()


def measure(world: World, count: int, rounds: int, kinds: list[str], slow_up_to: int) -> None:
    """One size, all kinds in turn."""
    rows = {kind: Row() for kind in kinds if count <= slow_up_to or kind in ("ours", "floor")}
    for number in range(rounds):
        for kind, row in rows.items():
            if kind == "floor":
                floor(world, count, row)
            elif kind == "flannels-way":
                if number == 0:
                    flannels_way(world, count, row)
            else:
                agent(world, kind, count, row, number)
    base = rows.get("flanneld")
    lines = []
    for kind, row in rows.items():
        against = "" if base is None or kind == "flanneld" else f"{min_of(row.took) / min_of(base.took):.3f}"
        cpu = rig.spread(row.cpu) if row.cpu else ""
        first = rig.spread(row.first) if row.first else ""
        memory = [
            rig.spread([getattr(each, name) for each in row.memory], digits=0) if row.memory else ""
            for name in ("rss", "anon", "peak")
        ]
        lines.append((f"{count} {kind}", rig.spread(row.took), against, first, cpu, *memory))
    rig.table(
        ("peers", "seconds", "of flanneld's", "to the first route", "CPU s", "RSS MiB", "anonymous", "peak"), lines
    )


def min_of(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


NETWORK = prefix(rig.NETWORK)

if __name__ == "__main__":
    main()
