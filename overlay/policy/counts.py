"""What the rules of a table counted, by policy: totals that only grow, though chains and their counters come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from overlay.policy.compile import Chain, Compiled, drops
from overlay.policy.model import ACCEPT, DENY, NAMESPACED, PASS
from overlay.policy.table import BY_UNKNOWN

ACCEPTED, DENIED_BY, PASSED = "accepted", "denied", "passed"


class Decided(NamedTuple):
    """policies: a policy's key; of what no rule of several NetworkPolicies accepts, all of these, with commas."""

    policies: str
    direction: str
    verdict: str


MOST, OTHERS = 2000, "others"
"""So many are told apart; what policies counted that are gone is summed then."""


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
            if more and comment == BY_UNKNOWN:
                self.unknown += more
            elif more and (found := compiled.chains.get(chain)) is not None:
                self.decided[_decided(found, place[1])] += more
        if len(self.decided) > MOST:
            self._sum_others(compiled)

    def _sum_others(self, compiled: Compiled) -> None:
        there = {policy for chain in compiled.chains.values() for policy in chain.policies}
        for each in [each for each in self.decided if not there.issuperset(each.policies.split(","))]:
            self.decided[each._replace(policies=OTHERS)] += self.decided.pop(each)

    def shown(self) -> list[Mapping[str, object]]:
        """For the status."""
        return [{**each._asdict(), "packets": count} for each, count in sorted(self.decided.items())]


_VERDICTS = {ACCEPT: ACCEPTED, DENY: DENIED_BY, PASS: PASSED}


def _decided(chain: Chain, place: int) -> Decided:
    """What the rule at a place among those that count decides (table.py): by its place, for a comment may be cut."""
    place -= drops(chain) and chain.tier != NAMESPACED  # packets of no connection are dropped first
    if 0 <= place < len(chain.rules):
        rule = chain.rules[place]
        return Decided(rule.policy, chain.direction, _VERDICTS[rule.action])
    return Decided(",".join(chain.policies), chain.direction, DENIED_BY)
