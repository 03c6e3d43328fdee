"""Whole agents on a real API server, with the rights of our manifest and no others."""

from __future__ import annotations

import json
import signal
import time

import yaml

from overlay.lab import matrix
from tests.support.kube import ACCOUNT, MANIFEST
from tests.support.wait import until
from tests.support.world import CNI_CONF, KubeWorld, number


def unavailable(world: KubeWorld, node: str) -> str:
    return world.kube.condition(node, "NetworkUnavailable")


def problems(agent) -> str:
    return json.dumps(agent.problems())


def test_two_nodes_become_one_network(kube_world):
    world = kube_world
    agents = world.nodes(2, "--ip-masq")
    assert [str(agent.subnet()) for agent in agents] == ["10.244.1.0/24", "10.244.2.0/24"]
    for number_, agent in enumerate(agents, 1):
        name = f"node{number_}"
        until("the condition is told", lambda name=name: unavailable(world, name) == "False")
        assert world.kube.notes(name) == {
            "kube-subnet-manager": "true",
            "backend-type": "vxlan",
            "backend-data": f'{{"VNI":1,"VtepMAC":"{agent.mac()}"}}',
            "public-ip": f"192.168.1.{number_ + 1}",
        }
        found = json.loads((agent.run_dir / "cni" / "10-flannel.conflist").read_text())
        assert found["name"] == "cbr0"
        bridge, portmap = found["plugins"]
        assert bridge["type"] == "bridge"
        assert bridge["hairpinMode"] is bridge["isDefaultGateway"] is True
        assert bridge["ipMasq"] is False
        assert bridge["mtu"] == 1450
        assert bridge["ipam"]["ranges"] == [[{"subnet": str(agent.subnet())}]]
        assert {"dst": "10.244.0.0/16"} in bridge["ipam"]["routes"]
        assert portmap["type"] == "portmap"
    pods = [world.pod(agent, "pod") for agent in agents]
    with matrix.Wires(pods) as wires:
        assert all(cell.ok for cell in wires.all(lambda _s, _t, own: own))


def test_a_restart_writes_nothing_and_costs_no_packet(kube_world):
    world = kube_world
    agents = world.nodes(2)
    pods = [world.pod(agent, "pod") for agent in agents]
    until("the condition is told", lambda: unavailable(world, "node1") == "False")
    version = world.kube.read("node1")["metadata"]["resourceVersion"]
    mac = agents[0].mac()
    with world.stream(pods[0], pods[1]) as stream:
        again = world.restart(agents[0]).wait_ready()
    assert stream.lost() == 0
    assert again.mac() == mac
    assert world.kube.read("node1")["metadata"]["resourceVersion"] == version


def test_a_node_without_a_pod_cidr_waits_and_becomes_ready_by_itself(kube_world):
    world = kube_world
    world.node(1, "")
    agent = world.agent("node1")
    until("it says so", lambda: "no podCIDR yet" in problems(agent))
    assert not agent.ready()
    assert agent.process.poll() is None
    world.kube.patch("node1", {"spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}})
    agent.wait_ready()
    assert str(agent.subnet()) == "10.244.7.0/24"


def test_what_somebody_removes_from_our_node_is_put_back(kube_world):
    world = kube_world
    world.nodes(1)
    before = world.kube.notes("node1")
    world.kube.annotate("node1", backend_data=None, kube_subnet_manager=None)
    until("the annotations are back", lambda: world.kube.notes("node1") == before)
    world.kube.annotate("node1", backend_data='{"VNI":1,"VtepMAC":"0a:00:00:00:00:99"}')
    until("a changed one is put right", lambda: world.kube.notes("node1") == before)


def test_a_node_made_again_under_one_name(kube_world):
    world = kube_world
    agents = world.nodes(2)
    mac = agents[1].mac()
    conflist = agents[1].run_dir / "cni" / "10-flannel.conflist"
    before = conflist.read_text()
    world.kube.delete("node2")
    until("the peer is gone", lambda: world.peers("node1") == 0)
    until("it says why it is not ready", lambda: "no Node node2" in problems(agents[1]), 40)
    until("no pod is made in a subnet that is anybody's", lambda: not conflist.exists())
    world.kube.node("node2", "10.244.2.0/24")
    until("the peer is back", lambda: world.peers("node1") == 1, 40)
    assert agents[1].mac() == mac
    until("it is ready again", agents[1].ready, 30)
    until("pods may be made again", lambda: conflist.exists() and conflist.read_text() == before)
    until("the new Node has its condition", lambda: unavailable(world, "node2") == "False", 30)


def test_a_list_that_comes_before_ours_is_a_problem(kube_world):
    world = kube_world
    agent = world.nodes(1)[0]
    until("there is a network list", (agent.run_dir / "cni" / "10-flannel.conflist").exists)
    other = agent.run_dir / "cni" / "05-other.conf"
    other.write_text('{"name": "other", "type": "bridge"}')
    until("it is named", lambda: "05-other.conf comes before" in problems(agent))
    other.unlink()
    until("and forgotten", lambda: "05-other" not in problems(agent))


def test_a_node_made_again_with_another_pod_cidr_moves(kube_world):
    world = kube_world
    agents = world.nodes(2)
    world.kube.delete("node2")
    world.kube.node("node2", "10.244.9.0/24")
    until(
        "the peer has its new subnet",
        lambda: agents[0].status()["peers"] and agents[0].status()["peers"][0]["subnet"] == "10.244.9.0/24",
        40,
    )
    until("its own agent too", lambda: str(agents[1].subnet()) == "10.244.9.0/24")
    conflist = agents[1].run_dir / "cni" / "10-flannel.conflist"
    until("new pods get addresses of it", lambda: "10.244.9.0/24" in conflist.read_text())
    until("and the kernel", lambda: world.kernel("node1")["routes"].keys() == {(number("10.244.9.0"), 24)})


def test_overlapping_pod_cidrs_the_older_node_wins(kube_world):
    world = kube_world
    world.nodes(2)
    world.next_second()
    world.node(3, "10.244.2.0/24")
    late = world.agent("node3")
    until("the younger says why", lambda: "overlaps that of Node node2, which is older" in problems(late))
    assert not late.ready()
    assert world.kube.notes("node3") == {}
    assert world.peers("node1") == 1


def test_a_younger_node_that_held_first_gives_no_more_addresses_out(kube_world):
    """The older one's agent starts later: what is its by age it gets, and no pod is made where nobody sends to."""
    world = kube_world
    world.node(1)
    older = world.node(2, "10.244.9.0/24")
    world.next_second()
    younger = world.agent(world.node(3, "10.244.9.0/24")).wait_ready()
    conflist = younger.run_dir / "cni" / "10-flannel.conflist"
    until("it has a network list", conflist.exists)
    world.agent(older).wait_ready()
    until("the younger says whose it is", lambda: "overlaps that of Node node2" in problems(younger), 30)
    until("and makes no more pods", lambda: not conflist.exists())
    world.kube.delete("node2")
    until("until it is alone again", conflist.exists, 40)
    until("and well", lambda: problems(younger) == "{}", 40)


def test_a_wider_network_is_taken_live(kube_world):
    world = kube_world
    agents = world.nodes(2, "--ip-masq")
    pods = [world.pod(agent, "pod") for agent in agents]
    with world.stream(pods[0], pods[1]) as stream:
        world.config(Network="10.240.0.0/12")
        for agent in agents:
            until("the status has it", lambda agent=agent: agent.network() == "10.240.0.0/12")
            until("and the kernel", lambda agent=agent: not agent.status()["differences"] and agent.ready())
            until("and the files", lambda agent=agent: "10.240.0.0/12" in (agent.run_dir / "subnet.env").read_text())
        table = ("nft", "list", "table", "ip", "overlay-1")
        until("and the masquerade, by a program", lambda: "10.240.0.0/12" in world.run("node1", *table))
    assert stream.lost() == 0
    world.config(Network="10.99.0.0/16")
    until("one that does not hold the podCIDR is refused", lambda: "does not contain our subnet" in problems(agents[0]))
    assert "delete its Node" in problems(agents[0])
    world.kube.delete("node1")
    world.kube.node("node1", "10.99.1.0/24")
    until("its Node made again is in the other network", lambda: str(agents[0].subnet()) == "10.99.1.0/24", 40)
    until("and well", lambda: agents[0].ready() and "config" not in agents[0].problems(), 40)
    until("by its new address", lambda: "10.99.1.0" in world.run("node1", "ip", "-4", "address", "show", "flannel.1"))
    assert "10.244.1.0" not in world.run("node1", "ip", "-4", "address", "show", "flannel.1")


def test_flannels_config_map_alone_masquerades_as_flannel_does(kube_world):
    """Its two keys, and the arguments of our manifest."""
    documents = [found for found in yaml.safe_load_all(MANIFEST.read_text()) if found]
    container = next(d for d in documents if d["kind"] == "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    flags = [flag for flag in container["args"] if flag.partition("=")[0] in ("--ip-masq", "--iptables-forward-rules")]
    world = kube_world
    agent = world.nodes(1, *flags)[0]
    assert "masquerade" in world.run("node1", "nft", "list", "table", "ip", "overlay-1")
    bridge = json.loads((agent.run_dir / "cni" / "10-flannel.conflist").read_text())["plugins"][0]
    assert bridge["ipMasq"] is False
    world.config_file("overlayd.json", {"ip-masq": False})
    until(
        "overlayd.json wins", lambda: "masquerade" not in world.run("node1", "nft", "list", "table", "ip", "overlay-1")
    )


def test_a_bridge_whose_packets_kube_proxy_does_not_see_is_told(kube_world):
    world = kube_world
    agent = world.nodes(1)[0]
    until("there is a network list", (agent.run_dir / "cni" / "10-flannel.conflist").exists)
    assert problems(agent) == "{}"
    world.run("node1", "sysctl", "-w", "net.bridge.bridge-nf-call-iptables=0")
    until("frames are given to the node", lambda: agent.status()["antispoof"]["lifted"], 30)
    assert problems(agent) == "{}"
    world.config_file("overlayd.json", {"pod-lift": "off"})
    until("it is told, and how to mend it", lambda: "modprobe br_netfilter" in problems(agent))
    assert agent.ready()
    world.run("node1", "sysctl", "-w", "net.bridge.bridge-nf-call-iptables=1")
    until("and solved", lambda: problems(agent) == "{}")


def test_a_pod_cidr_outside_network_is_refused_by_name(kube_world):
    world = kube_world
    world.node(1, "10.99.1.0/24")
    agent = world.agent("node1")
    until("it says so", lambda: "outside Network 10.244.0.0/16" in problems(agent))


def test_an_operator_chooses_and_replaces_the_public_ip(kube_world):
    world = kube_world
    agents = world.nodes(2)
    world.run("node1", "ip", "addr", "add", "192.168.1.77/24", "dev", "eth0")
    world.kube.annotate("node1", node_public_ip="192.168.1.77")
    until("it is published", lambda: world.kube.notes("node1")["public-ip"] == "192.168.1.77")
    until("the device sends from it", lambda: world.device("node1").local == number("192.168.1.77"))
    until("the peer sends to it", lambda: number("192.168.1.77") in world.kernel("node2")["fdb"].values())
    world.kube.annotate("node1", public_ip_overwrite="192.168.1.2")
    until("the other one is published", lambda: world.kube.notes("node1")["public-ip"] == "192.168.1.2")
    assert world.device("node1").local == number("192.168.1.77")
    world.kube.annotate("node1", node_public_ip="nonsense", public_ip_overwrite="203.0.113.5")
    until("a bad value is told", lambda: "nonsense" in problems(agents[0]))
    until("the good one is taken", lambda: world.kube.notes("node1")["public-ip"] == "203.0.113.5")
    assert world.device("node1").local == number("192.168.1.77"), "what stood before holds"
    world.kube.annotate("node1", public_ip_overwrite="203.0.113.555")
    until("a bad one is told, too", lambda: "203.0.113.555" in problems(agents[0]))
    world.settled(agents[0])
    assert world.kube.notes("node1")["public-ip"] == "203.0.113.5", "behind NAT all peers would lose the node"
    again = world.restart(agents[0]).wait_ready()
    assert world.kube.notes("node1")["public-ip"] == "203.0.113.5", "also after a restart"
    world.kube.annotate("node1", node_public_ip=None, public_ip_overwrite=None)
    until("without them it is as flags say", lambda: world.kube.notes("node1")["public-ip"] == "192.168.1.2")
    until("and nothing is wrong", lambda: problems(again) == "{}")


SOON_DIRECT = """
import overlay.main, overlay.peers.controller
overlay.peers.controller.KNOWN_AFTER_KUBE_S = 2.0  # a file of the test is no kubelet's
overlay.main.main()
"""


def test_a_changed_config_map_takes_effect_while_pods_talk(kube_world):
    world = kube_world
    names = [world.node(1), world.node(2)]
    agents = [world.agent(name, f"--node-name={name}", "--ip-masq", program=SOON_DIRECT) for name in names]
    for agent in agents:
        agent.wait_ready()
        until("it has its peer", lambda agent=agent: agent.status()["peers"] and not agent.status()["differences"])
    pods = [world.pod(agent, "pod") for agent in agents]
    table = lambda: world.run("node1", "nft", "list", "table", "ip", "overlay-1")  # noqa: E731
    assert "masquerade" in table()
    with world.stream(pods[0], pods[1]) as stream:
        world.config_file("overlayd.json", {"ip-masq": False, "log-level": "error"})
        until("masquerade is off", lambda: "masquerade" not in table())
        world.config(Backend={"Type": "vxlan", "DirectRouting": True})
        until("routes are direct", lambda: all(not r.flags & 4 for r in world.kernel("node1")["routes"].values()))
        until("on both", lambda: all(not r.flags & 4 for r in world.kernel("node2")["routes"].values()))
        world.config(Backend={"Type": "vxlan", "MTU": 1400})
        until("the MTU follows", lambda: world.device("node1").mtu == 1350)
        tables = lambda: world.run("node1", "nft", "list", "tables")  # noqa: E731
        world.config_file("overlayd.json", {"vxlan-guard": False, "pod-antispoof": False})
        until("nothing is guarded", lambda: "guard" not in tables() and "pods" not in tables())
        world.config_file("overlayd.json", {"vxlan-guard": True})
        until("all is as the flags say", lambda: "guard" in tables() and "pods" in tables())
        until("for new pods too", lambda: '"mtu": 1350' in (agents[0].run_dir / "cni/10-flannel.conflist").read_text())
    assert stream.lost() == 0
    world.config_file("overlayd.json", {"underlay-cidr": ["10.0.0.0/8"]})
    until("no peer lies there", lambda: "outside --underlay-cidr 10.0.0.0/8" in str(agents[0].refused_records()))
    world.config_file("overlayd.json", {})
    until("it is a peer again", lambda: world.peers("node1") == 1)
    world.config_file("overlayd.json", {"underlay-cidr": ["10.244.1.0/25", "192.168.1.0/24"]})
    until("not where our pods are", lambda: "touches our subnet 10.244.1.0/24" in problems(agents[0]))
    assert world.peers("node1") == 1
    world.config_file("overlayd.json", {"iface": "eth1"})
    until("what needs a restart is named", lambda: "needs a restart" in problems(agents[0]))
    world.config_file("overlayd.json", "{")
    until("rubbish is named", lambda: "not JSON" in problems(agents[0]))
    world.config_file("net-conf.json", "{")
    until("in the network config too", lambda: "net-conf.json: not JSON" in problems(agents[0]))
    assert agents[0].ready()


def test_an_api_server_that_is_away_frozen_or_killed_costs_nothing(kube_world):
    world = kube_world
    agents = world.nodes(2)
    pods = [world.pod(agent, "pod") for agent in agents]
    with world.stream(pods[0], pods[1]) as stream:
        world.kube.freeze()
        until("a frozen one is noticed", lambda: all(agent.status()["store"]["error"] for agent in agents), 20)
        world.kube.thaw()
        until("and found again", lambda: not any(agent.status()["store"]["error"] for agent in agents), 40)
        world.kube.stop(signal.SIGKILL)
        until("a killed one is noticed", lambda: all(agent.status()["store"]["error"] for agent in agents), 20)
        assert all(agent.ready() for agent in agents), [agent.problems() for agent in agents]
        world.kube.start()
        world.kube.peer("other", "10.244.50.0/24", "192.168.1.99", "0a:00:00:00:00:50")
        until("what came since is seen", lambda: world.peers("node1") == 2, 40)
    assert stream.lost() == 0


def test_a_broken_cni_template_costs_the_list_alone(kube_world):
    world = kube_world
    world.config_file("cni-conf.json", "{broken")
    node = world.node(1)
    run_dir = world.folder / node
    (run_dir / "cni").mkdir(parents=True)
    stale = run_dir / "cni" / "10-flannel.conflist"
    stale.write_text('{"plugins":[{"ipam":{"ranges":[[{"subnet":"10.244.7.0/24"}]]}}]}')
    agent = world.agent(node)
    until("it is named", lambda: "cni-conf.json: not JSON" in problems(agent))
    until("subnet.env stands", (run_dir / "subnet.env").exists)
    assert not stale.exists(), "an old list gives addresses of another subnet"
    world.config_file("cni-conf.json", CNI_CONF)
    until("a whole one is taken", stale.exists)
    until("nothing is wrong any more", lambda: problems(agent) == "{}")


def test_a_write_that_is_forbidden_is_told_also_while_we_hold(kube_world):
    world = kube_world
    agent = world.nodes(1)[0]
    until("the condition is told", lambda: unavailable(world, "node1") == "False")
    world.kube.ask("DELETE", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/overlay")
    role = {
        "metadata": {"name": "reader"},
        "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}],
    }
    binding = {
        "metadata": {"name": "reader"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "reader"},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": ACCOUNT}],
    }
    for kind, body in (("clusterroles", role), ("clusterrolebindings", binding)):
        world.kube.ask("POST", f"/apis/rbac.authorization.k8s.io/v1/{kind}", body)
    world.kube.annotate("node1", public_ip=None)
    until("it says what is forbidden", lambda: "403" in problems(agent) and "nodes/status" in problems(agent), 40)
    world.kube.authorize()
    until("it is put back, once it is allowed", lambda: world.kube.notes("node1").get("public-ip") == "192.168.1.2", 40)
    until("and solved", lambda: "lease" not in agent.problems(), 40)


def test_no_pod_is_made_in_a_subnet_that_a_new_node_may_not_get(kube_world):
    """Between a Node made again and its podCIDR the old CNI list would give addresses that nobody routes here."""
    world = kube_world
    conflist = world.nodes(1)[0].run_dir / "cni" / "10-flannel.conflist"
    agent = world.restart(world.agents[0]).wait_ready()  # which finds the list as it should be, and writes nothing
    mac = agent.mac()
    world.kube.delete("node1")
    world.kube.node("node1")
    until("the list is withdrawn", lambda: not conflist.exists(), 30)
    subnet_env = agent.run_dir / "subnet.env"
    content = subnet_env.read_text()
    subnet_env.write_text("altered")
    until("the files were looked at again", lambda: subnet_env.read_text() == content)
    assert not conflist.exists()
    world.kube.patch("node1", {"spec": {"podCIDR": "10.244.8.0/24", "podCIDRs": ["10.244.8.0/24"]}})
    until("it is back, for the new one", lambda: "10.244.8.0/24" in conflist.read_text(), 30)
    until("ready", agent.ready)
    assert agent.mac() == mac


def test_a_black_hole_on_the_way_to_the_api_server(kube_world):
    """Nothing is refused, nothing comes: only time tells."""
    world = kube_world
    agents = world.nodes(2)
    rules = "table ip hole { chain in { type filter hook input priority 0; tcp dport 6443 drop; }; }"
    world.run("underlay", "nft", rules)
    until("it is noticed", lambda: all(agent.status()["store"]["error"] for agent in agents), 20)
    assert all(agent.ready() for agent in agents)
    assert world.peers("node1") == world.peers("node2") == 1
    world.run("underlay", "nft", "delete table ip hole")
    until("and gone again", lambda: not any(agent.status()["store"]["error"] for agent in agents), 40)
    world.kube.peer("other", "10.244.50.0/24", "192.168.1.99", "0a:00:00:00:00:50")
    until("what came since is seen", lambda: world.peers("node1") == 2, 40)


def test_a_config_map_that_vanishes_changes_nothing(kube_world):
    """A kubelet takes it away from a container that it is about to end."""
    world = kube_world
    world.config_file("overlayd.json", {"ip-masq": True})
    agent = world.nodes(1)[0]
    conflist = agent.run_dir / "cni" / "10-flannel.conflist"
    content = conflist.read_text()
    assert "masquerade" in world.run("node1", "nft", "list", "table", "ip", "overlay-1")
    for path in list(world.config_map.iterdir()):
        path.unlink()
    until("it is told", lambda: problems(agent).count("is gone") == 3)
    conflist.write_text("altered")
    until("the list is put back as it was", lambda: conflist.read_text() == content)
    world.run("node1", "nft", "flush chain ip overlay-1 postrouting")
    until("and the table", lambda: "masquerade" in world.run("node1", "nft", "list", "table", "ip", "overlay-1"))
    assert agent.ready()
    world.config_file("overlayd.json", {"ip-masq": False})
    until(
        "and followed again", lambda: "masquerade" not in world.run("node1", "nft", "list", "table", "ip", "overlay-1")
    )


def test_what_is_wrong_stands_where_users_look_and_goes_with_the_agent(kube_world):
    """`kubectl describe node`: Events and a condition, written with no more rights than our manifest gives."""
    world = kube_world
    one, _ = world.nodes(2)

    def ready(node: str = "node1") -> str:
        return world.kube.condition(node, "OverlayReady")

    def reasons() -> list[str]:
        listed = world.kube.ask("GET", "/api/v1/namespaces/default/events?fieldSelector=involvedObject.name=node1")
        return [each["reason"] for each in listed["items"] if each["involvedObject"]["uid"] == "node1"]

    until("it is ready", lambda: ready() == "True", 40)
    assert "events" not in one.problems()
    world.run("node1", "sh", "-c", "ip route add blackhole 10.244.0.0/16 table 52; ip rule add pref 5270 lookup 52")
    until("an Event says so", lambda: "OverlayWays" in reasons(), 90)
    world.run("node1", "sh", "-c", "ip rule del pref 5270; ip route flush table 52")
    until("and that it is over", lambda: "OverlayWaysSolved" in reasons(), 90)
    until("it is ready again", lambda: ready() == "True" and not one.problems(), 60)
    time.sleep(12)  # what was told last is written
    version = world.kube.read("node1")["metadata"]["resourceVersion"]
    before = world.kube.read("node1")["status"]["conditions"]
    one = world.restart(one).wait_ready()
    time.sleep(25)
    assert world.kube.read("node1")["status"]["conditions"] == before
    assert world.kube.read("node1")["metadata"]["resourceVersion"] == version, "a restart writes nothing"
