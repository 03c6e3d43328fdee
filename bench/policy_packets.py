"""What a packet between pods of one node costs, bridged, lifted and judged: `.venv/bin/python -m bench.policy_packets`.

A whole agent, pods by CNI, policies from files. Small datagrams by iperf3 as fast as they go (both ends on this machine: a
packet's cost is the sender's, the kernel's and the receiver's in one), TCP, and round trips one after the other. The ways
ways in turn, some rounds; the best of each, since others run here too.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import rig
from overlay.lab import netns
from tests.policy.conftest import PolicyWorld

SECONDS = 2
ROUND_TRIPS = 3000
ISOLATED: list[dict[str, Any]] = [
    {
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": "from-client"},
        "spec": {"podSelector": {"matchLabels": {"app": "server"}},
                 "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]},
    }
]  # fmt: skip
MANY = [
    *ISOLATED,
    *(
        {
            "kind": "NetworkPolicy",
            "metadata": {"namespace": "x", "name": f"more-{number}"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "server"}},
                "ingress": [{"ports": [{"port": 10_000 + number}]}],
            },
        }
        for number in range(999)
    ),
]
WAYS: dict[str, tuple[bool, str, list[dict[str, Any]]]] = {
    "bridged": (False, "off", []),
    "bridged, br_netfilter": (True, "off", []),
    "lifted": (False, "on", []),
    "lifted, isolated by one policy": (False, "auto", ISOLATED),
    "lifted, isolated by 1,000 policies": (False, "auto", MANY),
}
"""By name: br_netfilter, --pod-lift, policies."""


def one_way(filtered: bool, lift: str, policies: list[dict[str, Any]], folder: Path) -> tuple[float, float, float]:
    """Nanoseconds a small datagram, Gbit/s of TCP, microseconds a round trip."""
    with closing(PolicyWorld(folder)) as world:
        world.bridge_filtered = filtered
        world.use(4)
        world.begin(1, f"--pod-lift={lift}")
        agent = world.agents[0]
        (server,), (client,) = (world.named_pod(agent, "x", name) for name in ("server", "client"))
        labels = {"x/server": {"app": "server"}, "x/client": {"app": "client"}}
        world.apply([*world.pod_objects(labels, {}), *policies])
        time.sleep(1.5)
        listening = subprocess.Popen(
            ["ip", "netns", "exec", server.namespace, "iperf3", "-s"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(0.5)
            udp = iperf(client.namespace, server.address, "-u", "-b", "0", "-l", "64")
            tcp = iperf(client.namespace, server.address)
        finally:
            listening.terminate()
            listening.wait(10)
        packets = udp["end"]["sum"]["packets"] * (1 - udp["end"]["sum"]["lost_percent"] / 100)
        rate = tcp["end"]["sum_received"]["bits_per_second"] / 1e9
        return SECONDS / packets * 1e9, rate, round_trip(client, server)


def iperf(namespace: str, address: str, *flags: str) -> dict[str, Any]:
    """What it measured."""
    command = ["ip", "netns", "exec", namespace, "iperf3", "-c", address, "-t", str(SECONDS), "-J", *flags]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def round_trip(client: Any, server: Any) -> float:
    """Microseconds, the median."""

    def made(at: Callable[[socket.socket], object]) -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        at(one)
        return one

    there = netns.inside(server.namespace, lambda: made(lambda one: one.bind((server.address, 7777))))
    here = netns.inside(client.namespace, lambda: made(lambda one: one.connect((server.address, 7777))))
    took = []
    with there, here:
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            here.send(b"x")
            data, whom = there.recvfrom(8)
            there.sendto(data, whom)
            here.recv(8)
            took.append(time.perf_counter() - began)
    return sorted(took)[len(took) // 2] * 1e6


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    print(rig.machine())
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for _ in range(given.rounds):
        for name, way in WAYS.items():
            with tempfile.TemporaryDirectory(prefix="overlay-bench-") as folder:
                found[name].append(one_way(*way, Path(folder) / "world"))
    rows = []
    base = min(each[0] for each in found["bridged"])
    for name, every in found.items():
        packet = min(each[0] for each in every)
        rate, trip = max(each[1] for each in every), min(each[2] for each in every)
        rows.append((name, f"{packet:.0f}", f"{packet / base:.2f}", f"{rate:.1f}", f"{trip:.1f}"))
    rig.table(("same node", "ns a small datagram", "of bridged", "TCP Gbit/s", "round trip us"), rows)


if __name__ == "__main__":
    main()
