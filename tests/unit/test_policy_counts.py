"""What rules counted, added up by policy: never less than before, whatever becomes of chains and their counters."""

from __future__ import annotations

import pytest

from overlay.cli.status import policy_words
from overlay.policy.compile import Chain, Compiled, Judged
from overlay.policy.counts import Counts, Decided
from overlay.policy.model import ACCEPT, ADMIN, DENY, INGRESS, PASS
from overlay.policy.table import BY_UNKNOWN, DENIED, STRAY

TWO = Chain(INGRESS, ("x/a", "x/b"), (Judged("x/a", 0, "", ""),))
TOP = "ClusterNetworkPolicy/top"
WIDE = Chain(
    INGRESS,
    (TOP,),
    tuple(Judged(TOP, place, "", "", action) for place, action in enumerate((ACCEPT, DENY, PASS))),
    ADMIN,
)
COMPILED = Compiled({}, {"in-1": TWO, "in-2": WIDE}, {})


def seen(accepted: int, denied: int, more: list[tuple[str, str, int]] | None = None) -> list[tuple[str, str, int]]:
    return [("in-1", "x/a ingress 0", accepted), ("in-1", DENIED, denied), *(more or ())]


def test_what_comes_is_added_and_what_begins_anew_is_whole():
    counts = Counts()
    counts.take(seen(5, 2), COMPILED)
    counts.take(seen(7, 2), COMPILED)
    counts.take(seen(1, 1), COMPILED)  # the chain was made anew
    counts.take([], COMPILED)
    assert counts.decided == {Decided("x/a", INGRESS, "accepted"): 8, Decided("x/a,x/b", INGRESS, "denied"): 3}
    assert counts.denied == 3


def test_each_action_and_pods_that_are_not_known():
    counts = Counts()
    rules = [
        ("in-2", STRAY, 1), ("in-2", f"{TOP} ingress 0", 2), ("in-2", f"{TOP} ingress 1 denies", 4), ("in-2", f"{TOP} ingress 2 passes", 8),
        ("egress", BY_UNKNOWN, 16), ("in-gone", DENIED, 32),
    ]  # fmt: skip
    counts.take(rules, COMPILED)
    assert counts.decided == {
        Decided(TOP, INGRESS, "accepted"): 2, Decided(TOP, INGRESS, "denied"): 5, Decided(TOP, INGRESS, "passed"): 8,
    }  # fmt: skip
    assert (counts.denied, counts.unknown) == (5, 16)
    assert [each["packets"] for each in counts.shown()] == [2, 5, 8]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "no NetworkPolicy"),
        ({"revision": 0}, "NetworkPolicies are not read yet"),
        ({"policies": 1, "enforced": True}, "1 NetworkPolicy enforced: 3 addresses of pods here are isolated"),
        (
            {"policies": 3, "cluster_wide": 1, "groups": 2},
            "2 NetworkPolicies, 1 ClusterNetworkPolicy, 2 groups, not enforced",
        ),
        ({"policies": 1, "refused": {"x/bad": "why"}}, "1 NetworkPolicy, not enforced; 1 cannot be used"),
    ],
)
def test_the_words_of_the_status(found, words):
    base = {
        "enforced": False, "policies": 0, "cluster_wide": 0, "groups": 0, "refused": {}, "isolated_addresses": 3, "revision": 1,
    }  # fmt: skip
    assert policy_words({**base, **found}) == words
