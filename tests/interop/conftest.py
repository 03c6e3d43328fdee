"""The real flanneld beside ours (built by bench/flanneld/build; run by `make interop`)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from lease.model import prefix
from overlay.cni import lists as cni
from overlay.cni.lists import CONFLIST
from overlay.lab import netns
from overlay.process.files import write_atomically
from tests.agent.conftest import _swept, kube_world, world  # noqa: F401 (fixtures)
from tests.support.wait import until
from tests.support.world import NETWORK6, KubeWorld, World

BINARY = Path(os.environ.get("FLANNELD", Path(__file__).parents[2] / ".venv" / "flanneld"))


class Flanneld:
    """One flanneld on a node, with the files of an Agent beside it, so that either can take the other's place."""

    def __init__(self, where: World, node: str) -> None:
        self.world, self.node, self.run_dir = where, node, where.folder / node
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if not BINARY.exists():
            pytest.fail("no flanneld: run `make interop`, which builds it", pytrace=False)
        with (self.run_dir / "flanneld.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "nsenter", f"--net={netns.path(where.namespace(node))}", str(BINARY),
                    *self._store_flags(where), "-iface=eth0", f"-subnet-file={self.run_dir}/subnet.env",
                ],
                stdout=log, stderr=log, env=os.environ | {"NODE_NAME": node, "WIREGUARD_KEY_FILE": f"{self.run_dir}/wgkey"},
            )  # fmt: skip
        where.agents.append(self)  # type: ignore[arg-type]  # ended with the others

    def _store_flags(self, where: World) -> list[str]:
        if isinstance(where, KubeWorld):
            config = f"{where.config_map}/net-conf.json"
            return ["-kube-subnet-mgr", f"-kubeconfig-file={where.kube.kubeconfig()}", f"-net-config-path={config}"]
        return [f"-etcd-endpoints={where.etcd.endpoint}"]  # of IPv6 alone it has none in etcd: its keys collide

    def wait_ready(self) -> Flanneld:
        until("flanneld wrote subnet.env", (self.run_dir / "subnet.env").exists, 30)
        families = self.world.families
        found = {family: cni.previous_subnet(str(self.run_dir / "subnet.env"), family) for family in families}
        networks = {4: prefix("10.244.0.0/16"), 6: NETWORK6}
        pods = [cni.PodNetwork(networks[family], subnet) for family, subnet in found.items() if subnet is not None]
        assert len(pods) == len(families)
        conflist = self.run_dir / "cni" / CONFLIST
        if not conflist.exists():
            mtu = int(re.search(r"FLANNEL_MTU=(\d+)", (self.run_dir / "subnet.env").read_text())[1])  # type: ignore[index]
            write_atomically(str(conflist), cni.network_list(pods, mtu, "cni0", f"{self.run_dir}/ipam"))
        self.world.run(self.node, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        if 6 in families:
            self.world.run(self.node, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
        return self

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(15)

    def log(self) -> str:
        return (self.run_dir / "flanneld.log").read_text(errors="replace")
