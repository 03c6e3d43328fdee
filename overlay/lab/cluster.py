"""A real Kubernetes on this machine, made of processes: a control plane and nodes, each node with a kubelet of its own.

The wires are the lab's: the underlay's namespace holds etcd and the control plane, each node has a namespace of its own.
A node has its own mount namespace too, so that two kubelets and two containerds that all use the standard paths share
this machine: node N's /run, /etc/cni, /opt/cni, /var/lib/kubelet ... are folders in `<folder>/nodeN`. What is mounted
there and what pods mount is gone with the last process of the node; nothing of this machine is changed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from overlay.lab import netns, processes, topology
from overlay.lab.lab import ROOT
from overlay.lab.processes import LabError, Process

SOURCES = Path(__file__).parents[2]
PROGRAMS = SOURCES / ".venv/kubernetes"
"""Built from k8s.io/kubernetes by .ci/kubernetes/build."""
CACHE = SOURCES / ".venv/images"
"""What .ci/cluster-setup makes."""
PLUGINS = Path("/usr/lib/cni")
CGROUPS = Path("/sys/fs/cgroup")
SERVER = f"https://{topology.GATEWAY}:6443"
SERVICE_ADDRESS = "10.96.0.1"
CLUSTER_NETWORKS = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
SERVICE_NETWORKS = {4: "10.96.0.0/16", 6: "fd00:10:96::/112"}
IMAGES = ("pause.tar", "overlayd.tar")
AGENT_IMAGE = "localhost/overlayd:dev"
# The standard paths that a node has for itself; /run comes on top.
OWN = (
    "etc/cni", "opt/cni", "opt/containerd", "var/lib/cni", "var/lib/containerd", "var/lib/kubelet",
    "var/log/containers", "var/log/pods",
)  # fmt: skip
# The settings of the whole machine that a kubelet would change.
MACHINE_WIDE = (
    "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)  # fmt: skip
# $1: the cluster's folder, $2: the node's, $3: OWN, $4: MACHINE_WIDE. An overlay above /etc, /opt and /var gives the mount
# points that this machine may lack. The cluster's folder stays visible under its own name.
MOUNTS = """
for top in etc opt var; do
    mkdir -p "$2/.over/$top" "$2/.work/$top"
    mount -t overlay -o "lowerdir=/$top,upperdir=$2/.over/$top,workdir=$2/.work/$top" overlay "/$top"
done
for own in $3; do
    mkdir -p "$2/$own" "/$own"
    mount --bind "$2/$own" "/$own"
done
mkdir -p "$2/$1" "$2/run/netns" "$2/run/lock"
mount --bind "$1" "$2/$1"
mount --rbind "$2/run" /run
for file in $4; do # the kubelet writes these: let it
    mkdir -p "$2/sys/${file%/*}"
    cat "/proc/sys/$file" >"$2/sys/$file"
    mount --bind "$2/sys/$file" "/proc/sys/$file"
done
mount --make-rshared /
touch "$2/mounted"
exec sleep infinity
"""
CONTAINERD = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:dev"
  disable_apparmor = true
  restrict_oom_score_adj = true
"""
KUBELET: dict[str, Any] = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
    "authorization": {"mode": "AlwaysAllow"},
    "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
    "cgroupDriver": "cgroupfs",
    "cgroupsPerQOS": False,
    "enforceNodeAllocatable": [],
    "failCgroupV1": False,
    "failSwapOn": False,
    "localStorageCapacityIsolation": False,
    "makeIPTablesUtilChains": False,
    "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
    "imageGCHighThresholdPercent": 100,
    "nodeStatusUpdateFrequency": "2s",
    "nodeLeaseDurationSeconds": 20,
    "resolvConf": "",
    "shutdownGracePeriod": "0s",
    "volumePluginDir": "/var/lib/kubelet/volume-plugins",  # and not /usr/libexec
}
PROXY: dict[str, Any] = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "nftables",
    "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    "nftables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
}


class Cluster:
    """A cluster by its name; what there is of it, if anything."""

    def __init__(
        self,
        name: str = "cluster",
        folder: Path | None = None,
        families: tuple[int, ...] = (4,),
        patience: float = 1,
    ) -> None:
        """families: of pods and Services: (4,), or (4, 6). patience: every wait is so many times as long."""
        self.name, self.families, self.patience = name, families, patience
        self.folder = folder or ROOT / name
        self.started: dict[str, Process] = {}
        with contextlib.suppress(OSError, ValueError):
            noted = json.loads((self.folder / "cluster.json").read_text())
            self.started = {key: Process(*value) for key, value in noted.items()}

    # --- up and down -----------------------------------------------------------------------------------------------------

    def up(self, nodes: int = 2, images: bool = True, plugins: bool = True) -> None:
        """Bring it up: until every node is registered and has its podCIDR. images: bring them to the nodes. plugins: fill
        the nodes' /opt/cni/bin, as a distribution's kubernetes-cni does. Raises LabError; `down` removes what was made."""
        if self.folder.exists() or netns.existing(f"overlay-{self.name}-"):
            raise LabError(f"the cluster {self.name!r} is there already")
        missing = [str(path) for path in self._needed() if not path.exists()]
        if missing:
            raise LabError(f"missing: {', '.join(missing)}; run `make cluster`, or .ci/cluster-setup")
        self.folder.mkdir(parents=True)
        names = [f"node{number}" for number in range(1, nodes + 1)]
        topology.make_underlay(self.name, self.families)
        self._make_credentials(names)
        self._start("etcd", processes.etcd_command(self.folder, [topology.GATEWAY]))
        for number, node in enumerate(names, 1):
            self._make_node(number, node, plugins)
        self.start_api_server()
        self._start("kube-controller-manager", self._controller_manager())
        self._start("kube-scheduler", self._scheduler())
        for node in names:
            self.start_kubelet(node)
            self._start(f"{node}-kube-proxy", self._kube_proxy(node), node)
        if images:
            for node in names:
                for image in IMAGES:
                    self.import_image(node, CACHE / image)
        self.wait("the nodes' podCIDRs", lambda: len([n for n in self.nodes() if n["spec"].get("podCIDR")]) == nodes)

    def down(self) -> None:
        """Remove everything that has its name, also what a crashed `up` left. Nothing to do is no error."""
        keep = [process for key, process in self.started.items() if "kubelet" not in key]
        processes.end([process for key, process in self.started.items() if "kubelet" in key])
        until = time.monotonic() + 20
        # containers, shims and all: whatever runs in our namespaces and cgroups; the mounts go with the last process
        while found := self._running():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > until:
                raise LabError(f"processes that do not end: {sorted(found)}")
            processes.end(keep)
            time.sleep(0.05)
        for name in netns.existing(f"overlay-{self.name}-"):
            netns.delete(name)
        for cgroup in sorted(self._cgroups(), key=lambda path: len(path.parts), reverse=True):
            _until_done(cgroup.rmdir)
        for cgroup in CGROUPS.glob("*/k8s.io"):
            with contextlib.suppress(OSError):  # someone else's containers are in it
                cgroup.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)
        if ROOT.exists() and not any(ROOT.iterdir()):
            ROOT.rmdir()
        self.started = {}
        if self.folder.exists():
            raise LabError(f"{self.folder}: cannot be removed")

    # --- using it ----------------------------------------------------------------------------------------------------------

    def kubectl(self, *args: str, input: str | None = None, timeout: float = 120) -> str:  # noqa: A002
        """Its output. Raises LabError with what it said."""
        command = [str(PROGRAMS / "kubectl"), f"--kubeconfig={self.folder}/admin.kubeconfig"]
        command += [f"--cache-dir={self.folder}/cache", *args]
        return self.run("underlay", command, input, timeout)

    def objects(self, *args: str) -> list[dict[str, Any]]:
        """`kubectl get ARGS` as a list."""
        value = json.loads(self.kubectl("get", *args, "-o", "json"))
        return list(value["items"]) if "items" in value else [value]

    def nodes(self) -> list[dict[str, Any]]:
        """The Node objects."""
        return self.objects("nodes")

    def ready(self, node: str) -> bool:
        """Whether the node says that it is Ready."""
        conditions = self.objects("node", node)[0]["status"].get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def wait(self, what: str, done: Callable[[], bool], seconds: float = 90) -> None:
        """Wait until it is so; an error of kubectl counts as not yet. Raises LabError."""
        seconds *= self.patience
        until, why = time.monotonic() + seconds, ""
        while True:
            try:
                if done():
                    return
            except (LabError, OSError) as error:
                why = f": {error}"
            if time.monotonic() > until:
                raise LabError(f"{what}: not within {seconds:.0f} s{why}; logs: {self.folder}/*.log")
            time.sleep(0.2)

    def wait_ready(self, seconds: float = 90) -> None:
        """Until all nodes are Ready."""
        self.wait("nodes Ready", lambda: all(self.ready(node["metadata"]["name"]) for node in self.nodes()), seconds)

    def wait_running(self, selector: str, count: int, seconds: float = 90, namespace: str = "default") -> list[str]:
        """Until so many pods of a label selector are Ready; their names, by node."""

        def names() -> list[tuple[str, str]]:
            return sorted(
                (pod["spec"]["nodeName"], pod["metadata"]["name"])
                for pod in self.objects("pods", "-n", namespace, "-l", selector)
                if not pod["metadata"].get("deletionTimestamp")
                and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
            )

        self.wait(f"{count} pods {selector}", lambda: len(names()) == count, seconds)
        return [name for _, name in names()]

    def run(self, place: str, command: list[str], input: str | None = None, timeout: float = 120) -> str:  # noqa: A002
        """Run a program on a node (its network and its files), or beside the API server (place "underlay")."""
        entry = ["nsenter", f"--net={netns.path(topology.node_netns(self.name, place))}"]
        timeout *= self.patience
        if place != "underlay":
            entry += ["nsenter", f"--mount=/proc/{self._holder(place)}/ns/mnt"]
        try:
            done = subprocess.run(
                [*entry, *command], input=input, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(command[:4])}: no end within {timeout:.0f} s") from error
        if done.returncode:
            raise LabError(f"{' '.join(command[:6])}: {(done.stderr or done.stdout).strip()[:1000]}")
        return done.stdout

    def import_image(self, node: str, archive: Path) -> None:
        """Bring an image to a node."""
        self.run(node, ["ctr", "-n", "k8s.io", "images", "import", "--no-unpack", str(archive)], timeout=300)

    def node_path(self, node: str, path: str) -> Path:
        """Where a node's own file (/etc/cni/..., /run/..., /opt/cni/...) stands for this machine."""
        return self.folder / node / path.lstrip("/")

    # --- breaking it -------------------------------------------------------------------------------------------------------

    def start_api_server(self) -> None:
        """Start the API server and wait until it is ready."""
        self._start("kube-apiserver", self._api_server())
        self.wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz", timeout=5) == "ok", 60)

    def stop_api_server(self, kill: bool = False) -> None:
        """An outage: its port is refused at once, watches fall silent until it is gone (8 s). kill: gone at once."""
        if kill:
            os.kill(self.started["kube-apiserver"].pid, signal.SIGKILL)
        self._end("kube-apiserver")

    def start_kubelet(self, node: str) -> None:
        """Start a node's kubelet."""
        self._start(f"{node}-kubelet", self._kubelet(node), node)

    def stop_kubelet(self, node: str) -> None:
        """End a node's kubelet; its containers go on."""
        self._end(f"{node}-kubelet")

    def restart_kubelet(self, node: str) -> None:
        """Anew."""
        self.stop_kubelet(node)
        self.start_kubelet(node)

    # --- its parts ---------------------------------------------------------------------------------------------------------

    def _needed(self) -> list[Path]:
        kubernetes = ["apiserver", "controller-manager", "scheduler", "proxy"]
        found = [PROGRAMS / "kubelet", PROGRAMS / "kubectl", *(PROGRAMS / f"kube-{name}" for name in kubernetes)]
        return [*found, *(CACHE / image for image in IMAGES), Path("/usr/bin/containerd"), PLUGINS / "loopback"]

    def _start(self, key: str, command: list[str], node: str | None = None) -> None:
        """Start a program on a node, or beside the API server; noted before anything else can fail."""
        if node is not None:
            command = ["nsenter", f"--mount=/proc/{self._holder(node)}/ns/mnt", *command]
        namespace = topology.node_netns(self.name, node or "underlay")
        self.started[key] = processes.start(namespace, command, self.folder / f"{key}.log")
        (self.folder / "cluster.json").write_text(json.dumps(self.started, indent=1))

    def _end(self, key: str) -> None:
        processes.end([self.started.pop(key)])
        (self.folder / "cluster.json").write_text(json.dumps(self.started, indent=1))

    def _holder(self, node: str) -> int:
        """The process that holds a node's mount namespace. Raises LabError."""
        holder = self.started.get(f"{node}-mounts")
        if holder is None or not holder.alive():
            raise LabError(f"there is no {node}")
        return holder.pid

    def _make_node(self, number: int, node: str, plugins: bool) -> None:
        topology.make_node(self.name, node, number, self.families)
        own = self.folder / node
        binaries = own / "opt/cni/bin"
        binaries.mkdir(parents=True)
        (own / "etc/cni/net.d").mkdir(parents=True)
        if plugins:
            shutil.copytree(PLUGINS, binaries, dirs_exist_ok=True)
        (own / "containerd.toml").write_text(CONTAINERD)
        (own / "kubelet.json").write_text(json.dumps(KUBELET))
        proxy = {
            **PROXY,
            "clusterCIDR": self._of(CLUSTER_NETWORKS),
            "clientConnection": {"kubeconfig": f"{self.folder}/{node}-kube-proxy.kubeconfig"},
        }
        (own / "kube-proxy.json").write_text(json.dumps(proxy))
        arguments = [str(self.folder), str(own), " ".join(OWN), " ".join(MACHINE_WIDE)]
        hold = ["unshare", "--mount", "sh", "-euc", MOUNTS, "mounts", *arguments]
        key = f"{node}-mounts"
        namespace = topology.node_netns(self.name, node)
        self.started[key] = processes.start(namespace, hold, self.folder / f"{key}.log")
        self.wait(f"{node}'s mounts", (own / "mounted").exists, 10)
        self._start(f"{node}-containerd", ["containerd", "--config", f"{own}/containerd.toml"], node)
        self.wait(f"{node}'s containerd", lambda: bool(self.run(node, ["ctr", "version"], timeout=10)), 30)

    def _of(self, networks: Mapping[int, str]) -> str:
        """Those of our families, as Kubernetes' flags take them."""
        return ",".join(networks[family] for family in self.families)

    def node_addresses(self, node: str) -> dict[int, str]:
        """By family."""
        number = int(node.removeprefix("node"))
        every = {4: topology.node_address(number), 6: topology.node_address6(number)}
        return {family: every[family] for family in self.families}

    def _api_server(self) -> list[str]:
        return [
            str(PROGRAMS / "kube-apiserver"),
            f"--etcd-servers=http://{topology.GATEWAY}:2379",
            f"--advertise-address={topology.GATEWAY}",
            f"--bind-address={topology.GATEWAY}",
            f"--token-auth-file={self.folder}/tokens.csv",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--service-cluster-ip-range={self._of(SERVICE_NETWORKS)}",
            f"--service-account-issuer={SERVER}",
            f"--service-account-key-file={self.folder}/accounts.pub",
            f"--service-account-signing-key-file={self.folder}/accounts.key",
            f"--tls-cert-file={self.folder}/server.crt",
            f"--tls-private-key-file={self.folder}/server.key",
            "--kubelet-preferred-address-types=InternalIP",
        ]

    def _controller_manager(self) -> list[str]:
        return [
            str(PROGRAMS / "kube-controller-manager"),
            f"--kubeconfig={self.folder}/kube-controller-manager.kubeconfig",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self.folder}/accounts.key",
            f"--root-ca-file={self.folder}/ca.crt",
            "--allocate-node-cidrs=true",
            f"--cluster-cidr={self._of(CLUSTER_NETWORKS)}",
            f"--service-cluster-ip-range={self._of(SERVICE_NETWORKS)}",
            *(["--node-cidr-mask-size-ipv4=24"] if 6 in self.families else ["--node-cidr-mask-size=24"]),
            f"--flex-volume-plugin-dir={self.folder}/volume-plugins",  # and not /usr/libexec
            "--node-monitor-period=2s",
            "--node-monitor-grace-period=20s",
        ]

    def _scheduler(self) -> list[str]:
        return [
            str(PROGRAMS / "kube-scheduler"),
            f"--kubeconfig={self.folder}/kube-scheduler.kubeconfig",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ]

    def _kubelet(self, node: str) -> list[str]:
        return [
            str(PROGRAMS / "kubelet"),
            f"--kubeconfig={self.folder}/{node}.kubeconfig",
            f"--config={self.folder}/{node}/kubelet.json",
            f"--hostname-override={node}",
            f"--node-ip={','.join(self.node_addresses(node).values())}",
        ]

    def _kube_proxy(self, node: str) -> list[str]:
        return [
            str(PROGRAMS / "kube-proxy"),
            f"--config={self.folder}/{node}/kube-proxy.json",
            f"--hostname-override={node}",
        ]

    def _make_credentials(self, nodes: list[str]) -> None:
        """A CA and the server's certificate, the key pair of service accounts, a token and a kubeconfig for each user."""
        folder = self.folder

        def openssl(*args: str) -> None:
            done = subprocess.run(["openssl", *args], capture_output=True, text=True, check=False, cwd=folder)
            if done.returncode:
                raise LabError(f"openssl {args[0]}: {done.stderr.strip()[:300]}")

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "365")
        openssl("req", "-x509", *key, "-subj", "/CN=lab-ca", "-keyout", "ca.key", "-out", "ca.crt")
        names = [f"IP:{topology.GATEWAY}", f"IP:{SERVICE_ADDRESS}", "IP:127.0.0.1", "DNS:kubernetes.default.svc"]
        openssl(
            "req", "-x509", *key, "-CA", "ca.crt", "-CAkey", "ca.key", "-subj", "/CN=kube-apiserver",
            "-addext", f"subjectAltName={','.join(names)}", "-addext", "basicConstraints=critical,CA:FALSE",
            "-addext", "extendedKeyUsage=serverAuth", "-keyout", "server.key", "-out", "server.crt",
        )  # fmt: skip
        openssl("genrsa", "-out", "accounts.key", "2048")
        openssl("rsa", "-in", "accounts.key", "-pubout", "-out", "accounts.pub")
        users = {"admin": ("admin", "system:masters")}
        for name in ("kube-controller-manager", "kube-scheduler"):
            users[name] = (f"system:{name}", "")
        for node in nodes:
            users[node] = (f"system:node:{node}", "system:nodes")
            users[f"{node}-kube-proxy"] = ("system:kube-proxy", "")
        tokens = []
        authority = base64.b64encode((folder / "ca.crt").read_bytes()).decode()
        for name, (user, group) in users.items():
            token = secrets.token_hex(16)
            tokens.append(f'{token},{user},{name},"{group}"' if group else f"{token},{user},{name}")
            config = {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": {"server": SERVER, "certificate-authority-data": authority}}],
                "users": [{"name": "lab", "user": {"token": token}}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            }
            (folder / f"{name}.kubeconfig").write_text(json.dumps(config))
        (folder / "tokens.csv").write_text("\n".join(tokens) + "\n")

    # --- what there is, by our names alone ---------------------------------------------------------------------------------

    def _cgroups(self) -> list[Path]:
        """The containers' cgroups, in all hierarchies. containerd makes them by the containers' ids in /k8s.io, whatever
        the kubelet's cgroupRoot says (cgroupsPerQOS is off)."""
        tasks = self.folder.glob("*/run/containerd/io.containerd.runtime.v2.task/k8s.io/*")
        roots = [root for task in tasks for root in CGROUPS.glob(f"*/k8s.io/{task.name}")]
        return [Path(folder) for root in roots for folder, _, _ in os.walk(root)]

    def _running(self) -> set[int]:
        """The processes in our network namespaces and in our cgroups, this one and zombies excepted."""
        ours = set()
        for name in netns.existing(f"overlay-{self.name}-"):
            status = os.stat(netns.path(name))
            ours.add((status.st_dev, status.st_ino))
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    status = os.stat(entry / "ns/net")
                    if (status.st_dev, status.st_ino) in ours:
                        found.add(int(entry.name))
        for cgroup in self._cgroups():
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (cgroup / "cgroup.procs").read_text().split())
        return {pid for pid in found if pid != os.getpid() and Path(f"/proc/{pid}/ns/net").exists()}


def _until_done(act: Callable[[], None], seconds: float = 5) -> None:
    """Do what fails for a moment after processes ended. Raises OSError."""
    until = time.monotonic() + seconds
    while True:
        try:
            return act()
        except FileNotFoundError:
            return None
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
