"""Resources that not every API server has: when it is believed that there are none."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from lease.kube.client import ApiError
from lease.kube.objects import Answer
from lease.store import StoreUnavailable
from overlay.policy import kube
from overlay.policy.feeds import CLUSTER_WIDE, Absent

ALL = ["apps", "policy.networking.k8s.io"]


class Client:
    """An API server that starts, or has some groups."""

    place = "https://api"

    def __init__(self) -> None:
        self.ready, self.groups, self.asked = True, ALL, []

    def ask(self, path: str, *_: Any) -> Answer:
        self.asked.append(path)
        if path == "/readyz":
            if not self.ready:
                raise ApiError(500, "[-]poststarthook failed")
            return Answer(b"ok", False)
        if path == "/apis":
            versions = [{"version": "v1alpha2"}]
            return Answer(
                json.dumps({"groups": [{"name": name, "versions": versions} for name in self.groups]}).encode(), False
            )
        return Answer(json.dumps({"metadata": {"resourceVersion": "7"}, "items": []}).encode(), False)


@pytest.fixture
def there(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    client, told = Client(), []
    return client, kube.CustomObjects(client, CLUSTER_WIDE, told.append), told, now


def test_what_is_served_is_listed(there):
    client, objects, told, _ = there
    assert objects.read().items == {}
    assert client.asked[-1] == "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies"
    assert told == []


def test_a_server_that_starts_says_nothing_about_what_there_is(there):
    """It serves some of its groups before all of them are known: what was enforced of them stays."""
    client, objects, told, now = there
    client.ready, client.groups = False, ["apps"]
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            objects.read()
        now[0] += 20
    assert told == []
    client.ready = True  # and still not whole
    with pytest.raises(StoreUnavailable, match="CustomResourceDefinition"):
        objects.read()
    now[0] += 2
    client.groups = ALL
    assert objects.read().revision == 7
    assert told == []


def test_an_absence_that_lasts_is_believed(there):
    client, objects, told, now = there
    client.groups = ["apps"]
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="CustomResourceDefinition"):
            objects.read()
        now[0] += kube.LACKING_S / 2
    assert told == [Absent(CLUSTER_WIDE)]
