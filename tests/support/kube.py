"""A real API server for a test, with RBAC on: on loopback or inside a namespace; stopped, killed, frozen, restored."""

from __future__ import annotations

import contextlib
import json
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from overlay.lab import netns
from tests.support.etcd import Etcd
from tests.support.ports import free_port

PROGRAMS = Path(__file__).parents[2] / ".venv/kubernetes"
MANIFEST = Path(__file__).parents[2] / "manifests/overlay.yaml"
PREFIX = "flannel.alpha.coreos.com"
ACCOUNT = "system:serviceaccount:kube-overlay:overlay"


def program(name: str) -> str:
    path = PROGRAMS / name
    if not path.exists():
        pytest.fail(f"{path} is missing: .ci/kubernetes/build {name}", pytrace=False)
    return str(path)


class Kube:
    """One API server with its etcd. `admin` may do everything; `agent` what the manifest's ClusterRole lets it."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", namespace: str = "") -> None:
        self.folder, self.host, self.namespace = folder, host, namespace
        folder.mkdir(parents=True, exist_ok=True)
        self.port = 6443 if namespace else free_port()
        self.etcd = Etcd(folder / "etcd", host=host, port=2379 if namespace else 0, namespace=namespace)
        self.process: subprocess.Popen[bytes] | None = None
        self.tokens = folder / "tokens.csv"
        self.tokens.write_text(f'admin-token,admin,1,"system:masters"\nagent-token,{ACCOUNT},2\n')
        self._key("sa")
        self._certificate()
        self.start()
        self.authorize()

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    def kubeconfig(self, user: str = "agent", name: str = "", token: str = "", port: int = 0) -> str:
        """port: of a proxy beside it."""
        path = self.folder / (name or f"{user}.kubeconfig")
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "clusters": [
                        {
                            "name": "k",
                            "cluster": {
                                "server": f"https://{self.host}:{port or self.port}",
                                "certificate-authority": str(self.folder / "tls.crt"),
                            },
                        }
                    ],
                    "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                    "users": [{"name": "u", "user": {"token": token or f"{user}-token"}}],
                }
            )
        )
        return str(path)

    def start(self) -> None:
        """Raises AssertionError when it does not come up."""
        self.launch()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "apiserver.log").read_text()[-2000:]
            with contextlib.suppress(OSError, AssertionError):
                if self.ask("GET", "/readyz", raw=True) == "ok":
                    return
            time.sleep(0.1)
        raise AssertionError(f"the API server does not come up: {(self.folder / 'apiserver.log').read_text()[-2000:]}")

    def launch(self, certificate: str = "tls") -> None:
        """Without waiting. certificate: its files, less .crt and .key."""
        command = [
            program("kube-apiserver"), f"--etcd-servers={self.etcd.endpoint}", f"--secure-port={self.port}",
            f"--bind-address={self.host}", f"--advertise-address={self.host if self.namespace else '192.0.2.1'}",
            f"--tls-cert-file={self.folder}/{certificate}.crt", f"--tls-private-key-file={self.folder}/{certificate}.key",
            f"--token-auth-file={self.tokens}", "--authorization-mode=Node,RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder}/sa.key", f"--service-account-signing-key-file={self.folder}/sa.key",
            "--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none", "--enable-priority-and-fairness=false", f"--cert-dir={self.folder}/run",
        ]  # fmt: skip
        if self.namespace:
            command = ["nsenter", f"--net={netns.path(self.namespace)}", *command]
        with (self.folder / "apiserver.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def authorize(self) -> None:
        """The roles of our manifest, for the agent."""
        for each in yaml.safe_load_all(MANIFEST.read_text()):
            if each and each["apiVersion"] == "rbac.authorization.k8s.io/v1":
                namespace = each["metadata"].get("namespace", "")
                where = f"namespaces/{namespace}/" if namespace else ""
                with contextlib.suppress(AssertionError):  # one that is there is good
                    self.ask("POST", f"/apis/rbac.authorization.k8s.io/v1/{where}{each['kind'].lower()}s", each)

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json", raw: bool = False) -> Any:
        """As admin. Raises AssertionError with what the server said."""

        def run() -> Any:
            request = urllib.request.Request(
                f"{self.url}{path}",
                method=method,
                data=json.dumps(body).encode() if body is not None else None,
                headers={"Authorization": "Bearer admin-token", "Content-Type": kind},
            )
            context = ssl.create_default_context(cafile=str(self.folder / "tls.crt"))
            try:
                with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                    data = answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()[:500]}") from None
            return data.decode() if raw else json.loads(data)

        return netns.inside(self.namespace, run) if self.namespace else run()

    # --- Nodes
    def node(self, name: str, pod_cidr: str = "", pod_cidrs: tuple[str, ...] = (), **notes: str) -> dict[str, Any]:
        """Make one. notes: annotations by their short name, `_` for `-`."""
        spec: dict[str, Any] = {}
        if pod_cidr or pod_cidrs:
            cidrs = list(pod_cidrs) or [pod_cidr]
            spec = {"podCIDR": cidrs[0], "podCIDRs": cidrs}
        return dict(
            self.ask(
                "POST",
                "/api/v1/nodes",
                {"metadata": {"name": name, "annotations": annotations(notes)}, "spec": spec},
            )
        )

    def peer(self, name: str, pod_cidr: str, public_ip: str, mac: str, **notes: str) -> dict[str, Any]:
        """A Node as a running flannel leaves it."""
        data = json.dumps({"VNI": 1, "VtepMAC": mac}, separators=(",", ":"))
        flannel = {
            "kube_subnet_manager": "true",
            "backend_type": "vxlan",
            "backend_data": data,
            "public_ip": public_ip,
        }
        return self.node(name, pod_cidr, **{**flannel, **notes})

    def read(self, name: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"/api/v1/nodes/{name}"))

    def condition(self, name: str, kind: str) -> str:
        """The status of a Node's condition: True, False or Unknown, as a word; "" where the Node has none of that kind."""
        conditions = self.read(name).get("status", {}).get("conditions", [])
        return next((str(each["status"]) for each in conditions if each["type"] == kind), "")

    def notes(self, name: str) -> dict[str, str]:
        found = self.read(name)["metadata"].get("annotations") or {}
        return {key.removeprefix(f"{PREFIX}/"): value for key, value in found.items() if key.startswith(PREFIX)}

    def annotate(self, name: str, **notes: str | None) -> None:
        self.patch(name, {"metadata": {"annotations": annotations(notes)}})

    def patch(self, name: str, body: dict[str, Any], status: bool = False) -> None:
        path = f"/api/v1/nodes/{name}{'/status' if status else ''}"
        self.ask("PATCH", path, body, "application/strategic-merge-patch+json")

    def delete(self, name: str) -> None:
        self.ask("DELETE", f"/api/v1/nodes/{name}")

    def heartbeat(self, name: str) -> None:
        """What a kubelet does to its Node all the time."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {"type": "Ready", "status": "True", "reason": f"beat{time.time_ns()}", "lastHeartbeatTime": now}
        self.patch(name, {"status": {"conditions": [condition]}}, status=True)

    # --- its life
    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def stop(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        self.process.wait(90)

    def close(self) -> None:
        self.stop()
        self.etcd.close()

    def _key(self, name: str) -> None:
        path = self.folder / f"{name}.key"
        subprocess.run(["openssl", "genrsa", "-out", path, "2048"], check=True, capture_output=True)

    def _certificate(self) -> None:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=overlay-test",
             "-addext", f"subjectAltName=IP:{self.host}", "-keyout", self.folder / "tls.key", "-out", self.folder / "tls.crt"],
            check=True, capture_output=True,
        )  # fmt: skip


def annotations(notes: dict[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}/{name.replace('_', '-')}": value for name, value in notes.items()}
