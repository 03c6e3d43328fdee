"""What the rules of a table counted, by policy: totals that only grow, though chains and their counters come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from overlay.policy.compile import Compiled
from overlay.policy.table import BY_UNKNOWN, DENIED, DENIES, PASSES, STRAY

ACCEPTED, DENIED_BY, PASSED = "accepted", "denied", "passed"


class Decided(NamedTuple):
    """policies: a policy's key; of what no rule of several NetworkPolicies accepts, all of these, with commas."""

    policies: str
    direction: str
    verdict: str


class Counts:
    """Of one table. Packets that were judged: the first of a connection, and again when something was taken away."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], int] = {}
        """What each rule said last, by chain and place."""
        self.decided: Counter[Decided] = Counter()
        self.unknown = 0
        """Packets of pods that were not known."""

    @property
    def denied(self) -> int:
        """Packets that policies dropped."""
        return sum(count for each, count in self.decided.items() if each.verdict == DENIED_BY)

    def take(self, rules: Iterable[tuple[str, str, int]], compiled: Compiled) -> None:
        """Of each rule that counts its chain, comment and packets, in the order of the table."""
        places: Counter[str] = Counter()
        last, self._last = self._last, {}
        for chain, comment, packets in rules:
            place = chain, places[chain]
            places[chain] += 1
            self._last[place] = packets
            before = last.get(place, 0)
            more = packets - before if packets >= before else packets  # made anew, it begins with 0
            if more:
                self._add(chain, comment, more, compiled)

    def _add(self, chain: str, comment: str, packets: int, compiled: Compiled) -> None:
        if comment == BY_UNKNOWN:
            self.unknown += packets
            return
        if (found := compiled.chains.get(chain)) is None:
            return
        verdict = DENIED_BY if comment in (DENIED, STRAY) else ACCEPTED
        policies = ",".join(found.policies)
        if verdict == ACCEPTED:
            for ending, other in ((DENIES, DENIED_BY), (PASSES, PASSED)):
                if comment.endswith(ending):
                    verdict, comment = other, comment.removesuffix(ending)
            policies = comment.rsplit(" ", 2)[0]
        self.decided[Decided(policies, found.direction, verdict)] += packets

    def shown(self) -> list[Mapping[str, object]]:
        """For the status."""
        return [{**each._asdict(), "packets": count} for each, count in sorted(self.decided.items())]
