"""Memory that is not needed any more is the system's again."""

from __future__ import annotations

import os
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


BEGIN = """
import ctypes, os, threading
from overlay.process import memory
if {little}:
    memory.keep_little()

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

def threads(work, count=1):
    made = [threading.Thread(target=work) for _ in range(count)]
    for each in made:
        each.start()
    for each in made:
        each.join()

"""
LARGE_BLOCKS = """
def work():
    first = bytearray(16 << 20)  # freed, it teaches glibc to keep such blocks
    del first
    large = [bytearray(b"x" * (200 << 10)) for _ in range(200)]
    del large[:-1]
    print(rss() - before)

before = rss()
threads(work)
"""
HEAPS = """
ready = threading.Barrier(4)
threads(lambda: (ready.wait(), [bytearray(1000) for _ in range(100)], ready.wait()), 4)
library = ctypes.CDLL(None)
library.stdout = ctypes.c_void_p.in_dll(library, "stdout")
library.malloc_info(0, library.stdout)
library.fflush(None)
"""
SMALL_BLOCKS = """
before = rss()
small = [bytearray(1000) for _ in range(40_000)]
del small[:-1]
if {little}:
    memory.give_back()
print(rss() - before)
"""


def said(program: str, little: bool) -> str:
    """What a program prints, with memory kept little or as glibc does it. (Debian's; another C library has none of this.)"""
    command = [sys.executable, "-c", (BEGIN + program).format(little=little)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout


@pytest.mark.parametrize("little", [True, False], ids=["kept little", "as glibc does"])
@pytest.mark.parametrize("program", [LARGE_BLOCKS, SMALL_BLOCKS], ids=["large blocks", "small blocks"])
def test_what_is_free_goes_back(program, little):
    """KiB of 40,000 that are held by one block at the end of a heap."""
    held = int(said(program, little))
    assert (held < 10_000) == little, held


@pytest.mark.parametrize("little", [True, False], ids=["kept little", "as glibc does"])
def test_threads_have_one_heap(little):
    count = said(HEAPS, little).count("<heap nr=")
    assert (count == 1) == little, count
