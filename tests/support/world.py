"""Whole agents in namespaces: an underlay bridge with etcd, nodes on it, overlayd in each, all removed again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pyroute2 import IPRoute

from lease.families import V4, Family
from lease.model import Prefix, ip_number, prefix
from overlay.api.family import of_family
from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.cni.lists import CONFLIST
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.link_wire import DeviceAttributes
from overlay.kernel.route.links import Links
from overlay.lab import matrix, netns, pods, topology
from tests.support.etcd import Etcd
from tests.support.kube import Kube
from tests.support.streams import Stream, Talk
from tests.support.wait import until

T = TypeVar("T")
NETWORK6 = prefix("fd00:10:244::/48")
KERNELS = (2,)
"""Routes of addresses (RTPROT_KERNEL)."""
ROOT = "/coreos.com/network"
RANGE = {"Network", "SubnetLen", "SubnetMin", "SubnetMax"}
DRAWN = {"SubnetMin": "10.244.16.0", "SubnetMax": "10.244.96.0"}
"""Nodes of a test draw subnets from these; the others are made-up peers'."""
DRAWN6 = {"IPv6SubnetMin": "fd00:10:244:8000::", "IPv6SubnetMax": "fd00:10:244:bfff::"}
NET_CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
CNI_CONF = """{"name":"cbr0","cniVersion":"0.3.1","plugins":[
{"type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}},
{"type":"portmap","capabilities":{"portMappings":true}}]}"""
"""As kube-flannel.yml has it."""
ROUTE_FORM = re.compile(r"10\.\d+\.\d+\.\d+/\d+")


def ready_the_machine() -> None:
    """Demand root, and remove what a crashed test run left: namespaces bear the pid of their run."""
    if os.geteuid() != 0:
        pytest.fail("these tests make network namespaces: run them as root", pytrace=False)
    for name in netns.existing("overlay-t"):
        found = re.match(r"overlay-t(\d+)x", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with suppress(OSError):  # another worker of this run does the same
                netns.delete(name)


def vxlan_record(public_ip: str, mac: str, **more: Any) -> dict[str, Any]:
    """A record's value as flannel writes it, with one thing or another beside it or in its place."""
    return {
        "PublicIP": public_ip,
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": mac},
    } | more


def made_up_peer(number: int, **more: Any) -> dict[str, Any]:
    return vxlan_record(f"192.168.1.{number}", f"0a:00:00:00:01:{number:02x}", **more)


class Agent:
    """One overlayd."""

    def __init__(
        self, world: World, node: str, flags: tuple[str, ...], run_dir: Path, environ: dict[str, str], program: str = ""
    ) -> None:
        self.world, self.node, self.run_dir = world, node, run_dir
        self.log_path = run_dir.parent / f"{run_dir.name}.log"
        run_dir.mkdir(parents=True, exist_ok=True)
        self.command = [
            "nsenter", f"--net={netns.path(world.namespace(node))}", sys.executable, *(["-c", program] if program else ["-m", "overlay"]),
            *world.store_flags(node), f"--run-dir={run_dir}", f"--subnet-file={run_dir}/subnet.env",
            f"--cni-conf-dir={run_dir}/cni", f"--cni-data-dir={run_dir}/ipam", "--log-format=json", *flags,
        ]  # fmt: skip
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=os.environ | environ)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        # a full disk takes half a line
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line["event"] == name]

    def status(self) -> dict[str, Any]:
        code, body = ask_unix(str(self.run_dir / SOCKET_NAME), "/status")
        assert code == 200, body
        return dict(json.loads(body))

    def network(self) -> str:
        return str(self.status()["network"]["subnets"]["ipv4"]["network"])

    def problems(self) -> dict[str, str]:
        return {problem["subject"]: problem["text"] for problem in self.status()["problems"]}

    def refused_records(self) -> dict[str, str]:
        return {record["key"]: record["reason"] for record in self.status()["refused_records"]}

    def ready(self) -> bool:
        return ask_unix(str(self.run_dir / SOCKET_NAME), "/readyz")[0] == 200

    def wait_ready(self, seconds: float = 25.0) -> Agent:
        try:
            until("the agent is ready", lambda: self.process.poll() is not None or self.ready(), seconds)
            assert self.process.poll() is None
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-3000:]}") from None
        return self

    def subnet(self) -> Prefix:
        return prefix(self.status()["lease"]["subnet"])

    def mac(self) -> str:
        return str(self.status()["lease"]["vtep_mac"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(15)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It does nothing meanwhile, and goes on then (SIGSTOP, SIGCONT)."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


class World:
    """The underlay, its etcd, nodes, agents and pods of one test."""

    def __init__(self, folder: Path) -> None:
        self.lab = f"t{os.getpid()}x{uuid.uuid4().hex[:4]}"
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.agents: list[Agent] = []
        self.families: tuple[int, ...] = (4,)
        self.node_families: tuple[int, ...] = ()
        """Of nodes' underlay addresses, where those are not the network's."""
        self._family_fields: dict[str, Any] = {}
        """What `use` said."""
        self.keeps_families = False
        """Every network config says that too."""
        self._marks = 0
        self.pod_names: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        topology.make_underlay(self.lab, (4, 6))
        self.make_store(folder)

    def make_store(self, folder: Path) -> None:
        self.etcd = Etcd(
            folder / "etcd",
            host=topology.GATEWAY,
            port=2379,
            namespace=topology.underlay_name(self.lab),
            also=topology.GATEWAY6,
        )

    def store_flags(self, node: str) -> list[str]:
        """How an agent reaches the store."""
        del node
        endpoint = self.etcd.endpoint if 4 in self.families else self.etcd.other_endpoints[0]
        return [f"--etcd-endpoints={endpoint}"]

    # --- nodes and agents
    def namespace(self, node: str) -> str:
        return topology.node_netns(self.lab, node)

    def config(self, **fields: Any) -> None:
        kept = self._family_fields if self.keeps_families else {}
        drawn = {} if fields.keys() & RANGE else DRAWN
        self.etcd.put(f"{ROOT}/config", json.dumps({**NET_CONF, **drawn, **kept, **fields}))

    def use(self, *families: int, **fields: Any) -> None:
        """Nodes that are made from now on have addresses of these families; the network has them, too."""
        self.families = families
        which: dict[str, Any] = {"EnableIPv4": 4 in families, "EnableIPv6": 6 in families, "IPv6Network": str(NETWORK6)}
        if "IPv6Network" not in fields:
            which |= DRAWN6
        self._family_fields = which
        self.config(**{**which, **fields})

    def node(self, number: int) -> str:
        """node1 is 192.168.1.2, fd00:192:168:1::2."""
        name = f"node{number}"
        topology.make_node(self.lab, name, number, self.node_families or self.families)
        self._numbers[name] = number
        return name

    def agent(
        self, node: str, *flags: str, run_dir: str = "", environ: dict[str, str] | None = None, program: str = ""
    ) -> Agent:
        """program: Python to run instead of `-m overlay`, for faults that come from inside."""
        self.agents.append(Agent(self, node, flags, self.folder / (run_dir or node), environ or {}, program))
        return self.agents[-1]

    def nodes(self, count: int, *flags: str) -> list[Agent]:
        agents = [self.agent(self.node(number), f"--node-name=node{number}", *flags) for number in range(1, count + 1)]
        for agent in agents:
            agent.wait_ready()
        for agent in agents:
            until("it has its peers", lambda agent=agent: self.has_peers(agent, count - 1))
        return agents

    def has_peers(self, agent: Agent, count: int) -> bool:
        """Of each family, and all are in the kernel."""
        views = [of_family(agent.status(), family) for family in self.families]
        return all(len(view["peers"]) == count and not view["differences"] for view in views)

    def restart(self, agent: Agent, *flags: str) -> Agent:
        if agent.process.poll() is None:
            agent.stop()
        return self.agent(agent.node, f"--node-name={agent.node}", *flags, run_dir=agent.run_dir.name)

    def settled(self, agent: Agent) -> None:
        """Wait until the agent's loop has taken in all that was told before now, and made a pass: a record that comes now is
        seen after that."""
        self._marks += 1
        key = f"mark-{self._marks}"
        self.put_record(key, "x")
        until("a record that came last is seen", lambda: key in agent.refused_records())
        self.etcd.delete(f"{ROOT}/subnets/{key}")

    # --- the kernel of a node
    def inside(self, node: str, act: Callable[[], T]) -> T:
        return netns.inside(self.namespace(node), act)

    def ipr(self, node: str, act: Callable[[IPRoute], T]) -> T:
        def run() -> T:
            with IPRoute() as ipr:
                return act(ipr)

        return self.inside(node, run)

    def index(self, node: str, name: str = "flannel.1") -> int:
        found = self.ipr(node, lambda ipr: ipr.link_lookup(ifname=name))
        return int(found[0]) if found else 0

    def device(self, node: str, name: str = "flannel.1") -> DeviceAttributes | None:
        """The vxlan device as rtnetlink shows it."""

        def read() -> DeviceAttributes | None:
            links = Links()
            try:
                return links.read(name)
            finally:
                links.close()

        return self.inside(node, read)

    def run(self, node: str, *command: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={netns.path(self.namespace(node))}", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def kernel(self, node: str, device: str = "flannel.1", family: Family = V4) -> dict[str, Any]:
        """What peers are to the kernel: routes by our device or protocol, neighbours, FDB."""
        device = device if family is V4 else device.replace("flannel.", "flannel-v6.")
        index = self.index(node, device)

        def read() -> dict[str, Any]:
            requests = RequestSocket()
            try:
                return {
                    "routes": {
                        r.key[:2]: r
                        for r in requests.routes(family)
                        if (r.oif == index or r.protocol == 111) and r.protocol not in KERNELS
                    },
                    "neighbours": {n.address: n.mac for n in requests.neighbours(family, index) if n.state & 0x80}
                    if index
                    else {},
                    "fdb": {f.mac: f.dst for f in requests.fdb(family, index) if not f.mac >> 40 & 1} if index else {},
                }
            finally:
                requests.close()

        return self.inside(node, read)

    def peers(self, node: str, device: str = "flannel.1", family: Family = V4) -> int:
        """How many peers are whole in the kernel: route, neighbour and FDB."""
        there = self.kernel(node, device, family)
        whole = 0
        for route in there["routes"].values():
            mac = there["neighbours"].get(route.via)
            whole += mac is not None and mac in there["fdb"]
        return whole

    def records(self) -> dict[str, dict[str, Any]]:
        return {
            key.rpartition("/")[2]: kv | json.loads(kv["value"])
            for key, kv in self.etcd.get(f"{ROOT}/subnets/").items()
        }

    def put_record(self, key: str, value: str | bytes | dict[str, Any], lease: int = 0) -> None:
        self.etcd.put(
            f"{ROOT}/subnets/{key}",
            json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else value,
            lease,
        )

    def put_peer(self, number: int, **more: Any) -> None:
        """The record of a peer that is none: 10.244.N.0/24 behind 192.168.1.N."""
        self.put_record(f"10.244.{number}.0-24", made_up_peer(number, **more))

    def drop_record(self, key: str) -> None:
        self.etcd.delete(f"{ROOT}/subnets/{key}")

    def pod(self, agent: Agent, name: str) -> matrix.End:
        return self.pod_ends(agent, name)[0]

    def pod_ends(self, agent: Agent, name: str) -> list[matrix.End]:
        """One for each of its addresses."""
        namespace = self.namespace(f"{agent.node}-{name}")
        netns.create(namespace)
        addresses = pods.attach(self.namespace(agent.node), agent.run_dir / "cni" / CONFLIST, namespace)
        return [
            matrix.End(f"{agent.node}-{name}{'/v6' * (':' in address)}", "pod", namespace, address, agent.node)
            for address in addresses
        ]

    @contextmanager
    def stream(self, source: matrix.End, target: matrix.End, gap_s: float = 0.005) -> Iterator[Stream]:
        stream = Stream(source, target, gap_s)
        try:
            yield stream
        finally:
            stream.stop()

    @contextmanager
    def stranger(self, address: str) -> Iterator[None]:
        """A namespace that comes before all others, with an address that is another's."""
        name = "aaa-overlay-test-stranger"
        netns.create(name)
        try:
            subprocess.run(["ip", "-n", name, "address", "add", f"{address}/32", "dev", "lo"], check=True)
            yield
        finally:
            netns.delete(name)

    def talk(self, source: matrix.End, address: str, port: int) -> Talk:
        """UDP from a pod, as much as it can."""
        return Talk(source, address, port)

    def close(self) -> None:
        for agent in self.agents:
            if agent.process.poll() is None:
                agent.process.kill()
            agent.process.wait()
        self.close_store()
        for name in netns.existing(f"overlay-{self.lab}-"):
            netns.delete(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def close_store(self) -> None:
        self.etcd.close()


class KubeWorld(World):
    """The same on Kubernetes: an API server on the underlay; `node(n)` makes the Node too, with podCIDR 10.244.n.0/24, and
    fd00:10:244:n::/64 where the network has IPv6."""

    def make_store(self, folder: Path) -> None:
        self.kube = Kube(folder / "kube", host=topology.GATEWAY, namespace=topology.underlay_name(self.lab))
        self.config_map = folder / "config"
        self.config_map.mkdir()
        self.config()
        (self.config_map / "cni-conf.json").write_text(CNI_CONF)

    def config(self, **fields: Any) -> None:
        self.config_file(
            "net-conf.json", {**NET_CONF, **(self._family_fields if self.keeps_families else {}), **fields}
        )

    def config_file(self, name: str, content: Any) -> None:
        temporary = self.config_map / f".{name}"
        temporary.write_text(content if isinstance(content, str) else json.dumps(content))
        temporary.rename(self.config_map / name)

    def node(self, number: int, pod_cidr: str | None = None) -> str:
        name = super().node(number)
        cidrs = {4: f"10.244.{number}.0/24", 6: f"fd00:10:244:{number:x}::/64"}
        wanted = tuple(cidrs[family] for family in self.families) if pod_cidr is None else tuple(pod_cidr.split(","))
        self.kube.node(name, pod_cidrs=tuple(each for each in wanted if each))
        # as the node controller does to each; on a Node without any annotation flanneld panics
        self.kube.patch(name, {"metadata": {"annotations": {"node.alpha.kubernetes.io/ttl": "0"}}})
        return name

    def store_flags(self, node: str) -> list[str]:
        where = self.config_map
        return [
            "--kube-subnet-mgr", f"--kubeconfig-file={self.kube.kubeconfig()}", f"--node-name={node}",
            f"--net-config-path={where}/net-conf.json", f"--cni-conf-template={where}/cni-conf.json",
            f"--live-settings={where}/overlayd.json",
        ]  # fmt: skip

    def settled(self, agent: Agent) -> None:
        """As of World."""
        self._marks += 1
        name = f"mark-{self._marks}"
        self.kube.peer(name, f"10.245.{self._marks}.0/24", "192.168.1.250", "0a:00:00:00:fa:fa")
        until("a Node that came last is seen", lambda: name in agent.refused_records())
        self.kube.delete(name)

    def next_second(self) -> None:
        """Wait until a Node that is made now is younger than all there are: a creationTimestamp has whole seconds."""
        end = int(time.time()) + 1
        until("the next second", lambda: time.time() >= end)

    def put_peer(self, number: int, **more: Any) -> None:
        """The Node of a peer that is none."""
        mac = made_up_peer(number)["BackendData"]["VtepMAC"]
        self.kube.peer(f"peer{number}", f"10.244.{number}.0/24", f"192.168.1.{number}", mac, **more)

    def close_store(self) -> None:
        self.kube.close()


number = partial(ip_number, family=4)
