"""Real etcds and API servers on loopback."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from lease.etcd.client import EtcdSettings
from lease.stores.etcd import EtcdStore
from tests.support.etcd import Etcd
from tests.support.feed import Follower
from tests.support.kube import Kube


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory) -> Iterator[Etcd]:
    """For tests that do not hurt it."""
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    yield etcd
    etcd.close()


@pytest.fixture
def etcd(tmp_path) -> Iterator[Etcd]:
    """For tests that do."""
    etcd = Etcd(tmp_path)
    yield etcd
    etcd.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Kube]:
    """An API server for tests that do not hurt it; each makes Nodes of its own."""
    kube = Kube(tmp_path_factory.mktemp("kube"))
    yield kube
    kube.close()


@pytest.fixture
def kube(tmp_path) -> Iterator[Kube]:
    """An API server for tests that do."""
    kube = Kube(tmp_path)
    yield kube
    kube.close()


@pytest.fixture
def clean(shared) -> Kube:
    """The shared one, without Nodes."""
    for node in shared.ask("GET", "/api/v1/nodes")["items"]:
        shared.delete(node["metadata"]["name"])
    return shared


@pytest.fixture
def prefix() -> str:
    return f"/overlay-test/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def open_store():
    """Opens stores, closes them."""
    opened: list[EtcdStore] = []

    def make(*endpoints: str, prefix: str = "/coreos.com/network", **more) -> EtcdStore:
        opened.append(EtcdStore(EtcdSettings(tuple(endpoints), **more), prefix))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def follow(open_store):
    followers = []

    def start(*endpoints: str, **more) -> Follower:
        followers.append(Follower(open_store(*endpoints, **more)))
        return followers[-1]

    yield start
    for follower in followers:
        follower.stop()
