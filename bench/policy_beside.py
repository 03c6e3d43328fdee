"""Policies enforced by us, and by kube-network-policies: `.venv/bin/python -m bench.policy_beside`.

One world: two nodes with our agents, a real API server, two pods by CNI, a policy by which one may reach the other. Three
ways in turn, rounds of them: nobody enforces (--network-policy=false), we do, kube-network-policies does, beside our agents
with --network-policy=false (bench/kube_network_policies/build). The best of the rounds, since others run here too.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from bench import policy, rig
from bench.policy_packets import ISOLATED, MANY
from bench.policy_probes import PATCH, Api, connections, datagram_ns, ended_after, label_changes
from overlay.lab import netns
from tests.policy.conftest import PolicyKube
from tests.support.wait import until

THEIRS = Path(os.environ.get("KUBE_NETWORK_POLICIES", Path(__file__).parents[1] / ".venv/kube-network-policies"))
TABLES: dict[str, set[str]] = {"none": set(), "ours": {"overlay-1-policy"}, "theirs": {"kube-network-policies"}}
WAYS = tuple(TABLES)
KNOWN = set().union(*TABLES.values())
QUEUE = 98
"""As their manifest has it."""
ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"
IN_CLUSTER = f"""mount -t tmpfs none /run && mkdir -p {ACCOUNT} && printf admin-token >{ACCOUNT}/token &&
cp "$1" {ACCOUNT}/ca.crt && shift && exec "$@" """
"""Their program knows the API server as a pod does, by these files: in a mount namespace of its own."""
LOCAL, FIRST_NODE = 100, 10
"""Made-up pods of node2; the number of the first node that is made up."""
IDLE_S = 30
NETPOL = "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"


class Beside:
    """The world, and who enforces policies in it now."""

    def __init__(self, folder: Path) -> None:
        self.world = PolicyKube(folder)
        self.theirs: list[subprocess.Popen[bytes]] = []
        self.world.use(4)
        self.world.begin(2)
        self.world.namespaces(x={})
        first, second = self.world.agents
        (self.client,) = self.world.pod_of_api(first, "x", "client", app="client")
        (self.server,) = self.world.pod_of_api(second, "x", "server", app="server")
        self.api = Api(self.world.kube)

    def use(self, way: str) -> int:
        """Everything anew; the pid of who enforces on the server's node, or of the agent where nobody does."""
        self.stop()
        ours = "true" if way == "ours" else "false"
        for name in ("node1", "node2"):
            self.world.agent(name, "--ip-masq", self.world.results(name), f"--network-policy={ours}")
        self.world.all_ready()
        if way == "theirs":
            self.theirs = [self._their_program(name) for name in ("node1", "node2")]
        wanted = TABLES[way]
        for name in ("node1", "node2"):
            until(f"{way} is in force on {name}", partial(self._enforces, name, wanted), 60)
        time.sleep(1)
        return self.theirs[1].pid if way == "theirs" else self.world.agents[1].process.pid

    def _their_program(self, name: str) -> subprocess.Popen[bytes]:
        kube = self.world.kube
        command = [
            "nsenter", f"--net={netns.path(self.world.namespace(name))}", "unshare", "--mount", "sh", "-c", IN_CLUSTER, "sh",
            str(kube.folder / "tls.crt"), str(THEIRS), f"--hostname-override={name}", f"--nfqueue-id={QUEUE}",
            "--metrics-bind-address=127.0.0.1:9080",
        ]  # fmt: skip
        where = {"KUBERNETES_SERVICE_HOST": kube.host, "KUBERNETES_SERVICE_PORT": str(kube.port)}
        with (self.world.folder / f"{name}-theirs.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | where)

    def _enforces(self, name: str, wanted: set[str]) -> bool:
        """A node has these tables of policies and no other; and somebody listens at the queue where it is theirs."""
        lines = self.world.run(name, "nft", "list", "tables").splitlines()
        queues = self.world.run(name, "cat", "/proc/net/netfilter/nfnetlink_queue").split()
        listens = str(QUEUE) in queues[:1]
        return {line.split()[-1] for line in lines} & KNOWN == wanted and listens == bool(self.theirs)

    def stop(self) -> None:
        """Nobody enforces, no agent runs."""
        for each in self.theirs:
            each.send_signal(signal.SIGINT)
        for each in self.theirs:
            each.wait(20)
        for name in ("node1", "node2") if self.theirs else ():  # what it writes while it ends stays sometimes
            self.world.run(name, "nft", "add table inet kube-network-policies; delete table inet kube-network-policies")
        self.theirs = []
        for agent in self.world.agents:
            agent.stop()
        self.world.agents.clear()

    def add(self, policies: list[dict[str, Any]]) -> None:
        for each in policies:
            self.api.ask("POST", NETPOL.format(each["metadata"]["namespace"]), each)

    def drop(self, names: list[str]) -> None:
        for name in names:
            self.api.ask("DELETE", f"{NETPOL.format('x')}/{name}")

    def close(self) -> None:
        for each in self.theirs:
            each.kill()
            each.wait(10)
        self.api.close()
        self.world.close()


def many_objects(pods: int, policies: int) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    """Path, object, its status' path, its status."""
    for each in policy.pods(pods, LOCAL):
        number = int(each["metadata"]["name"].removeprefix("pod"))
        node = int(each["spec"]["nodeName"].removeprefix("node"))
        place = 100 + number if node == 0 else number % 250 + 2
        each["spec"]["nodeName"] = f"node{FIRST_NODE + node}" if node else "node2"
        each["spec"]["automountServiceAccountToken"] = False
        each["spec"]["containers"][0] |= {"name": "c", "image": "none"}
        address = f"10.244.{FIRST_NODE + node if node else 2}.{place}"
        path = f"/api/v1/namespaces/{each['metadata']['namespace']}/pods"
        status = {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}}
        yield path, each, f"{path}/{each['metadata']['name']}/status", status
    for each in policy.policies(policies):
        yield NETPOL.format(each["metadata"]["namespace"]), each, "", {}


def fill(world: PolicyKube, pods: int, policies: int) -> None:
    """So many made-up pods and policies of a hundred namespaces, into the API."""
    with ExitStack() as stack:
        apis = [stack.enter_context(closing(Api(world.kube))) for _ in range(4)]
        for number in range(100):
            body = {"metadata": {"name": f"ns{number}", "labels": {"team": f"team{number % 50}"}}}
            apis[0].ask("POST", "/api/v1/namespaces", body)
        every = list(many_objects(pods, policies))

        def make(which: int) -> None:
            for path, body, status_path, status in every[which :: len(apis)]:
                apis[which].ask("POST", path, body)
                if status_path:
                    apis[which].ask("PATCH", status_path, status, PATCH)

        with ThreadPoolExecutor(len(apis)) as pool:
            list(pool.map(make, range(len(apis))))


def milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.0f} (at most {max(seconds) * 1000:.0f})"


class Results:
    """Rows by what is measured, a cell for each way."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}

    def put(self, what: str, way: str, shown: str) -> None:
        self.rows.setdefault(what, {})[way] = shown
        print(f"  {way}: {what}: {shown}", flush=True)

    def print(self) -> None:
        rig.table(("", *WAYS), [(what, *(cells.get(way, "") for way in WAYS)) for what, cells in self.rows.items()])


def packets(where: Beside, ways: tuple[str, ...], rounds: int, what: str, results: Results) -> None:
    """Datagrams and connections, of all ways in turn."""
    costs: dict[str, list[float]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            where.use(way)
            costs[way].append(datagram_ns(where.client, where.server))
            rates[way].append(connections(where.client, where.server))
    for way in ways:
        cost, rate = min(costs[way]), max(rates[way])
        results.put(f"ns a datagram, {what}", way, f"{cost:,.0f} ({cost / min(costs[ways[0]]):.2f})")
        results.put(f"connections a second, {what}", way, f"{rate:,.0f} ({rate / max(rates[ways[0]]):.2f})")


def changes(where: Beside, way: str, count: int, what: str, results: Results) -> None:
    """A label's."""
    allowed, denied = label_changes(where.api, where.client, where.server, count)
    results.put(f"label changed, ms, {what}", way, milliseconds(allowed + denied))
    results.put(f"  until allowed, {what}", way, milliseconds(allowed))
    results.put(f"  until denied, {what}", way, milliseconds(denied))


def open_connection(where: Beside, way: str, results: Results) -> None:
    """A new deny and a connection that is open."""
    where.drop(["from-client"])
    time.sleep(2)
    deny = {"metadata": {"namespace": "x", "name": "deny"},
            "spec": {"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"]}}  # fmt: skip
    api = Api(where.world.kube)  # another thread's
    took = ended_after(where.client, where.server, lambda: api.ask("POST", NETPOL.format("x"), deny))
    api.close()
    results.put("open connection, newly denied", way, "goes on" if took is None else f"ends, {took * 1000:.0f} ms")
    where.add(ISOLATED)
    where.drop(["deny"])
    time.sleep(1)


def at_scale(where: Beside, way: str, count: int, what: str, results: Results) -> None:
    """Memory and CPU of who enforces on the server's node."""
    pid = where.use(way)
    time.sleep(10)
    results.put(f"CPU s from the start on, {what}", way, f"{rig.cpu_s(pid):.2f}")
    if way != "none":
        changes(where, way, count, what, results)
        time.sleep(5)
    before = rig.cpu_s(pid)
    time.sleep(IDLE_S)
    used, memory = rig.cpu_s(pid) - before, rig.Memory.of(pid)
    results.put(f"RSS, anonymous, MiB, {what}", way, f"{memory.rss:.0f}, {memory.anon:.0f}")
    results.put(f"CPU at rest, %, {what}", way, f"{used / IDLE_S * 100:.2f}")


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--changes", type=int, default=20)
    arguments.add_argument("--pods", type=int, default=10_000)
    arguments.add_argument("--policies", type=int, default=1000)
    given = arguments.parse_args()
    if not THEIRS.exists():
        raise SystemExit("no kube-network-policies: bench/kube_network_policies/build makes it")
    rig.compile_sources()
    print(rig.machine(), flush=True)
    results = Results()
    with (
        tempfile.TemporaryDirectory(prefix="overlay-bench-") as folder,
        closing(Beside(Path(folder) / "world")) as where,
    ):
        where.add(ISOLATED)
        packets(where, WAYS, given.rounds, "one policy", results)
        for way in WAYS[1:]:
            where.use(way)
            changes(where, way, given.changes, "one policy", results)
            open_connection(where, way, results)
        more = MANY[len(ISOLATED) :]
        where.add(more)
        packets(where, WAYS, given.rounds, "1,000 policies", results)
        where.stop()
        where.drop([each["metadata"]["name"] for each in more])
        print("making pods and policies", flush=True)
        took = rig.timed(lambda: fill(where.world, given.pods, given.policies))
        print(f"made in {took:.0f} s", flush=True)
        for way in WAYS:
            at_scale(where, way, given.changes, f"{given.pods:,} pods, {given.policies:,} policies", results)
    results.print()


if __name__ == "__main__":
    main()
