"""Why does A not reach B, with backends that have no VTEP, or in whose packets nobody can look."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from overlay.lab import netns
from tests.diagnosis.test_faults import asking, check, counters_are_gone, doctor, trace  # noqa: F401 (a fixture)
from tests.support.wait import until
from tests.support.world import World

CLI = sys.executable, "-m", "overlay.cli.app"
FORWARD = (
    "add table ip planted; add chain ip planted onward { type filter hook forward priority 0; };"
    " add rule ip planted onward ip daddr 10.244.0.0/16 drop"
)
INPUT = (
    "add table ip planted; add chain ip planted in { type filter hook input priority 0; };"
    " add rule ip planted in udp dport 51820 drop"
)
OUTPUT = (
    "add table ip planted; add chain ip planted out { type filter hook output priority 0; };"
    " add rule ip planted out udp dport 51820 drop"
)
INGRESS = (
    "add table netdev planted; add chain netdev planted ahead { type filter hook ingress device eth0 priority 0; };"
    " add rule netdev planted ahead udp dport 51820 drop"
)


@pytest.fixture
def made(tmp_path):
    with closing(World(tmp_path / "world")) as made:
        yield made


@pytest.fixture(params=["host-gw", "wireguard"])
def network(request, made):
    made.config(Backend={"Type": request.param})
    made.backend = request.param
    return made


@pytest.fixture
def hostgw(made):
    made.config(Backend={"Type": "host-gw"})
    return made


@pytest.fixture
def wireguard(made):
    made.config(Backend={"Type": "wireguard"})
    return made


def states(agent) -> set[str]:
    return {each["state"] for each in agent.status()["reachability"]}


def test_a_healthy_network_and_a_fault_of_it(network, asking):  # noqa: F811
    agents = network.nodes(2, *asking)
    pods = [network.pod(agent, "a") for agent in agents]
    ways = (pods[0].address, pods[1].address), (pods[0].address, pods[1].address, "--proto", "tcp", "--port", "81")
    for way in ways:
        until("it is delivered", lambda way=way: trace(network, agents[0], *way)["verdict"] == "delivered")
        found = trace(network, agents[0], *way)
        assert {step["counted"] for each in found["rounds"] for step in each["steps"]} == {3}, found
    assert [each["state"] for each in check(network, agents[0])] == ["ok"]
    network.run("node2", "nft", INPUT if network.backend == "wireguard" else FORWARD)
    found = trace(network, agents[0], *ways[0])
    assert found["verdict"] == "dropped"
    assert found["node"] == "node2"
    assert "chain ip planted" in "; ".join(found["because"])
    asked = check(network, agents[0], pods[1].address)
    if network.backend == "wireguard":
        assert re.search("UDP 51820 is filtered on the way|the way there is broken", asked["verdict"])
    else:
        assert "does not forward to it" in asked["verdict"]
    counters_are_gone(network, agents)


# --- host-gw


def test_a_node_without_pods_is_not_called_well_nor_accused(hostgw, asking):  # noqa: F811
    agents = hostgw.nodes(2, *asking)
    until("it was asked", lambda: "no pod was made there" in agents[0].status()["reachability"][0]["text"], 20)
    assert states(agents[0]) == {"untried"}
    assert agents[0].problems() == {}
    asked = check(hostgw, agents[0], "node2")
    assert (asked["state"], "no pod was made there" in asked["verdict"]) == ("untried", True)
    pods = [hostgw.pod(agent, "a") for agent in agents]
    until("its pods' gateway answers", lambda: states(agents[0]) == states(agents[1]) == {"ok"}, 30)
    assert check(hostgw, agents[0], "node2")["state"] == check(hostgw, agents[0], pods[1].address)["state"] == "ok"
    until(
        "each hears the other's gateway", lambda: agents[1].status()["reachability"][0]["heard_age_s"] is not None, 30
    )


def test_a_rule_that_pods_packets_fall_into_is_named_though_nodes_answer_each_other(hostgw, asking):  # noqa: F811
    """The underlay's addresses answer all the time: they say nothing of pods."""
    agents = hostgw.nodes(2, *asking)
    pods = [hostgw.pod(agent, "a") for agent in agents]
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    subnet = str(agents[1].subnet())
    hostgw.run("node1", "ip", "rule", "add", "to", subnet, "pref", "100", "blackhole")
    until(
        "it is said",
        lambda: "does not send there: a blackhole route" in agents[0].problems().get("unreachable", ""),
        40,
    )
    for target in ("node2", pods[1].address):
        asked = check(hostgw, agents[0], target)
        assert (asked["state"], "ip rule 100" in asked["verdict"]) == ("refused", True), asked
    hostgw.run("node1", "ip", "rule", "del", "pref", "100")
    hostgw.run("node1", "ip", "rule", "add", "to", subnet, "iif", "cni0", "pref", "100", "blackhole")
    asked = check(hostgw, agents[0], "node2")
    assert asked["state"] == "refused", "this node's own packets pass, its pods' do not"
    assert "pings of this node are answered, but this node's own kernel: packets of pods here" in asked["verdict"]


def test_a_rule_that_goes_by_the_source_is_named_and_not_the_pods_own_route(network, asking):  # noqa: F811
    agents = network.nodes(2, *asking)
    pods = [network.pod(agent, "a") for agent in agents]
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    network.run("node2", "ip", "rule", "add", "from", str(agents[1].subnet()), "blackhole", "pref", "100")
    until("it is said", lambda: "ways" in agents[1].problems(), 30)
    assert "ip rule 100 (from" in agents[1].problems()["ways"]
    assert "ip route del" not in agents[1].problems()["ways"]
    found = trace(network, agents[0], pods[0].address, pods[1].address)
    assert "ip rule 100 (from" in "; ".join(found["because"]), found
    agents[1].kill()
    ways = {each["subject"]: each for each in doctor(network, agents[1])}["ways"]
    assert (ways["state"], "ip rule 100 (from" in f"{ways['what']}{ways['mend']}") == ("wrong", True), ways


def test_a_node_is_traced_to_and_from_by_name(hostgw, asking):  # noqa: F811
    agents = hostgw.nodes(2, *asking)
    pods = [hostgw.pod(agent, "a") for agent in agents]
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    assert trace(hostgw, agents[0], "node", pods[1].address)["verdict"] == "delivered"
    assert trace(hostgw, agents[0], pods[0].address, "node2")["verdict"] == "delivered"
    rules = INGRESS.replace("udp dport 51820", "ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16")
    hostgw.run("node2", "nft", rules)
    found = trace(hostgw, agents[0], pods[0].address, pods[1].address)
    assert (found["node"], "planted ahead drops" in "; ".join(found["because"])) == ("node2", True), found


def test_of_different_mtus_no_field_is_named_that_there_is_not(hostgw, asking):  # noqa: F811
    agents = hostgw.nodes(2, *asking)
    for agent in agents:
        hostgw.pod(agent, "a")
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    hostgw.run("node2", "ip", "link", "set", "eth0", "mtu", "1400")
    asked = check(hostgw, agents[0], "node2")
    assert asked["state"] == "path_mtu", asked
    assert "give the underlay's interfaces of all nodes one MTU" in asked["remedy"]


def test_what_keeps_packets_from_its_pods_is_asked_of_the_far_side(hostgw, asking):  # noqa: F811
    agents = hostgw.nodes(2, *asking)
    for agent in agents:
        hostgw.pod(agent, "a")
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    hostgw.run("node2", "nft", FORWARD)
    until("node2 says it", lambda: "foreign rules" in agents[1].problems(), 30)
    for asked in (check(hostgw, agents[0], "node2"), *check(hostgw, agents[0])):
        assert asked["state"] == "unreachable"
        assert "node2 has a problem that its pods may meet: foreign rules: " in asked["verdict"]


def test_a_node_whose_link_is_down_answers_no_arp(hostgw, asking):  # noqa: F811
    agents = hostgw.nodes(2, *asking)
    pods = [hostgw.pod(agent, "a") for agent in agents]
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    hostgw.run("node2", "ip", "link", "set", "eth0", "down")
    hostgw.run("node1", "ip", "neigh", "flush", "dev", "eth0")

    def named() -> bool:
        found = trace(hostgw, agents[0], pods[0].address, pods[1].address)
        because = "; ".join(found["because"])
        return (found["verdict"], found["node"]) == (
            "dropped",
            "node1",
        ) and "nobody answers ARP for 192.168.1.3" in because

    until("it is named", named, 20)
    asked = check(hostgw, agents[1], "node1")
    assert "eth0, which leads to peers, is down" in asked["verdict"]
    until("node2 asks nobody", lambda: states(agents[1]) == {"untried"}, 60)
    assert next(iter(agents[1].problems())) == "carrier"


# --- wireguard


@pytest.mark.parametrize(("node", "rules", "where"), [("node1", OUTPUT, "out"), ("node2", INGRESS, "ahead")])
def test_the_node_whose_rule_it_is_is_named(wireguard, asking, node, rules, where):  # noqa: F811
    agents = wireguard.nodes(2, *asking)
    pods = [wireguard.pod(agent, "a") for agent in agents]
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)
    wireguard.run(node, "nft", rules)
    found = trace(wireguard, agents[0], pods[0].address, pods[1].address)
    assert (found["verdict"], found["node"]) == ("dropped", node)
    assert f"planted {where} drops" in "; ".join(found["because"])
    theirs = agents[int(node[-1]) - 1]
    until(
        "its agent says it",
        lambda: f"planted {where} drops the tunnel" in theirs.problems().get("foreign rules", ""),
        30,
    )


def test_a_capture_shows_what_is_encrypted_and_that_it_is(wireguard, asking, tmp_path):  # noqa: F811
    agents = wireguard.nodes(2, *asking)
    pods = [wireguard.pod(agent, "a") for agent in agents]
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)

    def captured(*words: str) -> list[str]:
        """While node1 pings a pod of node2."""
        lines: list[str] = []
        command = (*CLI, "capture", "--run-dir", str(agents[0].run_dir), "--seconds", "10", *words)
        there = threading.Thread(target=lambda: lines.extend(wireguard.run("node1", *command).splitlines()))
        there.start()
        while there.is_alive():
            check(wireguard, agents[0], pods[1].address)
            there.join(0.1)
        return lines

    seen = [json.loads(line) for line in captured("--json", "-n", "40", "node2")]
    inner = [each for each in seen if not each["encrypted"]]
    outer = [each for each in seen if each["encrypted"]]
    assert {each["interface"] for each in inner} == {"flannel-wg"}
    assert any(each["what"].startswith("icmp echo request") for each in inner)
    assert {each["interface"] for each in outer} == {"eth0"}
    assert {each["what"] for each in outer} == {"wireguard data"}
    assert {end for each in outer for end in (each["source"], each["destination"])} == {"192.168.1.2", "192.168.1.3"}
    assert all("flannel-wg" in line for line in captured("-n", "2", pods[1].address))
    captured("-n", "4", "-w", str(tmp_path / "it.pcap"))
    assert (tmp_path / "it.pcap").read_bytes()[:4] == b"\x4d\x3c\xb2\xa1"


def test_commands_go_to_the_agents_network(wireguard):
    """From outside of its network namespace they would ask another machine's kernel."""
    agents = wireguard.nodes(2)
    until("all is well", lambda: states(agents[0]) == {"ok"}, 30)

    def outside(*words: str) -> subprocess.CompletedProcess[str]:
        command = (*CLI, *words, "--run-dir", str(agents[0].run_dir))
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = outside("check", "--json", "node2")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "ok"), done.stderr
    firewalls = outside("doctor", "--json", "--subnet-file", str(agents[0].run_dir / "subnet.env"))
    offloads = [each for each in json.loads(firewalls.stdout) if each["subject"] == "MTU"]
    assert [each["state"] for each in offloads] == ["ok"], firewalls.stdout
    assert "flannel-wg" in offloads[0]["what"]


def test_a_refused_record_is_named_by_who_asks_for_its_pods(hostgw):
    (agent,) = hostgw.nodes(1)
    hostgw.put_record("10.244.9.0-24", {"PublicIP": "rubbish", "BackendType": "host-gw", "BackendData": None})
    until("it is refused", lambda: "10.244.9.0-24" in agent.refused_records())
    for words in (("check", "10.244.9.7"), ("check", "10.244.9.0/24")):
        done = subprocess.run(
            (*CLI, *words, "--run-dir", str(agent.run_dir)), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "record 10.244.9.0-24 is refused" in done.stderr
        assert "PublicIP" in done.stderr


def test_two_leases_of_one_key_are_found_in_the_store(wireguard):
    wireguard.nodes(1)
    (record,) = wireguard.records().values()
    kept = {name: record[name] for name in ("BackendType", "BackendData")}
    wireguard.put_record("10.244.9.0-24", {**kept, "PublicIP": "192.168.1.9"})
    store = (
        "nsenter",
        f"--net={netns.path(wireguard.namespace('underlay'))}",
        *CLI,
        "leases",
        "check",
        *wireguard.store_flags(""),
    )
    done = subprocess.run(store, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"10.244.9.0-24: it has the public key {record['BackendData']['PublicKey']} of" in done.stdout
