"""Memory that is not needed any more is the system's again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from overlay.firewall.let_in import LetIn
from overlay.peers.difference import Difference
from tests.support.clock import Clock

MANY = 20_000


def test_what_was_let_in_once_takes_no_room():
    """A set that is emptied one by one keeps its table: 2 MiB of 20,000 keys."""
    kept = LetIn(Clock())
    kept.load([])
    kept.made(set())
    kept.use(range(MANY))
    add, take, gone = kept.changes()
    assert len(add) == MANY
    kept.changed(add, take, gone)
    assert sys.getsizeof(kept._new) < 1000
    assert kept.there == set(range(MANY))
    kept.found(set(range(MANY)))
    assert sys.getsizeof(kept._new) < 1000 and sys.getsizeof(kept._beyond) < 1000


def test_what_was_pending_once_takes_no_room():
    pending = dict.fromkeys(range(MANY), 1)
    for peer in range(MANY):
        Difference._keep(pending, peer, 0)
    assert sys.getsizeof(pending) < 1000


PROGRAM = """
import threading
from overlay.process import memory
if {little}:
    memory.keep_little()

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4

def work():
    first = bytearray(16 << 20)  # freed, it teaches glibc to keep such blocks
    del first
    large = [bytearray(b"x" * (200 << 10)) for _ in range(200)]
    del large[:-1]
    print(rss() - before)

before = rss()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("little", [True, False], ids=["kept little", "as glibc does"])
def test_blocks_of_a_thread_go_back(little):
    """KiB of 40,000 that are held by one block at the end of a heap."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(little=little)], capture_output=True, text=True, check=True)  # fmt: skip
    held = int(done.stdout)
    assert (held < 10_000) == little, held
