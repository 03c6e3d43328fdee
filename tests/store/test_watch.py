"""Any resource of the Kubernetes API, listed and watched, against a real API server."""

from __future__ import annotations

import queue
import random
from collections.abc import Mapping
from typing import Any

import pytest

from lease.kube import watch
from lease.kube.changes import Changed, Listed, Resource, Unusable
from lease.kube.client import KubeClient, KubeSettings
from lease.kube.watch import Objects
from lease.store import Feed, StoreDown
from tests.support.wait import until

NAMESPACES = "/api/v1/namespaces"
POLICIES = "/apis/networking.k8s.io/v1/networkpolicies"


def label(item: Mapping[str, Any]) -> str:
    """What the tests keep of an object."""
    found = item["metadata"].get("labels", {}).get("tier", "none")
    if found == "bad":
        raise ValueError("tier: bad is no tier")
    return str(found)


class Told:
    """What a feed posted, made into the picture that somebody would have of it."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}
        self.lists = self.downs = 0
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def post(self, event: Any) -> None:
        if isinstance(event, Listed):
            self.items, self.lists = dict(event.items), self.lists + 1
        elif isinstance(event, Changed):
            for key, item in event.items.items():
                if item is None:
                    self.items.pop(key, None)
                else:
                    self.items[key] = item
        else:
            assert isinstance(event, StoreDown)
            self.downs += 1
        self.events.put(event)


@pytest.fixture
def follow():
    """Feeds that follow a resource as admin; all are ended."""
    running: list[tuple[Feed, KubeClient]] = []

    def begin(kube, path: str) -> Told:
        told, client = Told(), KubeClient(KubeSettings(kubeconfig=kube.kubeconfig("admin")))
        objects = Objects(client, Resource(path.rpartition("/")[2], path, label))
        feed = Feed(objects, told.post, random.Random(1))
        running.append((feed, client))
        feed.start()
        return told

    yield begin
    for feed, client in running:
        feed.stop()
        client.close()
        feed.join(20)
        assert not feed.is_alive()


def namespace(kube, name: str, tier: str) -> None:
    kube.ask("POST", NAMESPACES, {"metadata": {"name": name, "labels": {"tier": tier}}})


def policy(kube, where: str, name: str, tier: str) -> None:
    body = {"metadata": {"name": name, "labels": {"tier": tier}}, "spec": {"podSelector": {}}}
    kube.ask("POST", f"/apis/networking.k8s.io/v1/namespaces/{where}/networkpolicies", body)


def test_objects_are_listed_in_pages_and_their_changes_told(shared, follow, monkeypatch):
    monkeypatch.setattr(watch, "PAGE", 2)
    for number in range(5):
        policy(shared, "default", f"p{number}", f"t{number}")
    told = follow(shared, POLICIES)
    until("the list is in", lambda: told.items == {f"default/p{number}": f"t{number}" for number in range(5)})
    policy(shared, "default", "late", "t9")
    until("one that came", lambda: told.items.get("default/late") == "t9")
    one = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/late"
    shared.ask("PATCH", one, {"metadata": {"labels": {"tier": "t8"}}}, "application/merge-patch+json")
    until("one that changed", lambda: told.items.get("default/late") == "t8")
    shared.ask("DELETE", one)
    until("one that went", lambda: "default/late" not in told.items)
    assert told.lists == 1


def test_an_object_nobody_can_use_costs_itself_alone(shared, follow):
    namespace(shared, "good", "t1")
    namespace(shared, "bad", "bad")
    told = follow(shared, NAMESPACES)
    until("the list is in", lambda: told.items.get("good") == "t1")
    assert told.items["bad"] == Unusable("tier: bad is no tier")
    namespace(shared, "bad2", "bad")
    until("nor one that came", lambda: told.items.get("bad2") == Unusable("tier: bad is no tier"))
    assert told.downs == 0


@pytest.mark.parametrize("end", ["killed", "frozen"])
def test_a_server_that_goes_is_noticed_and_what_it_did_meanwhile_is_listed(kube, follow, end, monkeypatch):
    monkeypatch.setattr(watch, "SILENT_S", 1.0)
    monkeypatch.setattr(watch, "PROBE_S", 1.0)
    namespace(kube, "one", "t1")
    told = follow(kube, NAMESPACES)
    until("the list is in", lambda: told.items.get("one") == "t1")
    if end == "killed":
        kube.stop()
    else:
        kube.freeze()
    until("it is noticed", lambda: told.downs > 0, 30)
    assert told.items.get("one") == "t1", "what was known is kept"
    if end == "killed":
        kube.start()
    else:
        kube.thaw()
    namespace(kube, "two", "t2")
    until("it is listed again", lambda: told.items.get("two") == "t2", 60)
    assert told.lists > 1
