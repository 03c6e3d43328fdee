"""A join storm: `.venv/bin/python -m bench.storm [--agents 10,50]`.

N agents start at once on one machine, over a pool of exactly N subnets. Printed: the time until all are ready and until each
knows all others, against the CPU they spent (the floor of that time on this machine is CPU / cores), and the requests that
etcd was asked for each join, by kind. Then all end and start again. An agent that fails, a subnet that two have, one that is
left over: each ends the run. Ours alone: flanneld, of 50 that start so, loses some of its races and exits.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import time
import urllib.request
from collections import Counter

from bench import rig
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.lab import netns, topology
from tests.support.world import World

LIMIT_S = 240.0
CORES = os.cpu_count() or 1
_STARTED = re.compile(r'^grpc_server_started_total\{grpc_method="(\w+)",.*\} (\d+)$', re.MULTILINE)
_BYTES = re.compile(r"^etcd_network_client_grpc_(sent|received)_bytes_total ([\d.e+]+)$", re.MULTILINE)


def metrics(world: World) -> tuple[Counter[str], dict[str, float]]:
    """What an etcd was asked, by method; bytes by direction."""

    def read() -> str:
        with urllib.request.urlopen(f"{world.etcd.endpoint}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    text = netns.inside(topology.underlay_name(world.lab), read)
    asked = Counter({method: int(count) for method, count in _STARTED.findall(text) if int(count)})
    return asked, {direction: float(count) for direction, count in _BYTES.findall(text)}


class Storm:
    """N nodes and their agents."""

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count
        self.nodes = [world.node(number) for number in range(1, count + 1)]
        self.watches = [rig.RouteWatch(world.namespace(node)) for node in self.nodes]
        self.programs: list[rig.Program] = []

    def start(self) -> float:
        """All at once; when the first was started."""
        began = time.perf_counter()
        self.programs = [
            rig.Program(self.world, node, "ours", self.world.folder / f"storm-{node}", f"--node-name={node}")
            for node in self.nodes
        ]
        return began

    def subnets(self) -> set[str]:
        """Once all are ready."""
        end = time.perf_counter() + LIMIT_S
        found = set()
        for program in self.programs:
            while True:
                if program.process.poll() is not None or time.perf_counter() > end:
                    raise SystemExit(f"an agent failed: {program.log()[-3000:]}")
                try:
                    if ask_unix(str(program.folder / SOCKET_NAME), "/readyz")[0] == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.02)
            lease = json.loads(ask_unix(str(program.folder / SOCKET_NAME), "/status")[1])["lease"]
            found.add(str(lease["subnet"]))
        return found

    def end(self) -> None:
        for program in self.programs:
            program.end()

    def close(self) -> None:
        for program in self.programs:
            program.kill()
        for watch in self.watches:
            watch.close()


def storm(world: World, count: int) -> None:
    """One size: cold, and again."""
    first = int(ipaddress.IPv4Address("10.64.0.0"))
    pool = {str(ipaddress.IPv4Network((first + 256 * place, 24))) for place in range(count)}
    world.config(
        Network="10.0.0.0/8",
        SubnetLen=24,
        SubnetMin="10.64.0.0",
        SubnetMax=str(ipaddress.IPv4Address(first + 256 * (count - 1))),
    )
    it = Storm(world, count)
    try:
        for what in ("cold", "again"):
            before, bytes_before = metrics(world)
            for watch in it.watches:
                watch.forget()
            began = it.start()
            found = it.subnets()
            ready = time.perf_counter() - began
            if found != pool:
                raise SystemExit(f"the pool is {sorted(pool)}, taken is {sorted(found)}")
            if what == "cold":
                for watch in it.watches:
                    watch.until(came=count - 1, limit_s=LIMIT_S)
            whole = time.perf_counter() - began
            spent = sum(rig.cpu_s(program.pid) for program in it.programs)
            after, bytes_after = metrics(world)
            asked = {name: f"{number / count:.1f}" for name, number in sorted((after - before).items())}
            total = sum((after - before).values()) / count
            sent = (bytes_after["sent"] - bytes_before["sent"]) / count / 1024
            print(
                f"{count:>4} agents, {what}: all ready in {ready:.2f} s, all know all after {whole:.2f} s;"
                f" CPU {spent:.2f} s, {spent / count * 1000:.0f} ms each: on {CORES} cores at least {spent / CORES:.2f} s"
            )
            print(f"     requests to etcd for each join: {total:.1f} {asked}; {sent:.1f} KiB sent by etcd", flush=True)
            it.end()
    finally:
        it.close()


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--agents", default="10,25,50")
    given = arguments.parse_args()
    print(rig.machine())
    for count in (int(text) for text in given.agents.split(",")):
        with rig.world() as world:
            storm(world, count)


if __name__ == "__main__":
    main()
