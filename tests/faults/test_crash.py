"""The agent killed at every step."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lease.model import mac_text
from tests.support.crash import killed_at
from tests.support.faults import alike, picture
from tests.support.wait import until
from tests.support.world import ROOT, made_up_peer

SHARDS = 4
"""The sweep of a start is cut in so many tests, for so many workers."""
LONGEST_SWEEP = 400


def _killed(agent) -> str:
    """At what step the agent was killed: by us, not by a fault of its own."""
    lines = [line for line in agent.log().splitlines() if line.startswith("killed at step")]
    assert agent.process.returncode == -signal.SIGKILL, (agent.process.returncode, agent.log()[-2000:])
    assert "crashed" not in agent.log()
    return lines[-1]


def _sweep(scene, step: int, after: bool, armed: str = ""):
    return scene.world.agent(
        "node1", "--node-name=node1", "--ip-masq", run_dir="node1", program=killed_at(step, after, armed)
    )


def _wipe(scene) -> None:
    """node1 as it never was."""
    scene.world.run("node1", "sh", "-c", "nft flush ruleset; ip link del flannel.1 2>/dev/null; true")
    scene.world.run("node1", "sh", "-c", f"rm -rf {scene.world.folder}/node1 && mkdir {scene.world.folder}/node1")
    for key, record in scene.world.records().items():
        if record["PublicIP"] == "192.168.1.2":
            scene.world.drop_record(key)


def _left_over(scene) -> list[str]:
    return [str(path) for path in Path(scene.world.folder / "node1").rglob(".*")]


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_first_start_killed_at_every_step(scene, shard):
    """Whatever stands then, the next start ends where one start would have ended; one record, no remains."""
    world = scene.world
    world.config(SubnetMin="10.244.1.0", SubnetMax="10.244.2.0")  # so that it gets the same each time
    other = world.agent(world.node(2), "--node-name=node2").wait_ready()
    world.node(1)
    agent = world.agent("node1", "--node-name=node1", "--ip-masq").wait_ready()
    until("whole", lambda: world.peers("node1") == 1)
    reference = _without_mac(picture(world, agent))
    agent.stop()
    step, points, longest = 1 + shard, 0, 0.0
    steps: list[str] = []
    while True:
        assert step < LONGEST_SWEEP
        for after in (False, True):
            _wipe(scene)
            dying = _sweep(scene, step, after)
            until("it dies, or is ready", lambda dying=dying: dying.process.poll() is not None or dying.ready())
            if dying.process.poll() is None:
                dying.stop()
                break
            steps.append(_killed(dying))
            points += 1
            began = time.monotonic()
            again = world.agent("node1", "--node-name=node1", "--ip-masq", run_dir="node1").wait_ready()
            mine = [key for key, record in world.records().items() if record["PublicIP"] == "192.168.1.2"]
            assert len(mine) == 1, (steps[-1], mine)
            until("whole", lambda again=again: alike(reference, _without_mac(picture(world, again))))
            longest = max(longest, time.monotonic() - began)
            until(
                "node2 sends to it",
                lambda again=again: mac_text(world.kernel("node2")["neighbours"][again.subnet().base]) == again.mac(),
            )
            assert _left_over(scene) == [], steps[-1]
            again.stop()
        else:
            step += SHARDS
            continue
        break
    assert points > 20
    assert other.ready()
    scene.row(
        f"a first start killed, part {shard + 1} of {SHARDS}: {points} points",
        "SIGKILL before and after each message to kernel and store, file, program; time from the next start", "nothing",
        longest,
    )  # fmt: skip


def _without_mac(picture_: dict[str, Any]) -> dict[str, Any]:
    """A first start draws a MAC."""
    return picture_ | {"device": {n: found and found._replace(mac=0) for n, found in picture_["device"].items()}}


def test_a_restart_killed_at_every_step_under_traffic(scene):
    scene.begin("--ip-masq")
    world = scene.world
    before = picture(world, scene.agents[0])
    records = {key: record["value"] for key, record in world.records().items()}
    scene.agents[0].stop()
    points, step = 0, 0
    with world.stream(*scene.pods) as there, world.stream(*reversed(scene.pods)) as back:
        while True:
            step += 1
            dying = _sweep(scene, step, False)
            until("it dies, or is ready", lambda dying=dying: dying.process.poll() is not None or dying.ready())
            alike(before, picture(world, scene.agents[0]))
            if dying.process.poll() is None:
                dying.stop()
                break
            _killed(dying)
            points += 1
        last = world.agent("node1", "--node-name=node1", "--ip-masq", run_dir="node1").wait_ready()
        alike(before, picture(world, last))
    assert {key: record["value"] for key, record in world.records().items()} == records
    assert points > 10
    lost = there.lost() + back.lost()
    assert lost == 0
    scene.row(
        f"a restart killed at every step, {points} one after the other", "SIGKILL before each message, file, program; it is whole all the time",
        "nothing", 0.0,
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_a_first_start_on_kubernetes_killed_at_every_step(kube_scene):
    """Its lease is its podCIDR; what it writes is its Node's annotations."""
    scene = kube_scene
    world = scene.world
    world.put_peer(99)
    world.node(1)
    agent = world.agent("node1", "--node-name=node1").wait_ready()
    until("whole", lambda: world.peers("node1") == 1)
    reference = _without_mac(picture(world, agent))
    agent.stop()
    step, longest = 0, 0.0
    while True:
        step += 1
        assert step < LONGEST_SWEEP
        scene.world.run("node1", "sh", "-c", "nft flush ruleset; ip link del flannel.1 2>/dev/null; true")
        scene.world.run("node1", "sh", "-c", f"rm -rf {world.folder}/node1 && mkdir {world.folder}/node1")
        world.kube.annotate(
            "node1", **dict.fromkeys(("public_ip", "backend_data", "backend_type", "kube_subnet_manager"))
        )
        dying = world.agent("node1", "--node-name=node1", run_dir="node1", program=killed_at(step))
        until("it dies, or is ready", lambda dying=dying: dying.process.poll() is not None or dying.ready())
        if dying.process.poll() is None:
            dying.stop()
            break
        where = _killed(dying)
        began = time.monotonic()
        again = world.agent("node1", "--node-name=node1", run_dir="node1").wait_ready()
        until(f"whole: {where}", lambda again=again: alike(reference, _without_mac(picture(world, again))))
        longest = max(longest, time.monotonic() - began)
        assert world.kube.notes("node1")["public-ip"] == "192.168.1.2"
        assert json.loads(world.kube.notes("node1")["backend-data"])["VtepMAC"] == again.mac()
        assert _left_over(scene) == [], where
        again.stop()
    assert step > 20
    scene.row(
        f"a first start on Kubernetes killed at each of {step - 1} steps",
        "SIGKILL before each message to kernel and API server, file, program; time from the next start", "nothing",
        longest,
    )  # fmt: skip


def _peers(scene, numbers: range) -> None:
    """Records in one transaction: one change, as the agent sees it."""
    import base64

    def coded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    puts = []
    for number in numbers:
        key, value = f"{ROOT}/subnets/10.244.{number}.0-24", made_up_peer(number)
        puts.append({"requestPut": {"key": coded(key), "value": coded(json.dumps(value))}})
    scene.world.etcd.ask("/v3/kv/txn", {"success": puts})


def test_a_change_killed_at_every_step_under_traffic(scene):
    """Thirty peers come, then change, then go, all while the agent is killed within it; the pods never notice."""
    scene.begin("--ip-masq")
    world, armed = scene.world, scene.world.folder / "armed"
    own = {str(agent.subnet()).split(".")[2] for agent in scene.agents}
    first = next(n for n in (100, 140, 180) if not any(n <= int(o) < n + 30 for o in own))
    names = range(first, first + 30)
    scene.agents[0].stop()
    points, step, longest = 0, 0, 0.0
    with world.stream(*scene.pods) as there, world.stream(*reversed(scene.pods)) as back:
        while True:
            step += 1
            armed.unlink(missing_ok=True)
            dying = _sweep(scene, step, bool(step % 2), str(armed)).wait_ready()
            armed.touch()
            _peers(scene, names)
            for number in names:
                world.drop_record(f"10.244.{number}.0-24")
            _peers(scene, range(first, first + 15))
            until(
                "it dies, or is through",
                lambda dying=dying: dying.process.poll() is not None or (world.peers("node1") == 16 and dying.ready()),
            )
            alive = dying.process.poll() is None
            if alive:
                dying.stop()
            else:
                _killed(dying)
                points += 1
            armed.unlink(missing_ok=True)
            began = time.monotonic()
            again = world.agent("node1", "--node-name=node1", "--ip-masq", run_dir="node1").wait_ready()
            until("sixteen peers, no more", lambda: world.peers("node1") == 16 == len(world.kernel("node1")["fdb"]))
            longest = max(longest, time.monotonic() - began)
            for number in names:
                world.drop_record(f"10.244.{number}.0-24")
            until("one peer, no more", lambda: world.peers("node1") == 1 == len(world.kernel("node1")["neighbours"]))
            again.stop()
            if alive:
                break
            assert step < LONGEST_SWEEP
    assert points > 4, "a change has steps: fewer messages where a busy machine lets events gather"
    lost = there.lost() + back.lost()
    assert lost == 0
    scene.row(
        f"a change of 30 peers killed at {points} of its steps",
        "SIGKILL before or after each message; time from the next start",
        "nothing",
        longest,
    )


def test_two_agents_on_one_node_by_mistake(scene):
    """Another run directory: the second waits, says who has the device, and takes over when the first ends."""
    scene.begin("--ip-masq")
    world, before = scene.world, picture(scene.world, scene.agents[0])
    with world.stream(*scene.pods) as there:
        second = world.agent("node1", "--node-name=node1", run_dir="second")
        told = until("it says why it waits", lambda: second.problems().get("another agent"))
        assert f"pid {scene.agents[0].process.pid}" in told
        assert not second.ready()
        alike(before, picture(world, scene.agents[0]))
        assert not (second.run_dir / "subnet.env").exists()
        scene.agents[0].stop()
        began = time.monotonic()
        second.wait_ready()
        took = time.monotonic() - began
        assert second.status()["lease"]["subnet"] in (second.run_dir / "subnet.env").read_text().replace(
            ".1/24", ".0/24"
        )
    assert there.lost() == 0
    scene.row(
        "two agents on one node",
        "a second overlayd with a run directory of its own",
        "nothing; the second waits; time from the end of the first",
        took,
    )
