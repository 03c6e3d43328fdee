"""With many peers in place: a restart, a device lost, joins and leaves, bursts, the full check, and what is at rest.

`.venv/bin/python -m bench.warm [--peers 10,200,5000,20000] [--joins 200]`. Each figure stands beside the same thing done by
the real flanneld on the same peers (--flanneld-up-to), or beside the kernel's own cost of it, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable

from bench import rig
from lease.model import Lease
from overlay.api.serve import SOCKET_NAME, ask_unix
from tests.support.world import World

FIRST_JOIN = 90_000
"""Numbers of peers that join and leave; above all that stand."""
REST_S = 60.0


class Watches:
    """The routes of all families of a node."""

    def __init__(self, namespace: str, families: Iterable[int]) -> None:
        self.each = [rig.RouteWatch(namespace, family) for family in families]

    def until(self, came: int = 0, went: int = 0, limit_s: float = 120.0) -> float:
        """When the last of them was there."""
        return max(watch.until(came, went, limit_s) for watch in self.each)

    def forget(self) -> None:
        for watch in self.each:
            watch.forget()

    def close(self) -> None:
        for watch in self.each:
            watch.close()


class Standing:
    """An agent beside `count` peers, all in the kernel."""

    def __init__(self, world: World, kind: str, count: int, folder: str) -> None:
        self.world, self.kind, self.count = world, kind, count
        self.node = rig.fresh_node(world)
        self.watch = Watches(world.namespace(self.node), world.families)
        self.both = len(world.families) > 1
        self.folder = world.folder / folder
        self.program = rig.Program(world, self.node, kind, self.folder)
        self.watch.until(came=count, limit_s=240)
        time.sleep(3.0)
        self.watch.forget()

    def lease(self, number: int) -> Lease:
        """A peer's, of the network's families."""
        return rig.lease(number, self.both)

    def counters(self) -> dict[str, int]:
        """Of ours."""
        return dict(json.loads(ask_unix(str(self.folder / SOCKET_NAME), "/status")[1])["counters"])

    def ready(self) -> bool:
        try:
            return ask_unix(str(self.folder / SOCKET_NAME), "/readyz")[0] == 200
        except OSError:
            return False

    def restart(self, before: str = "") -> float:
        """Seconds until it was ready again."""
        self.program.end()
        self.watch.forget()
        self.program = rig.Program(self.world, self.node, self.kind, self.folder, before=before)
        end = time.perf_counter() + 60
        while not self.ready():
            if time.perf_counter() > end:
                raise SystemExit(f"not ready again: {self.program.log()[-500:]}")
            time.sleep(0.005)
        return time.perf_counter() - self.program.began

    def close(self) -> None:
        self.program.kill()
        self.watch.close()


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--peers", default="10,200,5000,20000")
    arguments.add_argument("--joins", type=int, default=200)
    arguments.add_argument("--flanneld-up-to", type=int, default=20000)
    arguments.add_argument("--only", default="joins,burst,growth,device,restart,check,rest")
    arguments.add_argument("--both", action="store_true", help="a dual-stack network")
    given = arguments.parse_args()
    print(rig.machine())
    with rig.world(given.both) as world:
        records = rig.Records(world)
        for count in records.growing(given.peers, given.both):
            kinds = ["ours", *(["flanneld"] if count <= given.flanneld_up_to else [])]
            for kind in kinds:
                standing = Standing(world, kind, count, f"{kind}-{count}")
                try:
                    measure(standing, records, given.joins, given.only.split(","))
                finally:
                    standing.close()
        records.close()


def measure(it: Standing, records: rig.Records, joins: int, only: list[str]) -> None:
    """All of it for one agent."""
    ours = it.kind == "ours"
    steps: dict[str, Callable[[], None]] = {
        "rest": lambda: rest(it),
        "growth": lambda: growth(it, records),
        "joins": lambda: arrive(it, records, joins),
        "burst": lambda: burst(it, records, 5000),
        **(
            {"device": lambda: device(it), "check": lambda: check(it, records), "restart": lambda: restart(it)}
            if ours
            else {}
        ),
    }
    for name, step in steps.items():
        if name in only:
            step()


def say(it: Standing, what: str, figure: str) -> None:
    print(f"{it.count:>6} {it.kind:<9} {what:<44} {figure}", flush=True)


def arrive(it: Standing, records: rig.Records, joins: int, when: str = "") -> None:
    """Store commit (the moment etcd answers the writer) to the kernel's word that the route came or went."""
    records.put([it.lease(FIRST_JOIN - 1)])  # the first event of a run finds this program's own ways cold
    it.watch.until(came=1)
    records.drop([it.lease(FIRST_JOIN - 1)])
    it.watch.until(went=1)
    came, went, before = [], [], rig.cpu_s(it.program.pid)
    for number in range(FIRST_JOIN, FIRST_JOIN + joins):
        records.put([it.lease(number)])
        committed = time.perf_counter()
        came.append(it.watch.until(came=1) - committed)
        time.sleep(0.02)
    for number in range(FIRST_JOIN, FIRST_JOIN + joins):
        records.drop([it.lease(number)])
        committed = time.perf_counter()
        went.append(it.watch.until(went=1) - committed)
        time.sleep(0.02)
    spent = (rig.cpu_s(it.program.pid) - before) / (2 * joins)
    for what, times in ((f"{when}a join, commit to kernel", came), (f"{when}a leave", went)):
        ordered = sorted(times)
        median, high = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
        say(it, what, f"median {median * 1000:.2f} ms, 99 % {high * 1000:.2f} ms, max {ordered[-1] * 1000:.2f} ms")
    if not when:
        say(it, "  CPU for each of them", f"{spent * 1e6:.0f} us")


def burst(it: Standing, records: rig.Records, count: int) -> None:
    """Many at once; from the last commit, and from the first."""
    before = rig.cpu_s(it.program.pid)
    began = time.perf_counter()
    records.put(it.lease(number) for number in range(FIRST_JOIN, FIRST_JOIN + count))
    committed = time.perf_counter()
    done = it.watch.until(came=count, limit_s=240)
    spent = rig.cpu_s(it.program.pid) - before
    say(
        it,
        f"{count} joins in a burst",
        f"{done - began:.2f} s, {done - committed:.2f} s after the last commit, CPU {spent:.2f} s",
    )
    records.drop(it.lease(number) for number in range(FIRST_JOIN, FIRST_JOIN + count))
    it.watch.until(went=count, limit_s=240)


CHANGES = 10_000


def growth(it: Standing, records: rig.Records) -> None:
    """Ten thousand changes, in bursts of 500 joins and 500 leaves: what is there more of afterwards."""

    def counted() -> tuple[float, float, int, int, int]:
        time.sleep(2.0)
        memory = rig.Memory.of(it.program.pid)
        threads, files = (len(os.listdir(f"/proc/{it.program.pid}/{what}")) for what in ("task", "fd"))
        entries = sum(
            it.world.run(it.node, *command).count("\n")
            for command in (
                ("ip", "route", "show", "table", "all"),
                ("ip", "neigh", "show", "nud", "all"),
                ("bridge", "fdb", "show", "dev", "flannel.1"),
            )
        )
        return memory.rss, memory.anon, threads, files, entries

    def change(count: int) -> None:
        for start in range(0, count // 2, 500):
            some = range(FIRST_JOIN + start, FIRST_JOIN + start + 500)
            it.watch.forget()
            records.put(it.lease(number) for number in some)
            it.watch.until(came=500)
            records.drop(it.lease(number) for number in some)
            it.watch.until(went=500)

    change(1000)  # what a first change takes once
    before = counted()
    change(CHANGES)
    after = counted()
    rss, anon, threads, files, entries = (f"{b - a:+.1f}" for a, b in zip(before, after, strict=True))
    say(
        it,
        f"{CHANGES} changes: growth",
        f"RSS {rss} MiB, anonymous {anon} MiB, threads {threads}, descriptors {files}, kernel entries {entries}",
    )


def device(it: Standing) -> None:
    """Set down, then deleted: until the last route is back."""
    devices = ["flannel.1", *(["flannel-v6.1"] if it.both else [])]
    for what, command in (("set down", "ip link set {} down"), ("deleted", "ip link del {}")):
        it.watch.forget()
        began = time.perf_counter()
        it.world.run(it.node, "sh", "-c", "; ".join(command.format(name) for name in devices))
        done = it.watch.until(came=it.count)
        say(it, f"device {what}: whole again", f"{done - began:.2f} s")
        time.sleep(2.0)


OFTEN = "import overlay.control.schedule as schedule\nschedule.RECHECK_S, schedule.CHECK_SHARE = 0.2, 1"
"""Reads the kernel whole all the time, at half of what a core can."""


def check(it: Standing, records: rig.Records) -> None:
    """What it costs to read the kernel whole, and how long an event waits when that never ends."""
    it.restart(before=OFTEN)
    time.sleep(5.0)
    before = it.counters()
    arrive(it, records, 100, "while that goes on: ")
    after = it.counters()
    made, spent = (after[name] - before[name] for name in ("full_checks", "full_checks_cpu_ms"))
    longest = after["full_check_longest_slice_us"] / 1000
    say(
        it,
        "a full check of the kernel",
        f"CPU {spent / max(1, made):.0f} ms ({made} made), longest slice {longest:.1f} ms",
    )
    it.restart()


def restart(it: Standing) -> None:
    """Over an unchanged kernel: exec to ready, and what was written."""
    times, written = [], []
    for _ in range(3):
        times.append(it.restart())
        written.append(sum(count for name, count in it.counters().items() if name.startswith("writes_")))
    say(it, "restart over an unchanged kernel, ready", f"{rig.spread(times)} s, {max(written)} writes")


def rest(it: Standing) -> None:
    """Memory, CPU, threads, descriptors, when nothing happens."""
    before = rig.cpu_s(it.program.pid)
    time.sleep(REST_S)
    spent = rig.cpu_s(it.program.pid) - before
    memory = rig.Memory.of(it.program.pid)
    threads, files = (len(os.listdir(f"/proc/{it.program.pid}/{what}")) for what in ("task", "fd"))
    say(it, "at rest: RSS, anonymous, peak", f"{memory.rss:.1f}, {memory.anon:.1f}, {memory.peak:.1f} MiB")
    say(it, "at rest: CPU, threads, descriptors", f"{spent / REST_S * 100:.3f} %, {threads}, {files}")


if __name__ == "__main__":
    main()
