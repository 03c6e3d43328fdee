"""What we wrote comes back as notifications: recognised in one go, it must leave what one at a time leaves."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.families import V4
from lease.records.packed import Leases, number
from overlay.kernel.route import wire
from overlay.kernel.route.entries import TUNNEL
from overlay.kernel.route.fast import FDB, DumpMatcher
from overlay.peers.datapath import Datapath
from overlay.peers.difference import Device, Touched
from tests.support.clock import Clock
from tests.support.fakes import FakeKernel
from tests.support.make import node
from tests.unit.test_fast import NETWORK, OIF, dumped, peer

MESSAGES = st.tuples(
    st.integers(1, 5), st.sampled_from([1, 2, 2, 2]), st.booleans(), st.sampled_from([{}, {}, {}, {"dst": 9}, {"oif": 8}, {"state": 2}])
)  # fmt: skip
"""Of which peer, which of its entries (1: the neighbour, 2: the FDB entry), whether it is gone, what is odd about it."""


def path_of(found: list[int], dumping: bool) -> Datapath:
    """Peers 3 to 6, of which these have an FDB entry as it should be; dumping: a dump is under way."""
    kernel: Any = FakeKernel()
    made = Datapath(V4, kernel, Clock(), random.Random(1))
    made.plan(node(network=NETWORK), "", Leases.of([peer(n + 2) for n in range(1, 5)]))
    made.rec.devices[TUNNEL] = Device(OIF, True)
    made.rec.agree(FDB, [number(peer(n + 2).v4.subnet) for n in found])
    made.rec.touched = Touched(len(made.rec.tables)) if dumping else None
    return made


def state(path: Datapath) -> Any:
    rec = path.rec
    touched = None if rec.touched is None else (rec.touched.keys, rec.touched.peers)
    return copy.deepcopy((rec.pending, rec.backing_off, rec.extra, touched, rec.mended, rec._missing, rec._removals))


@given(st.lists(st.integers(1, 4), unique=True), st.booleans(), st.lists(st.lists(MESSAGES, max_size=4), max_size=4))
def test_in_one_go_is_one_by_one(found, dumping, batches):
    quick, slow = path_of(found, dumping), path_of(found, dumping)
    for batch in batches:
        messages = []
        for which, entry, gone, odd in batch:
            data = dumped(peer(which + 2), **odd)[entry]
            kind = wire.RTM_DELNEIGH if gone else wire.RTM_NEWNEIGH
            messages.append(data[:4] + struct.pack("=H", kind) + data[6:])
        quick.on_neighbour_messages(list(messages))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DumpMatcher, "put_by_us", lambda *_: [])
            slow.on_neighbour_messages(list(messages))
        assert state(quick) == state(slow)
