"""Hostile or broken input"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.lab import netns
from tests.agent.test_hostile import GOOD_NOTES, NODES
from tests.support.faults import alike, picture
from tests.support.wait import until
from tests.support.world import ROOT, vxlan_record
from tests.unit.hostile import GOOD_KEY, GOOD_VALUE, HOSTILE, KEY, OWN_MAC

FLAG = "--underlay-cidr=192.168.0.0/16"
LARGEST = 1_400_000
"""etcd takes 1.5 MiB."""


def _refused(scene, key: str, words: str) -> str:
    """The reason that the first agent gives."""
    found = scene.agents[0].refused_records()
    reason = str(found.get(key) or found.get(ascii(key)[1:-1], ""))
    return reason if words in reason and reason else ""


def _timed(what: str, check: Callable[[], object]) -> float:
    began = time.monotonic()
    until(what, check, pause_s=0.002)
    return time.monotonic() - began


def test_records(scene):
    """The corpus one by one, under traffic. Control: at the key that most of them have a good record is a peer, before each."""
    scene.world.config(SubnetMin="10.244.1.0", SubnetMax="10.244.2.0")
    scene.begin(FLAG)
    world, agent = scene.world, scene.agents[0]
    world.put_record(GOOD_KEY, GOOD_VALUE)
    until("a good peer", lambda: world.peers("node1") == 2)
    before = world.kernel("node1")
    own = str(agent.subnet()).removesuffix("0/24")
    with world.stream(*scene.pods) as there, world.stream(*reversed(scene.pods)) as back:
        for name, key, value, words in HOSTILE:
            here = key.replace("10.244.1.", own)
            if key == KEY:
                world.put_record(KEY, vxlan_record("192.168.1.9", "0a:00:00:00:00:09"))
                until(f"{name}: control: it is a peer", lambda: world.peers("node1") == 3)
            data = value[:LARGEST].replace(OWN_MAC.encode(), agent.mac().encode())
            if not here.isprintable() or not here or len(here) > 1000:
                continue  # unit tests have those; etcd's own API would not take them from here
            world.put_record(here, data)
            usual = words.split(" 10.244.5")[0] if len(data) == len(value) else "value has"
            took = _timed(f"{name}: refused", lambda here=here, usual=usual: _refused(scene, here, usual))
            until(f"{name}: nothing of it is in the kernel", lambda: world.kernel("node1") == before)
            scene.row(f"record: {name}", f"refused: {_refused(scene, here, usual)[:110]}", "nothing", took)
            world.drop_record(here)
            until("it is gone", lambda here=here: not _refused(scene, here, ""))
    assert there.lost() + back.lost() == 0


def test_annotations(kube_scene):
    """The same on Kubernetes. Control: with good annotations the Node is a peer."""
    scene, world = kube_scene, kube_scene.world
    scene.begin(FLAG)
    before = world.kernel("node1")
    with world.stream(*scene.pods) as there:
        for name, (notes, words) in NODES.items():
            world.kube.node(name, "10.244.100.0/24", **GOOD_NOTES)
            until(f"{name}: control: it is a peer", lambda: world.peers("node1") == 2)
            world.kube.annotate(name, **notes)
            took = _timed(f"{name}: refused", lambda name=name, words=words: _refused(scene, name, words))
            until(f"{name}: nothing of it is in the kernel", lambda: world.kernel("node1") == before)
            scene.row(f"annotation: {name}", f"refused: {_refused(scene, name, words)[:110]}", "nothing", took)
            world.kube.delete(name)
            until("it is gone", lambda name=name: not _refused(scene, name, ""))
    assert there.lost() == 0


CONFIGS = {
    "not JSON": (b"{", "not JSON"),
    "a list": (b"[]", "must be an object"),
    "deep": (b"[" * 50_000, "not JSON"),
    "no text": (b"\xff\xfe\x00", "not JSON"),
    "no Network": (b'{"Backend":{"Type":"vxlan"}}', "Network: missing"),
    "half of all for Network": (b'{"Network":"128.0.0.0/1"}', "must not touch"),
    "another Network": (b'{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}', "does not contain our subnet"),
    "a backend that is none": (b'{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}', "Backend.Type"),
    "a VNI too large": (b'{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}', "VNI"),
    "a number of 4000 digits": (b'{"Network":"10.244.0.0/16","SubnetLen":' + b"9" * 4000 + b"}", "SubnetLen"),
    "a megabyte": (b'{"Network":"' + b"x" * 1_000_000 + b'"}', "Network"),
}  # fmt: skip


def test_the_network_config(scene):
    """Live: what runs goes on. Control: a good one is followed."""
    scene.begin()
    world, agent = scene.world, scene.agents[0]
    before = picture(world, agent)
    with world.stream(*scene.pods) as there:
        for name, (text, words) in CONFIGS.items():
            world.etcd.put(f"{ROOT}/config", text)
            told: Callable[[], str] = lambda: agent.problems().get("config", "")  # noqa: E731
            took = _timed(f"{name}: refused", lambda words=words, told=told: words in told())
            said = told()
            assert "the running config is kept" in said, said
            assert len(said) < 400
            alike(before, picture(world, agent))
            scene.row(f"network config: {name}", f"refused: {said[:110]}", "nothing", took)
            world.config()
            until("a good one is taken", lambda told=told: not told())
        assert there.came
    assert there.lost() == 0
    world.config(Backend={"Type": "vxlan", "MTU": 1400})
    until("control: it is followed", lambda: world.device("node1").mtu == 1350)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_our_files_made_something_else(scene, kind):
    """Under a running agent; a folder cannot be written over, and is told."""
    scene.begin()
    world, agent = scene.world, scene.agents[0]
    path = agent.run_dir / "subnet.env"
    before = picture(world, agent)

    def whole() -> bool:
        return path.is_file() and not path.is_symlink() and alike(before, picture(world, agent))

    def inject() -> None:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        # and something else to mend: whoever waits for the file does not
        world.run("node1", "ip", "route", "flush", "dev", "flannel.1", "proto", "111")

    def bites() -> bool:
        return True if kind != "folder" else f"{path}: Is a directory" in agent.problems().get("files", "")

    def recover() -> bool:
        if kind == "folder":
            until("all else goes on", lambda: world.peers("node1") == 1)
            path.rmdir()
        return kind == "folder"

    scene.suffer(f"file: subnet.env made a {kind}", "and all routes flushed", inject, bites, 30, recover, whole)


FLAGS = {
    "--no-such-flag": "no-such-flag",
    "--healthz-port=99999": "from 0 to 65535",
    "--iface-regex=a{4294967296}": "is not a regular expression",
    "--etcd-prefix=/\udcff": "is not UTF-8",
    "--etcd-endpoints=http://root:hunter2@10.0.0.1:2379": "not in an address",
    "--underlay-cidr=everything": "must be a prefix like 192.168.0.0/16 or fd00:1::/48",
    "--public-ip=eth0": "must be an IPv4 address",
}


def test_flags(scene):
    """Exit 2 and one line, before anything is touched."""
    for flag, words in FLAGS.items():
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "overlay", os.fsencode(flag)], capture_output=True, text=True, check=False
        )
        took = time.monotonic() - began
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert "hunter2" not in done.stderr
        shown = flag.encode(errors="replace").decode().replace("hunter2", "...")
        scene.row(f"flag: `{shown}`", f"refused: {done.stderr.strip()[:110]}", "nothing", took)


RUBBISH = {
    "70,000 zeros": b"\0" * 70_000,
    "a line of 100,000 letters": b"GET " + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "5,000 headers": b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    "no text": b"\xff\xfe\xfd\r\n\r\n",
    "a path upwards": b"GET /../../etc/passwd HTTP/1.0\r\n\r\n",
    "another method": b"POST /status HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
}


@pytest.mark.parametrize("door", ["unix", "tcp"])
def test_the_status_socket(scene, door):
    """A hundred of each at once; time until an honest one is answered beside them."""
    scene.begin("--healthz-port=10299")
    agent = scene.agents[0]

    def connect() -> socket.socket:
        if door == "tcp":
            return netns.inside(
                scene.world.namespace("node1"), lambda: socket.create_connection(("127.0.0.1", 10299), 5)
            )
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(agent.run_dir / SOCKET_NAME))  # waits while the queue is full
        made.settimeout(5)
        return made

    with scene.world.stream(*scene.pods) as there:
        for name, data in RUBBISH.items():
            open_ones = []
            for _ in range(100):
                one = connect()
                try:
                    one.sendall(data)
                except OSError:
                    one.close()
                    continue
                open_ones.append(one)
            began = time.monotonic()
            assert ask_unix(str(agent.run_dir / SOCKET_NAME), "/healthz")[0] == 200
            took = time.monotonic() - began
            for one in open_ones:
                one.close()
            scene.row(f"{door} socket: {name}", "a hundred connections", "nothing", took)
    assert there.lost() == 0
    assert agent.problems() == {}
    assert json.loads(ask_unix(str(agent.run_dir / SOCKET_NAME), "/status")[1])["ready"]
