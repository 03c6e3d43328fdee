"""Storms, and a long time."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lease.model import ip_number, ip_text, mac_text
from overlay.process.log import BURST, EVERY_S
from tests.support.faults import cpu_s
from tests.support.wait import until
from tests.support.world import ROOT, vxlan_record

STORM_S = 180.0
NAMES = 120
CHANGES = 10_000
HOSTILE_S = 30.0


def _value(number: int, mac: int) -> dict[str, Any]:
    return vxlan_record(f"192.168.1.{100 + number % 150}", mac_text(mac))


def _free(scene) -> list[int]:
    own = {str(agent.subnet()).split(".")[2] for agent in scene.agents}
    return [number for number in range(1, 255) if str(number) not in own][:NAMES]


@pytest.mark.timeout(600)
def test_a_hundred_changes_a_second_while_entries_are_deleted_at_random(scene):
    """The model is a dict of what was put last; in the end the kernel holds exactly that."""
    scene.begin()
    world, rng = scene.world, random.Random(11)
    numbers, model = _free(scene), {}
    fixed = world.kernel("node1")
    meddled: list[str] = []
    ending = threading.Event()

    def meddle() -> None:
        choice = random.Random(7)
        while not ending.is_set():
            number = choice.choice(numbers)
            what = choice.choice((
                f"ip route flush root 10.244.{number}.0/24 proto 111",
                f"ip neigh del 10.244.{number}.0 dev flannel.1",
                f"bridge fdb del 0a:00:00:00:{number:02x}:01 dev flannel.1 self",
                f"ip route replace 10.244.{number}.0/24 dev flannel.1 metric {choice.randrange(1, 999)} proto 111",
                f"ip neigh replace 10.244.{number}.0 lladdr 0a:00:00:00:99:99 dev flannel.1 nud permanent",
                *(["ip link set flannel.1 down", "ip link set flannel.1 up", "nft flush ruleset"] if choice.random() < 0.01 else []),
            ))  # fmt: skip
            world.run("node1", "sh", "-c", f"{what} 2>/dev/null || true")
            meddled.append(what)
            time.sleep(0.02)

    thread = threading.Thread(target=meddle)
    thread.start()
    cpu, began, writes = cpu_s(scene.agents[0].process.pid), time.monotonic(), 0
    lines = len(scene.agents[0].log().splitlines())
    try:
        while time.monotonic() - began < STORM_S:
            number = rng.choice(numbers)
            if number in model and rng.random() < 0.5:
                world.drop_record(f"10.244.{number}.0-24")
                del model[number]
            else:
                mac = 0x0A0000000000 | number << 8 | rng.choice((1, 2))
                world.put_record(f"10.244.{number}.0-24", _value(number, mac))
                model[number] = mac
            writes += 1
            time.sleep(max(0.0, began + writes / 100 - time.monotonic()))
    finally:
        ending.set()
        thread.join()
    spent = cpu_s(scene.agents[0].process.pid) - cpu
    ended = time.monotonic()

    def exact() -> bool:
        there = world.kernel("node1")
        wanted = {ip_number(f"10.244.{number}.0", 4): mac for number, mac in model.items()} | fixed["neighbours"]
        assert there["neighbours"] == wanted
        assert {base for base, _ in there["routes"]} == wanted.keys(), [
            (route, scene.agents[0].status()["differences"][:3])
            for (base, _), route in there["routes"].items()
            if base not in wanted
        ][:3]
        assert len(there["routes"]) == len(wanted)
        assert len(world.run("node1", "ip", "route", "show", "proto", "111").splitlines()) == len(wanted), (
            "of no other metric"
        )
        addresses = {mac: ip_number(f"192.168.1.{100 + number % 150}", 4) for number, mac in model.items()}
        assert there["fdb"] == addresses | fixed["fdb"]
        let_in = world.run("node1", "nft", "list", "set", "ip", "overlay-1-guard", "vteps")
        assert {ip_text(4, address) for address in addresses.values()} <= set(re.findall(r"192\.168\.1\.\d+", let_in))
        return not scene.agents[0].status()["differences"]

    until("exactly what was put last", exact, 40)
    took = time.monotonic() - ended
    kinds = Counter(json.loads(line)["event"] for line in scene.agents[0].log().splitlines()[lines:])
    told, most = kinds.total(), BURST + (time.monotonic() - began) / EVERY_S + 5
    assert scene.agents[0].process.poll() is None
    assert max(kinds.values()) <= most, "the log is bounded, by kinds of lines"
    assert len(kinds) < 20
    assert spent / STORM_S < 0.5, "so is CPU"
    scene.row(
        f"{writes} joins, changes and leaves in {STORM_S:.0f} s, {len(meddled)} deletions and alterations at random beside them",
        f"etcd, ip, bridge, nft; {spent / STORM_S:.0%} of a core and {told} log lines of ours", "nothing", took,
    )  # fmt: skip


def test_a_storm_of_hostile_records(scene):
    """New reasons all the time: not JSON, outside Network, our address, a peer's MAC, overlapping; and each is gone again."""
    scene.begin()
    world, rng, agent = scene.world, random.Random(3), scene.agents[0]
    theirs, kernel = scene.agents[1].mac(), world.kernel("node1")
    numbers = _free(scene)
    cpu, lines, writes = 0.0, 0, 0

    def inject() -> None:
        nonlocal cpu, lines, writes
        cpu, lines, began = cpu_s(agent.process.pid), len(agent.log().splitlines()), time.monotonic()
        while time.monotonic() - began < HOSTILE_S:
            number, serial = rng.choice(numbers), rng.randrange(1 << 16)
            key, value = rng.choice((
                (f"10.244.{number}.0-24", f"not JSON {serial}"),
                (f"11.{serial >> 8}.{serial & 255}.0-24", vxlan_record("192.168.1.99", "0a:00:00:00:00:99")),
                (f"10.244.{number}.0-24", vxlan_record("192.168.1.2", mac_text(0x0A0000000000 | serial))),
                (f"10.244.{number}.0-24", vxlan_record("192.168.1.66", theirs)),
                (f"10.244.0.0-{16 + number % 2}", vxlan_record("192.168.1.66", mac_text(0x0A0000000000 | serial))),
                (f"rubbish-{serial}", "x" * 5000),
            ))  # fmt: skip
            world.put_record(key, value)
            if writes % 3 == 2:
                world.drop_record(key)
            writes += 1
            time.sleep(max(0.0, began + writes / 200 - time.monotonic()))

    def recover() -> bool:
        nonlocal cpu, lines
        cpu = (cpu_s(agent.process.pid) - cpu) / HOSTILE_S
        lines = len(agent.log().splitlines()) - lines
        assert lines < 200, "the log is bounded"
        assert cpu < 0.5, "so is CPU"
        assert world.kernel("node1") == kernel
        for key in world.etcd.get(f"{ROOT}/subnets/"):
            name = key.rpartition("/")[2]
            if name not in own:
                world.drop_record(name)
        return True

    own = {each.status()["lease"]["key"] for each in scene.agents}
    lost = scene.suffer(
        f"a storm of hostile records, {HOSTILE_S:.0f} s", "some 200 a second of six kinds put, a third of them deleted again",
        inject, lambda: len(agent.refused_records()) > 20, 30, recover,
        lambda: not agent.refused_records() and world.kernel("node1") == kernel,
    )  # fmt: skip
    assert lost == 0
    scene.row(
        f"{writes} hostile records in {HOSTILE_S:.0f} s",
        "as above",
        f"nothing; {cpu:.0%} of a core, {lines} log lines",
        None,
    )


class Sizes:
    """What must not grow."""

    def __init__(self, pid: int) -> None:
        status = Path(f"/proc/{pid}/status").read_text()
        self.anonymous = int(status.split("RssAnon:")[1].split()[0]) / 1024
        self.descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        self.threads = len(os.listdir(f"/proc/{pid}/task"))


def test_ten_thousand_changes_leave_nothing_behind(scene):
    """Joins, changed MACs, leaves and rubbish, in two halves: the second leaves all as the first did."""
    scene.begin()
    world, pid, numbers = scene.world, scene.agents[0].process.pid, _free(scene)

    def half(seed: int) -> float:
        rng = random.Random(seed)
        for place in range(CHANGES // 2):
            number = numbers[place % len(numbers)]
            if place % 7 == 3:
                world.put_record(f"10.244.{number}.0-24", f"rubbish {rng.random()}")
            elif place // len(numbers) % 3 == 2:
                world.drop_record(f"10.244.{number}.0-24")
            else:
                world.put_record(
                    f"10.244.{number}.0-24", _value(number, 0x0A0000000000 | number << 8 | rng.randrange(200))
                )
        for number in numbers:
            world.drop_record(f"10.244.{number}.0-24")
        last = time.monotonic()
        until("all are gone", lambda: world.peers("node1") == 1, 60)
        return time.monotonic() - last

    half(1)
    time.sleep(2)
    before, kernel = Sizes(pid), {name: len(there) for name, there in world.kernel("node1").items()}
    began = time.monotonic()
    ended = half(2)
    took = time.monotonic() - began
    time.sleep(2)
    after = Sizes(pid)
    assert {name: len(there) for name, there in world.kernel("node1").items()} == kernel
    assert after.anonymous - before.anonymous < 1.0, "MiB"
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    scene.row(
        f"{CHANGES} changes", f"as fast as etcd takes them ({CHANGES / 2 / took:.0f} a second)",
        f"nothing; memory {after.anonymous - before.anonymous:+.1f} MiB, descriptors, threads and kernel entries as before",
        ended,
    )  # fmt: skip
