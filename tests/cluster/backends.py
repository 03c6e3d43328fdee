"""A whole cluster that goes from one backend to another, by its ConfigMap, while all runs."""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

import yaml

from overlay.cni.lists import CONFLIST
from overlay.kernel.netlink import RequestSocket
from overlay.lab import netns
from overlay.lab.proof import NAMESPACE, Proof, manifest
from tests.support.wait import until


class OfCluster(NamedTuple):
    """What a backend's routes and pods have. program: the device is one of wireguard-go."""

    type: str
    device: str
    mtu: int
    program: bool = False


VXLAN, HOST_GW = OfCluster("vxlan", "flannel.1", 1450), OfCluster("host-gw", "eth0", 1500)
IPIP, WIREGUARD = OfCluster("ipip", "flannel.ipip", 1480), OfCluster("wireguard", "flannel-wg", 1420)
WIREGUARD_GO = WIREGUARD._replace(program=True)


def _with_program(text: str) -> str:
    """A manifest by which the agent finds wireguard-go, and may open /dev/net/tun."""
    documents = [each for each in yaml.safe_load_all(text) if each]
    (pods,) = (each["spec"]["template"]["spec"] for each in documents if each["kind"] == "DaemonSet")
    (agent,) = pods["containers"]
    agent["securityContext"] = {"privileged": True}
    for name, path in (("wireguard-go", "/usr/bin/wireguard-go"), ("run-wireguard", "/run/wireguard")):
        kind = "File" if name == "wireguard-go" else "DirectoryOrCreate"
        pods["volumes"].append({"name": name, "hostPath": {"path": path, "type": kind}})
        agent["volumeMounts"].append({"name": name, "mountPath": path})
    return yaml.safe_dump_all(documents)


def change(proof: Proof, backend: OfCluster) -> None:
    """All nodes follow, and pods that are made anew have the MTU of the backend and reach each other."""
    text = manifest("overlay.yaml").replace('"Type": "vxlan"', f'"Type": "{backend.type}"')
    proof.cluster.kubectl("apply", "-f", "-", input=_with_program(text) if backend.program else text)
    proof.cluster.kubectl(
        "-n", NAMESPACE, "rollout", "status", "daemonset/overlay", f"--timeout={120 * proof.cluster.patience:.0f}s"
    )

    def follows(name: str) -> bool:
        listed = proof.cluster.node_path(name, f"/etc/cni/net.d/{CONFLIST}").read_text()
        routes = proof.cluster.run(name, ["ip", "route", "show", "proto", "111"])
        return f"dev {backend.device}" in routes and f'"mtu": {backend.mtu}' in listed

    for name in proof.names:
        until(f"{name} follows", lambda name=name: follows(name), 180)
    proof.cluster.kubectl("-n", "kube-system", "delete", "deployment", "coredns", "--ignore-not-found", "--wait=true")
    gone = lambda: not proof.cluster.objects("pods", "-n", "kube-system", "-l", "k8s-app=kube-dns")  # noqa: E731
    proof.cluster.wait("no pod has the MTU of before", gone, 60)
    proof.cluster.kubectl("rollout", "restart", "daemonset/everywhere", "deployment/web")
    for what in ("daemonset/everywhere", "deployment/web"):
        proof.cluster.kubectl("rollout", "status", what, f"--timeout={90 * proof.cluster.patience:.0f}s")
    # the first packet that is too large for a bridge of before would be remembered for ten minutes
    for name in proof.names:
        proof.cluster.wait(
            f"{name}'s bridge has the new MTU",
            lambda name=name: f"mtu {backend.mtu} " in proof.cluster.run(name, ["ip", "-o", "link", "show", "cni0"]),  # type: ignore[misc]
            60,
        )
    proof.cluster.wait("every pair reaches each other", lambda: bool(proof.reach()), 60)
    for name in proof.names:
        assert proof.notes(name)["backend-type"] == backend.type
        link = proof.cluster.run(name, ["ip", "-d", "link", "show", backend.device])
        assert (" tun type tun" if backend.program else " wireguard") in link or backend.type != "wireguard", link
    for end in proof.ends():
        if end.kind == "pod":
            assert netns.inside(end.namespace, lambda: _mtus()["eth0"]) == backend.mtu


def _mtus() -> dict[str, int]:
    with closing(RequestSocket()) as requests:
        return {link.name: link.mtu for link in requests.links()}
