"""What keeps pods apart that is not ours to put back is named: the rule, the table, the device, and what to do."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
from contextlib import contextmanager

import pytest

from overlay.kernel.wireguard.userspace import TUN, make_tun
from overlay.lab import matrix, netns
from tests.support.reach import all_reach
from tests.support.wait import until
from tests.support.world import number


def is_told(agent, subject, *words):
    """That a problem of the subject comes, with all these words."""

    def told():
        text = agent.problems().get(subject, "")
        return text if all(word in text for word in words) else ""

    return until(f"{subject}: {words}", told, 25)


def is_over(agent):
    until("no problem is left", lambda: not agent.problems() and agent.ready(), 25)


def pods_of(world, agents):
    return [world.pod(agent, "a") for agent in agents]


# --- report 3


def test_report_3_back_to_the_recorded_address_as_soon_as_it_is_local_again(world):
    one, _ = world.nodes(2)
    home = number("192.168.1.2")
    world.run("node1", "ip", "addr", "add", "192.168.1.100/32", "dev", "eth0")
    world.run("node1", "ip", "addr", "del", "192.168.1.2/24", "dev", "eth0")
    until("the other address stands in", lambda: world.device("node1").local == number("192.168.1.100"), 10)
    world.run("node1", "ip", "addr", "add", "192.168.1.2/24", "dev", "eth0")
    until("back", lambda: world.device("node1").local == home, 10)
    until("and on record", lambda: [r["PublicIP"] for r in world.records().values()].count("192.168.1.2") == 1)
    is_over(one)


@pytest.mark.parametrize("flag", ["--iface=eth0", "--iface-regex=eth0", "--iface-can-reach=192.168.1.1"])
def test_report_3_a_virtual_ip_that_stands_first_at_a_start_is_not_taken(world, flag):
    node = world.node(1)
    world.run(node, "ip", "addr", "flush", "dev", "eth0")
    for address in ("192.168.1.100/32", "192.168.1.2/24"):
        world.run(node, "ip", "addr", "add", address, "dev", "eth0")
    world.run(node, "ip", "route", "replace", "default", "via", "192.168.1.1")
    world.agent(node, flag).wait_ready()
    assert world.device(node).local == number("192.168.1.2")


def test_report_3_the_recorded_one_of_two_equal_addresses_is_kept_through_a_restart(world):
    one, _ = world.nodes(2)
    world.run("node1", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries")
    world.run("node1", "ip", "addr", "add", "192.168.1.102/24", "dev", "eth0")
    world.run("node1", "ip", "addr", "del", "192.168.1.2/24", "dev", "eth0")
    until("the other stands in", lambda: world.device("node1").local == number("192.168.1.102"), 10)
    world.run("node1", "ip", "addr", "add", "192.168.1.2/24", "dev", "eth0")
    until("back, though it is the secondary now", lambda: world.device("node1").local == number("192.168.1.2"), 10)
    until("on record", lambda: "192.168.1.2" in (one.run_dir / "lease.json").read_text())
    world.restart(one, "--iface=eth0").wait_ready()
    assert world.device("node1").local == number("192.168.1.2")


def test_report_3_an_address_that_another_host_answers_for_is_told(world):
    one, two = world.nodes(2)
    world.run("node2", "ip", "addr", "add", "192.168.1.2/32", "dev", "eth0")
    one.stop()
    again = world.restart(one)
    mac = world.run("node2", "ip", "-br", "link", "show", "eth0").split()[2]
    is_told(again, "duplicate address", "192.168.1.2", mac, "--iface")
    until("which is no small thing", lambda: not again.ready())
    assert "duplicate address" not in two.problems()


# --- report 4


def test_report_4_an_address_on_the_loopback_has_the_mtu_of_the_interface_that_sends(world):
    agents = []
    for n in (1, 2):
        node = world.node(n)
        world.run(node, "ip", "addr", "add", f"10.9.9.{n}/32", "dev", "lo")
        agents.append(world.agent(node, f"--iface=10.9.9.{n}", f"--node-name={node}"))
    for n, other in ((1, 2), (2, 1)):
        source = f"10.9.9.{n}"
        world.run(f"node{n}", "ip", "route", "add", f"10.9.9.{other}", "dev", "eth0", "src", source)
        world.run(f"node{n}", "ip", "route", "replace", "default", "via", "192.168.1.1", "src", source)
    # the gateway has the store: it answers to those addresses
    netns.inside(f"overlay-{world.lab}-underlay", lambda: os.system("ip route add 10.9.9.0/24 dev br0"))
    for agent in agents:
        agent.wait_ready()
    until("both have their peer", lambda: all(world.peers(f"node{n}") == 1 for n in (1, 2)))
    for n, agent in enumerate(agents, 1):
        device, under = world.device(f"node{n}"), agent.status()["underlay"]
        assert (device.mtu, device.local) == (1450, number(f"10.9.9.{n}"))
        assert (under["interface"], under["address"], under["mtu"]) == ("eth0", f"10.9.9.{n}", 1500)
    source, target = pods_of(world, agents)
    until("pods reach each other", lambda: all_reach([source, target]), 10)
    with matrix.Wires([source, target]) as wires:
        assert {cell.size for cell in wires.all()} == {1450}, "full-size packets pass"
    world.run("node1", "ip", "link", "set", "eth0", "mtu", "1400")
    until("followed", lambda: world.device("node1").mtu == 1350)


# --- report 5


@contextmanager
def point_to_point(one: str, two: str, name: str = "tun0"):
    """A tun between two namespaces, as VPNs have it: no ARP on it. Addresses 10.7.0.1/24 and 10.7.0.2/24."""

    make_tun()  # a chroot has none

    def made(host: int):
        file = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(file, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
        assert os.system(f"ip addr add 10.7.0.{host}/24 dev {name} && ip link set {name} up") == 0
        return file

    ends = [netns.inside(space, lambda host=host: made(host)) for host, space in enumerate((one, two), 1)]
    stop, stopped = os.pipe()

    def relay():
        while True:
            ready, _, _ = select.select([*ends, stop], [], [])
            if stop in ready:
                return
            for end in ready:
                os.write(ends[1 - ends.index(end)], os.read(end, 65536))

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(stopped, b"x")
        thread.join()
        for file in (*ends, stop, stopped):
            os.close(file)


def test_report_5_peers_behind_a_point_to_point_link_are_reached_by_the_tunnel(world):
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    nodes = [world.node(n) for n in (1, 2)]
    with point_to_point(*(world.namespace(node) for node in nodes)):
        agents = [world.agent(node, "--iface=tun0", f"--node-name={node}") for node in nodes]
        for agent in agents:
            agent.wait_ready()
        until("both have their peer, by the tunnel", lambda: all(world.peers(node) == 1 for node in nodes))
        assert [peer["path"] for peer in agents[0].status()["peers"]] == ["vxlan"]
        assert "tun0" in agents[0].status()["direct_routing"]
        assert "ARP" in agents[0].status()["direct_routing"]
        pods = pods_of(world, agents)
        until("pods reach each other", lambda: all_reach(pods), 10)


def test_report_5_direct_routes_stand_where_peers_are_neighbours(world):
    world.config(Backend={"Type": "vxlan", "DirectRouting": True})
    one, _ = world.nodes(2)
    assert [peer["path"] for peer in one.status()["peers"]] == ["direct"]
    assert "192.168.1.0/24" in one.status()["direct_routing"]


# --- report 6


def other_device(world):
    world.run("node1", "ip", "link", "add", "mesh0", "type", "bridge")
    world.run("node1", "ip", "link", "set", "mesh0", "up")


def do(world, *lines: str):
    world.run("node1", "sh", "-ec", "\n".join(lines))


WAYS = {
    "a mesh VPN's table": (
        ["ip rule add pref 5270 lookup 52", "ip route add 10.244.0.0/16 dev mesh0 table 52"],
        ["leave by mesh0, not by flannel.1", "10.244.0.0/16 dev mesh0 of table 52", "ip rule 5270 (from all lookup 52)",
         "ip rule add pref 5269 to 10.244.0.0/16 lookup main"],
        ["ip rule del pref 5270"],
    ),
    "a blackhole": (
        ["ip rule add pref 100 lookup 53", "ip route add blackhole 10.244.0.0/16 table 53"],
        ["are dropped (blackhole)", "blackhole 10.244.0.0/16 of table 53", "ip rule 100"],
        ["ip rule del pref 100"],
    ),
    "an unreachable route before ours in main": (
        ["for n in 0 1; do ip route add unreachable 10.244.$((n * 128)).0/17 table 60; done", "ip rule add pref 9 lookup 60"],
        ["are refused (unreachable)", "of table 60", "ip rule 9"],
        ["ip rule del pref 9"],
    ),
    "a rule that ends it itself": (
        ["ip rule add pref 8 to 10.244.0.0/16 prohibit"],
        ["are refused (prohibited)", "ip rule 8 (from all to 10.244.0.0/16 prohibit)"],
        ["ip rule del pref 8"],
    ),
    "a rule by the pods' bridge": (
        ["ip rule add pref 7 iif cni0 lookup 52", "ip route add 10.244.0.0/16 dev mesh0 table 52"],
        ["packets of pods here to 10.244.", "leave by mesh0", "ip rule 7 (from all iif cni0 lookup 52)"],
        ["ip rule del pref 7"],
    ),
    "a rule by the tunnel": (
        ["ip rule add pref 6 iif flannel.1 lookup 52", "ip route add 10.244.0.0/16 dev mesh0 table 52"],
        ["to pods here leave by mesh0, not by cni0", "ip rule 6"],
        ["ip rule del pref 6"],
    ),
    "a blackhole over the other node's pods": (
        ["ip route add blackhole {there} metric 1"],
        ["are dropped (blackhole)", "the route blackhole {there} of table main says so; ip route del blackhole {there}"],
        ["ip route del blackhole {there}"],
    ),
    "a rule by the tunnel's port": (
        ["ip rule add pref 5 ipproto udp dport 8472 lookup 52", "ip route add blackhole default table 52"],
        ["packets of the tunnel to 10.244.", "ip rule 5 (from all ipproto udp dport 8472 lookup 52)"],
        ["ip rule del pref 5"],
    ),
    "the other node's address in a blackhole": (
        ["ip route add blackhole 192.168.1.3/32"],
        ["packets of the tunnel to 10.244.", "find no route", "the route blackhole 192.168.1.3/32 of table main says so"],
        ["ip route del blackhole 192.168.1.3/32"],
    ),
    "the routes of the underlay": (
        ["ip route del 192.168.1.0/24 dev eth0", "ip route del default || true"],
        ["packets of the tunnel to 10.244.", "no route by eth0 leads to 192.168.1.3"],
        ["ip route add 192.168.1.0/24 dev eth0 proto kernel scope link src 192.168.1.2",
         "ip route add default via 192.168.1.1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS)
def test_report_6_where_the_kernel_sends_elsewhere_rule_table_and_device_are_named(world, case):
    breaks, words, mends = WAYS[case]
    agents = world.nodes(2)
    pods_of(world, agents)
    other_device(world)
    is_over(agents[0])
    there, own = str(agents[1].subnet()), str(agents[0].subnet())
    do(world, *(line.replace("{there}", there) for line in breaks))
    told = is_told(agents[0], "ways", *(word.replace("{there}", there) for word in words))
    assert f"ip route del {own}" not in told, "advice that would cut its own pods off"
    assert "ip route del default" not in told
    until("not well", lambda: not agents[0].ready(), 25)
    do(world, *(line.replace("{there}", there) for line in mends))
    is_over(agents[0])


def test_a_bridge_that_lost_its_address_is_told_with_the_command_that_mends_it(world):
    agents = world.nodes(2)
    pods = pods_of(world, agents)
    is_over(agents[0])
    do(world, "ip addr flush dev cni0")
    told = is_told(agents[0], "routes", "cni0, which pods are attached to, has not their gateway's address")
    assert not all_reach(pods)
    do(world, told.rpartition(": ")[2])
    is_over(agents[0])
    assert all_reach(pods)


def test_pods_whose_route_went_get_no_advice_about_the_default_route(world):
    agents = world.nodes(2)
    pods_of(world, agents)
    is_over(agents[0])
    own = str(agents[0].subnet())
    do(world, f"ip route del {own} dev cni0", "ip route add default via 192.168.1.1 || true")
    is_told(agents[0], "routes", f"no route leads {own} to cni0")
    assert "ip route del default" not in str(agents[0].problems())


def test_report_6_what_status_advises_mends_it(world):
    one, two = world.nodes(2)
    pods = pods_of(world, (one, two))
    other_device(world)
    do(world, "ip rule add pref 5270 lookup 52", "ip route add 10.244.0.0/16 dev mesh0 table 52")
    text = is_told(one, "ways", "puts the pod network's routes before it")
    assert not all_reach(pods)
    do(world, text.partition("; ")[2].partition(" puts")[0])
    is_over(one)
    assert all_reach(pods)


def test_report_6_a_rule_by_mark_is_told_but_ends_no_readiness(world):
    one, _ = world.nodes(2)
    other_device(world)
    do(world, "ip rule add pref 50 fwmark 0x10/0xff lookup 52", "ip route add 10.244.0.0/16 dev mesh0 table 52")
    is_told(one, "marks", "with mark 0x10 leave by mesh0", "ip rule 50 (from all fwmark 0x10/0xff lookup 52)")
    assert one.ready()


FILTERS = {
    "a drop rule of nftables": (
        ["nft add table ip foreign", "nft add chain ip foreign passing '{ type filter hook forward priority 5; }'",
         "nft add rule ip foreign passing ip daddr 10.244.0.0/16 drop"],
        "foreign rules", ["chain ip foreign passing drops packets of pods here to 10.244.", "nft delete rule ip foreign passing handle"],
        ["nft delete table ip foreign"],
    ),
    "one behind a jump, by interface": (
        ["nft add table inet foreign", "nft add chain inet foreign sub",
         "nft add chain inet foreign passing '{ type filter hook forward priority 5; policy accept; }'",
         "nft add rule inet foreign passing ct state established,related accept",
         "nft add rule inet foreign passing iifname cni0 jump sub", "nft add rule inet foreign sub oifname != eth0 reject"],
        "foreign rules", ["chain inet foreign sub drops packets of pods here"],
        ["nft delete table inet foreign"],
    ),
    "one of iptables": (
        ["iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
         "iptables -A FORWARD -s 10.244.0.0/16 -d 10.244.0.0/16 -j DROP"],
        "foreign rules", ["drops packets of pods here", "iptables -t filter -D FORWARD -s 10.244.0.0/16 -d 10.244.0.0/16 -j DROP"],
        ["iptables -F FORWARD"],
    ),
    "the tunnel's port is closed": (
        ["nft add table inet fw", "nft add chain inet fw in '{ type filter hook input priority 0; policy drop; }'",
         "nft add rule inet fw in ct state established accept", "nft add rule inet fw in iifname lo accept",
         "nft add rule inet fw in tcp dport 22 accept"],
        "foreign rules", ["chain inet fw in drops the tunnel from 192.168.1.3 (UDP port 8472) by its policy",
                          "nft add rule inet fw in udp dport 8472 accept"],
        ["nft delete table inet fw"],
    ),
    "the tunnel's port is closed, pings are not": (
        ["nft add table inet fw", "nft add chain inet fw in '{ type filter hook input priority 0; policy drop; }'",
         "nft add rule inet fw in ct state vmap '{ established : accept, related : accept, invalid : drop }'",
         "nft add rule inet fw in icmp type echo-request accept", "nft add rule inet fw in iifname lo accept"],
        "foreign rules", ["chain inet fw in drops the tunnel from 192.168.1.3 (UDP port 8472) by its policy"],
        ["nft delete table inet fw"],
    ),
    "a drop by a named set": (
        ["nft add table inet fw", "nft add chain inet fw passing '{ type filter hook forward priority 0; }'",
         "nft add set inet fw bad '{ type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }'",
         "nft add rule inet fw passing ip daddr @bad drop"],
        "foreign rules", ["chain inet fw passing drops packets of pods here to 10.244."],
        ["nft delete table inet fw"],
    ),
    "pods sent to another address": (
        ["iptables -t nat -A PREROUTING -d 10.244.0.0/16 -j DNAT --to-destination 192.168.1.1"],
        "foreign rules", ["sends packets of pods here to 10.244.", "to another address", "iptables -t nat -D PREROUTING"],
        ["iptables -t nat -F PREROUTING"],
    ),
    "masquerade of what leaves by the tunnel": (
        ["iptables -t nat -A POSTROUTING -o flannel.1 -j MASQUERADE"],
        "foreign masquerade", ["masquerades packets of pods here", "iptables -t nat -D POSTROUTING -o flannel.1 -j MASQUERADE"],
        ["iptables -t nat -F POSTROUTING"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERS)
def test_report_6_foreign_rules_that_cut_pods_off_are_named(world, case):
    breaks, subject, words, mends = FILTERS[case]
    agents = world.nodes(2)
    pods = pods_of(world, agents)
    is_over(agents[0])
    do(world, *breaks)
    is_told(agents[0], subject, *words)
    if "masquerade" not in case:
        assert not all_reach(pods)
    do(world, *mends)
    is_over(agents[0])
    assert all_reach(pods)


def test_report_6_rules_that_let_pods_through_are_no_news(world):
    agents = world.nodes(2)
    pods_of(world, agents)
    do(
        world,
        "nft add table inet fw",
        "nft add chain inet fw passing '{ type filter hook forward priority 0; policy accept; }'",
        "nft add rule inet fw passing ip saddr 10.244.0.0/16 accept",
        "nft add rule inet fw passing ip daddr 10.244.0.0/16 accept",
        "nft add rule inet fw passing drop",
        "nft add rule inet fw passing ip daddr 172.16.0.0/12 drop",
        "iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    )
    # the same with a rule that is a fault, so that it was read
    do(world, "nft insert rule inet fw passing iifname flannel.1 drop")
    text = is_told(agents[0], "foreign rules", "packets from 10.244.")
    assert "packets of pods here" not in text
    assert "nat" not in text


def test_report_6_forwarding_switched_off_on_the_pods_bridge_is_put_back(world):
    agents = world.nodes(2)
    pods = pods_of(world, agents)
    do(world, "echo 0 > /proc/sys/net/ipv4/conf/cni0/forwarding")
    until("put back", lambda: world.run("node1", "cat", "/proc/sys/net/ipv4/conf/cni0/forwarding").strip() == "1")
    until("pods reach each other", lambda: all_reach(pods), 10)


def test_report_6_an_underlay_without_carrier_is_told(world):
    one, _ = world.nodes(2)
    space = f"overlay-{world.lab}-underlay"
    netns.inside(space, lambda: os.system("ip link set v1 down"))
    is_told(one, "carrier", "eth0", "no carrier")
    until("not well", lambda: not one.ready(), 25)
    netns.inside(space, lambda: os.system("ip link set v1 up"))
    is_over(one)


# --- report 7


def test_report_7_a_bridge_of_another_name_that_has_the_gateway_is_the_pods(world):
    """mk-docker-opts: docker0 has the lease's gateway."""
    one, two = world.nodes(2)
    gateway = f"{str(one.subnet()).rsplit('.', 1)[0]}.1/24"
    do(world, "ip link add docker0 type bridge", f"ip addr add {gateway} dev docker0", "ip link set docker0 up")
    container = world.namespace("node1-c")
    netns.create(container)
    do(world, f"ip link add c0 type veth peer name eth0 netns {container}", "ip link set c0 master docker0 up")
    address = gateway.replace(".1/24", ".77/24")
    world.run(
        "node1-c",
        "sh",
        "-ec",
        f"ip addr add {address} dev eth0; ip link set eth0 up; ip route add default via {gateway[:-3]}",
    )
    until(
        "it is covered",
        lambda: one.status()["antispoof"] == {"on": True, "bridges": ["docker0"], "bound_ports": 1, "lifted": False},
    )
    target = world.pod(two, "a")
    end = matrix.End("node1-c", "pod", container, address[:-3], "node1")
    until("it reaches a pod", lambda: all_reach([end, target]), 10)
    until("no pod is without protection", lambda: not one.problems())


def test_report_7_pods_without_a_bridge_are_told_to_be_unprotected(world):
    one, _ = world.nodes(2)
    base = str(one.subnet()).rsplit(".", 1)[0]
    do(world, "ip link add ptp0 type veth peer name ptp1", f"ip addr add {base}.1/32 dev ptp0", "ip link set ptp0 up")
    is_told(one, "unprotected", "ptp0", "no bridge")
    assert one.ready()
