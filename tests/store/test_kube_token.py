"""A service account's token that ends under a running agent, and the one that the kubelet puts in its place, against a real
API server."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from kubernetes.config import incluster_config

from lease.config import parse_config
from lease.kube.client import KubeSettings
from lease.records.annotations import Names
from lease.store import Feed
from lease.stores.kubernetes import NodeStore
from lease.tenure.claim import Claim, Identity
from lease.tenure.events import Denied, Held
from lease.tenure.keeper import TenureThread
from lease.tenure.kubernetes import NodeTenure
from tests.store.test_kubernetes import Told, peer
from tests.support.kube import PREFIX, Kube
from tests.support.wait import until

NAMES = Names.of(PREFIX)
SPACE = "/api/v1/namespaces/kube-overlay"
CLAIM = Claim(
    parse_config('{"Network":"10.244.0.0/16"}'), 0xC0A80102, 0x0A0000000002, Identity("", "me", ""), None, False
)


class Mount:
    """The volume that a kubelet mounts into a pod: files are links into `..data`, which is swapped as a whole."""

    def __init__(self, kube: Kube, folder: Path) -> None:
        self._kube, self._folder, self._count = kube, folder, 0
        self.first = ""
        kube.ask("POST", "/api/v1/namespaces", {"metadata": {"name": "kube-overlay"}})
        kube.ask("POST", f"{SPACE}/serviceaccounts", {"metadata": {"name": "overlay"}})
        folder.mkdir()
        for name in ("token", "ca.crt"):
            (folder / name).symlink_to(f"..data/{name}")

    def issue(self) -> str:
        """A token that lives as long as its Secret does."""
        self._count += 1
        secret = f"bound{self._count}"
        self._kube.ask("POST", f"{SPACE}/secrets", {"metadata": {"name": secret}})
        spec = {"boundObjectRef": {"kind": "Secret", "apiVersion": "v1", "name": secret}, "expirationSeconds": 3600}
        return str(self._kube.ask("POST", f"{SPACE}/serviceaccounts/overlay/token", {"spec": spec})["status"]["token"])

    def put(self, token: str) -> None:
        """As a kubelet does (AtomicWriter)."""
        there = self._folder / f"..{self._count}"
        there.mkdir()
        (there / "token").write_text(token)
        (there / "ca.crt").write_bytes((self._kube.folder / "tls.crt").read_bytes())
        (self._folder / "..data_tmp").symlink_to(there.name)
        os.rename(self._folder / "..data_tmp", self._folder / "..data")

    def revoke(self, number: int, token: str) -> None:
        """A token is none any more, also for a server that remembers it (for ten seconds)."""
        self._kube.ask("DELETE", f"{SPACE}/secrets/bound{number}")
        asked = {"spec": {"token": token}}

        def valid() -> bool:
            found = self._kube.ask("POST", "/apis/authentication.k8s.io/v1/tokenreviews", asked)
            return bool(found["status"].get("authenticated"))

        until("the server refuses it", lambda: not valid(), 30, 1.0)


@pytest.fixture
def mount(kube, tmp_path, monkeypatch) -> Mount:
    folder = tmp_path / "serviceaccount"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", kube.host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kube.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(folder / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
    made = Mount(kube, folder)
    made.first = made.issue()
    made.put(made.first)
    kube.node("me", "10.244.2.0/24")
    return made


class Agent:
    """A feed and a tenure on one store, as the agent has them."""

    def __init__(self) -> None:
        self.store = NodeStore(KubeSettings(), NAMES, "me", "/nowhere")
        self.told, self.said = Told(), []
        self.feed = Feed(self.store, self.told.post, random.Random(1))
        self.tenure = TenureThread(NodeTenure(self.store, NAMES, "me", False, random.Random(1)), self.said.append)
        self.feed.start()
        self.tenure.start()
        self.tenure.claim(CLAIM)

    def close(self) -> None:
        for thread in (self.feed, self.tenure):
            thread.stop()
        self.store.close()
        for thread in (self.feed, self.tenure):
            thread.join(20)
            assert not thread.is_alive()

    @property
    def denied(self) -> list[str]:
        return [event.reason for event in self.said if isinstance(event, Denied)]

    def holds(self) -> bool:
        return any(isinstance(event, Held) for event in self.said)


def test_a_token_that_ends_beside_a_new_one_costs_nothing(kube, mount, closing):
    """The file has another already: an open watch goes on, and what is asked next is asked with that one."""
    agent = closing(Agent())
    until("it is listed, and held", lambda: agent.told.lists == 1 and agent.holds())
    mount.put(mount.issue())
    mount.revoke(1, mount.first)
    peer(kube, 5)
    until("the watch tells a Node", lambda: "n5" in agent.told.leases)
    kube.annotate("me", public_ip="192.168.1.99")
    agent.tenure.recheck()
    until("our own Node is put right", lambda: kube.notes("me")["public-ip"] == "192.168.1.2")
    assert agent.denied == []
    assert (agent.told.lists, agent.told.downs) == (1, 0)


def test_a_token_that_is_refused_is_told_and_the_next_is_taken_without_a_restart(kube, mount, closing, monkeypatch):
    """The watch stands, since the server does not look at its token again; what is new to it, and writes, wait."""
    monkeypatch.setattr(random, "randint", lambda _low, _high: 20)  # seconds until the server ends the watch
    agent = closing(Agent())
    until("it is listed, and held", lambda: agent.told.lists == 1 and agent.holds())
    mount.revoke(1, mount.first)
    kube.annotate("me", public_ip="192.168.1.99")
    agent.tenure.recheck()
    until("the tenure says so", lambda: any("401" in why for why in agent.denied))
    until("the watch ends, and the feed says so", lambda: "401" in agent.told.down, 60)
    told = agent.told.downs, len(agent.denied)
    peer(kube, 5)
    mount.put(mount.issue())
    until("it is listed again", lambda: not agent.told.down and "n5" in agent.told.leases)
    until("and our own Node put right", lambda: kube.notes("me")["public-ip"] == "192.168.1.2")
    assert max(told) < 20, "it tries without a pause"
    peer(kube, 6)
    until("and watched", lambda: "n6" in agent.told.leases)
