"""What somebody deletes or alters comes back, seen by events (these tests end long before the slow full check)."""

import json
import shlex
from contextlib import nullcontext

import pytest

from lease.model import ip_text, mac_text
from overlay.lab import matrix, topology
from tests.support.wait import until

SOON = 5.0
"""Generous: the agent does it within a second; a busy test machine may not."""


@pytest.fixture
def pair(world):
    return world.nodes(2)


def device_index(ipr) -> int:
    return ipr.link_lookup(ifname="flannel.1")[0]


def whole(world, before) -> None:
    until("the kernel is as before", lambda: world.kernel("node1") == before, SOON)


@pytest.mark.parametrize("what", ["route", "neighbour", "fdb", "all three"])
def test_deleted_entries(world, pair, what):
    before = world.kernel("node1")
    (base, length), route = next(iter(before["routes"].items()))
    mac = before["neighbours"][base]

    def delete(ipr):
        index = device_index(ipr)
        if what in ("route", "all three"):
            ipr.route("del", dst=f"{ip_text(4, base)}/{length}", priority=route.key.metric, oif=index)
        if what in ("neighbour", "all three"):
            ipr.neigh("del", dst=ip_text(4, base), lladdr=mac_text(mac), ifindex=index)
        if what in ("fdb", "all three"):
            ipr.fdb("del", ifindex=index, lladdr=mac_text(mac), dst="192.168.1.3")

    world.ipr("node1", delete)
    whole(world, before)
    counters = until("it is counted", lambda: pair[0].status()["counters"])
    for kind in ("route", "neighbour", "fdb"):
        if what in (kind, "all three"):
            assert counters[f"mended_{kind}"] == 1
    assert pair[0].events("kernel.mended")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "ip route replace {subnet} via {base} dev flannel.1 onlink metric {metric} mtu 900", id="route altered"
        ),
        pytest.param("ip route replace {subnet} dev flannel.1 metric {metric}", id="route without its gateway"),
        pytest.param(
            "ip neigh replace {base} lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent", id="neighbour's MAC altered"
        ),
        pytest.param(
            "ip neigh replace {base} lladdr {mac} dev flannel.1 nud stale", id="neighbour not permanent any more"
        ),
        pytest.param("bridge fdb replace {mac} dev flannel.1 dst 192.168.1.99", id="FDB destination altered"),
        pytest.param("bridge fdb replace {mac} dev flannel.1 dst 192.168.1.3 port 9999", id="FDB port altered"),
        pytest.param(
            "ip route add 10.244.0.0/25 via {base} dev flannel.1 onlink proto 111", id="a route of ours too many"
        ),
        pytest.param(
            "ip neigh add 10.244.0.9 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent", id="a neighbour too many"
        ),
        pytest.param("bridge fdb add 02:00:00:00:00:99 dev flannel.1 dst 192.168.1.99", id="an FDB entry too many"),
        pytest.param("bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.168.1.99", id="a default destination"),
    ],
)
def test_altered_entries(world, pair, command):
    before = world.kernel("node1")
    (base, length), route = next(iter(before["routes"].items()))
    filled = command.format(
        subnet=f"{ip_text(4, base)}/{length}",
        base=ip_text(4, base),
        metric=route.key.metric,
        mac=mac_text(before["neighbours"][base]),
    )
    writes = sum(v for k, v in pair[0].status()["counters"].items() if k.startswith("writes_"))
    world.run("node1", *filled.split())
    until(
        "we wrote",
        lambda: sum(v for k, v in pair[0].status()["counters"].items() if k.startswith("writes_")) > writes,
        SOON,
    )
    whole(world, before)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("ip link del flannel.1", id="deleted"),
        pytest.param("ip link set flannel.1 down", id="down"),
        pytest.param("sh -c 'ip link set flannel.1 down; ip link set flannel.1 up'", id="down and up in one breath"),
        pytest.param("ip addr flush dev flannel.1", id="its address flushed"),
        pytest.param("ip link set flannel.1 address 02:00:00:00:00:01", id="another MAC"),
        pytest.param("ip link set flannel.1 mtu 1000", id="another MTU"),
        pytest.param("ip link set flannel.1 type vxlan id 1 learning", id="learning"),
        pytest.param("ip link set flannel.1 type vxlan id 1 local 192.168.1.77", id="another local address"),
        pytest.param("sh -c 'ip link del flannel.1; ip link add flannel.1 type bridge'", id="a bridge in its place"),
        pytest.param(
            "sh -c 'ip link del flannel.1; ip link add flannel.1 type vxlan id 1 dstport 4789 dev eth0'",
            id="a vxlan of another port in its place",
        ),
    ],
)
def test_the_device(world, pair, command):
    source, target = world.pod(pair[0], "a"), world.pod(pair[1], "a")
    before, device = world.kernel("node1"), world.device("node1")
    asleep = "link add" in command  # it would put its own back before another can stand there
    with pair[0].paused() if asleep else nullcontext():
        world.run("node1", *shlex.split(command))

    def same() -> bool:
        there = world.kernel("node1")
        now = world.device("node1")
        routes = {key: route._replace(oif=0) for key, route in there["routes"].items()}
        return (
            now is not None
            and now._replace(ifindex=0) == device._replace(ifindex=0)
            and routes == {key: route._replace(oif=0) for key, route in before["routes"].items()}
            and (there["neighbours"], there["fdb"]) == (before["neighbours"], before["fdb"])
        )

    until("device and peers are as before", same, SOON)
    assert f"{str(pair[0].subnet())[:-3]}/32" in world.run("node1", "ip", "-4", "addr", "show", "flannel.1")
    with matrix.Wires([source, target]) as wires:
        assert all(cell.ok for cell in wires.all())
    until("ready again", pair[0].ready)


def test_what_is_not_ours_is_never_touched(world, pair):
    subnet = str(pair[1].subnet())
    foreign = [
        "ip route add 10.99.0.0/24 via 192.168.1.3 dev eth0",
        f"ip route add {subnet} via 192.168.1.3 dev eth0 metric 5000",
        "ip route add 10.98.0.0/24 dev flannel.1",
        "ip neigh add 192.168.1.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        "ip route add blackhole 10.97.0.0/16",
        "ip addr add 172.30.0.1/32 dev flannel.1",
        "ip route add 10.96.0.0/24 dev flannel.1 table 100",
    ]
    for command in foreign:
        world.run("node1", *command.split())
    agent = world.restart(pair[0]).wait_ready()
    until("peers", lambda: len(agent.status()["peers"]) == 1)
    routes = world.run("node1", "ip", "route", "show", "table", "all")
    for there in (
        "10.99.0.0/24 via 192.168.1.3",
        f"{subnet} via 192.168.1.3 dev eth0 metric 5000",
        "10.98.0.0/24 dev flannel.1",
        "blackhole 10.97.0.0/16",
        "10.96.0.0/24 dev flannel.1 table 100",
    ):
        assert there in routes
    assert "192.168.1.77" in world.run("node1", "ip", "neigh")
    assert "172.30.0.1/32" in world.run("node1", "ip", "addr")
    assert agent.status()["conflicting_routes"] == []


def test_a_conflicting_route_is_reported_not_replaced(world, pair):
    agent, subnet = pair[0], str(pair[1].subnet())
    key = next(iter(world.kernel("node1")["routes"].values())).key
    world.run("node1", "ip", "route", "add", subnet, "dev", "eth0")
    (told,) = until("it is told", lambda: agent.status()["conflicting_routes"], SOON)
    assert told == {"destination": subnet, "via": "", "device": "eth0", "metric": 0, "protocol": 3}
    world.run("node1", "ip", "route", "del", subnet, "dev", "eth0", "metric", "0")
    until("and forgotten", lambda: not agent.status()["conflicting_routes"], SOON)
    # a part of it is as bad
    part = f"{subnet[:-3]}/26"
    world.run("node1", "ip", "route", "add", "blackhole", part)
    (told,) = until("it is told", lambda: agent.status()["conflicting_routes"], SOON)
    assert (told["destination"], told["device"]) == (part, "")
    world.run("node1", "ip", "route", "del", "blackhole", part)
    until("and forgotten", lambda: not agent.status()["conflicting_routes"], SOON)
    # one with our very metric: our own cannot stand beside it
    world.run("node1", "ip", "route", "replace", subnet, "dev", "eth0", "metric", str(key.metric))
    until("it is told", lambda: agent.status()["conflicting_routes"] and agent.status()["differences"], SOON)
    assert "eth0" in world.run("node1", "ip", "route", "show", subnet)
    until("it is not ready then", lambda: not agent.ready(), 20)
    world.run("node1", "ip", "route", "del", subnet, "dev", "eth0")
    until("ours comes back at once", lambda: world.peers("node1") == 1, SOON)
    until("ready", agent.ready)


def nat(world, node: str) -> list:
    listed = json.loads(world.run(node, "nft", "-j", "list", "ruleset"))["nftables"]
    return [
        item
        for item in listed
        if next(iter(item.values())).get("table", next(iter(item.values())).get("name")) == "overlay-1"
    ]


@pytest.mark.parametrize(
    "command",
    [
        "nft flush ruleset",
        "nft delete table ip overlay-1",
        "nft flush chain ip overlay-1 postrouting",
        "nft insert rule ip overlay-1 postrouting return",
    ],
)
def test_the_nat_table_comes_back(world, command):
    (agent,) = world.nodes(1, "--ip-masq")

    def rules() -> list:
        return [item["rule"]["expr"] for item in nat(world, "node1") if "rule" in item]

    before = until("it stands", rules)
    assert len(before) == 10
    world.run("node1", *command.split())
    until("it is back", lambda: rules() == before and agent.status()["counters"].get("mended_nat"), SOON)


def test_masquerade_does_what_it_says(world):
    one, two = world.nodes(2, "--ip-masq")
    source, target = world.pod(one, "a"), world.pod(two, "a")
    outside = matrix.End("outside", "node", topology.underlay_name(world.lab), topology.GATEWAY, "outside")
    remote = matrix.End("node2", "node", world.namespace("node2"), "192.168.1.3", "node2")
    with matrix.Wires([source, target, outside, remote]) as wires:
        assert wires.measure(source, target).seen == source.address, "pod to pod: never"
        assert wires.measure(source, outside).seen == "192.168.1.2", "to the world: the node's address"
        assert wires.measure(source, remote).seen == "192.168.1.2", "another node is the world, too"


def test_masquerade_switched_off_leaves_no_rule(world):
    (agent,) = world.nodes(1, "--ip-masq")
    until("it stands", lambda: nat(world, "node1"))
    agent = world.restart(agent, "--iptables-forward-rules=false").wait_ready()
    until("it is gone", lambda: nat(world, "node1") == [])


@pytest.mark.parametrize("name", ["net.ipv4.ip_forward", "net.ipv6.conf.flannel/1.accept_ra"])
def test_sysctls_and_files_are_looked_at_from_time_to_time(world, pair, name):
    path = "/proc/sys/" + name.replace(".", "/").replace("flannel/1", "flannel.1")
    right = world.run("node1", "cat", path).strip()
    world.run("node1", "sh", "-c", f"echo {1 - int(right)} > {path}")
    env = pair[0].run_dir / "subnet.env"
    content = env.read_text()
    env.unlink()
    conflist = pair[0].run_dir / "cni" / "10-flannel.conflist"
    conflist.write_text("{}")
    until("the files are back", lambda: env.read_text() == content and "bridge" in conflist.read_text(), 15)
    until("the sysctl is back", lambda: world.run("node1", "cat", path).strip() == right, 15)


def test_the_kernels_own_news_is_not_taken_for_drift(world, pair):
    """A quiet network stays quiet: nothing mended, nothing written, over some full checks' worth of passes."""
    before = pair[0].status()["counters"]
    for _ in range(3):
        world.put_record(
            "10.244.0.0-24",
            {
                "PublicIP": "192.168.1.50",
                "PublicIPv6": None,
                "BackendType": "vxlan",
                "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:50"},
            },
        )
        until("joined", lambda: world.peers("node1") == 2)
        world.etcd.delete("/coreos.com/network/subnets/10.244.0.0-24")
        until("left", lambda: world.peers("node1") == 1)
    after = pair[0].status()["counters"]
    assert {k: v for k, v in after.items() if k.startswith("mended")} == {
        k: v for k, v in before.items() if k.startswith("mended")
    }


def test_what_is_not_ours_to_put_back_is_told(world):
    """The route of the bridge, the bridge, the route of the underlay: others make these, and without them no pod is reached."""
    one, _ = world.nodes(2)
    world.pod(one, "a")
    subnet = str(one.subnet())
    gateway = subnet.removesuffix("0/24") + "1"

    def told() -> str:
        found = one.problems()
        return "; ".join(found[subject] for subject in ("routes", "ways") if subject in found)

    for break_it, words in (
        (f"ip route del {subnet} dev cni0", f"no route leads {subnet} to cni0"),
        ("ip link set cni0 down", "cni0 is down"),
        ("ip route flush table main", "no route by eth0 leads to 192.168.1.3"),
    ):
        until("nothing is told yet", lambda: not told())
        world.run("node1", "sh", "-c", break_it)
        said = until(f"{break_it}: told", lambda words=words: words in told() and told())
        if "ip route replace" in said:
            world.run("node1", "sh", "-c", said[said.index("ip route replace") :].partition(";")[0])
        world.run("node1", "sh", "-c", "ip link set cni0 up; ip route replace 192.168.1.0/24 dev eth0 src 192.168.1.2")
        world.run("node1", "sh", "-c", f"ip route replace {subnet} dev cni0 src {gateway}")
        until(f"{break_it}: solved", lambda: not told())
    until("well again", one.ready)


def test_a_device_that_is_deleted_is_counted_and_told_each_time(world):
    """Whether its own notification or that of its entries comes first."""
    one, _ = world.nodes(2)
    for count in range(1, 6):
        world.run("node1", "ip", "link", "del", "flannel.1")
        until("it is whole again", lambda: world.peers("node1") == 1)
        until("it is counted", lambda count=count: one.status()["counters"]["mended_device"] == count)
    assert len(one.events("device.gone")) == 5


def test_nothing_is_mended_at_rest(world):
    """Kernels before 6.13 tell of each FDB entry twice, the second time without its destination."""
    one, two = world.nodes(2)
    taken = {agent.subnet().base >> 8 & 255 for agent in (one, two)}
    for count, number in enumerate([each for each in range(9, 13) if each not in taken][:2], start=2):
        world.put_peer(number)
        for agent in (one, two):
            until("it is in the kernel", lambda agent=agent, count=count: world.peers(agent.node) == count)
            world.settled(agent)
    for agent in (one, two):
        counters = agent.status()["counters"]
        assert {name: count for name, count in counters.items() if name.startswith("mended") and count} == {}
        assert counters["writes_put_fdb"] == 3, "each once"
