"""The lab as a whole: up, status, add a node, remove one, down; also after a crash of the command itself.

What there is stands in one state file, written before and after each thing is made, and in names with our prefix:
`down` finds everything by these.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lease.backend_config import VxlanConfig
from lease.config import NetworkConfig, parse_config
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.ask.client import NoAnswer, secret_in
from overlay.cni.lists import CONFLIST
from overlay.lab import forward, matrix, netns, pods, processes, topology
from overlay.lab.capture import Captured, capture
from overlay.lab.processes import LabError, Process
from overlay.page.token import token_of
from overlay.process.files import write_atomically
from overlay.process.rundir import MODE

ROOT = Path("/run/overlay-lab")
DEFAULT_NET_CONF = '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}'
NET_CONFS = {  # by what `overlay lab up --family` says
    "ipv4": DEFAULT_NET_CONF,
    "dual": '{"EnableIPv6": true, "Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48",'
    ' "Backend": {"Type": "vxlan"}}',
    "ipv6": '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": "vxlan"}}',
}
SETTLED_S = 15.0
"""So long the kernel may check new IPv6 addresses of pods and bridges for others that have them (RFC 4862, 5.4)."""
READY_S, PAGE_S, NAME = 60.0, 10.0, re.compile(r"[a-z0-9]{1,16}")
Progress = Callable[[str], None]


@dataclass(slots=True)
class Node:
    """One node of the lab. families: of its addresses; pods: name -> addresses (none until CNI gave some)."""

    name: str
    number: int
    families: tuple[int, ...] = (4,)
    agent: Process | None = None
    pods: dict[str, list[str]] = field(default_factory=dict)

    @property
    def addresses(self) -> list[str]:
        """On the underlay, of each family one."""
        of = {4: topology.node_address, 6: topology.node_address6}
        return [of[family](self.number) for family in self.families]


def existing_labs() -> list[str]:
    """The names of all labs of which anything is there."""
    by_folder = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} if ROOT.is_dir() else set()
    suffix = "-underlay"
    by_namespace = {
        name.removeprefix("overlay-").removesuffix(suffix)
        for name in netns.existing("overlay-")
        if name.endswith(suffix) and NAME.fullmatch(name.removeprefix("overlay-").removesuffix(suffix))
    }
    return sorted(by_folder | by_namespace)


class Lab:
    """A lab by its name; what there is of it, if anything."""

    def __init__(self, name: str = "lab") -> None:
        """Raises LabError."""
        self.name = _checked(name)
        self.folder = ROOT / name
        self.etcd: Process | None = None
        self.net_conf = DEFAULT_NET_CONF
        self.agent_flags: list[str] = []
        self.nodes: list[Node] = []
        self._load()

    # --- what there is -------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether anything of it is there."""
        return self.folder.exists() or bool(netns.existing(f"overlay-{self.name}-"))

    def whole(self) -> bool:
        """Whether nothing of it is broken."""
        return self.broken() == []

    def broken(self) -> list[str]:
        """What is not as it was made: processes that ended, pods without an address. Agents may have been started again
        by hand: one that answers will do."""
        found = [] if self.etcd is not None and self.etcd.alive() else ["etcd does not run"]
        if not self.nodes:
            found.append("there is no node")
        for node in self.nodes:
            if (node.agent is None or not node.agent.alive()) and not self._answers(node):
                found.append(f"{node.name}: its agent does not run")
            found += [f"{pod} was never attached" for pod, addresses in node.pods.items() if not addresses]
        return found

    def _answers(self, node: Node) -> bool:
        try:
            return ask_unix(str(self.run_dir(node) / SOCKET_NAME), "/healthz", 2.0)[0] == 200
        except OSError:
            return False

    @property
    def config(self) -> NetworkConfig:
        """The network config it was made with."""
        return parse_config(self.net_conf)

    @property
    def endpoint(self) -> str:
        """Its etcd, from inside the lab."""
        return f"http://{topology.GATEWAY if 4 in self.families else f'[{topology.GATEWAY6}]'}:2379"

    @property
    def families(self) -> tuple[int, ...]:
        """Of its network, and of its nodes' addresses."""
        return tuple(sorted(self.config.pools))

    def node(self, name: str) -> Node:
        """A node by name. Raises LabError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"there is no {name}; there is: {', '.join(node.name for node in self.nodes) or 'no node'}")

    def run_dir(self, node: Node) -> Path:
        """What the node's agent writes."""
        return self.folder / node.name

    def namespace(self, name: str) -> str:
        """The namespace of a node or pod by its name, checked. Raises LabError."""
        names = [node.name for node in self.nodes] + [pod for node in self.nodes for pod in node.pods]
        if name not in names:
            raise LabError(f"there is no {name}; there is: {', '.join(names) or 'nothing: overlay lab up makes it'}")
        return topology.node_netns(self.name, name)

    def ends(self) -> list[matrix.End]:
        """All pods and nodes."""
        found = []
        for node in self.nodes:
            namespace = topology.node_netns(self.name, node.name)
            found += [_end(node.name, "node", namespace, address, node.name) for address in node.addresses]
            found += [
                _end(pod, "pod", topology.node_netns(self.name, pod), address, node.name)
                for pod, addresses in node.pods.items()
                for address in addresses
            ]
        return found

    def agent_status(self, node: Node) -> dict[str, Any]:
        """The agent's own status. Raises LabError."""
        try:
            code, body = ask_unix(str(self.run_dir(node) / SOCKET_NAME), "/status")
        except OSError as error:
            raise LabError(f"{node.name}: its agent does not answer ({error}); log: {self.log(node.name)}") from error
        if code != 200:
            raise LabError(f"{node.name}: {body.strip()}")
        return dict(json.loads(body))

    def log(self, name: str) -> Path:
        """The log of an agent, or of etcd."""
        return self.folder / f"{name}.log"

    # --- making it -----------------------------------------------------------------------------------------------------

    def up(self, nodes: int, pods_each: int, net_conf: str, agent_flags: list[str], progress: Progress) -> None:
        """Bring it up. Raises LabError; what was made by then stays for `down`."""
        parse_config(net_conf)
        pods.plugin_path()
        self.net_conf, self.agent_flags = net_conf, agent_flags
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()
        progress("underlay: bridge 192.168.1.0/24")
        topology.make_underlay(self.name, self.families)
        progress("etcd")
        hosts = {4: topology.GATEWAY, 6: f"[{topology.GATEWAY6}]"}
        command = processes.etcd_command(self.folder, [hosts[family] for family in self.families])
        self.etcd = processes.start(topology.underlay_name(self.name), command, self.log("etcd"))
        self._save()
        self._put_config(net_conf)
        for number in range(1, nodes + 1):
            self._make_node(number, progress)
        self._wait_ready(self.nodes, progress)
        self._attach(self.nodes, pods_each, progress)
        self._start_page()

    def add_node(self, pods_each: int, progress: Progress) -> Node:
        """One more node, with pods. Raises LabError."""
        self._must_be_whole()
        number = max((node.number for node in self.nodes), default=0) + 1
        if number > topology.MAX_NODES:
            raise LabError(f"192.168.1.0/24 has room for {topology.MAX_NODES} nodes")
        node = self._make_node(number, progress)
        self._wait_ready([node], progress)
        self._attach([node], pods_each, progress)
        return node

    def remove_node(self, name: str, progress: Progress) -> None:
        """Take a node away: its pods, its agent, its lease, its namespace. Raises LabError."""
        node = self.node(name)
        progress(f"{name}: pods")
        for pod in list(node.pods):
            with contextlib.suppress(LabError, OSError):  # a broken node is removed all the same
                pods.detach(
                    topology.node_netns(self.name, name),
                    self.run_dir(node) / "cni" / CONFLIST,
                    topology.node_netns(self.name, pod),
                )
            netns.delete(topology.node_netns(self.name, pod))
        progress(f"{name}: agent")
        self._end_agent(node)
        progress(f"{name}: lease")
        self._release(node)
        netns.delete(topology.node_netns(self.name, name))
        self.nodes.remove(node)
        self._save()
        shutil.rmtree(self.run_dir(node), ignore_errors=True)

    def restart(self, name: str, progress: Progress) -> None:
        """End a node's agent, if it runs, and start it as `up` did; its pods stay as they are. Raises LabError."""
        node = self.node(name)
        progress(f"{name}: agent")
        self._end_agent(node)
        self._start_agent(node)
        self._wait_ready([node], progress)

    def down(self, progress: Progress) -> None:
        """Remove everything that has its name, noted or not."""
        progress("processes")
        noted = [node.agent for node in self.nodes if node.agent is not None]
        noted += [self.etcd] if self.etcd is not None else []
        processes.end(noted + processes.leftovers(self.folder))
        progress("namespaces")
        for name in netns.existing(f"overlay-{self.name}-"):
            netns.delete(name)
        shutil.rmtree(self.folder, ignore_errors=True)
        if ROOT.exists() and not any(ROOT.iterdir()):
            ROOT.rmdir()
        self.etcd, self.nodes = None, []

    def prove(self, answer_s: float = matrix.ANSWER_S) -> list[matrix.Cell]:
        """The whole matrix."""
        masq = "--ip-masq" in self.agent_flags
        addresses = {(node.name, ":" in address): address for node in self.nodes for address in node.addresses}

        def expected(source: matrix.End, target: matrix.End, own: str) -> str:
            # A node's underlay address lies outside the pod network: there --ip-masq does what it says.
            if masq and source.kind == "pod" and target.kind == "node" and source.node != target.node:
                return addresses[source.node, ":" in source.address]
            return own

        until = time.monotonic() + (SETTLED_S if 6 in self.families else 0.0)
        while True:
            with matrix.Wires(self.ends()) as wires:
                cells = wires.all(expected, answer_s)
            if all(cell.ok or ":" not in cell.own for cell in cells) or time.monotonic() > until:
                return cells
            time.sleep(0.5)

    def capture(self) -> Captured | None:
        """A packet between pods of two nodes; None where there are no two nodes with pods, or no VXLAN. Raises LabError."""
        with_pods, backend = [node for node in self.nodes if any(node.pods.values())], self.config.backend
        if (
            not isinstance(backend, VxlanConfig)
            or backend.direct_routing
            or len(with_pods) < 2
            or 4 not in self.families
        ):
            return None
        by_name = {end.name: end for end in self.ends()}
        source, target = (by_name[next(iter(node.pods))] for node in with_pods[:2])
        with matrix.Wires([source, target]) as wires:
            namespace = topology.node_netns(self.name, with_pods[0].name)
            return capture(namespace, "eth0", backend.port, lambda: wires.measure(source, target))

    def page_url(self) -> str:
        """Where its page is, "" where it has none (yet)."""
        try:
            port = (self.folder / forward.PORT_FILE).read_text()
            return f"http://127.0.0.1:{port}/?token={token_of(secret_in(str(self._secret)))}"
        except (OSError, NoAnswer):
            return ""

    # --- its parts -----------------------------------------------------------------------------------------------------

    def _make_node(self, number: int, progress: Progress) -> Node:
        node = Node(f"node{number}", number, self.families)
        progress(f"{node.name}: namespace, agent")
        self.nodes.append(node)
        self._save()
        topology.make_node(self.name, node.name, number, self.families)
        self._start_agent(node)
        return node

    def _start_agent(self, node: Node) -> None:
        run_dir = self.run_dir(node)
        run_dir.mkdir(exist_ok=True)
        if not self._secret.exists():
            self._secret.touch(0o600)
            self._secret.write_text(f"{secrets.token_hex(32)}\n")
        command = [
            *processes.agent_command(),
            f"--ask-secret-file={self._secret}",
            f"--page=127.0.0.1:{forward.PORT}",
            f"--etcd-endpoints={self.endpoint}",
            f"--run-dir={run_dir}",
            f"--subnet-file={run_dir}/subnet.env",
            f"--cni-conf-dir={run_dir}/cni",
            f"--cni-data-dir={run_dir}/ipam",
            f"--node-name={node.name}",
            *self.agent_flags,
        ]
        node.agent = processes.start(topology.node_netns(self.name, node.name), command, self.log(node.name))
        self._save()

    @property
    def _secret(self) -> Path:
        return self.folder / "ask-secret"

    def _start_page(self) -> None:
        """The agents' pages are in their namespaces; this leads there from ours."""
        command = [sys.executable, "-m", "overlay.lab.forward", self.name, str(self.folder)]
        processes.start(None, command, self.log("page"))
        until = time.monotonic() + PAGE_S
        while not self.page_url() and time.monotonic() < until:
            time.sleep(0.05)

    def _end_agent(self, node: Node) -> None:
        agents = [node.agent] if node.agent is not None else []
        processes.end(agents + processes.leftovers(self.run_dir(node)))

    def _wait_ready(self, nodes: list[Node], progress: Progress) -> None:
        until = time.monotonic() + READY_S
        for node in nodes:
            progress(f"{node.name}: waiting for its agent to be ready")
            while (why := self._not_ready(node)) is not None:
                if node.agent is None or not node.agent.alive() or time.monotonic() > until:
                    raise LabError(
                        f"{node.name}: {why}; its log, {self.log(node.name)}, ends: {self._log_end(node.name)}"
                    )
                time.sleep(0.05)

    def _not_ready(self, node: Node) -> str | None:
        try:
            code, body = ask_unix(str(self.run_dir(node) / SOCKET_NAME), "/readyz")
        except OSError as error:
            return f"its agent does not answer ({error.strerror})"
        listed = (self.run_dir(node) / "cni" / CONFLIST).exists()
        return (None if listed else "its CNI list is not there yet") if code == 200 else body.strip()

    def _log_end(self, name: str) -> str:
        try:
            lines = self.log(name).read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "(empty)"

    def _attach(self, nodes: list[Node], pods_each: int, progress: Progress) -> None:
        wanted = [(node, f"{node.name}-pod{i}") for node in nodes for i in range(1, pods_each + 1)]
        for node, pod in wanted:
            node.pods[pod] = []
        self._save()

        def one(item: tuple[Node, str]) -> None:
            node, pod = item
            netns.create(namespace := topology.node_netns(self.name, pod))
            conflist = self.run_dir(node) / "cni" / CONFLIST
            node.pods[pod] = pods.attach(topology.node_netns(self.name, node.name), conflist, namespace)

        progress(f"{len(wanted)} pods by CNI")
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(one, wanted))
        self._save()

    def _put_config(self, net_conf: str) -> None:
        def put() -> None:
            from lease.etcd.client import EtcdClient, EtcdSettings, rpc
            from lease.store import StoreUnavailable

            client = EtcdClient(EtcdSettings((self.endpoint,)))
            key = b"/coreos.com/network/config"
            operation = rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=net_conf.encode()))
            until = time.monotonic() + 20
            try:
                while True:
                    try:
                        client.txn([], [operation])
                        return
                    except StoreUnavailable as error:
                        if time.monotonic() > until or self.etcd is None or not self.etcd.alive():
                            raise LabError(f"etcd does not come up: {error}; log: {self.log('etcd')}") from error
                        time.sleep(0.05)
            finally:
                client.close()

        netns.inside(topology.underlay_name(self.name), put)

    def _release(self, node: Node) -> None:
        from overlay.settings.settings import read_settings
        from overlay.teardown.release import NothingKnown, ReleaseError, release

        flags = [f"--etcd-endpoints={self.endpoint}", f"--run-dir={self.run_dir(node)}"]
        settings, _ = read_settings(flags, {})
        try:
            netns.inside(topology.underlay_name(self.name), lambda: release(settings))
        except NothingKnown:
            return  # it never got one
        except (ReleaseError, OSError) as error:
            raise LabError(f"{node.name}: {error}") from error

    def _must_be_whole(self) -> None:
        if not self.exists:
            raise LabError(f"there is no lab {self.name!r}; `overlay lab up` makes it")
        if not self.whole():
            raise LabError(
                f"the lab {self.name!r} is broken ({'; '.join(self.broken())}): `overlay lab down`, then `overlay lab up`"
            )

    # --- its state file ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        value = {
            "net_conf": self.net_conf,
            "agent_flags": self.agent_flags,
            "etcd": self.etcd,
            "nodes": [
                {"name": node.name, "number": node.number, "agent": node.agent, "pods": node.pods}
                for node in self.nodes
            ],
        }
        write_atomically(str(self.folder / "lab.json"), json.dumps(value, indent=1))

    def _load(self) -> None:
        try:
            value = json.loads((self.folder / "lab.json").read_text())
        except (OSError, ValueError):
            return
        self.net_conf, self.agent_flags = value["net_conf"], value["agent_flags"]
        self.etcd = Process(*value["etcd"]) if value["etcd"] else None
        self.nodes = [
            Node(
                item["name"],
                item["number"],
                self.families,
                Process(*item["agent"]) if item["agent"] else None,
                {
                    pod: [addresses] if isinstance(addresses, str) else addresses
                    for pod, addresses in item["pods"].items()
                },
            )
            for item in value["nodes"]
        ]


def _end(name: str, kind: str, namespace: str, address: str, node: str) -> matrix.End:
    return matrix.End(f"{name}/v6" if ":" in address else name, kind, namespace, address, node)


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise LabError(f"--name {name!r}: must be 1 to 16 lower-case letters and digits")
    return name


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One command at a time for one lab. Raises LabError."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces: run it as root")
    path = f"/run/overlay-lab-{_checked(name)}.lock"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE), "w") as file:
        try:
            os.fchmod(file.fileno(), MODE)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LabError(f"another `overlay lab` command works on the lab {name!r}; wait for it") from error
        try:
            yield
        finally:
            if not (ROOT / name).exists():
                Path(path).unlink(missing_ok=True)
