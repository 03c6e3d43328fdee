"""One agent for each run directory and each device: who has it is named, at every look, and its end is noticed; nobody but
root can have it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from overlay.process.rundir import LOCK_NAME, DeviceLock, RunDir, RunDirError

KEEPER = """
import sys
from overlay.process.rundir import DeviceLock
lock = DeviceLock()
assert lock.take(sys.argv[1]) is None
print("has it", flush=True)
sys.stdin.read()
"""


@contextmanager
def keeper(device: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def test_who_has_the_device_is_named_at_every_look(closing):
    device = f"overlay-test-{uuid.uuid4().hex}"
    locks = [closing(DeviceLock()) for _ in range(3)]
    with keeper(device) as first:
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            assert [lock.take(device) for lock in locks] == [first.pid] * 3
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 3
        first.kill()
        first.wait()
        with keeper(device) as second:
            assert [lock.take(device) for lock in locks] == [second.pid] * 3
            second.kill()
            second.wait()
            assert locks[0].take(device) is None
            assert locks[0].take(device) is None
            assert locks[1].take(device) == os.getpid()


NOBODY = 65534
ANYBODYS_PYTHON = "/usr/bin/python3"
"""That of a .venv may lie where a user without privileges sees nothing."""
SQUATTER = """
import socket, sys
names, backlog = int(sys.argv[2]), sys.argv[3]
held = []
for number in range(names):
    made = socket.socket(socket.AF_UNIX)
    made.bind("\\0overlayd/" + sys.argv[1] + ("/" + str(number) if number else ""))
    held.append(made)
    if backlog == "full":
        made.listen(0)
        held.append(socket.socket(socket.AF_UNIX))
        held[-1].connect(made.getsockname())
    elif backlog == "listening":
        made.listen(8)
print("has it", flush=True)
sys.stdin.read()
"""


@contextmanager
def squatter(device: str, names: int, backlog: str) -> Iterator[int]:
    """A process without privileges that has the first of an agent's names; its pid."""
    assert os.path.exists(ANYBODYS_PYTHON), "apt-get install python3-minimal"
    command = [ANYBODYS_PYTHON, "-c", SQUATTER, device, str(names), backlog]
    with subprocess.Popen(
        command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=NOBODY, group=NOBODY
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("backlog", ["listening", "full", "deaf"])
def test_who_is_not_root_keeps_no_agent_waiting(closing, backlog):
    device = f"overlay-test-{uuid.uuid4().hex}"
    with squatter(device, 1, backlog):
        lock, other = closing(DeviceLock()), closing(DeviceLock())
        assert lock.take(device) is None
        assert lock.squatters == {}, "there are more names"
        assert other.take(device) == os.getpid(), "a second agent is noticed all the same"
    assert other.take(device) == os.getpid(), "also by the first name, which is free now"
    lock.close()
    assert other.take(device) is None


CROWD = """
import socket, sys
held = []
while True:
    made = socket.socket(socket.AF_UNIX)
    made.setblocking(False)
    try:
        made.connect("\\0overlayd/" + sys.argv[1])
    except BlockingIOError:
        break
    held.append(made)
print(len(held), flush=True)
sys.stdin.read()
"""


def test_an_agent_whose_backlog_others_fill_is_noticed_all_the_same(closing):
    device = f"overlay-test-{uuid.uuid4().hex}"
    first, second = closing(DeviceLock()), closing(DeviceLock())
    assert first.take(device) is None
    command = [ANYBODYS_PYTHON, "-c", CROWD, device]
    with subprocess.Popen(
        command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=NOBODY, group=NOBODY
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 1
        assert second.take(device) == 0, "who it is cannot be asked"
        process.kill()
    assert second.take(device) == 0, "they stay there, though who made them ended"
    first.close()
    assert second.take(device) is None


def test_who_has_all_names_is_said(closing):
    device = f"overlay-test-{uuid.uuid4().hex}"
    lock = closing(DeviceLock())
    with squatter(device, DeviceLock.NAMES, "listening") as pid:
        assert lock.take(device) is None
        assert lock.squatters[device] == (pid, NOBODY)
    assert lock.take(device) is None
    assert lock.squatters == {}
    assert closing(DeviceLock()).take(device) == os.getpid()


def test_a_run_directory_is_held_by_root_alone(tmp_path):
    """Who may read a file may lock it."""
    lock = tmp_path / LOCK_NAME
    lock.touch(0o644)  # as earlier versions left it
    with RunDir(str(tmp_path)):
        assert lock.stat().st_mode & 0o777 == 0o600
        with pytest.raises(RunDirError, match=rf"in use by overlayd \(pid {os.getpid()}\)"):
            RunDir(str(tmp_path))
    RunDir(str(tmp_path)).close()


def test_a_lock_that_somebody_removed_is_taken_again(tmp_path):
    with RunDir(str(tmp_path)) as held:
        assert not held.keep()
        (tmp_path / LOCK_NAME).unlink()
        assert held.keep()
        assert not held.keep()
        with pytest.raises(RunDirError, match="in use"):
            RunDir(str(tmp_path))
        (tmp_path / LOCK_NAME).unlink()
        with RunDir(str(tmp_path)), pytest.raises(RunDirError, match="in use"):
            held.keep()


def test_what_stands_in_the_way_of_a_run_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=rf"--run-dir: {tmp_path}/file: File exists"):
        RunDir(f"{tmp_path}/file")


def test_a_device_that_is_given_back_may_be_anothers(closing):
    device = f"test-{os.getpid()}-back"
    first, second = closing(DeviceLock()), closing(DeviceLock())
    assert first.take(device) is None
    assert second.take(device) == os.getpid()
    first.give_back(device)
    assert second.take(device) is None
    assert first.take(device) == os.getpid()
