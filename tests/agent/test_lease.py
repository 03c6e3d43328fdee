"""How an agent gets its lease: config, disputes about addresses, restarts, reboots."""

import contextlib
import socket
import threading

import pytest

from tests.support.wait import until
from tests.support.world import ROOT, number, vxlan_record

FRESH_S = 86_000


def other(ip: str = "192.168.1.50", mac: str = "0a:00:00:00:00:50", **more) -> dict:
    return vxlan_record(ip, mac, **more)


def test_a_missing_config_is_waited_for_with_one_line(bare_world):
    world = bare_world
    agent = world.agent(world.node(1))
    told = until("it says so", lambda: [e for e in agent.events("problem") if e["subject"] == "config"])
    assert "no network config at" in told[0]["what"]
    assert f"{ROOT}/config" in told[0]["what"]
    for _ in range(3):
        world.settled(agent)
    assert len([e for e in agent.events("problem") if e["subject"] == "config"]) == 1
    until("nothing of ours is written", lambda: world.records() == {})
    world.config()
    agent.wait_ready()


def test_a_wrong_config_is_refused_and_a_running_agent_keeps_its_last_good_one(world):
    (one,) = world.nodes(1)
    before = world.kernel("node1")
    world.config(SubnetLen=99)
    problem = until("it says so", lambda: one.problems().get("config"))
    for word in ("SubnetLen", "99", "30", "the running config is kept"):
        assert word in problem
    world.etcd.delete(f"{ROOT}/config")
    until(
        "a missing one, too",
        lambda: "is kept" in one.problems().get("config", "") and "no network config" in one.problems()["config"],
    )
    assert one.ready()
    assert world.kernel("node1") == before
    two = world.agent(world.node(2))
    until("a newcomer waits", lambda: "no network config" in two.problems().get("config", ""))
    world.config()
    two.wait_ready()
    until("no problem is left", lambda: not one.problems())


def test_a_network_that_does_not_hold_our_subnet_needs_a_drain(world):
    (one,) = world.nodes(1)
    subnet = one.subnet()
    world.config(Network="10.99.0.0/16")
    problem = until("it says so", lambda: one.problems().get("config"))
    assert "drain" in problem
    assert str(subnet) in problem
    assert one.ready()
    again = world.restart(one).wait_ready()
    assert again.network() == "10.99.0.0/16"
    assert list(world.records()) == [str(again.subnet()).replace("/", "-")], "the old record is given up"
    shown = world.run("node1", "ip", "-4", "-o", "address", "show", "flannel.1").split("inet ")[1:]
    assert [each.split()[0] for each in shown] == [str(again.subnet()).replace("/24", "/32")], "nor its address kept"


@pytest.mark.timeout(180)
def test_twenty_nodes_over_exactly_twenty_subnets(world):
    """All at once, all in namespaces that share machine-id and hostname."""
    world.config(SubnetMin="10.244.1.0", SubnetMax="10.244.20.0")
    names = [world.node(n) for n in range(1, 21)]
    agents = [world.agent(name) for name in names]
    for agent in agents:
        agent.wait_ready(120)
    records = world.records()
    assert sorted(records) == sorted(f"10.244.{n}.0-24" for n in range(1, 21))
    assert len({record["PublicIP"] for record in records.values()}) == 20
    assert len({record["BackendData"]["VtepMAC"] for record in records.values()}) == 20
    one_more = world.agent(world.node(21))
    full = until(
        "the 21st says that the range is full",
        lambda: [e for e in one_more.events("problem") if e["subject"] == "lease"],
    )
    assert "all 20 subnets" in full[0]["what"]
    assert one_more.process.poll() is None
    agents[0].stop()
    (key,) = [key for key, record in records.items() if record["PublicIP"] == "192.168.1.2"]
    world.etcd.delete(f"{ROOT}/subnets/{key}")
    one_more.wait_ready(60)
    assert str(one_more.subnet()).replace("/", "-") == key


def test_the_second_node_on_one_address_refuses_naming_the_first(world):
    one, _ = world.nodes(2)
    record = world.records()[str(one.subnet()).replace("/", "-")]
    second = twin(world)
    assert second.process.wait(20) == 1
    (told,) = second.events("lease.conflict")
    for word in ("192.168.1.2", str(one.subnet()).replace("/", "-"), "node1", "--take-over"):
        assert word in told["reason"]
    assert world.records()[str(one.subnet()).replace("/", "-")] == record
    assert one.ready()


def twin(world, *flags):
    """A node9 that claims node1's address."""
    name = world.node(9)
    world.run(name, "ip", "addr", "flush", "dev", "eth0")
    world.run(name, "ip", "addr", "add", "192.168.1.2/24", "dev", "eth0")
    return world.agent(name, *flags)


def test_two_nodes_with_one_address_behind_nat(world):
    """Off-link, so nobody can be asked: the second refuses while the record is fresh; a flag takes over, unfought."""
    one, two = (world.agent(world.node(n), "--public-ip=203.0.113.5", f"--node-name=node{n}") for n in (1, 2))
    for agent in (one, two):
        until("one is ready, or refused", lambda agent=agent: agent.process.poll() is not None or agent.ready())
    first, second = (one, two) if one.process.poll() is None else (two, one)
    assert second.process.wait(20) == 1
    (told,) = second.events("lease.conflict")
    for word in ("203.0.113.5", first.node, "off-link", "--take-over"):
        assert word in told["reason"]
    subnet = first.subnet()
    taker = world.agent(
        second.node, "--public-ip=203.0.113.5", f"--node-name={second.node}", "--take-over", run_dir=second.run_dir.name
    )
    taker.wait_ready()
    assert taker.subnet() == subnet
    problem = until("the first says so", lambda: first.problems().get("lease"))
    assert "203.0.113.5" in problem
    assert taker.node in problem
    assert first.process.poll() is None
    until("and is not ready", lambda: not first.ready(), 25)
    for agent in (first, taker):
        world.settled(agent)
    record = world.records()[str(subnet).replace("/", "-")]
    assert record["BackendData"]["VtepMAC"] == taker.mac() != first.mac()
    assert taker.ready()


def test_a_reinstalled_node_takes_its_old_record_over(world):
    name = world.node(1)
    world.put_record(
        "10.244.47.0-24",
        other("192.168.1.2", "0a:00:00:00:00:07", OverlayNode="f00/old/02:00:00:00:00:01"),
        world.etcd.grant(FRESH_S),
    )
    agent = world.agent(name).wait_ready()
    assert str(agent.subnet()) == "10.244.47.0/24"
    assert agent.mac() != "0a:00:00:00:00:07", "another interface wrote it: its owner may live after all"
    (lease,) = agent.events("lease")
    assert lease["level"] == "warning"
    assert "taken over from old" in lease["method"]


def test_a_new_address_after_a_restart_keeps_the_subnet(world):
    one, two = world.nodes(2)
    subnet, mac = one.subnet(), one.mac()
    one.stop()
    world.run("node1", "ip", "link", "del", "flannel.1")
    readdress(world)
    again = world.restart(one).wait_ready()
    assert (again.subnet(), again.mac()) == (subnet, mac)
    assert world.records()[str(subnet).replace("/", "-")]["PublicIP"] == "192.168.1.102"
    until("the peer follows", lambda: number("192.168.1.102") in world.kernel("node2")["fdb"].values())


def readdress(world) -> None:
    world.run("node1", "ip", "addr", "del", "192.168.1.2/24", "dev", "eth0")
    world.run("node1", "ip", "addr", "add", "192.168.1.102/24", "dev", "eth0")
    world.run("node1", "ip", "route", "replace", "default", "via", "192.168.1.1")


def test_a_reboot_keeps_subnet_and_mac(world):
    """No device, no run-dir, no subnet.env: all that is left stands in etcd."""
    import shutil

    one, _ = world.nodes(2)
    subnet, mac = one.subnet(), one.mac()
    one.stop()
    world.run("node1", "ip", "link", "del", "flannel.1")
    shutil.rmtree(one.run_dir)
    again = world.restart(one).wait_ready()
    assert (again.subnet(), again.mac()) == (subnet, mac)


def answer_for_everybody(world) -> list[bytes]:
    """The underlay's bridge answers each ARP probe (Linux' own proxy ARP leaves out those from 0.0.0.0)."""
    answered: list[bytes] = []

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
        made.bind(("br0", 0x0806))
        return made

    link = world.inside("underlay", listen)
    own = link.getsockname()[4]

    def run() -> None:
        with contextlib.suppress(OSError), link:
            while world.etcd.process.poll() is None:
                frame = link.recv(2048)
                if frame[20:22] == b"\x00\x01" and frame[28:32] == bytes(4):
                    asker, target = frame[22:28], frame[38:42]
                    link.send(asker + own + frame[12:20] + b"\x00\x02" + own + target + asker + bytes(4))
                    answered.append(target)

    threading.Thread(target=run, daemon=True).start()
    return answered


def test_a_router_that_answers_for_every_address_is_nobody_in_particular(world):
    """Proxy ARP, as in some clouds: after a reboot our own address is answered for, by the router."""
    one, _ = world.nodes(2)
    subnet, mac = one.subnet(), one.mac()
    one.stop()
    world.run("node1", "ip", "link", "del", "flannel.1")
    answered = answer_for_everybody(world)
    again = world.restart(one).wait_ready()
    assert (again.subnet(), again.mac()) == (subnet, mac)
    again.stop()
    world.run("node1", "ip", "link", "del", "flannel.1")
    key = str(subnet).replace("/", "-")
    world.put_record(key, other("192.168.1.2", OverlayNode="f00/stranger/02:00:00:00:00:77"), world.etcd.grant(FRESH_S))
    refused = world.restart(again)
    assert refused.process.wait(20) == 1, "but a fresh record of a stranger is not overrun on its word"
    assert "stranger" in refused.events("lease.conflict")[0]["reason"]
    assert len(answered) >= 2, "it did answer, both times"


def test_the_old_subnet_env_is_a_preference(world):
    node = world.node(1)
    folder = world.folder / node
    folder.mkdir()
    (folder / "subnet.env").write_text(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.93.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    assert str(world.agent(node).wait_ready().subnet()) == "10.244.93.0/24"
