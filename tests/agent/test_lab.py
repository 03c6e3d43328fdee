"""The lab and the operator's command, as a user runs them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from overlay.lab import netns
from overlay.lab.capture import parse_vxlan
from overlay.lab.lab import Lab
from tests.support.wait import until


def overlay(*words: str, check: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "overlay.cli.app", *words], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert check is None or done.returncode == check, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def name():
    made = f"t{uuid.uuid4().hex[:6]}"
    yield made
    overlay("lab", "down", "--name", made, check=None)
    assert not netns.existing(f"overlay-{made}-")


@pytest.mark.timeout(240)
def test_the_whole_tour(name):
    up = overlay("lab", "up", "--name", name)
    for shown in (
        "node1",
        "192.168.1.4",
        "flannel.1",
        "VTEP MAC",
        "pod to pod",
        "node to pod",
        "pod to node",
        "outer IPv4",
        "VNI 1",
        "all 66 pairs reach each other",
    ):
        assert shown in up.stdout
    assert "..." in up.stderr, "progress"

    value = json.loads(overlay("lab", "matrix", "--name", name, "--json").stdout)
    assert value["all_reach"]
    assert len(value["matrix"]) == 30 + 18 + 18
    assert all(cell["ok"] and cell["rtt_us"] > 0 and cell["seen"] == cell["own"] for cell in value["matrix"])
    packet = value["packet"]
    assert set(packet["outer_ip"]) == {"192.168.1.2", "192.168.1.3"}
    assert packet["outer_port"][1] == 8472
    assert all(address.startswith("10.244.") for address in packet["inner_ip"])
    macs = {node["status"]["lease"]["vtep_mac"] for node in value["nodes"]}
    assert set(packet["inner_mac"]) <= macs

    again = overlay("lab", "up", "--name", name)
    assert "all 66 pairs" in again.stdout, "a lab that stands is shown again"
    assert "10.244." in overlay("lab", "exec", "--name", name, "node1", "ip", "route").stdout
    assert "eth0" in overlay("lab", "exec", "--name", name, "node1-pod1", "ip", "addr").stdout
    assert "there is no node9" in overlay("lab", "exec", "--name", name, "node9", "true", check=1).stderr

    grown = json.loads(overlay("lab", "add-node", "--name", name, "--json").stdout)
    assert len(grown["nodes"]) == 4
    assert grown["all_reach"]
    overlay("lab", "remove-node", "--name", name, "node2")
    left = json.loads(overlay("lab", "status", "--name", name, "--json").stdout)
    assert [node["name"] for node in left["nodes"]] == ["node1", "node3", "node4"]
    assert all(len(node["status"]["peers"]) == 2 for node in left["nodes"])

    run_dir = Lab(name).run_dir(Lab(name).nodes[0])
    shown = overlay("status", "--run-dir", str(run_dir)).stdout
    for word in ("ready", "yes", "10.244.", "flannel.1", "2 peers", "all that the agent manages is as it should be"):
        assert word in shown
    status = json.loads(overlay("status", "--run-dir", str(run_dir), "--json").stdout)
    assert status["ready"]
    assert status["differences"] == []

    # a problem of one agent is named, and ends nothing
    chain = "add table inet filter; add chain inet filter fw { type filter hook forward priority 0; policy drop; }"
    overlay("lab", "exec", "--name", name, "node3", "nft", chain)
    until("it is shown", lambda: "node3: forward chain: " in overlay("lab", "status", "--name", name).stdout)

    overlay("lab", "exec", "--name", name, "node3", "nft", "delete table inet filter")

    # full-size packets that do not pass are named as such, and a node that nobody reaches
    assert f"{name}: 3 nodes, whole" in overlay("lab", "list").stdout
    overlay("lab", "exec", "--name", name, "node3", "nft", "add table inet cut; add chain inet cut in { type filter hook input"
            " priority 0; }; add rule inet cut in udp dport 8472 drop")  # fmt: skip
    cut = overlay("lab", "matrix", "--name", name, check=1).stdout
    assert "node3 is cut off: nobody reaches it, and it reaches nobody" in cut
    overlay("lab", "exec", "--name", name, "node3", "nft", "delete table inet cut")
    large = "add rule inet cut out udp dport 8472 meta length > 1300 drop"
    overlay("lab", "exec", "--name", name, "node3", "nft", "add table inet cut; add chain inet cut out { type filter hook"
            f" postrouting priority 0; }}; {large}")  # fmt: skip
    cut = overlay("lab", "matrix", "--name", name, check=1).stdout
    assert "small packets pass everywhere: it is the MTU" in cut
    assert "full-size packets (1450 bytes, DF) do not" in cut
    overlay("lab", "exec", "--name", name, "node3", "nft", "delete table inet cut")

    # a node whose agent is dead, and the truth about it
    lab = Lab(name)
    os.kill(lab.nodes[0].agent.pid, signal.SIGKILL)
    until("it is gone", lambda: not lab.nodes[0].agent.alive())
    broken = overlay("lab", "status", "--name", name, check=1)
    assert "does not answer" in broken.stdout
    assert "no agent answers" in overlay("status", "--run-dir", str(run_dir), check=3).stderr
    overlay("lab", "matrix", "--name", name)  # the data path needs no agent
    assert "there is no node9" in overlay("lab", "restart", "--name", name, "node9", check=1).stderr
    overlay("lab", "restart", "--name", name, "node1")
    assert Lab(name).whole()
    os.kill(Lab(name).nodes[0].agent.pid, signal.SIGKILL)
    until("it is gone again", lambda: not Lab(name).whole())
    overlay("lab", "up", "--name", name, "--nodes", "1", "--pods", "1")  # what is left is replaced
    assert len(Lab(name).nodes) == 1

    overlay("lab", "down", "--name", name)
    assert not Lab(name).exists
    assert "there is no lab" in overlay("lab", "status", "--name", name, check=1).stderr


def test_the_matrix_fails_when_a_pair_does(name):
    overlay("lab", "up", "--name", name, "--nodes", "2", "--pods", "1")
    lab = Lab(name)
    os.kill(lab.nodes[0].agent.pid, signal.SIGSTOP)
    try:
        overlay("lab", "exec", "--name", name, "node1", "ip", "link", "set", "flannel.1", "down")
        done = overlay("lab", "matrix", "--name", name, check=1)
    finally:
        os.kill(lab.nodes[0].agent.pid, signal.SIGCONT)
    assert re.search(r"nothing arrived|no route|no way back", done.stdout)
    assert "pairs reach each other; see" in done.stdout
    until("the agent mends it", lambda: overlay("lab", "matrix", "--name", name, check=None).returncode == 0, 40)


def command_lines():
    """Every process and its command line; one that ends while we look is none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes()


def test_a_crash_of_the_lab_command_is_cleaned_up(name):
    running = subprocess.Popen(
        [sys.executable, "-m", "overlay.cli.app", "lab", "up", "--name", name],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until("it has begun", lambda: len(netns.existing(f"overlay-{name}-")) >= 2)
    running.kill()
    running.wait()
    assert netns.existing(f"overlay-{name}-")
    overlay("lab", "down", "--name", name)
    assert not netns.existing(f"overlay-{name}-")
    assert not Path(f"/run/overlay-lab/{name}").exists()
    mine = [pid for pid, words in command_lines() if f"/run/overlay-lab/{name}/".encode() in words]
    assert mine == []


def test_an_agent_started_by_hand_is_found_and_ended(name):
    """Of a lab command killed between starting an agent and noting it, or of a user who started one again."""
    overlay("lab", "up", "--name", name, "--nodes", "1", "--pods", "1")
    node = Lab(name).nodes[0]
    words = Path(f"/proc/{node.agent.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    os.kill(node.agent.pid, signal.SIGKILL)
    until("it is gone", lambda: not node.agent.alive())
    namespace = f"overlay-{name}-node1"
    again = subprocess.Popen(
        ["nsenter", f"--net={netns.path(namespace)}", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until("an agent that answers will do", lambda: overlay("lab", "status", "--name", name, check=None).returncode == 0)
    overlay("lab", "down", "--name", name)
    assert again.wait(15) == 0
    assert not Path(f"/run/overlay-lab/{name}").exists()


def test_the_matrix_names_an_end_that_lost_its_address(name):
    overlay("lab", "up", "--name", name, "--nodes", "2", "--pods", "1")
    overlay("lab", "exec", "--name", name, "node1-pod1", "ip", "link", "del", "eth0")
    done = overlay("lab", "matrix", "--name", name, "--json", check=1)
    cells = {(cell["source"], cell["target"]): cell for cell in json.loads(done.stdout)["matrix"]}
    assert "node1-pod1 has no 10.244." in cells["node2-pod1", "node1-pod1"]["why"]
    assert cells["node1", "node2-pod1"]["ok"], "the others are measured"


def test_a_lab_that_stands_is_not_remade_in_silence(name):
    overlay("lab", "up", "--name", name, "--nodes", "1", "--pods", "1")
    done = overlay("lab", "up", "--name", name, "--nodes", "2", "--pods", "1", check=1)
    assert "exists, with other options" in done.stderr
    assert "--name" in done.stderr


def test_with_masquerade_and_direct_routing(name):
    conf = (
        '{"Network":"10.50.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan","VNI":42,"Port":4789,"DirectRouting":true}}'
    )
    done = overlay(
        "lab",
        "up",
        "--name",
        name,
        "--nodes",
        "2",
        "--pods",
        "1",
        "--net-conf",
        conf,
        "--agent-flag=--ip-masq",
        "--json",
    )
    value = json.loads(done.stdout)
    assert value["all_reach"]
    assert value["packet"] is None, "nothing is encapsulated"
    seen = {(cell["source"], cell["target"]): cell["seen"] for cell in value["matrix"]}
    assert seen["node1-pod1", "node2"] == "192.168.1.2", "masqueraded, as asked for"
    assert seen["node1-pod1", "node2-pod1"].startswith("10.50."), "never between pods"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lab", "up", "--net-conf", "{}"], "Network: missing"),
        (["lab", "up", "--nodes", "0"], "0 is not in the range"),
        (["lab", "up", "--name", "Bad Name"], "lower-case"),
        (["lab", "matrix", "--name", "../x"], "lower-case"),
        (["lab", "matrix"], "there is no lab"),
        (["lab", "add-node"], "there is no lab"),
        (["release", "--run-dir=/nonexistent"], "no lease of this node is known"),
        (["release", "--bogus"], "bogus"),
        (["status", "--run-dir=/nonexistent"], "no agent answers at /nonexistent"),
    ],
)
def test_errors_are_one_line_with_what_to_do(words, said, name):
    if words[0] == "lab" and "--name" not in words:
        words = [*words, "--name", name]
    done = overlay(*words, check=None)
    assert done.returncode in (1, 2, 3)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_vxlan_frame_is_taken_apart():
    inner = (
        bytes.fromhex("0a0000000002 0a0000000001 0800".replace(" ", ""))
        + bytes.fromhex("4500002000000000401100000af401020af40203")
        + bytes.fromhex("0400080000100000")
        + b"payload!"
    )
    vxlan = b"\x08\x00\x00\x00" + (42).to_bytes(3, "big") + b"\x00" + inner
    outer = (
        bytes.fromhex("020000000002 020000000001 0800".replace(" ", ""))
        + bytes.fromhex("450000520000000040110000c0a80102c0a80103")
        + bytes.fromhex("c35012b500000000")
        + vxlan
    )
    found = parse_vxlan(outer, 4789, "eth0")
    assert found is not None
    assert (found.vni, found.outer_ip, found.inner_ip, found.inner_port) == (
        42,
        ("192.168.1.2", "192.168.1.3"),
        ("10.244.1.2", "10.244.2.3"),
        (1024, 2048),
    )
    assert found.outer_mac == ("02:00:00:00:00:01", "02:00:00:00:00:02")
    assert parse_vxlan(outer, 8472, "eth0") is None
    for cut in range(len(outer)):
        parse_vxlan(outer[:cut], 4789, "eth0")
