"""The datapath: `.venv/bin/python -m bench.datapath [--seconds 4] [--rounds 3]`.

Two nodes on one underlay, a pod on each. In one run, in turn: node to node on the underlay; pod to pod by our overlay; by
DirectRouting; by a vxlan device made by hand with `ip` and `bridge` (the same kernel entries, no agent). For each: TCP
throughput of one stream (iperf3), CPU of the whole machine for each gigabit, and the time of a request of 64 bytes and its
answer (TCP, one at a time). Then settings by one at a time on our overlay, each against the run before it without.

Underlay and nodes are veths and a bridge of one machine: what is compared is the kernel's work, not a network card's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench import rig
from overlay.cni.lists import CONFLIST
from overlay.lab import netns, topology
from tests.support.wait import until
from tests.support.world import World

REQUESTS = 4000
PORT = 5201
Figures = tuple[float, float, float]
"""Gbit/s, CPU seconds for each gigabit, microseconds for a request and its answer."""


def busy_s() -> float:
    """CPU seconds that this machine has spent on anything."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _wait, interrupts, soft, stolen = fields
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def throughput(source: str, target: str, address: str, seconds: float) -> tuple[float, float]:
    """Gbit/s of one TCP stream between two namespaces, and the CPU for each gigabit."""
    server = subprocess.Popen(
        ["nsenter", f"--net={netns.path(target)}", "iperf3", "-s", "-1", "-p", str(PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until("iperf3 listens", lambda: netns.inside(target, lambda: listens(PORT)), 10)
        before = busy_s()
        done = subprocess.run(
            [
                "nsenter",
                f"--net={netns.path(source)}",
                "iperf3",
                "-c",
                address,
                "-p",
                str(PORT),
                "-t",
                str(seconds),
                "-J",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        spent = busy_s() - before
        said = json.loads(done.stdout)
        if "error" in said:
            raise SystemExit(f"iperf3 to {address}: {said['error']}")
        gigabits = said["end"]["sum_received"]["bytes"] * 8 / 1e9
        return gigabits / said["end"]["sum_received"]["seconds"], spent / gigabits
    finally:
        server.kill()
        server.wait()


def listens(port: int) -> bool:
    """Whether this namespace has a TCP listener there."""
    wanted = f":{port:04X} "
    rows = Path("/proc/thread-self/net/tcp").read_text() + Path("/proc/thread-self/net/tcp6").read_text()
    return any(wanted in row and " 0A " in row for row in rows.splitlines())


def answers(source: str, target: str, address: str) -> float:
    """The median of a request of 64 bytes and its answer, in microseconds."""

    def listening() -> socket.socket:
        return socket.create_server(("0.0.0.0", 0))

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(64):
                connection.send(data)

    server = netns.inside(target, listening)
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    with (
        server,
        netns.inside(source, lambda: socket.create_connection((address, server.getsockname()[1]), 10)) as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            client.send(b"x" * 64)
            client.recv(64)
            times.append(time.perf_counter() - began)
    thread.join(10)
    return statistics.median(times[REQUESTS // 10 :]) * 1e6


class Way:
    """A way from one namespace to another."""

    def __init__(self, name: str, source: str, target: str, address: str) -> None:
        self.name, self.source, self.target, self.address = name, source, target, address
        self.found: list[Figures] = []

    def measure(self, seconds: float) -> None:
        gigabits, cpu = throughput(self.source, self.target, self.address, seconds)
        self.found.append((gigabits, cpu, answers(self.source, self.target, self.address)))

    def row(self, base: Way | None) -> tuple[str, ...]:
        columns = [rig.spread([each[column] for each in self.found], digits=digits) for column, digits in COLUMNS]
        if base is None:
            return (self.name, *columns, "")
        ratio = statistics.median(each[0] for each in self.found) / statistics.median(each[0] for each in base.found)
        return (self.name, *columns, f"{ratio:.2f}")


COLUMNS = ((0, 2), (1, 3), (2, 1))


class Scene:
    """Two nodes with an agent each and a pod on each, in a world of their own."""

    def __init__(self, world: World, **backend: object) -> None:
        self.world = world
        world.config(Network="10.244.0.0/16", Backend={"Type": "vxlan", **backend})
        self.agents = world.nodes(2)
        self.pods = [world.pod(agent, f"pod-{agent.node}") for agent in self.agents]

    def path(self, name: str) -> Way:
        one, two = self.pods
        return Way(name, one.namespace, two.namespace, two.address)


def by_hand(scene: Scene, *options: str) -> None:
    """The same device and entries by `ip` and `bridge`, after the agents and their devices are gone. options: of the device,
    where they differ from ip's defaults."""
    world = scene.world
    found = {}
    for agent in scene.agents:
        status = agent.status()
        found[agent.node] = (status["lease"]["subnet"], status["lease"]["public_ip"])
    for agent in scene.agents:
        agent.stop()
        world.run(agent.node, "ip", "link", "del", "flannel.1")
    for number, agent in enumerate(scene.agents, start=1):
        base = found[agent.node][0].split("/")[0]
        world.run(agent.node, "ip", "link", "add", "flannel.1", "type", "vxlan", "id", "1", "dev", "eth0", "local",
                  found[agent.node][1], "dstport", "8472", "nolearning", *options)  # fmt: skip
        world.run(
            agent.node, "ip", "link", "set", "flannel.1", "address", f"02:00:00:00:00:0{number}", "mtu", "1450", "up"
        )
        world.run(agent.node, "ip", "addr", "add", f"{base}/32", "dev", "flannel.1")
    for number, agent in enumerate(scene.agents, start=1):
        other = scene.agents[2 - number]
        subnet, public_ip = found[other.node]
        base, mac = subnet.split("/")[0], f"02:00:00:00:00:0{3 - number}"
        world.run(agent.node, "ip", "neigh", "add", base, "lladdr", mac, "dev", "flannel.1", "nud", "permanent")
        world.run(agent.node, "bridge", "fdb", "add", mac, "dev", "flannel.1", "dst", public_ip)
        world.run(agent.node, "ip", "route", "add", subnet, "via", base, "dev", "flannel.1", "onlink")


def jumbo(world: World) -> Scene:
    """A scene whose underlay takes frames of 9,000 bytes."""
    scene = Scene(world)
    ports = [f"v{number}" for number, _ in enumerate(scene.agents, start=1)]
    for port in ports:
        world.run("underlay", "ip", "link", "set", port, "mtu", "9000")
    for agent in scene.agents:
        world.run(agent.node, "ip", "link", "set", "eth0", "mtu", "9000")
    for agent in scene.agents:
        until(
            "the tunnel follows",
            lambda agent=agent: "mtu 8950" in world.run(agent.node, "ip", "link", "show", "flannel.1"),
        )
        until("and the network list", lambda agent=agent: "8950" in (agent.run_dir / "cni" / CONFLIST).read_text(), 15)
    scene.pods = [world.pod(agent, f"big-{agent.node}") for agent in scene.agents]
    return scene


def rps(scene: Scene, mask: str) -> None:
    """Receive packet steering of what a node and its tunnel receive."""
    for agent in scene.agents:
        for device in ("eth0", "flannel.1"):
            path = f"/sys/class/net/{device}/queues/rx-0/rps_cpus"
            # its own /sys, in a mount namespace that ends with the command
            steer = f"mount -t sysfs s /sys && echo {mask} > {path}"
            scene.world.run(agent.node, "unshare", "--mount", "sh", "-c", steer)


def each(scene: Scene, *command: str) -> Callable[[], None]:
    """Run a command on both nodes."""

    def run() -> None:
        for agent in scene.agents:
            scene.world.run(agent.node, *command)

    return run


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=4)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", default="paths,settings")
    given = arguments.parse_args()
    for tool, package in (("iperf3", "iperf3"), ("ethtool", "ethtool")):
        if shutil.which(tool) is None:
            raise SystemExit(f"no {tool}: apt-get install {package}")
    print(rig.machine())
    for what in given.only.split(","):
        {"paths": paths, "settings": settings}[what](given.seconds, given.rounds)


def paths(seconds: float, rounds: int) -> None:
    """The four ways, in turn."""
    header = ("way", "Gbit/s", "CPU s a Gbit", "request and answer, us", "of underlay")
    with rig.world() as first, rig.world() as second, rig.world() as third, rig.world() as fourth, rig.world() as fifth:
        tunnel, direct, hand, without = Scene(first), Scene(second, DirectRouting=True), Scene(third), Scene(fourth)
        by_hand(hand)
        by_hand(without, "noudpcsum")
        one, two = (first.namespace(agent.node) for agent in tunnel.agents)
        underlay = Way("underlay, node to node", one, two, topology.node_address(2))
        ways = [underlay, tunnel.path("overlay"), direct.path("DirectRouting"), hand.path("vxlan made by hand"),
                without.path("vxlan made by hand, noudpcsum"), jumbo(fifth).path("overlay, underlay MTU 9000")]  # fmt: skip
        for _ in range(rounds):
            for way in ways:
                way.measure(seconds)
        rig.table(header, [way.row(underlay) for way in ways])


def settings(seconds: float, rounds: int) -> None:
    """One at a time on the overlay, each between two runs without."""
    with rig.world() as world:
        scene = Scene(world)
        off_on = {
            "tunnel segmentation offload off": (
                each(scene, "ethtool", "-K", "flannel.1", "tso", "off", "gso", "off"),
                each(scene, "ethtool", "-K", "flannel.1", "tso", "on", "gso", "on"),
            ),
            "GRO off on tunnel and underlay": (
                each(scene, "sh", "-c", "ethtool -K flannel.1 gro off; ethtool -K eth0 gro off"),
                each(scene, "sh", "-c", "ethtool -K flannel.1 gro on; ethtool -K eth0 gro on"),
            ),
            "tx checksum offload off": (
                each(scene, "ethtool", "-K", "flannel.1", "tx", "off"),
                each(scene, "ethtool", "-K", "flannel.1", "tx", "on"),
            ),
            "RPS to both cores": (lambda: rps(scene, "3"), lambda: rps(scene, "0")),
            "txqueuelen 1000 (we set 0: none)": (
                each(scene, "ip", "link", "set", "flannel.1", "txqueuelen", "1000"),
                each(scene, "ip", "link", "set", "flannel.1", "txqueuelen", "0"),
            ),
        }
        rows = []
        for name, (change, back) in off_on.items():
            without, with_it = scene.path(f"without: {name}"), scene.path(name)
            for _ in range(rounds):
                without.measure(seconds)
                change()
                with_it.measure(seconds)
                back()
            rows.append(with_it.row(without))
        rig.table(("setting", "Gbit/s", "CPU s a Gbit", "request and answer, us", "of without"), rows)


if __name__ == "__main__":
    main()
