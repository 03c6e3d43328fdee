"""What policies are read from: whether a new pod need wait."""

from __future__ import annotations

import pytest

from lease.kube.changes import Listed
from overlay.policy.cluster import Cluster
from overlay.policy.feeds import CLUSTER_WIDE, CONTRACTS, NAMESPACES, PODS, POLICIES, Absent, Down
from overlay.policy.sources import REFUSED_S, Sources
from tests.support.fakes import FakeFeeds


class Bench:
    """Sources of an agent with an API server."""

    def __init__(self) -> None:
        self.now, self.feeds, self.cluster = 100.0, FakeFeeds(), Cluster("node1", alone=False)
        self.sources = Sources(self.feeds, self.cluster, False, lambda: self.now)
        self.sources.begin({CLUSTER_WIDE: False, CONTRACTS: False})

    def lists(self, *names: str) -> None:
        for name in names:
            self.sources.came(name)
            self.cluster.take(Listed(name, 1, {}))

    def refused(self, name: str, seconds: float = 0.0) -> None:
        """For so long, with an answer every second."""
        end = self.now + seconds
        self.sources.down(Down(name, "forbidden", refused=True))
        while self.now < end:
            self.now += 1
            self.sources.down(Down(name, "forbidden", refused=True))


@pytest.fixture
def bench():
    return Bench()


def test_all_that_is_needed_is_read(bench):
    assert bench.feeds.running == {POLICIES, NAMESPACES}
    bench.lists(POLICIES)
    assert not bench.sources.settled(pods=False)
    bench.lists(NAMESPACES)
    assert bench.sources.settled(pods=False)
    assert not bench.sources.settled(pods=True)
    bench.sources.pods(True)
    bench.lists(PODS)
    assert bench.sources.settled(pods=True)
    bench.sources.pods(False)
    assert bench.feeds.running == {POLICIES, NAMESPACES}
    assert not bench.sources.settled(pods=True), "nobody watches them any more"


def test_a_server_away_is_waited_for(bench):
    bench.lists(NAMESPACES)
    for _ in range(100):
        bench.now += 10
        bench.sources.down(Down(POLICIES, "connection refused"))
    assert bench.sources.unread == {POLICIES: "connection refused"}
    assert not bench.sources.settled(pods=False)


def test_a_refusal_that_lasts_is_believed(bench):
    bench.lists(NAMESPACES)
    bench.refused(POLICIES, REFUSED_S - 1)
    assert not bench.sources.settled(pods=False), "a server that starts refuses, too"
    bench.sources.down(Down(POLICIES, "500"))
    bench.refused(POLICIES, REFUSED_S - 1)
    assert not bench.sources.settled(pods=False), "it began anew"
    bench.refused(POLICIES, 1)
    assert bench.sources.settled(pods=False)
    bench.lists(POLICIES)
    bench.refused(NAMESPACES)
    assert bench.sources.settled(pods=False), "what was read once is known"


def test_cluster_wide_policies_are_waited_for_where_they_are_wanted(bench):
    bench.lists(POLICIES, NAMESPACES)
    bench.sources.begin({CLUSTER_WIDE: True, CONTRACTS: False})
    assert not bench.sources.settled(pods=False)
    bench.sources.none(Absent(CLUSTER_WIDE))
    bench.cluster.take(Listed(CLUSTER_WIDE, 0, {}))
    assert bench.sources.settled(pods=False), "the API server has no such resource"
    bench.sources.begin({CLUSTER_WIDE: False, CONTRACTS: False})
    assert bench.sources.settled(pods=False)
    assert bench.feeds.running == {POLICIES, NAMESPACES}
