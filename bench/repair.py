"""How long what somebody deletes stays away: `.venv/bin/python -m bench.repair [ROUNDS]`.

Two agents in namespaces; each thing is deleted on the first node, and the kernel is asked until it is there again.
Prints minimum, median and maximum in milliseconds; the baseline is how long asking the kernel once takes.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lease.model import ip_text, mac_text
from tests.support.world import World

LIMIT_S = 10.0


def main(rounds: int) -> None:
    """Measure and print."""
    world = World(Path(tempfile.mkdtemp(prefix="overlay-bench-")) / "world")
    try:
        world.config()
        world.nodes(2)
        there = world.kernel("node1")
        (base, length), route = next(iter(there["routes"].items()))
        mac = there["neighbours"][base]
        deletions = {
            "(asking once: baseline)": "true",
            "route": f"ip route del {ip_text(4, base)}/{length} metric {route.key.metric}",
            "neighbour": f"ip neigh del {ip_text(4, base)} dev flannel.1",
            "FDB entry": f"bridge fdb del {mac_text(mac)} dev flannel.1",
            "device set down": "ip link set flannel.1 down",
            "device deleted": "ip link del flannel.1",
        }
        for what, command in deletions.items():
            times = [once(world, command) for _ in range(rounds)]
            print(f"{what:26} min {min(times):7.1f}  median {statistics.median(times):7.1f}  max {max(times):7.1f} ms")
    finally:
        world.close()


def once(world: World, command: str) -> float:
    """Milliseconds from the end of a deletion until the peer is whole again."""
    world.run("node1", *shlex.split(command))
    began = time.perf_counter()
    while world.peers("node1") != 1:
        if time.perf_counter() - began > LIMIT_S:
            raise SystemExit(f"not back within {LIMIT_S:.0f} s: {command}")
    took = (time.perf_counter() - began) * 1000
    time.sleep(0.2)
    return took


main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
