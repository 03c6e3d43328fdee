"""Twenty thousand peers of WireGuard in a kernel: by difference, and one more is one more."""

from __future__ import annotations

import base64
import json
import os
import time

import pytest

from lease.model import key_text
from overlay.kernel.wireguard.genl import KernelWireguard
from tests.support.wait import PATIENCE, until
from tests.support.world import ROOT

COUNT, AT_ONCE, FIRST = 20_000, 100, 1 << 12
FLAGS = "--node-name=node1", "--underlay-cidr=192.0.0.0/8"


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def record(number: int) -> tuple[str, str]:
    subnet = f"10.{64 + (number >> 8)}.{number & 255}.0"
    value = {
        "PublicIP": f"192.{168 + (number >> 16)}.{number >> 8 & 255}.{number & 255}",
        "BackendType": "wireguard",
        "BackendData": {"PublicKey": key_text(os.urandom(32)), "Port": 51820},
    }
    return f"{ROOT}/subnets/{subnet}-24", json.dumps(value)


def put(world, numbers) -> None:
    """In transactions of many."""
    numbers = list(numbers)
    for start in range(0, len(numbers), AT_ONCE):
        puts = [
            {"requestPut": {"key": _b64(key), "value": _b64(value)}}
            for key, value in map(record, numbers[start : start + AT_ONCE])
        ]
        world.etcd.ask("/v3/kv/txn", {"compare": [], "success": puts, "failure": []})


def device(world):
    def read():
        there = KernelWireguard("flannel-wg")
        try:
            return there.read()
        finally:
            there.close()

    return world.inside("node1", read)


@pytest.mark.timeout(300 * PATIENCE)
def test_they_are_put_once_and_one_more_is_one_more(world):
    world.etcd.put(
        f"{ROOT}/config",
        json.dumps({"Network": "10.0.0.0/8", "SubnetMin": "10.250.0.0", "Backend": {"Type": "wireguard"}}),
    )
    put(world, range(FIRST, FIRST + COUNT))
    agent = world.agent(world.node(1), *FLAGS)
    began = time.monotonic()
    until("all are in the kernel", lambda: len(device(world).peers) == COUNT, 120)
    took = time.monotonic() - began
    agent.wait_ready()
    before, index = device(world), world.index("node1", "flannel-wg")
    counted = agent.status()["counters"]
    put(world, [FIRST + COUNT])
    until("it is one more", lambda: len(device(world).peers) == COUNT + 1, 20)
    after, now = device(world), agent.status()["counters"]
    assert world.index("node1", "flannel-wg") == index
    assert {key: after.peers[key] for key in before.peers} == before.peers
    assert now["put_wireguard"] - counted["put_wireguard"] == 1
    assert now["mended_wireguard"] == 0
    agent.stop()
    again = world.agent("node1", *FLAGS, run_dir="node1").wait_ready(120)
    assert again.status()["counters"].get("put_wireguard", 0) == 0, "a restart writes none"
    print(f"{COUNT} peers in the kernel {took:.1f} s after the agent's start")
