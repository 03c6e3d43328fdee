"""Started in flanneld's place: by the files that packages and k3s start it with."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from overlay.lab import netns
from tests.support.wait import until

UNIT = Path(__file__).parents[2] / "manifests/overlayd.service"
FILES = {
    "etc/sysconfig/flanneld": """\
# Flanneld configuration options
# etcd url location.  Point this to the server where etcd runs
FLANNEL_ETCD_ENDPOINTS="http://192.168.1.1:2379"

# etcd config key.  This is the configuration key that flannel queries
# For address range assignment
FLANNEL_ETCD_PREFIX="/atomic.io/network"

# Any additional options that you want to pass
FLANNEL_OPTIONS="-iface=eth0 -ip-masq"
""",
    "etc/default/flanneld": "FLANNELD_ETCD_ENDPOINTS=http://192.168.1.1:2379\nFLANNELD_ETCD_PREFIX=/atomic.io/network\nFLANNELD_IP_MASQ=true\n",
    "run/flannel/options.env": 'FLANNELD_ETCD_ENDPOINTS="http://192.168.1.1:2379"\nFLANNELD_ETCD_PREFIX="/atomic.io/network"\nFLANNELD_IP_MASQ=true\n',
}
"""As the flannel package of Fedora and CentOS brings it; as people write it on Debian; as CoreOS' unit reads it."""


def as_systemd_reads(text: str) -> dict[str, str]:
    """systemd.exec(5), EnvironmentFile=: lines NAME=VALUE, quotes taken away, comments left out."""
    lines = (line for line in text.splitlines() if line.strip() and line[0] not in "#;")
    return {
        name: "".join(shlex.split(value)) if value[:1] in "'\"" else value
        for name, _, value in (line.partition("=") for line in lines)
    }


@pytest.mark.parametrize("name", FILES)
def test_by_the_environment_file_of_a_package(world, tmp_path, name):
    assert f"EnvironmentFile=-/{name}\n" in UNIT.read_text()
    world.etcd.put("/atomic.io/network/config", '{"Network":"10.50.0.0/16","Backend":{"Type":"vxlan"}}')
    node, run = world.node(1), tmp_path / "run"
    flags = [f"--run-dir={run}", f"--subnet-file={run}/subnet.env", f"--cni-conf-dir={run}/cni"]
    command = ["nsenter", f"--net={netns.path(world.namespace(node))}", sys.executable, "-m", "overlay", *flags]
    agent = subprocess.Popen(command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **as_systemd_reads(FILES[name])})
    try:
        until("it has a subnet", lambda: "FLANNEL_NETWORK=10.50.0.0/16" in (run / "subnet.env").read_text())
        assert "FLANNEL_IPMASQ=true" in (run / "subnet.env").read_text()
        until(
            "and its rules",
            lambda: (
                "masquerade" in world.run(node, "nft", "list", "tables")
                or "overlay-1" in world.run(node, "nft", "list", "tables")
            ),
        )
    finally:
        agent.terminate()
        agent.wait(15)


K3S_CONFIG = """{
\t"Network": "10.244.0.0/16",
\t"EnableIPv6": false,
\t"EnableIPv4": true,
\t"IPv6Network": "::/0",
\t"Backend": {
\t"Type": "vxlan"
}
}
"""
K3S_CNI = {
    "name": "cbr0",
    "cniVersion": "1.0.0",
    "plugins": [
        {"type": "flannel", "delegate": {"hairpinMode": True, "forceAddress": True, "isDefaultGateway": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
    ],
}


def test_beside_k3s_by_its_files_and_annotations(kube_world):
    """k3s runs flannel inside of itself: its net-conf.json, its CNI list, and the annotations that its nodes have."""
    kube_world.config_map.mkdir(parents=True, exist_ok=True)
    (kube_world.config_map / "net-conf.json").write_text(K3S_CONFIG)
    (kube_world.config_map / "cni-conf.json").write_text(json.dumps(K3S_CNI))
    ours = kube_world.agent(
        kube_world.node(1), f"--cni-conf-template={kube_world.config_map}/cni-conf.json"
    ).wait_ready()
    kube_world.put_peer(9)
    until("k3s's node is a peer", lambda: kube_world.peers("node1") == 1)
    listed = json.loads((ours.run_dir / "cni/10-flannel.conflist").read_text())
    assert [plugin["type"] for plugin in listed["plugins"]] == ["bridge", "portmap", "bandwidth"]
    assert listed["plugins"][0]["hairpinMode"] is True
    assert re.search(r"FLANNEL_NETWORK=10.244.0.0/16", (ours.run_dir / "subnet.env").read_text())
    assert "IPV6" not in (ours.run_dir / "subnet.env").read_text()
