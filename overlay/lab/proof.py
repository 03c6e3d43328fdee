"""What a cluster must show: the manifest as a user applies it, pods and a Service on it, and what is done to it later.

Each step raises LabError with what failed, and returns what it saw, as text.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from overlay.cni.lists import CONFLIST
from overlay.lab import matrix, netns, topology
from overlay.lab.cluster import AGENT_IMAGE, CLUSTER_NETWORKS, SOURCES, Cluster
from overlay.lab.processes import LabError

RELEASED_IMAGE = "ghcr.io/overlay/overlayd:0.1.0"
NAMESPACE = "kube-overlay"
AGENTS = "app.kubernetes.io/component=agent"
PREFIX = "flannel.alpha.coreos.com/"
WEB_PORT = 8080
_WEB = (
    "import http.server, socket, sys\n"
    "class H(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        body = (socket.gethostname() + ' ' + self.client_address[0]).encode()\n"
    "        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()\n"
    "        self.wfile.write(body)\n"
    "    def log_message(self, *a): pass\n"
    "class S(http.server.ThreadingHTTPServer):\n"
    "    address_family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
    f"S((sys.argv[1], {WEB_PORT}), H).serve_forever()\n"
)


def workload(families: Collection[int]) -> str:
    """A Deployment `web` behind a Service, and a DaemonSet `everywhere`, as kubectl takes them."""
    dual = len(families) > 1

    def template(app: str) -> dict[str, object]:
        container = {
            "name": "web",
            "image": AGENT_IMAGE,
            "imagePullPolicy": "IfNotPresent",
            "command": ["python3", "-c", _WEB, "::" if dual else "0.0.0.0"],  # noqa: S104 (inside a pod)
            "readinessProbe": {"tcpSocket": {"port": WEB_PORT}, "periodSeconds": 1},
        }
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "enableServiceLinks": False}
        return {"metadata": {"labels": {"app": app}}, "spec": spec}

    def set_of(kind: str, app: str, **more: object) -> dict[str, object]:
        spec = {"selector": {"matchLabels": {"app": app}}, "template": template(app), **more}
        return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": app}, "spec": spec}

    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {
            "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": WEB_PORT}],
            "ipFamilyPolicy": "RequireDualStack" if dual else "SingleStack",
        },
    }
    items = [set_of("Deployment", "web", replicas=2), set_of("DaemonSet", "everywhere"), service]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


class Proof:
    """The steps, in the order in which they are made."""

    def __init__(self, cluster: Cluster, flags: Mapping[str, object] | None = None) -> None:
        """flags: of the agent, in its ConfigMap, beside those of the manifest."""
        self.cluster, self.flags = cluster, flags or {}
        self.names = [node["metadata"]["name"] for node in cluster.nodes()]

    def install(self) -> str:
        """Apply the manifest; every node becomes Ready."""
        began = time.monotonic()
        self.cluster.kubectl("apply", "-f", "-", input=self.manifest())
        self.cluster.wait_running(AGENTS, len(self.names), 180, NAMESPACE)
        self.cluster.wait_ready(60)
        for name in self.names:
            self.cluster.wait(f"{name}'s NetworkUnavailable", lambda name=name: self.condition(name) == "False", 20)  # type: ignore[misc]
        return f"{len(self.names)} nodes Ready {time.monotonic() - began:.0f} s after kubectl apply"

    def pods(self) -> list[matrix.End]:
        """Pods of a Deployment and of a DaemonSet, all Ready."""
        self.cluster.kubectl("apply", "-f", "-", input=workload(self.cluster.families))
        self.cluster.wait_running("app=web", 2, 120)
        self.cluster.wait_running("app=everywhere", len(self.names), 120)
        return self.ends()

    def ends(self) -> list[matrix.End]:
        """All pods and nodes that there are now, by each of their addresses."""
        found = []
        for name in self.names:
            for family, address in self.cluster.node_addresses(name).items():
                there = topology.node_netns(self.cluster.name, name)
                found.append(matrix.End(f"{name}{_end(family)}", "node", there, address, name))
        for pod in self.cluster.objects("pods", "-l", "app in (web, everywhere)"):
            if not pod["metadata"].get("deletionTimestamp") and pod["status"].get("podIP"):
                name, node = pod["metadata"]["name"], pod["spec"]["nodeName"]
                namespace = self._namespace(node, name)
                addresses = [each["ip"] for each in pod["status"]["podIPs"]]
                found += [
                    matrix.End(f"{name}{_end(6 if ':' in address else 4)}", "pod", namespace, address, node)
                    for address in addresses
                ]
        return found

    def reach(self) -> list[matrix.Cell]:
        """The whole matrix. Raises LabError where a pair does not reach each other. The IPv6 address of a bridge that was
        just made serves after a moment: the kernel checks it for others that have it (RFC 4862, 5.4)."""
        cells: list[matrix.Cell] = []

        def whole() -> bool:
            cells[:] = self._reach()
            return True

        if 6 in self.cluster.families:
            with contextlib.suppress(LabError):
                self.cluster.wait("pods reach each other", whole, 20)
        return cells or self._reach()

    def _reach(self) -> list[matrix.Cell]:
        ends = self.ends()
        addresses = {(end.node, end.family): end.address for end in ends if end.kind == "node"}

        def expected(source: matrix.End, target: matrix.End, own: str) -> str:
            # A node's underlay address lies outside the pod network: there masquerade does what it says.
            if source.kind == "pod" and target.kind == "node" and source.node != target.node:
                return addresses[source.node, source.family]
            return own

        with matrix.Wires(ends) as wires:
            cells = wires.all(expected)
        if wrong := [f"{cell.source} -> {cell.target}: {cell.why}" for cell in cells if not cell.ok]:
            raise LabError(f"{len(wrong)} of {len(cells)} pairs do not reach each other: {'; '.join(wrong[:5])}")
        return cells

    def service(self) -> str:
        """The Service answers from every pod by both its pods; through kube-proxy's rules."""
        addresses = self.cluster.objects("service", "web")[0]["spec"]["clusterIPs"]
        return "; ".join(self._service_at(address) for address in addresses)

    def _service_at(self, address: str) -> str:
        family = 6 if ":" in address else 4
        ends = [end for end in self.ends() if end.kind == "pod" and end.family == family]
        answered: dict[str, set[str]] = {end.name: set() for end in ends}

        def both() -> bool:
            for end in ends:
                for _ in range(12):
                    pod, _saw = netns.inside(end.namespace, lambda: _http(address, 80)).split()
                    answered[end.name].add(pod)
            return all(len(pods) > 1 for pods in answered.values())

        # kube-proxy hears of a pod a moment after it is Ready
        self.cluster.wait(f"the Service {address} answered by both its pods", both, 20)
        where = f"[{address}]" if family == 6 else address
        return f"{where}:80 answers {len(answered)} pods, by {len(set().union(*answered.values()))} pods"

    def rolling_restart(self) -> str:
        """A new version of the DaemonSet and back, under a connection."""
        before = self._agents()
        with self.connection() as connection:
            for step in (("restart", "daemonset/overlay"), ("undo", "daemonset/overlay")):
                self.cluster.kubectl("-n", NAMESPACE, "rollout", *step)
                self.cluster.kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/overlay", "--timeout=120s")
        if self._agents() & before:
            raise LabError("the agents were not replaced")
        return f"rolling update and rollback: {connection.verdict()}"

    def agent_killed(self) -> str:
        """An agent dies under a connection; its kubelet starts it again."""
        with self.connection() as connection:
            for name in self.names:
                os.kill(self._pid(name, 'labels."io.kubernetes.container.name"==overlayd'), signal.SIGKILL)
            self.cluster.wait("the agents were started again", lambda: min(self._restarts()) > 0, 60)
            self.cluster.wait_running(AGENTS, len(self.names), 90, NAMESPACE)
        return f"agents killed: {connection.verdict()}"

    def node_returns(self, name: str) -> str:
        """A machine is lost and its Node deleted; later it comes back under its name, with a podCIDR that may be another.

        Until then its pods are made elsewhere: those of a Node that returns at once would keep addresses that nobody
        routes to it any more (docs/kubernetes.md).
        """
        before = self.cluster.objects("node", name)[0]["spec"]["podCIDR"]
        self.cluster.stop_kubelet(name)
        self.cluster.kubectl("delete", "node", name)
        other = next(node for node in self.names if node != name)
        self.cluster.wait(f"{other} has no route to {name}", lambda: before not in self._routes(other), 60)
        self.cluster.wait(f"no pod is bound to {name}", lambda: not self._bound_to(name), 120)
        self.cluster.start_kubelet(name)
        self.cluster.wait("the node is Ready again", lambda: self.cluster.ready(name), 120)
        self.cluster.wait_running("app=everywhere", len(self.names), 180)
        self.cluster.wait_running("app=web", 2, 180)
        self.cluster.wait_running(AGENTS, len(self.names), 120, NAMESPACE)
        after = self.cluster.objects("node", name)[0]["spec"]["podCIDR"]
        self.cluster.wait(f"{other} has a route to it", lambda: after in self._routes(other), 60)
        self.reach()
        return f"{name} was {before}, came back as {after}; every pair reaches each other"

    def outage(self, seconds: float) -> str:
        """The API server is away; pods' connections and the agents stay."""
        with self.connection() as connection:
            self.cluster.stop_api_server()
            time.sleep(seconds)
            self.cluster.start_api_server()
        self.cluster.wait_running(AGENTS, len(self.names), 120, NAMESPACE)
        self.cluster.wait_ready(60)
        return f"API server away for {seconds:.0f} s: {connection.verdict()}"

    def uninstall(self) -> str:
        """As manifests/uninstall.yaml says; nothing is left."""
        kubectl = self.cluster.kubectl
        kubectl("-n", NAMESPACE, "delete", "daemonset", "overlay", "--cascade=foreground")
        kubectl("apply", "-f", "-", input=manifest("uninstall.yaml"))
        self.cluster.wait("no node has our annotations", lambda: not any(map(self.notes, self.names)), 120)
        left = {name: found for name in self.names if (found := self.left_on(name))}
        if left:
            raise LabError(f"left behind: {left}")
        kubectl("delete", "-f", "-", "--ignore-not-found", input=manifest("uninstall.yaml"))
        kubectl("delete", "-f", "-", "--ignore-not-found", input=self.manifest())
        return "no CNI list, device, route, nft table, file, annotation or condition is left"

    def manifest(self) -> str:
        """Ours, with the families of the cluster and the flags asked for."""
        text = manifest("overlay.yaml")
        if 6 in self.cluster.families:
            network = f'"Network": "{CLUSTER_NETWORKS[4]}",'
            text = _after(text, network, {"EnableIPv6": True, "IPv6Network": CLUSTER_NETWORKS[6]})
        return _after(text, '"log-level": "info",', self.flags) if self.flags else text

    # --- looking ---------------------------------------------------------------------------------------------------------

    def condition(self, name: str) -> str:
        """The status of a node's NetworkUnavailable, "" where it has none."""
        conditions = self.cluster.objects("node", name)[0]["status"].get("conditions", [])
        return next((str(one["status"]) for one in conditions if one["type"] == "NetworkUnavailable"), "")

    def notes(self, name: str) -> dict[str, str]:
        """A node's annotations of ours."""
        found = self.cluster.objects("node", name)[0]["metadata"].get("annotations") or {}
        return {key.removeprefix(PREFIX): text for key, text in found.items() if key.startswith(PREFIX)}

    def left_on(self, name: str) -> list[str]:
        """What of ours is on a node."""
        run, path = self.cluster.run, self.cluster.node_path
        found = [
            f"link {line.split()[1]}" for line in run(name, ["ip", "-o", "link"]).splitlines() if "flannel" in line
        ]
        for family in ("-4", "-6"):
            found += [line for line in run(name, ["ip", family, "route", "show", "proto", "111"]).splitlines() if line]
        found += [line for line in run(name, ["nft", "list", "tables"]).splitlines() if "overlay-" in line]
        found += [str(there) for folder in ("/run/overlay", "/run/flannel") for there in path(name, folder).glob("*")]
        list_ = path(name, f"/etc/cni/net.d/{CONFLIST}")
        found += [str(list_)] if list_.exists() else []
        return found + ([f"condition {self.condition(name)}"] if self.condition(name) else [])

    def _bound_to(self, name: str) -> list[str]:
        pods = self.cluster.objects("pods", "-A", f"--field-selector=spec.nodeName={name}")
        return [pod["metadata"]["name"] for pod in pods]

    def _routes(self, name: str) -> str:
        return self.cluster.run(name, ["ip", "route"])

    def _agents(self) -> set[str]:
        return {pod["metadata"]["name"] for pod in self.cluster.objects("pods", "-n", NAMESPACE, "-l", AGENTS)}

    def _namespace(self, node: str, pod: str) -> str:
        """The file of a pod's network namespace: that of its sandbox's process."""
        labels = f'labels."io.kubernetes.pod.name"=={pod},labels."io.cri-containerd.kind"==sandbox'
        return f"/proc/{self._pid(node, labels)}/ns/net"

    def _pid(self, node: str, labels: str) -> int:
        """The process of the container that runs on a node under these labels."""
        containers = self.cluster.run(node, ["ctr", "-n", "k8s.io", "containers", "ls", "-q", labels]).split()
        for line in self.cluster.run(node, ["ctr", "-n", "k8s.io", "tasks", "ls"]).splitlines():
            words = line.split()
            if words and words[0] in containers and "RUNNING" in words:
                return int(words[1])
        raise LabError(f"no container runs on {node} with {labels}")

    def _restarts(self) -> list[int]:
        pods = self.cluster.objects("pods", "-n", NAMESPACE, "-l", AGENTS)
        return [status["restartCount"] for pod in pods for status in pod["status"].get("containerStatuses", [])]

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A TCP connection between pods of two nodes while something is done. Raises LabError when it suffered."""
        pods = [end for end in self.ends() if end.kind == "pod" and end.family == self.cluster.families[-1]]
        target = next(end for end in pods if end.node != pods[0].node)
        connection = Connection(pods[0], target)
        try:
            yield connection
        finally:
            connection.stop()
        if connection.broken:
            raise LabError(f"the connection {pods[0].name} -> {target.name} broke: {connection.broken}")


class Connection:
    """A TCP connection between two pods, on which a number goes there and back a hundred times a second."""

    GAP_S, STALL_S = 0.01, 20.0

    def __init__(self, source: matrix.End, target: matrix.End) -> None:
        def listen() -> socket.socket:
            made = socket.create_server(
                (target.address, 0), family=socket.AF_INET6 if target.family == 6 else socket.AF_INET
            )
            made.settimeout(10)
            return made

        listening = netns.inside(target.namespace, listen)
        where = listening.getsockname()[:2]  # of IPv6 it has four parts
        with listening:
            self._near = netns.inside(source.namespace, lambda: socket.create_connection(where, 10))
            self._far, _ = listening.accept()
        for end in (self._near, self._far):
            end.settimeout(self.STALL_S)
        self._ending = threading.Event()
        self.broken = ""
        self.answers = 0
        self.longest_s = 0.0
        self._thread = threading.Thread(target=self._run, name="connection")
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(self.GAP_S):
            began = time.monotonic()
            try:
                for sender, receiver in ((self._near, self._far), (self._far, self._near)):
                    sender.sendall(self.answers.to_bytes(8, "big"))
                    if int.from_bytes(receiver.recv(8, socket.MSG_WAITALL), "big") != self.answers:
                        raise OSError("another number came than was sent")
            except OSError as error:
                self.broken = f"{error} after {self.answers} round trips"
                return
            self.answers += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def stop(self) -> None:
        """End it."""
        self._ending.set()
        self._thread.join()
        self._near.close()
        self._far.close()

    def verdict(self) -> str:
        """In words."""
        return f"{self.answers} round trips on one connection, none lost, the longest {self.longest_s * 1000:.0f} ms"


def _end(family: int) -> str:
    return "" if family == 4 else "/v6"


def manifest(name: str) -> str:
    """A manifest as a user applies it, with the image that was built here."""
    text = (SOURCES / "manifests" / name).read_text()
    if RELEASED_IMAGE not in text:
        raise LabError(f"manifests/{name} does not name {RELEASED_IMAGE}")
    return text.replace(RELEASED_IMAGE, AGENT_IMAGE)


def _after(text: str, entry: str, more: Mapping[str, object]) -> str:
    """The manifest with more entries behind one of the JSON objects in its ConfigMap."""
    if text.count(entry) != 1:
        raise LabError(f"manifests/overlay.yaml does not say {entry} once")
    return text.replace(
        entry, "\n      ".join([entry, *(f"{json.dumps(key)}: {json.dumps(it)}," for key, it in more.items())])
    )


def _http(address: str, port: int) -> str:
    with socket.create_connection((address, port), 5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        data = b""
        while chunk := connection.recv(4096):
            data += chunk
    return data.rpartition(b"\r\n")[2].decode()
