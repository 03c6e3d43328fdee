"""Which peer is probed next, and how each one is by what was answered. Pure: time and answers are given.

A visit is one full-size probe of a peer's VTEP: where that is answered everything below it is whole. A peer that does not
answer is in doubt, and asked by all four kinds, once a second for ROUNDS, before anything is said of it. Peers that came or
changed are asked first, those in doubt next, the others in turn; in all no more than a budget of packets a second, however
many there are. Of peers that never answered, nor did their underlay address, nothing is made: records outlive their nodes.
Nor of those whose pods' gateway, asked where there are no VTEPs, never answered: it may not be there yet.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlay.probes.path import Search
from overlay.probes.verdict import NO_GATEWAY, Kind, Outcome, Peer, State, Verdict, judge, of_size

INTERVAL_S = 10.0
"""Each peer is visited so often where there are not too many for the budget."""
ANSWER_S = 2.0
"""What is not answered after so long is lost."""
BUDGET, OF_DOUBTS = 20, 12
"""Packets a second, and how many of them at most are for peers in doubt."""
ROUNDS = 3
AGAIN_S = 3.0
"""One that does not answer is asked again so often, if the budget has room: that it does is to be known soon."""
MOST_DOUBTS = 256
"""So many peers are in doubt at once, at most."""
REMEMBERED = 16
"""Visits by which loss is known."""
RTT_UNIT_NS = 20_000
"""An RTT fits 16 bits: up to 1.3 s."""


class Target(NamedTuple):
    """A peer to be asked. number: of its subnet (records.packed.number); vtep: or its pods' gateway (gateway)."""

    number: int
    vtep: int
    public_ip: int
    direct: bool
    gateway: bool = False


class Probe(NamedTuple):
    """One packet to be sent. mtu: its size, where the path's MTU is looked for; 0: by its kind."""

    target: Target
    kind: Kind
    mtu: int = 0


class _Doubt:
    """A peer that did not answer. rounds: how many were asked; next_s: when again; path: the search for
    the path's MTU, once only small packets pass."""

    __slots__ = ("next_s", "outcomes", "path", "rounds", "since_s", "target", "verdict")

    def __init__(self, target: Target, now: float) -> None:
        self.target, self.since_s, self.next_s = target, now, now
        self.rounds = 0
        self.outcomes: dict[Kind, Outcome] = {}
        self.verdict: Verdict | None = None
        """Of the last whole look, None before the first."""
        self.path: Search | None = None


class Report(NamedTuple):
    """How one peer is. answered_s, heard_s: seconds since, None: never; rtt_us: of the last answer; loss: of the last
    visits, 0 to 1, None: not known."""

    verdict: Verdict
    answered_s: float | None
    heard_s: float | None
    rtt_us: int
    loss: float | None


class Known(NamedTuple):
    """What is known of all peers at a moment. slots: of those that were asked or heard of, by number, places in the others:
    when each answered and was heard (0: never), its RTT, lost visits as bits, how many there were; verdicts: of those in
    doubt, None: nothing is said yet; silent: those that never answered; unproven: those of which the underlay address alone
    did."""

    slots: dict[int, int]
    answered: array[float]
    heard: array[float]
    rtt: array[int]
    lost: array[int]
    visits: array[int]
    verdicts: dict[int, Verdict | None]
    silent: frozenset[int]
    unproven: frozenset[int] = frozenset()

    def report(self, number: int, now: float) -> Report:
        """How a peer is."""
        slot = self.slots.get(number)
        if slot is None:
            return Report(Verdict(State.UNTRIED, "not tried yet"), None, None, 0, None)
        answered, heard, visits = self.answered[slot], self.heard[slot], self.visits[slot]
        verdict = self.verdicts.get(number)
        if verdict is None and number in self.silent:
            verdict = Verdict(State.SILENT, "has never answered")
        elif verdict is None and number in self.unproven:
            verdict = Verdict(State.UNTRIED, NO_GATEWAY)
        elif verdict is None and answered:
            verdict = Verdict(State.OK, "answers")
        elif verdict is None:
            verdict = Verdict(State.UNTRIED, "has not answered yet" if number in self.verdicts else "not tried yet")
        return Report(
            verdict,
            max(0.0, now - answered) if answered else None,
            max(0.0, now - heard) if heard else None,
            self.rtt[slot] * RTT_UNIT_NS // 1000,
            self.lost[slot].bit_count() / visits if visits else None,
        )


class Mesh:
    """All peers' states, 13 bytes each beside one dict."""

    def __init__(self, port: Callable[[], int], mtu: Callable[[Target], int] = lambda _target: 0) -> None:
        """port: the tunnel's, for what is said; mtu: the largest that a peer is asked by, 0: not known."""
        self._port, self._mtu = port, mtu
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._answered, self._heard = array("f"), array("f")
        """When, in seconds of the caller's clock; 0: never."""
        self._rtt, self._lost, self._visits = array("H"), array("H"), array("B")
        """The RTT by RTT_UNIT_NS; of the last visits those that were lost, as bits, the last one the lowest."""
        self._first: dict[int, None] = {}
        """Peers that came or changed, to be asked first."""
        self._doubts: dict[int, _Doubt] = {}
        self._silent: set[int] = set()
        """Peers that never answered, nor did anybody at their underlay address."""
        self._unproven: set[int] = set()
        """Peers whose underlay address answered, and their pods' gateway never."""
        self._waiting: deque[tuple[float, int, Probe]] = deque()
        """Probes under way, in the order in which they were sent: when they are lost, their sequence number."""
        self._sent: dict[int, tuple[Probe, int]] = {}
        """By sequence number; when, by the wall clock in ns."""
        self._sequence = 0
        self.counts = {"sent": 0, "answered": 0, "lost": 0, "refused": 0}

    # --- peers

    def keep(self, is_peer: Callable[[int], bool]) -> None:
        """Forget those that are no peers any more."""
        for number in [number for number in (*self._slots, *self._first) if not is_peer(number)]:
            self.gone(number)

    def came(self, number: int) -> None:
        """A peer is new, or another: what was known of it says nothing, and it is asked first."""
        self.gone(number)
        self._first[number] = None

    def _slot(self, number: int) -> int:
        """Its place, made where it has none."""
        slot = self._slots.get(number)
        if slot is not None:
            return slot
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._rtt)
            for values in (self._answered, self._heard, self._rtt, self._lost, self._visits):
                values.append(0)
        self._answered[slot] = self._heard[slot] = 0.0
        self._rtt[slot] = self._lost[slot] = self._visits[slot] = 0
        self._slots[number] = slot
        return slot

    def gone(self, number: int) -> None:
        """A peer went."""
        slot = self._slots.pop(number, None)
        if slot is not None:
            self._free.append(slot)
        self._first.pop(number, None)
        self._doubts.pop(number, None)
        self._silent.discard(number)
        self._unproven.discard(number)
        for sequence in [sequence for sequence, (probe, _) in self._sent.items() if probe.target.number == number]:
            del self._sent[sequence]  # of its answer, or that there is none, nothing follows for the next one

    # --- what is asked

    def first(self, most: int) -> list[int]:
        """Peers that are to be asked before the others, so many at most."""
        return [number for number, _ in zip(self._first, range(most), strict=False)]

    def later(self, number: int) -> None:
        """One of them cannot be asked yet: the others come before it."""
        if self._first.pop(number, self) is None:
            self._first[number] = None

    def visit(self, target: Target, odd: bool) -> Probe:
        """What a peer is asked in its turn; one that never answered at its underlay address as well, every other time."""
        never = target.number in self._silent or target.number in self._unproven
        return Probe(target, Kind.UNDERLAY if odd and never else Kind.VTEP_FULL)

    def in_doubt(self, number: int) -> bool:
        """Whether a peer did not answer, and has rounds of its own."""
        return number in self._doubts

    def doubtful(self, now: float, target_of: Callable[[int], Target | None]) -> Iterator[Probe]:
        """The probes of peers in doubt that are due, a whole round of each. target_of: how a peer is asked now, None: it is
        not, since its entries do not stand. One that is asked another way than before is asked as a new one."""
        left = OF_DOUBTS
        due = [(number, doubt) for number, doubt in self._doubts.items() if doubt.next_s <= now]
        for number, doubt in sorted(due, key=lambda item: item[1].verdict is not None):  # of whom nothing is said yet
            if left < len(Kind):
                return
            target = target_of(number)
            if target is None:
                doubt.next_s = now + AGAIN_S
                continue
            if target != doubt.target:
                self.came(number)
                continue
            doubt.rounds += 1
            doubt.next_s = now + (1.0 if doubt.rounds < ROUNDS else AGAIN_S)
            if doubt.rounds > ROUNDS:  # each look stands for itself
                doubt.outcomes = {}
            del self._doubts[number]  # to the end: others are asked as well
            self._doubts[number] = doubt
            left -= len(Kind)
            yield from (Probe(doubt.target, kind) for kind in Kind)
            if doubt.path is not None:
                left -= 1
                yield Probe(doubt.target, Kind.VTEP, doubt.path.next())

    def sent(self, probe: Probe, now: float, now_ns: int) -> int:
        """A probe is about to be sent; its sequence number."""
        self._sequence = (self._sequence + 1) & 0xFFFF
        self._first.pop(probe.target.number, None)
        self._slot(probe.target.number)
        self._sent[self._sequence] = (probe, now_ns)
        self._waiting.append((now + ANSWER_S, self._sequence, probe))
        self.counts["sent"] += 1
        return self._sequence

    # --- what came of it

    def refused(self, sequence: int, reason: str, now: float) -> None:
        """The kernel did not send it."""
        found = self._sent.pop(sequence, None)
        if found is not None:
            self.counts["refused"] += 1
            self._missed(found[0], now, reason)

    def answered(self, sequence: int, source: int, at_ns: int, now: float) -> None:
        """An answer came."""
        found = self._sent.get(sequence)
        if found is None:
            return
        (target, kind, mtu), sent_ns = found
        if source != (target.vtep if kind.by_tunnel else target.public_ip):
            return
        del self._sent[sequence]
        self.counts["answered"] += 1
        slot = self._slots.get(target.number)
        if slot is None:
            return
        self._proven(target.number, slot, by_tunnel=kind.by_tunnel)
        if kind.by_tunnel:
            self._answered[slot] = now
            self._rtt[slot] = min(0xFFFF, max(1, (at_ns - sent_ns) // RTT_UNIT_NS))
        doubt = self._doubts.get(target.number)
        if doubt is not None and mtu:
            if doubt.path is not None:
                doubt.path.passed(mtu)
            return
        if doubt is not None:
            self._note(doubt, kind, True)
        if kind is Kind.VTEP_FULL:
            if doubt is None:
                self._visited(slot, lost=False)
            elif doubt.verdict is not None and self._visits[slot]:  # loss is that of a peer that answers
                self._lost[slot] >>= 1  # so the visit by which it came into doubt is not counted
                self._visits[slot] -= 1
            self._doubts.pop(target.number, None)

    def heard(self, number: int, now: float) -> None:
        """A peer asked us through the tunnel."""
        slot = self._slot(number)
        self._heard[slot] = now
        self._proven(number, slot, by_tunnel=True)

    def _proven(self, number: int, slot: int, by_tunnel: bool) -> None:
        """It is there, so that from now on its silence says something; loss is that of a peer that answers."""
        if number in self._silent or (by_tunnel and number in self._unproven):
            self._silent.discard(number)
            if by_tunnel:
                self._unproven.discard(number)
            self._lost[slot] = self._visits[slot] = 0

    def expire(self, now: float) -> None:
        """What was not answered in time is lost; a look that is whole is judged."""
        while self._waiting and self._waiting[0][0] <= now:
            _, sequence, probe = self._waiting.popleft()
            found = self._sent.get(sequence)
            if found is not None and found[0] == probe:
                del self._sent[sequence]
                self.counts["lost"] += 1
                self._missed(probe, now, "")

    def _missed(self, probe: Probe, now: float, refused: str) -> None:
        target, kind, mtu = probe
        slot = self._slots.get(target.number)
        if slot is None:
            return
        doubt = self._doubts.get(target.number)
        if doubt is None:
            if kind is Kind.VTEP_FULL:
                self._visited(slot, lost=True)
            unproven = (
                target.number in self._unproven
            )  # of those the node's own silence is news, not that of the gateway
            news = kind is (Kind.UNDERLAY if unproven else Kind.VTEP_FULL) or (unproven and bool(refused))
            if news and target.number not in self._silent and len(self._doubts) < MOST_DOUBTS:
                self._doubts[target.number] = _Doubt(target, now)
            return
        if mtu:
            if doubt.path is not None:
                doubt.path.lost(mtu)
            return
        self._note(doubt, kind, False, refused)
        if doubt.rounds >= ROUNDS and kind is Kind.VTEP_FULL:
            heard, proven = self._heard[slot] > doubt.since_s, bool(self._heard[slot] or self._answered[slot])
            ever = proven or target.number in self._unproven
            under = doubt.outcomes.get(Kind.UNDERLAY)
            if target.gateway and ever and under is not None and not under.ok:
                # it may have started anew, and its gateway comes back with its first pod
                self._unproven.add(target.number)
                self._heard[slot] = self._answered[slot] = 0.0
            peer = Peer(target.direct, target.gateway, heard, proven, ever)
            doubt.verdict = judge(doubt.outcomes, self._port(), peer)
            if doubt.verdict.state in (State.SILENT, State.UNTRIED):
                del self._doubts[target.number]
                (self._silent if doubt.verdict.state is State.SILENT else self._unproven).add(target.number)
            self._look_for_path(doubt, refused)

    def _look_for_path(self, doubt: _Doubt, refused: str) -> None:
        """Where full-size packets are lost on the way, which are not?"""
        largest = self._mtu(doubt.target)
        if doubt.verdict is None or doubt.verdict.state is not State.PATH_MTU or refused or not largest:
            doubt.path = None
            return
        if doubt.path is None or doubt.path.largest != largest:
            doubt.path = Search(largest)
        doubt.verdict = of_size(doubt.verdict, doubt.path.found, doubt.target.gateway)

    @staticmethod
    def _note(doubt: _Doubt, kind: Kind, answered: bool, refused: str = "") -> None:
        sent, count, before = doubt.outcomes.get(kind, Outcome(0, 0))
        doubt.outcomes[kind] = Outcome(sent + 1, count + answered, refused or before)

    def _visited(self, slot: int, lost: bool) -> None:
        self._lost[slot] = (self._lost[slot] << 1 | lost) & 0xFFFF
        self._visits[slot] = min(REMEMBERED, self._visits[slot] + 1)

    # --- what is known

    def known(self) -> Known:
        """All of it, for another thread."""
        verdicts = {number: doubt.verdict for number, doubt in self._doubts.items()}
        slots = dict(self._slots)
        return Known(
            slots, self._answered[:], self._heard[:], self._rtt[:], self._lost[:], self._visits[:], verdicts,
            frozenset(self._silent), frozenset(self._unproven),
        )  # fmt: skip

    def lossy(self, least: float, visits: int) -> Iterator[tuple[int, float]]:
        """The peers that answer, but lost so much of their last visits, of which there were so many; their numbers."""
        for number, slot in self._slots.items():
            count = self._visits[slot]
            if count < visits or number in self._doubts or number in self._silent or number in self._unproven:
                continue
            lost = self._lost[slot].bit_count() / count
            if lost >= least:
                yield number, lost

    def wrong(self) -> Iterator[tuple[Target, Verdict]]:
        """The peers of which something is wrong, and what."""
        for doubt in self._doubts.values():
            if doubt.verdict is not None and doubt.verdict.state not in (State.OK, State.UNTRIED):
                yield doubt.target, doubt.verdict
