"""Reports without secrets, manual pages, completion, the kubectl plugin, doctor's look at files."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile

import pytest
from click.testing import CliRunner

from overlay.cli import complete, kubectl, man, report
from overlay.cli.app import app
from overlay.cli.kubectl import CannotRun
from overlay.doctor import agent, host
from overlay.doctor.finding import State
from overlay.settings.flags import FLAGS

# --- report


@pytest.mark.parametrize(
    "text",
    [
        "etcd-password: hunter2",
        '"password": "hunter2"',
        "FLANNELD_ETCD_PASSWORD=hunter2",
        "Authorization: hunter2",
        "--etcd-password hunter2",
        "https://root:hunter2@etcd:2379",
        "{'client_secret': 'hunter2'}",
        "privateKey = hunter2",
    ],
)
def test_no_secret_is_in_a_report(text):
    found = report.without_secrets(text)
    assert "hunter2" not in found
    assert "(removed)" in found


def test_what_is_no_secret_stays():
    for text in (
        "10.244.1.0/24 via 10.244.1.0 dev flannel.1",
        '{"PublicIP": "192.168.1.2"}',
        "http://192.168.1.1:2379 up",
    ):
        assert report.without_secrets(text) == text


def test_a_report_is_whole_where_nothing_runs(tmp_path, monkeypatch):
    """No agent, no programs: it says of each why there is nothing."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(report, "COMMANDS", {"a.txt": ("no-such-program",), "b.txt": ("echo", "token=hunter2")})
    monkeypatch.setattr(report, "_doctor", lambda *_: "[]")
    log = tmp_path / "agent.log"
    log.write_text("a line\npassword=hunter2\n")
    path = tmp_path / "r.tar.gz"
    done = CliRunner().invoke(app, ["report", "-o", str(path), "--run-dir", str(tmp_path), "--log", str(log)])
    assert done.exit_code == 0, done.output
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as bundle:
        parts = {each.name.removeprefix("overlay-report/"): bundle.extractfile(each).read().decode() for each in bundle}
    assert "no agent answers" in parts["status.json"]
    assert "no-such-program" in parts["a.txt"]
    assert "a line" in parts["files/agent.log"]
    assert not [name for name, text in parts.items() if "hunter2" in text]


# --- manual pages


def test_every_command_and_flag_has_its_manual_page_and_troff_takes_it():
    pages = {name: text for name, _, text in man.pages()}
    assert {"overlayd", "overlay", "overlay-status", "overlay-trace", "overlay-lab-up"} <= pages.keys()
    for flag in FLAGS:
        assert f"\\-\\-{flag.name.replace('-', chr(92) + '-')}" in pages["overlayd"], flag.name
    groff = shutil.which("groff")
    assert groff, "groff is missing: apt-get install groff-base"
    for name, text in pages.items():
        done = subprocess.run([groff, "-man", "-ww", "-Tutf8"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_manual_pages_are_written(tmp_path):
    assert CliRunner().invoke(app, ["man", "--to", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "man8/overlayd.8").read_text().startswith(".TH OVERLAYD 8")


# --- completion

PEERS = {"peers": [{"node_name": "worker1", "public_ip": "192.168.1.2", "subnet": "10.244.1.0/24"}]}


def test_words_of_peers_complete(monkeypatch):
    monkeypatch.setattr("overlay.cli.status.asked", lambda _run_dir: PEERS)
    context = type("Context", (), {"params": {}})()
    found = {item.value for item in complete.TARGET(context, None, "wo")}
    assert found == {"worker1"}
    assert {item.value for item in complete.TARGET(context, None, "1")} == {"192.168.1.2", "10.244.1.0/24"}


@pytest.mark.parametrize("shell", complete.SHELLS)
def test_each_shell_has_its_script(shell):
    done = CliRunner().invoke(app, ["completion", shell])
    assert (done.exit_code, "_OVERLAY_COMPLETE" in done.output) == (0, True)


# --- kubectl


def pod(name: str, node: str, phase: str = "Running"):
    return {"metadata": {"name": name}, "spec": {"nodeName": node}, "status": {"phase": phase}}


def test_the_pod_of_a_node_is_found():
    pods = [pod("a", "n1", "Pending"), pod("b", "n2"), pod("c", "n3")]
    assert kubectl.choose(pods, "n3", "ns") == "c"
    assert kubectl.choose(pods, "", "ns") == "b"
    with pytest.raises(CannotRun, match="node n9 has no agent; these have: n1, n2, n3"):
        kubectl.choose(pods, "n9", "ns")
    with pytest.raises(CannotRun, match="no agent in namespace ns"):
        kubectl.choose([], "", "ns")
    with pytest.raises(CannotRun, match="none of 1 agents runs"):
        kubectl.choose(pods[:1], "", "ns")


def test_the_plugins_options_stand_first():
    assert kubectl.split(["--node", "n1", "-n=x", "check", "--json", "--node", "y"]) == (
        {"node": "n1", "namespace": "x"}, ["check", "--json", "--node", "y"],
    )  # fmt: skip
    with pytest.raises(CannotRun, match="needs a value"):
        kubectl.split(["--node"])


def test_it_runs_kubectl_exec(tmp_path, monkeypatch):
    program = tmp_path / "kubectl"
    answer = json.dumps({"items": [pod("overlay-x", "n1")]})
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    found = kubectl.command_of(["--context=dev", "status", "--cluster"])
    assert found == [
        str(program), "--context=dev", "-n", "kube-overlay", "exec", "-i", "overlay-x", "-c", "overlayd", "--", "overlay",
        "status", "--cluster",
    ]  # fmt: skip
    assert "get pods -l app.kubernetes.io/name=overlay" in (tmp_path / "asked").read_text()


# --- doctor


def write(root, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def states(findings) -> list[tuple[str, State]]:
    return [(each.subject, each.state) for each in findings]


def test_networkd_that_removes_what_it_does_not_know_is_told_and_can_be_told_off(tmp_path):
    assert states(host.networkd(tmp_path)) == [("systemd-networkd", State.UNKNOWN)], "no host's files"
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert states(host.networkd(tmp_path)) == [("systemd-networkd", State.OK)]
    (tmp_path / "run/systemd/netif/links").mkdir(parents=True)
    (found,) = host.networkd(tmp_path)
    assert found.state is State.WARN
    assert "ManageForeignRoutes, ManageForeignRoutingPolicyRules" in found.what
    found.fix()
    assert states(host.networkd(tmp_path)) == [("systemd-networkd", State.OK)], "its own mend is enough"
    write(tmp_path, "usr/lib/systemd/network/10-all.network", "[Match]\nName=*\n[Network]\nDHCP=yes\n")
    assert [each.what for each in host.networkd(tmp_path) if each.state is State.WARN] == [
        "10-all.network is about every interface"
    ]
    write(tmp_path, "etc/systemd/network/10-all.network", "[Match]\nName=eth*\n")
    assert states(host.networkd(tmp_path)) == [("systemd-networkd", State.OK)], "that of /etc stands for it"


def test_network_manager_that_is_not_told_to_leave_our_interfaces(tmp_path, monkeypatch):
    reloaded: list[list[str]] = []
    assert states(host.network_manager(tmp_path)) == [("NetworkManager", State.UNKNOWN)], "no host's files"
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert states(host.network_manager(tmp_path)) == [("NetworkManager", State.OK)]
    monkeypatch.setattr(subprocess, "run", lambda command, **_: reloaded.append(command))
    (tmp_path / "run/NetworkManager").mkdir(parents=True)
    write(tmp_path, "etc/NetworkManager/conf.d/a.conf", "[keyfile]\nunmanaged-devices=interface-name:veth*\n")
    (found,) = host.network_manager(tmp_path)
    assert "begin with flannel, cni" in found.what
    found.fix()
    assert states(host.network_manager(tmp_path)) == [("NetworkManager", State.OK)]
    assert reloaded == [["nmcli", "general", "reload", "conf"]]


def test_a_mac_policy_that_alters_virtual_devices(tmp_path):
    (tmp_path / "run/udev").mkdir(parents=True)
    assert states(host.mac_policy(tmp_path)) == [("MACAddressPolicy", State.OK)]
    link = "[Match]\nOriginalName=*\n[Link]\nMACAddressPolicy=persistent\n"
    write(tmp_path, "usr/lib/systemd/network/99-default.link", link)
    assert states(host.mac_policy(tmp_path)) == [("MACAddressPolicy", State.WARN)]
    write(tmp_path, "etc/systemd/network/99-default.link", link.replace("persistent", "none"))
    assert states(host.mac_policy(tmp_path)) == [("MACAddressPolicy", State.OK)]


def test_the_network_list_that_the_runtime_takes(tmp_path):
    conf, ours = "/etc/cni/net.d", json.dumps({"plugins": [{"type": "bridge"}, {"type": "portmap"}]})
    assert states(agent.cni(tmp_path, conf)) == [("CNI", State.WRONG)]
    write(tmp_path, "etc/cni/net.d/10-flannel.conflist", ours)
    assert states(agent.cni(tmp_path, conf)) == [("CNI", State.OK), ("CNI plugins", State.UNKNOWN)]
    for name in ("bridge", "host-local", "loopback"):
        write(tmp_path, f"opt/cni/bin/{name}", "")
        (tmp_path / "opt/cni/bin" / name).chmod(0o755)
    (_, plugins) = agent.cni(tmp_path, conf)
    assert plugins.what.startswith("portmap: neither")
    write(tmp_path, "etc/cni/net.d/00-calico.conflist", "{}")
    (first, _) = agent.cni(tmp_path, conf)
    assert (first.state, "00-calico.conflist stands before" in first.what) == (State.WRONG, True)
    assert states(agent.cni(tmp_path, "")) == [("CNI", State.OK)]


def test_what_the_agent_says_is_a_finding_each():
    problem = {"subject": "ways", "text": "packets are dropped: ip rule del pref 5270", "keeps_unready": True}
    found = list(agent.agent({"problems": [problem], "refused_records": [{"key": "a", "reason": "b"}]}))
    assert (found[0].state, found[0].what) == (State.WRONG, problem["text"])
    assert "docs/operations.md" in found[0].mend
    assert found[1].subject == "records"
