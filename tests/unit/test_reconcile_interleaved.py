"""Dumps, events, kills and refusals in any order: a state machine against the plain rule."""

import errno
from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overlay.kernel.route.entries import (
    TUNNEL,
)
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from tests.support.model_kernel import It, Killed, peer, settle, world


class Interleaved(RuleBasedStateMachine):
    """Wanted changes, others meddle (seen or unseen), the kernel refuses, devices fall, the agent is killed within it all and
    started again: the end is always wanted."""

    @initialize()
    def start(self) -> None:
        self.kernel, self.clock, self.rec = world()
        self.wanted: dict[int, int] = {}

    def _entries(self) -> tuple[dict, dict, dict]:
        tables: tuple[dict, dict, dict] = ({}, {}, {})
        for n, mac in self.wanted.items():
            for kind, key, value in peer(n, mac):
                tables[kind][key] = value
        return tables

    @rule(n=st.integers(0, 5), salt=st.integers(0, 1))
    def join_or_change(self, n: int, salt: int) -> None:
        mac = (0x0A << 40) | (salt << 20) | n
        self.wanted[n] = mac
        self.rec.join(n, peer(n, mac))

    @rule(n=st.integers(0, 5))
    def leave(self, n: int) -> None:
        self.wanted.pop(n, None)
        self.rec.leave(n)

    @rule(n=st.integers(0, 7), which=st.sampled_from(range(3)), seen=st.booleans())
    def somebody_deletes(self, n: int, which: int, seen: bool) -> None:
        for kind, key, _ in peer(n):
            if kind == which and self.kernel.tables[kind].pop(key, None) is not None and seen:
                if n in self.wanted and self.wanted[n] == peer(n)[1][1] and not self.rec.extra[kind]:
                    self.rec.lose_of(n, kind)
                else:
                    self.rec.lose(kind, key)

    @rule(n=st.integers(0, 7), which=st.sampled_from(range(3)), seen=st.booleans())
    def somebody_adds_or_alters(self, n: int, which: int, seen: bool) -> None:
        for kind, key, value in peer(n):
            if kind == which:
                odd = value._replace(unexpected=("altered",))
                self.kernel.tables[kind][key] = odd
                if seen:
                    self.rec.find(kind, key, odd)

    @rule(
        n=st.integers(0, 5),
        which=st.sampled_from(range(3)),
        code=st.sampled_from([errno.ENOBUFS, errno.EPERM, errno.EINVAL]),
    )
    def kernel_refuses(self, n: int, which: int, code: int) -> None:
        for kind, key, _ in peer(n):
            if kind == which:
                self.kernel.refuse[kind, key] = code

    @rule()
    def kernel_relents(self) -> None:
        self.kernel.refuse.clear()

    @rule(gone=st.booleans())
    def device_falls(self, gone: bool) -> None:
        self.kernel.tables[ROUTES].clear()
        self.kernel.tables[NEIGHBOURS].clear()
        if gone:
            self.kernel.tables[FDB].clear()
        self.rec.device_lost(TUNNEL, deleted=gone)

    @rule()
    def device_goes_and_nobody_has_told_yet(self) -> None:
        for table in self.kernel.tables:
            table.clear()
        self.kernel.gone = True
        self.rec.apply()

    @rule()
    def it_is_told(self) -> None:
        if self.kernel.gone:
            self.rec.device_lost(TUNNEL, deleted=True)
            self.kernel.gone = self.rec.device_gone = False

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.rec.apply()

    @rule()
    def full_check(self) -> None:
        for kind in range(3):
            self.rec.dump(kind, dict(self.kernel.tables[kind]))

    @rule()
    def planned_anew(self) -> None:
        self.rec.forget(self.rec.wanted)
        self.full_check()

    @rule(after=st.integers(0, 6))
    def killed_and_started_again(self, after: int) -> None:
        """Within a batch, or between two: nothing is left of what it believed; the kernel is as it left it."""
        self.kernel.left = after
        with suppress(Killed):
            self.rec.apply()
        self.kernel.left, self.kernel.gone = None, False  # the new one makes a device that is not there
        self.rec = It(self.kernel, self.clock)
        self.rec.wished.of.update({n: peer(n, mac) for n, mac in self.wanted.items()})
        self.planned_anew()

    @invariant()
    def what_differs_is_counted(self) -> None:
        differing = 0
        for kind, table in zip(range(3), self._entries(), strict=True):
            found = self.rec.found(kind)
            differing += sum(table.get(key) != found.get(key) for key in table.keys() | found.keys())
        assert self.rec.differing() == differing
        assert all(self.rec.pending.values())
        assert all(self.rec.backing_off.values())

    def teardown(self) -> None:
        if not hasattr(self, "kernel"):
            return
        self.kernel.refuse.clear()
        self.it_is_told()
        self.full_check()
        settle(self.rec, self.clock)
        assert self.kernel.tables == self._entries()
        assert self.rec.differing() == 0


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
