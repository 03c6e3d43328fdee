"""The underlay changes, the config changes: followed live, and nothing lost that need not be."""

import shutil

import pytest

from overlay.lab import matrix, topology
from tests.support.reach import all_reach
from tests.support.wait import until
from tests.support.world import number


def test_a_smaller_underlay_mtu_is_followed(world):
    one, _ = world.nodes(2)
    before = world.kernel("node1")
    for underlay, inner in ((1400, 1350), (1500, 1450)):
        world.run("node1", "ip", "link", "set", "eth0", "mtu", str(underlay))
        until("the device follows", lambda inner=inner: world.device("node1").mtu == inner, 5)
        until(
            "subnet.env follows",
            lambda inner=inner: f"FLANNEL_MTU={inner}" in (one.run_dir / "subnet.env").read_text(),
            5,
        )
        until(
            "the CNI list follows",
            lambda inner=inner: f'"mtu": {inner}' in (one.run_dir / "cni" / "10-flannel.conflist").read_text(),
            5,
        )
    assert world.kernel("node1") == before


def test_an_mtu_above_the_underlays_is_lowered_and_told(world):
    world.config(Backend={"Type": "vxlan", "MTU": 9000})
    one, _ = world.nodes(2)
    assert world.device("node1").mtu == 1450
    assert "9000" in one.problems()["mtu"]
    assert one.ready(), "it works all the same"
    world.config(Backend={"Type": "vxlan", "MTU": 1300})
    until("a configured one below it is taken, live", lambda: world.device("node1").mtu == 1250)
    until("no problem is left", lambda: not one.problems())


def test_a_new_address_is_followed_live(world):
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    index, subnet, mac = world.index("node1"), one.subnet(), one.mac()
    world.run("node1", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries")
    world.run("node1", "ip", "addr", "add", "192.168.1.102/24", "dev", "eth0")
    assert world.device("node1").local == number("192.168.1.2"), "kept while it stands"
    world.run("node1", "ip", "addr", "del", "192.168.1.2/24", "dev", "eth0")
    until("the tunnel's source", lambda: world.device("node1").local == number("192.168.1.102"), 10)
    until("the peer's FDB", lambda: number("192.168.1.102") in world.kernel("node2")["fdb"].values(), 10)
    assert (world.index("node1"), one.subnet(), one.mac()) == (index, subnet, mac), (
        "the device was changed, not made again"
    )
    with matrix.Wires([source, target]) as wires:
        assert all(cell.ok for cell in wires.all())
    until("ready", one.ready)


def test_the_underlay_loses_its_address_for_a_while(world):
    one, _ = world.nodes(2)
    world.run("node1", "ip", "addr", "del", "192.168.1.2/24", "dev", "eth0")
    problem = until("it says so", lambda: one.problems().get("underlay"))
    assert "eth0" in problem or "--iface" in problem
    assert one.process.poll() is None
    world.run("node1", "ip", "addr", "add", "192.168.1.2/24", "dev", "eth0")
    until("and recovers", lambda: not one.problems() and world.peers("node1") == 1, 15)


def test_the_underlay_goes_down_and_up(world):
    one, two = world.nodes(2)
    source, target = world.pod(one, "a"), world.pod(two, "a")
    world.run("node1", "ip", "link", "set", "eth0", "down")
    world.run("node1", "ip", "link", "set", "eth0", "up")
    until("pods reach each other", lambda: all_reach([source, target]), 20)


def test_direct_routes_come_back_after_the_underlay_was_down(world):
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    world.nodes(2)
    before = world.kernel("node1")["routes"]
    assert len(before) == 1
    world.run("node1", "sh", "-c", "ip link set eth0 down; ip link set eth0 up")
    until("the route is back", lambda: world.kernel("node1")["routes"] == before, 10)


def test_a_public_ip_that_is_not_local_is_only_advertised(world):
    node = world.node(1)
    agent = world.agent(node, "--public-ip=203.0.113.5").wait_ready()
    (record,) = world.records().values()
    assert record["PublicIP"] == "203.0.113.5"
    assert world.device(node).local == number("192.168.1.2")
    assert agent.status()["underlay"]["public_ip"] == "203.0.113.5"


def test_the_reason_of_the_choice_is_logged(world):
    node = world.node(1)
    agent = world.agent(node).wait_ready()
    assert "routes to the store" in agent.events("underlay")[0]["chosen"]


@pytest.mark.parametrize("flag", ["--iface=nope", "--iface-regex=^zz", "--iface-can-reach=203.0.113.1"])
def test_an_interface_that_is_not_there_is_waited_for_in_one_line(world, flag):
    node = world.node(1)
    if "can-reach" in flag:
        world.run(node, "ip", "route", "del", "default")
    agent = world.agent(node, flag)
    problem = until("it says so", lambda: agent.problems().get("underlay"))
    assert flag.split("=")[1] in problem
    assert "eth0 192.168.1.2" in problem
    assert len([e for e in agent.events("problem") if e["subject"] == "underlay"]) == 1


@pytest.mark.parametrize(
    ("backend", "name", "port"),
    [
        pytest.param({"Port": 4789}, "flannel.1", 4789, id="port"),
        pytest.param({"GBP": True}, "flannel.1", 8472, id="GBP"),
        pytest.param({"VNI": 42}, "flannel.42", 8472, id="VNI"),
    ],
)
def test_a_change_the_kernel_cannot_make_live_makes_the_device_again_with_its_mac(world, backend, name, port):
    agents = world.nodes(2)
    source, target = world.pod(agents[0], "a"), world.pod(agents[1], "a")
    macs = [agent.mac() for agent in agents]
    world.config(Backend={"Type": "vxlan", **backend})
    for node in ("node1", "node2"):
        until(
            "the new device",
            lambda node=node: (
                world.device(node, name).port == port and world.device(node, name).gbp == bool(backend.get("GBP"))
            ),
            15,
        )
        until("and its peer", lambda node=node: world.peers(node, name) == 1, 15)
        if name != "flannel.1":
            until("the old one is gone", lambda node=node: world.device(node, "flannel.1") is None)
            until("and its nat table", lambda node=node: "overlay-1\n" not in world.run(node, "nft", "list", "tables"))
    until("the same MACs", lambda: [agent.mac() for agent in agents] == macs)
    with matrix.Wires([source, target]) as wires:
        assert all(cell.ok for cell in wires.all())
    if name == "flannel.1":
        assert [e for e in agents[0].events("device") if "the kernel cannot change it" in e.get("reason", "")], (
            "it says why"
        )


def test_a_vni_changed_while_the_agent_was_down_leaves_no_old_device(world):
    one, _ = world.nodes(2)
    one.stop()
    world.config(Backend={"Type": "vxlan", "VNI": 42})
    world.restart(one).wait_ready()
    assert world.device("node1", "flannel.1") is None
    assert world.device("node1", "flannel.42") is not None


def test_an_adopted_device_is_changed_live_and_keeps_its_mac(world):
    node = world.node(1)
    mac = "0e:2a:11:22:33:44"
    world.run(
        node,
        "ip",
        "link",
        "add",
        "flannel.1",
        "address",
        mac,
        "mtu",
        "1300",
        "type",
        "vxlan",
        "id",
        "1",
        "dstport",
        "8472",
        "dev",
        "eth0",
        "local",
        "192.168.1.99",
        "learning",
    )
    index = world.index(node)
    agent = world.agent(node).wait_ready()
    device = world.device(node)
    assert (world.index(node), agent.mac()) == (index, mac)
    assert (device.mtu, device.local, device.learning, device.up) == (1450, number("192.168.1.2"), False, True)


def test_two_networks_on_one_node_leave_each_other_alone(world):
    """Flannel's "multi": two agents, two prefixes, two VNIs, one underlay; both with direct routes of our number."""
    world.etcd.put(
        "/second/network/config",
        '{"Network":"10.50.0.0/16","Backend":{"Type":"vxlan","VNI":2,"Port":8473,"DirectRouting":true}}',
    )
    one, two = world.nodes(2)
    firsts = [
        world.agent(name, "--etcd-prefix=/second/network", f"--node-name={name}", run_dir=f"{name}-second").wait_ready()
        for name in ("node1", "node2")
    ]
    for agent in (one, two, *firsts):
        until(
            "each has its peer",
            lambda agent=agent: len(agent.status()["peers"]) == 1 and not agent.status()["differences"],
        )

    def routes() -> str:
        return world.run("node1", "ip", "route", "show", "proto", "111")

    before = routes()
    assert before.count("\n") == 2
    world.run("node1", "sh", "-c", "ip link set flannel.1 down; ip link set flannel.1 up")
    until("back", lambda: routes() == before)
    assert one.ready()
    assert firsts[0].ready()

    def uninstall(agent, *more: str) -> str:
        flags = agent.command[agent.command.index("-m") + 2 :]
        return world.run(agent.node, agent.command[2], "-m", "overlay.cli.app", "uninstall", *more, *flags)

    one.stop()
    assert "device flannel.1" in uninstall(one)
    left = "".join(line for line in before.splitlines(keepends=True) if "10.50." in line)
    assert left.count("\n") == 1
    assert routes() == left, "the other network's direct route is no business of this one"
    assert firsts[0].status()["counters"].get("mended_route", 0) == 0
    for agent in (two, firsts[1]):
        agent.stop()
        shutil.rmtree(agent.run_dir)
    with pytest.raises(AssertionError, match=r"several networks \(VNI 1, 2\).*--vni; nothing was removed"):
        uninstall(two, "--force")
    for agent, flags, device in ((two, ("--vni=1",), "flannel.1"), (firsts[1], (), "flannel.2")):
        assert device in world.run("node2", "ip", "link")
        with pytest.raises(
            AssertionError, match=rf"(?s)removed device {device}.*1 routes are .*of which nothing here says"
        ):
            uninstall(agent, "--force", *flags)
        assert device not in world.run("node2", "ip", "link")
    assert "overlay-" not in world.run("node2", "nft", "list", "tables")


def test_a_flap_of_the_underlay_too_short_to_see_brings_direct_routes_back(world):
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    world.nodes(3)
    before = world.kernel("node1")["routes"]
    assert len(before) == 2
    batch = world.folder / "flap"
    batch.write_text("link set eth0 down\nlink set eth0 up\n")
    world.run("node1", "ip", "-batch", str(batch))
    until("the routes are back", lambda: world.kernel("node1")["routes"] == before, 10)


def test_addresses_elsewhere_on_the_node_are_no_news(world):
    """A Service proxy adds addresses to dummy devices all day long."""
    one, _ = world.nodes(2)
    plans = len(one.events("peers"))
    for n in range(5):
        world.run("node1", "ip", "addr", "add", f"172.31.0.{n}/32", "dev", "lo")
    world.config(Backend={"Type": "vxlan", "MTU": 1400})
    until("it took notice of something later", lambda: world.device("node1").mtu == 1350)
    until("and planned for it", lambda: len(one.events("peers")) > plans)
    assert len(one.events("peers")) == plans + 1, "planned anew for the config alone"


def test_learned_entries_are_the_kernels(world):
    world.config(Backend={"Type": "vxlan", "Learning": True})
    one, _ = world.nodes(2)
    world.run(
        "node1", "bridge", "fdb", "add", "02:00:00:00:00:99", "dev", "flannel.1", "dst", "192.168.1.99", "dynamic"
    )
    until(
        "another event passed",
        lambda: (
            world.run("node1", "ip", "link", "set", "flannel.1", "mtu", "1200") == ""
            and world.device("node1").mtu == 1450
        ),
    )
    assert "02:00:00:00:00:99" in world.run("node1", "bridge", "fdb", "show", "dev", "flannel.1")
    assert "writes_remove_fdb" not in one.status()["counters"]


@pytest.mark.parametrize("masq", [False, True], ids=["control", "masquerade"])
def test_report_9_pods_reach_the_underlay_inside_the_network(world, masq):
    """The network holds the nodes' own prefix: who is there is no pod, and hears from a node."""
    world.config(Network="192.168.0.0/16", SubnetLen=24)
    agents = world.nodes(2, f"--ip-masq={str(masq).lower()}")
    assert all(str(agent.subnet()) != "192.168.1.0/24" for agent in agents)
    pods = [world.pod(agent, "a") for agent in agents]
    gateway = matrix.End("gateway", "node", topology.underlay_name(world.lab), topology.GATEWAY, "gateway")
    with matrix.Wires([*pods, gateway]) as wires:
        assert wires.measure(*pods).ok, "between pods never"
        cell = wires.measure(pods[0], gateway, lambda *_: "192.168.1.2", 0.5)
    assert cell.ok == masq, cell
    assert cell.why == ("" if masq else "no way back")
