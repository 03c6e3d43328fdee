"""Whole agents that enforce policies from files, pods by CNI, and real packets between them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from overlay.cni.lists import CONFLIST
from overlay.lab import netns, pods
from tests.support.probing import End, Field, Probe
from tests.support.wait import until
from tests.support.world import Agent, World, ready_the_machine


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


class PolicyWorld(World):
    """Nodes with named pods, and one folder of objects for all nodes."""

    def begin(self, count: int, *flags: str) -> None:
        """Agents on nodes."""
        self.objects = self.folder / "policies"
        self.objects.mkdir()
        self.revisions: dict[str, int] = {}
        self.ends: dict[str, list[End]] = {}
        self.caches: dict[str, pods.Cache] = {}
        self.extra: dict[str, dict[str, Any]] = {}
        for number in range(1, count + 1):
            node = self.node(number)
            self.agent(
                node, f"--node-name={node}", f"--policy-dir={self.objects}",
                f"--cni-results-dir={self.folder}/{node}-results", *flags,
            )  # fmt: skip
        for agent in self.agents:
            agent.wait_ready()
        for agent in self.agents:
            until("it has its peers", lambda agent=agent: self.has_peers(agent, count - 1))

    def named_pod(self, agent: Agent, namespace: str, name: str) -> list[End]:
        """A pod with a name, attached as a runtime does."""
        where = self.namespace(f"{namespace}-{name}")
        netns.create(where)
        cache = pods.Cache(self.folder / f"{agent.node}-results", namespace, name)
        addresses = pods.attach(self.namespace(agent.node), agent.run_dir / "cni" / CONFLIST, where, cache)
        key = f"{namespace}/{name}"
        self.caches[key] = cache
        self.ends[key] = [End(key, where, address, agent.node) for address in addresses]
        return self.ends[key]

    def gone(self, agent: Agent, namespace: str, name: str) -> None:
        """A pod is deleted."""
        where = self.namespace(f"{namespace}-{name}")
        pods.detach(
            self.namespace(agent.node), agent.run_dir / "cni" / CONFLIST, where, self.caches.pop(f"{namespace}/{name}")
        )
        netns.delete(where)
        del self.ends[f"{namespace}/{name}"]

    def apply(self, objects: list[dict[str, Any]], wait: bool = True) -> None:
        """These are all objects; every agent has them in its kernel."""
        before = {agent.node: self.revision(agent) for agent in self.living()}
        temporary = self.objects / ".all"
        temporary.write_text(json.dumps({"kind": "List", "items": objects}))
        changed = (
            not (self.objects / "all.json").exists()
            or (self.objects / "all.json").read_bytes() != temporary.read_bytes()
        )
        temporary.rename(self.objects / "all.json")
        for agent in self.living():
            agent.process.send_signal(signal.SIGHUP)
        if changed and wait:
            for agent in self.living():
                until("it has them", lambda agent=agent: self.revision(agent) > before[agent.node], pause_s=0.02)

    def settled(self, field: Field) -> None:
        """Without a policy every pod reaches every other: the kernel has checked their IPv6 addresses."""
        ends = [end for those in self.ends.values() for end in those]
        pairs = [Probe(one, two, "UDP", 80) for one in ends for two in ends if one != two and one.family == two.family]
        until("pods' addresses are settled", lambda: all(field.ask(pairs)), 40)

    def living(self) -> list[Agent]:
        return [agent for agent in self.agents if agent.process.poll() is None]

    def revision(self, agent: Agent) -> int:
        return int(agent.status()["policy"]["revision"])

    def pod_objects(
        self, labels: dict[str, dict[str, str]], ports: dict[str, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The pods that are attached, as objects."""
        return [
            {
                "kind": "Pod", "metadata": {"namespace": key.split("/")[0], "name": key.split("/")[1], "labels": labels.get(key, {})},
                "spec": {"nodeName": ends[0].node, "containers": [{"name": "c", "ports": ports.get(key, [])}]},
                "status": {"podIPs": [{"ip": end.address} for end in ends]},
            }
            for key, ends in self.ends.items()
        ]  # fmt: skip


@pytest.fixture(params=[(4,), (6,), (4, 6)], ids=["IPv4", "IPv6 alone", "dual stack"])
def policed(request, tmp_path) -> Iterator[PolicyWorld]:
    """In each kind of network."""
    with closing(PolicyWorld(tmp_path / "world")) as made:
        made.use(*request.param)
        yield made


@pytest.fixture
def world(tmp_path) -> Iterator[PolicyWorld]:
    """Of both families."""
    with closing(PolicyWorld(tmp_path / "world")) as made:
        made.use(4, 6)
        yield made


@pytest.fixture
def field() -> Iterator[Field]:
    with closing(Field()) as made:
        yield made
