"""Whether a new pod need wait, by what was read and what the kernel took: the controller of policies alone."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from lease.kube.changes import Listed
from overlay.control.inputs import CurrentInputs
from overlay.kernel.netlink import KernelError
from overlay.policy import controller as policies
from overlay.policy.controller import PolicyController
from overlay.policy.feeds import CLUSTER_WIDE, CONTRACTS, NAMESPACES, PODS, POLICIES, Down
from overlay.policy.resources import policy_of
from overlay.policy.sources import REFUSED_S
from tests.support.bench import Bench
from tests.support.fakes import FakeFeeds

DENY = policy_of(
    {"metadata": {"name": "deny", "namespace": "x"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}
)


class Tables:
    """nftables with one table at most."""

    def __init__(self) -> None:
        self.there: Any = None
        self.refuses = False

    def _asked(self) -> None:
        if self.refuses:
            raise KernelError(errno.EOPNOTSUPP, "nftables")

    def stands(self, _table: Any) -> bool:
        return self.there is not None

    def rules_counted(self, _table: Any, beside: bool = False) -> list[Any]:
        del beside
        self._asked()
        return []

    def remove(self, _family: str, _name: str) -> bool:
        self._asked()
        gone, self.there = self.there is not None, None
        return gone

    def read_content(self, _table: Any, _wanted: Any) -> Any:
        self._asked()
        return self.there

    def change_content(self, _table: Any, _there: Any, wanted: Any) -> bool:
        self._asked()
        self.there = wanted
        return True

    def drop_beside(self, _table: Any) -> None:
        self._asked()


class World:
    """A node with an API server."""

    def __init__(self, folder: Any, **settings: Any) -> None:
        self.bench, self.tables, self.feeds = Bench(folder), Tables(), FakeFeeds()
        self.current: CurrentInputs = self.bench.current
        self.current.set(settings=self.bench.settings._replace(kube=True, node_name="node1", **settings))
        sets: Any = self.tables
        self.controller = PolicyController(
            self.current, sets, self.bench.owned, self.bench.health, self.bench.clock, self.feeds, list, {}
        )

    def tell(self, *events: Any) -> bool:
        """These, and a pass; whether a new pod need not wait then."""
        for event in events:
            self.bench.tell(self.controller, event)
        try:
            self.bench.reconcile(self.controller)
        except KernelError:
            assert self.tables.refuses
        return self.current.inputs.policies_settled

    def refused(self, *names: str) -> bool:
        """As an API server says it again and again."""
        for _ in range(3):
            self.tell(*(Down(name, "forbidden", refused=True) for name in names if name in self.feeds.running))
            self.bench.clock.now += REFUSED_S
        return self.tell()


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "clear_marks", lambda _mask: 0)
    return lambda **settings: World(tmp_path, **settings)


def listed(name: str, **items: Any) -> Listed:
    return Listed(name, 1, items)


def test_it_waits_for_the_lists_and_for_the_kernel(node):
    there = node()
    assert not there.tell(listed(POLICIES, deny=DENY))
    assert not there.tell(listed(NAMESPACES))
    assert there.tables.there is None
    assert there.tell(listed(PODS))
    assert there.tables.there is not None


def test_without_a_policy_it_waits_for_the_lists_alone(node):
    there = node()
    assert not there.tell(listed(POLICIES))
    assert there.tell(listed(NAMESPACES))
    assert PODS not in there.feeds.running


def test_a_kernel_without_nftables_makes_pods_where_there_is_no_policy(node):
    there = node()
    there.tables.refuses = True
    assert there.tell(listed(POLICIES), listed(NAMESPACES))


def test_a_kernel_that_refuses_the_table_makes_none_where_there_is_one(node):
    there = node()
    there.tables.refuses = True
    assert not there.tell(listed(POLICIES, deny=DENY), listed(NAMESPACES), listed(PODS))
    there.tables.refuses = False
    assert there.tell()
    there.tables.refuses = True
    assert not there.tell(Listed(NAMESPACES, 2, {"y": {}})), "what changed is not in the kernel"


@pytest.mark.parametrize(
    ("settings", "before", "names"),
    [
        ({}, [], (POLICIES, NAMESPACES)),
        ({"groups": "namespace"}, [], (POLICIES, NAMESPACES, CONTRACTS)),
        ({"groups": "namespace"}, [listed(POLICIES), listed(NAMESPACES), listed(CONTRACTS)], (PODS,)),
        ({}, [listed(POLICIES, deny=DENY)], (NAMESPACES,)),
        ({}, [listed(POLICIES, deny=DENY), listed(NAMESPACES)], (PODS,)),
        ({"cluster_network_policy": True}, [listed(POLICIES), listed(NAMESPACES)], (CLUSTER_WIDE,)),
    ],
    ids=["all", "all, groups", "pods, groups", "namespaces", "pods", "cluster-wide ones"],
)
@pytest.mark.parametrize("refuses", [False, True], ids=["", "no nftables"])
def test_what_this_agent_may_not_read_for_good_keeps_no_pod(node, settings, before, names, refuses):
    """A ClusterRole of before: it is told, and pods are made as by that agent of before."""
    there = node(**settings)
    there.tables.refuses = refuses
    assert not there.tell(*before)
    assert there.refused(*names)
    assert "forbidden" in there.bench.problems()["policies unread"]


def test_what_is_switched_off_is_not_settled_when_it_is_switched_on(node):
    there = node(network_policy=False)
    assert not there.tell(listed(POLICIES, deny=DENY), listed(NAMESPACES))
    there.tables.refuses = True
    there.current.set(settings=there.current.inputs.settings._replace(network_policy=True))
    assert not there.tell(listed(PODS))
    there.tables.refuses = False
    assert there.tell()
