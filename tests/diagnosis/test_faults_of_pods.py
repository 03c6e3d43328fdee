"""Faults that cost one pod its traffic, or part of it: what trace and check say, from both ends. Status, which tries nodes and
not pods, need not know of them."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import pytest

from tests.diagnosis.test_faults import check, doctor, is_well, trace
from tests.support.wait import PATIENCE, until

TABLE = "nft add table inet planted; nft add chain inet planted {chain}; "
FORWARD = TABLE.replace("{chain}", "f '{{ type filter hook forward priority 10; }}'")


class Fault(NamedTuple):
    """plant: a command on node2, or on another ("node1: ..."), or inside a pod ("pod1: ..."). there, back: words of trace from
    pod1 to pod2, and from pod2 to pod1, "" where that is delivered; checked: of node1's check of pod2, "" where that is well.
    wrong: words that nobody says. proto: further words of the command. doctored: of node2's doctor."""

    plant: str
    there: str
    back: str
    checked: str
    wrong: str = ""
    proto: tuple[str, ...] = ()
    doctored: str = ""
    said: str = ""
    """Of node2's problems."""


FAULTS = {
    "a reset that a filter makes": Fault(
        FORWARD + "nft add rule inet planted f tcp dport 5201 reject with tcp reset",
        'dropped at node2, between "routed to cni0" and "passed the forward chains".*chain inet planted f drops these packets'
        ".*somebody on the way refused in the destination's name",
        "refused",
        "",
        proto=("--proto", "tcp", "--port", "5201"),
    ),
    "a wrong MAC in the node's neighbour entry": Fault(
        "ip neigh replace {pod2} lladdr 02:00:00:00:00:99 nud permanent dev cni0",
        "whether that took it is not seen, and no answer came.*neighbour entry of {pod2} has 02:00:00:00:00:99",
        "its answer was given to the pod by .* did not come to who asked.*neighbour entry of {pod2} has 02:00:00:00:00:99",
        "the way to node2 is whole",
    ),
    "a shaper that large packets do not pass": Fault(
        "tc qdisc add dev {veth2} root tbf rate 100mbit burst 600 latency 50ms",
        "packets of 1450 bytes: given to the pod.*packets of 44 bytes pass.*queueing discipline of others .tbf.",
        "did not come to who asked.*queueing discipline of others .tbf.",
        "the pod answers small packets, not full-size ones",
        doctored="queues",
    ),
    "a blackhole for one pod": Fault(
        "node1: ip route add blackhole {pod2}/32",
        "dropped at node1.*blackhole {pod2}",
        "its answer was dropped at node1.*blackhole {pod2}",
        "this node's own kernel: .*blackhole",
        "the pod does not: it is down",
    ),
    "answers dropped behind a jump": Fault(
        TABLE.replace("{chain}", "p '{{ type filter hook postrouting priority 0; }}'")
        + "nft add chain inet planted x; nft add rule inet planted x ct direction reply drop;"
        " nft add rule inet planted p ip saddr {subnet2} jump x",
        'delivered; its answer was dropped at node2, between "the answer passed the forward chains" and "the answer left the IP'
        ' stack".*chain inet planted x drops these packets',
        "",
        "VTEP does not",
        "neighbour and FDB entry",
        said="chain inet planted x drops answers of pods here to",
    ),
    "a filter by length": Fault(
        FORWARD + "nft add rule inet planted f ip length \\> 1000 counter drop",
        "packets of 1450 bytes: dropped at node2.*packets of 44 bytes pass.*chain inet planted f drops these packets",
        "packets of 1450 bytes: dropped at node2",
        "drops by length or rate",
    ),
    "a DNAT to nobody": Fault(
        TABLE.replace("{chain}", "n '{{ type nat hook prerouting priority -110; }}'")
        + "nft add rule inet planted n ip daddr {pod2} dnat ip to {elsewhere}",
        "its destination was changed at node2 before it passed prerouting",
        "",
        "the way to node2 is whole",
    ),
    "a port of the bridge that is switched off": Fault(
        "bridge link set dev {veth2} state 0",
        "{veth2}, the pod's port of cni0, is disabled",
        "{veth2}, the pod's port of cni0, is disabled",
        "the way to node2 is whole",
    ),
    "the bridge down": Fault("ip link set cni0 down", "cni0 is down", "cni0 is down", "the way to node2 is whole"),
    "a route inside the pod by another pod": Fault(
        "pod1: ip route replace 10.244.0.0/16 via {beside1}",
        "inside the pod packets to {pod2} go by {beside1}, not by this node's gateway",
        "inside the pod packets to {pod2} go by {beside1}, not by this node's gateway",
        "",
    ),
    "a wrong MAC of the gateway inside the pod": Fault(
        "pod2: ip neigh replace {gateway2} lladdr 02:00:00:00:00:99 nud permanent dev eth0",
        "inside the pod the gateway's neighbour entry has 02:00:00:00:00:99",
        "inside the pod the gateway's neighbour entry has 02:00:00:00:00:99",
        "the way to node2 is whole",
    ),
    "a node that answers no pings": Fault(
        "sysctl -qw net.ipv4.icmp_echo_ignore_all=1", "", "", "", doctored="icmp_echo_ignore_all is 1",
    ),
    "a node that answers no ARP": Fault(
        "sysctl -qw net.ipv4.conf.eth0.arp_ignore=8; node1: ip neigh flush dev eth0",
        "left this node|dropped at node1",
        "delivered, and |left this node",
        "nobody answers ARP for 192.168.1.3 on eth0",
        doctored="arp_ignore is 8",
    ),
    "some source ports of the tunnel filtered": Fault(
        TABLE.replace("{chain}", "i '{{ type filter hook input priority 0; }}'")
        + "nft add rule inet planted i udp sport 0-65535 udp dport 8472 ip saddr 192.168.1.2 drop",
        "dropped at node2.*chain inet planted i drops the tunnel",
        "its answer was dropped at node2.*chain inet planted i drops the tunnel",
        "VTEP does not",
    ),
}  # fmt: skip


@pytest.mark.timeout(300 * PATIENCE)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_pod_is_named(world, tmp_path, name):
    path = tmp_path / "ask-secret"
    path.write_text("a secret of a test of ours\n")
    fault, agents = FAULTS[name], world.nodes(2, f"--ask-secret-file={path}")
    one, two = (world.pod(agent, "a") for agent in agents)
    beside = world.pod(agents[0], "b")
    until("all is well", lambda: is_well(agents), 30)
    assert trace(world, agents[0], one.address, two.address, *fault.proto)["verdict"] == "delivered"
    subnet2 = str(agents[1].subnet())
    words = {
        "pod2": two.address, "beside1": beside.address, "subnet2": subnet2, "gateway2": subnet2.replace("0/24", "1"),
        "elsewhere": subnet2.replace("0/24", "77"), "veth2": veth_of(world, "node2", "node2-a"),
    }  # fmt: skip
    plant = fault.plant.format(**words)
    spaces = {"pod1": "node1-a", "pod2": "node2-a", "node1": "node1"}
    for part in re.split(r"; (?=node1: )", plant):
        where, _, command = part.partition(": ") if re.match(r"(pod[12]|node1): ", part) else ("", "", part)
        world.run(spaces.get(where, "node2"), "sh", "-c", command)
    said = [
        words_of(trace(world, agents[0], one.address, two.address, *fault.proto)),
        words_of(trace(world, agents[1], two.address, one.address, *fault.proto)),
    ]
    for text, expected in zip(said, (fault.there, fault.back), strict=True):
        expected = expected.format(**words) if expected else "delivered, and "  # noqa: PLW2901
        assert re.search(expected, text), text
        assert not fault.wrong or fault.wrong not in text
    found = check(world, agents[0], two.address)
    assert (found["state"] == "ok") == (not fault.checked), found
    assert re.search(fault.checked, found["verdict"]), found
    assert not fault.wrong or fault.wrong not in json.dumps(found)
    if fault.said:
        until("it is said", lambda: fault.said in " ".join(agents[1].problems().values()), 40)
    if fault.doctored:
        lines = [f"{each['subject']}: {each['what']}" for each in doctor(world, agents[1]) if each["state"] != "ok"]
        assert any(fault.doctored in line for line in lines), lines


def words_of(traced: dict[str, Any]) -> str:
    return "; ".join((traced["text"], *traced["because"], *traced["notes"]))


def veth_of(world: Any, node: str, pod: str) -> str:
    link = json.loads(world.run(pod, "ip", "-j", "link", "show", "eth0"))[0]
    listed = json.loads(world.run(node, "ip", "-j", "link"))
    return next(each["ifname"] for each in listed if each["ifindex"] == link["link_index"])
