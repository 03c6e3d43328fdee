"""One agent for each device: who has it is named, at every look, and its end is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from overlay.process.rundir import DeviceLock

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
        assert len(os.listdir("/proc/self/fd")) == descriptors + 3
        first.kill()
        first.wait()
        with keeper(device) as second:
            assert [lock.take(device) for lock in locks] == [second.pid] * 3
            second.kill()
            second.wait()
            assert locks[0].take(device) is None
            assert locks[0].take(device) is None
            assert locks[1].take(device) == os.getpid()
