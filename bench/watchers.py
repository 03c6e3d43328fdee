"""The store at scale: `.venv/bin/python -m bench.watchers [--agents 100,200,400,800]`.

N agents' feeds (the agent's own code: list, then watch) on one real etcd, in one process of their own; then joins, one after
the other. Printed: what a list and a watch cost etcd, its CPU and bytes for each join and watcher, the time until the last
feed has a join, memory for each watcher. From the largest sizes follows the model of docs/scale.md, which is printed too:
what N joins cost that N agents see, for N that no machine here bears.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import subprocess
import sys
import time
from typing import Any

from bench import rig
from bench.storm import metrics
from lease.etcd.client import EtcdSettings
from lease.store import Changes, Feed, Snapshot
from lease.stores.etcd import EtcdStore
from overlay.lab import netns, topology
from tests.support.world import ROOT, World

JOINS = 50
FIRST_JOIN = 90_000


def feeds(endpoint: str, prefix: str, count: int) -> None:
    """The child: N feeds; a line when all have listed, then one for each join that all have seen."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stores = [EtcdStore(EtcdSettings((endpoint,)), prefix) for _ in range(count)]
    began = time.perf_counter()
    for store in stores:
        Feed(store, inbox.put).start()
    listed = 0
    while listed < count:
        listed += isinstance(inbox.get(), Snapshot)
    print(f"{time.perf_counter() - began:.3f}", flush=True)
    seen = 0
    while True:
        if isinstance(inbox.get(), Changes):
            seen += 1
            if seen == count:
                seen = 0
                print(f"{time.perf_counter():.6f}", flush=True)


class Feeds:
    """The child, from outside. perf_counter is the machine's (CLOCK_MONOTONIC), so the two agree on the time."""

    def __init__(self, world: World, count: int) -> None:
        command = [
            "nsenter",
            f"--net={netns.path(topology.underlay_name(world.lab))}",
            sys.executable,
            "-m",
            __spec__.name,
        ]
        command += ["--child", str(count), "--endpoint", world.etcd.endpoint]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def line(self) -> float:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise SystemExit("the feeds ended")
        return float(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Point:
    """What one size cost."""

    def __init__(self, count: int, cpu_us: float, sent: float, memory_kib: float) -> None:
        self.count, self.cpu_us, self.sent, self.memory_kib = count, cpu_us, sent, memory_kib


def measure(world: World, records: rig.Records, count: int, there: int) -> Point:
    """N watchers of `there` records."""
    assert world.etcd.process is not None
    pid = world.etcd.process.pid
    memory, cpu, (asked, sent) = rig.Memory.of(pid), rig.cpu_s(pid), metrics(world)
    child = Feeds(world, count)
    try:
        listing = child.line()
        listed = rig.cpu_s(pid) - cpu
        asked_then, sent_then = metrics(world)
        per_list = (sent_then["sent"] - sent["sent"]) / count / 1024
        print(
            f"{count:>6} watchers: all listed {there} records in {listing:.2f} s; etcd: CPU {listed / count * 1000:.1f} ms,"
            f" {per_list:.0f} KiB each, {sum((asked_then - asked).values()) / count:.1f} requests"
        )
        times = []
        before, (_, sent) = rig.cpu_s(pid), metrics(world)
        for number in range(FIRST_JOIN, FIRST_JOIN + JOINS):
            began = time.perf_counter()
            records.put([rig.lease(number)])
            times.append(child.line() - began)
        cpu_us = (rig.cpu_s(pid) - before) / JOINS / count * 1e6
        _, sent_after = metrics(world)
        each = (sent_after["sent"] - sent["sent"]) / JOINS / count
        grown = (rig.Memory.of(pid).rss - memory.rss) / count * 1024
        print(
            f"{'':>6} a join: etcd CPU {cpu_us:.1f} us and {each:.0f} bytes for each watcher; the last has it after"
            f" {statistics.median(times) * 1000:.1f} ms (max {max(times) * 1000:.1f}); memory {grown:.0f} KiB",
            flush=True,
        )
        return Point(count, cpu_us, each, grown)
    finally:
        child.close()
        records.drop(rig.lease(number) for number in range(FIRST_JOIN, FIRST_JOIN + JOINS))


def model(point: Point) -> None:
    """N joins seen by N agents, on one etcd of this machine's speed."""
    print("     agents   etcd CPU for N joins   bytes sent   memory of watchers   one join: CPU, bytes")
    for count in (1_000, 5_000, 10_000, 50_000, 100_000):
        cpu, memory, one = point.cpu_us * count / 1e6, point.memory_kib * count / (1 << 20), point.sent * count / 1e6
        print(
            f"{count:>11,} {cpu * count:>18,.0f} s {point.sent * count * count / 1e9:>9,.1f} GB"
            f" {memory:>17.1f} GiB {cpu * 1000:>14,.0f} ms {one:>6.1f} MB"
        )


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--agents", default="100,200,400,800")
    arguments.add_argument("--records", type=int, default=2000)
    arguments.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--endpoint", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        feeds(given.endpoint, ROOT, given.child)
        return
    print(rig.machine())
    point = None
    for count in (int(text) for text in given.agents.split(",")):
        with rig.world() as world:
            records = rig.Records(world)
            records.put(rig.lease(number) for number in range(given.records))
            point = measure(world, records, count, given.records)
            records.close()
    if point is not None:
        model(point)


if __name__ == "__main__":
    main()
