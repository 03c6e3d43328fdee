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
from overlay.lab.matrix import End
from tests.support.probing import Field, Probe
from tests.support.wait import until
from tests.support.world import Agent, KubeWorld, World, ready_the_machine


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


class NamedPods(World):
    """Nodes whose pods have names, as a runtime gives them."""

    def no_pods(self) -> None:
        """None yet."""
        self.ends: dict[str, list[End]] = {}

    def results(self, node: str) -> str:
        """The flag that says where a runtime keeps what it gave."""
        return f"--cni-results-dir={self.folder}/{node}-results"

    def all_ready(self) -> None:
        """Each has its peers."""
        for agent in self.agents:
            agent.wait_ready()
        for agent in self.agents:
            until("it has its peers", lambda agent=agent: self.has_peers(agent, len(self.agents) - 1))

    def named_pod(self, agent: Agent, namespace: str, name: str) -> list[End]:
        """A pod with a name, attached as a runtime does."""
        where = self.namespace(f"{namespace}-{name}")
        netns.create(where)
        cache = pods.Cache(self.folder / f"{agent.node}-results", namespace, name)
        addresses = pods.attach(self.namespace(agent.node), agent.run_dir / "cni" / CONFLIST, where, cache)
        key = f"{namespace}/{name}"
        self.ends[key] = [End(key, "pod", where, address, agent.node) for address in addresses]
        return self.ends[key]

    def pods_settled(self, field: Field) -> None:
        """Without a policy every pod reaches every other: the kernel has checked their IPv6 addresses."""
        ends = [end for those in self.ends.values() for end in those]
        pairs = [Probe(one, two, "UDP", 80) for one in ends for two in ends if one != two and one.family == two.family]
        until("pods' addresses are settled", lambda: all(field.ask(pairs)), 40)


class PolicyWorld(NamedPods):
    """One folder of objects for all nodes."""

    bridge_filtered = True
    """Whether rules see what nodes bridge (br_netfilter)."""

    def node(self, number: int) -> str:
        """As it is set."""
        name = super().node(number)
        for which in ("iptables", "ip6tables"):
            file = f"/proc/sys/net/bridge/bridge-nf-call-{which}"
            self.run(name, "sh", "-c", f"test ! -e {file} || echo {int(self.bridge_filtered)} > {file}")
        return name

    def begin(self, count: int, *flags: str) -> None:
        """Agents on nodes."""
        self.objects = self.folder / "policies"
        self.objects.mkdir()
        self.no_pods()
        for number in range(1, count + 1):
            node = self.node(number)
            self.agent(
                node, f"--node-name={node}", f"--policy-dir={self.objects}",
                self.results(node), *flags,
            )  # fmt: skip
        self.all_ready()

    def apply(self, objects: list[dict[str, Any]]) -> None:
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
        if changed:
            for agent in self.living():
                until("it has them", lambda agent=agent: self.revision(agent) > before[agent.node], pause_s=0.02)

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


@pytest.fixture(
    params=[((4,), True), ((6,), True), ((4, 6), True), ((4, 6), False)],
    ids=["IPv4", "IPv6 alone", "dual stack", "dual stack without br_netfilter"],
)
def policed(request, tmp_path) -> Iterator[PolicyWorld]:
    """In each kind of network."""
    with closing(PolicyWorld(tmp_path / "world")) as made:
        families, made.bridge_filtered = request.param
        made.use(*families)
        yield made


@pytest.fixture(params=[True, False], ids=["br_netfilter", "without br_netfilter"])
def world(request, tmp_path) -> Iterator[PolicyWorld]:
    """Of both families."""
    with closing(PolicyWorld(tmp_path / "world")) as made:
        made.use(4, 6)
        made.bridge_filtered = request.param
        yield made


class PolicyKube(KubeWorld, NamedPods):
    """The same with policies in the Kubernetes API, and pods as a kubelet shows them."""

    def begin(self, count: int, *flags: str) -> None:
        """Agents on nodes."""
        self.no_pods()
        for number in range(1, count + 1):
            node = self.node(number)
            self.agent(node, "--ip-masq", self.results(node), *flags)
        self.all_ready()

    def create(self, path: str, body: dict[str, Any]) -> None:
        self.kube.ask("POST", path, body)

    def namespaces(self, **labels: dict[str, str]) -> None:
        for name, given in labels.items():
            self.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": given}})

    def pod_of_api(self, agent: Agent, namespace: str, name: str, **labels: str) -> list[End]:
        """Made in the API first, then attached; its status comes last."""
        spec = {
            "nodeName": agent.node,
            "containers": [{"name": "c", "image": "none"}],
            "automountServiceAccountToken": False,
        }
        self.create(
            f"/api/v1/namespaces/{namespace}/pods", {"metadata": {"name": name, "labels": labels}, "spec": spec}
        )
        ends = self.named_pod(agent, namespace, name)
        self.pod_patch(
            namespace, name, {"status": {"phase": "Running", "podIPs": [{"ip": end.address} for end in ends]}}, True
        )
        return ends

    def pod_patch(self, namespace: str, name: str, body: dict[str, Any], status: bool = False) -> None:
        path = f"/api/v1/namespaces/{namespace}/pods/{name}{'/status' if status else ''}"
        self.kube.ask("PATCH", path, body, "application/strategic-merge-patch+json")

    def policy(self, body: dict[str, Any]) -> None:
        namespace = body["metadata"]["namespace"]
        self.create(f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies", body)

    def no_policy(self, namespace: str, name: str) -> None:
        self.kube.ask("DELETE", f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}")


@pytest.fixture
def kube(tmp_path) -> Iterator[PolicyKube]:
    """Of both families, on Kubernetes."""
    with closing(PolicyKube(tmp_path / "world")) as made:
        made.use(4, 6)
        yield made


@pytest.fixture
def field() -> Iterator[Field]:
    with closing(Field()) as made:
        yield made
