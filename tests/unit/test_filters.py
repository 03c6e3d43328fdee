"""What rules of other programs do with pods' packets: judged from the rules alone. Pure."""

from __future__ import annotations

import pytest

from lease.model import ip_number
from overlay.kernel.nftables.program import Chain
from overlay.reach import filters, iptables_lines
from overlay.reach.filters import Flow

POD, THERE = ip_number("10.244.1.2", 4), ip_number("10.244.2.2", 4)
OUT = Flow("ip", "cni0", "flannel.1", POD, THERE)
TUNNEL = Flow("ip", "eth0", "", ip_number("192.168.1.3", 4), ip_number("192.168.1.2", 4), "udp", 8472)


def match(left, right, op="=="):
    return {"match": {"op": op, "left": left, "right": right}}


def meta(key, value, op="=="):
    return match({"meta": {"key": key}}, value, op)


def field(name, value, op="==", protocol="ip"):
    return match({"payload": {"protocol": protocol, "field": name}}, value, op)


def pool(text):
    base, length = text.split("/")
    return {"prefix": {"addr": base, "len": int(length)}}


DROP, ACCEPT, RETURN = {"drop": None}, {"accept": None}, {"return": None}
UNKNOWN = match({"ct": {"key": "mark"}}, 7)


def judged(*rules, flow=OUT, policy="accept", **chains):
    """The action of a chain of these rules, and whether it is sure."""
    there = {"base": rules, **chains}

    def rules_of(_family, _table, name):
        return [{"expr": list(expr), "handle": place} for place, expr in enumerate(there.get(name, ()), 1)]

    found = filters.judge(Chain("inet", "t", "base", policy), flow, rules_of)
    return found.action, found.sure


@pytest.mark.parametrize(
    ("expr", "drops"),
    [
        ([], True),
        ([field("saddr", pool("10.244.0.0/16"))], True),
        ([field("saddr", pool("10.245.0.0/16"))], False),
        ([field("daddr", "10.244.2.2")], True),
        ([field("daddr", "10.244.2.3", "!=")], True),
        ([field("daddr", {"range": ["10.244.2.0", "10.244.2.9"]})], True),
        ([field("daddr", {"set": ["10.0.0.1", pool("10.244.2.0/24")]})], True),
        ([field("saddr", pool("10.244.0.0/16")), field("daddr", pool("10.244.0.0/16"), "!=")], False),
        ([field("saddr", "fd00::1", protocol="ip6")], False),
        ([meta("iifname", "cni0")], True),
        ([meta("iifname", "cni*")], True),
        ([meta("iifname", {"set": ["br0", "cni0"]})], True),
        ([meta("iifname", "cni1")], False),
        ([meta("oifname", "flannel.1", "!=")], False),
        ([meta("nfproto", "ipv4")], True),
        ([meta("nfproto", "ipv6")], False),
        ([match({"ct": {"key": "state"}}, ["established", "related"], "in")], False),
        ([match({"ct": {"key": "state"}}, "invalid", "in")], False),
        ([match({"ct": {"key": "state"}}, ["new", "invalid"], "in")], True),
        ([{"counter": {"packets": 1, "bytes": 1}}, {"log": {"prefix": "x"}}], True),
        ([{"xt": {"type": "match", "name": "comment"}}], True),
        # of some packets only
        ([UNKNOWN], False),
        ([field("dport", 80, protocol="tcp")], False),
        ([field("saddr", "@somebody")], False),
        ([{"limit": {"rate": 1}}], True),
    ],
)
def test_which_packets_a_rule_is_about(expr, drops):
    assert judged([*expr, DROP])[0] == ("drop" if drops else "accept")
    assert judged([*expr, {"reject": {"type": "icmp"}}])[0] == ("reject" if drops else "accept")


def test_the_first_rule_that_is_about_a_packet_decides():
    assert judged([ACCEPT], [DROP]) == ("accept", True)
    assert judged([meta("iifname", "eth9"), ACCEPT], [DROP]) == ("drop", True)
    assert judged([RETURN], [DROP], policy="drop") == ("drop", True), "the policy, of a base chain"


def test_what_follows_an_accept_that_cannot_be_judged_is_not_sure():
    assert judged([UNKNOWN, ACCEPT], [DROP]) == ("drop", False)
    assert judged([UNKNOWN, {"jump": {"target": "sub"}}], [DROP], sub=[[ACCEPT]]) == ("drop", False)
    assert judged([{"vmap": {}}], [DROP]) == ("drop", False)
    assert judged([UNKNOWN, DROP], [DROP]) == ("drop", True)
    assert judged([UNKNOWN, ACCEPT], policy="drop") == ("drop", False)


def test_jumps_come_back_and_gotos_do_not():
    jump, goto = {"jump": {"target": "sub"}}, {"goto": {"target": "sub"}}
    assert judged([jump], [DROP], sub=[[RETURN], [ACCEPT]]) == ("drop", True)
    assert judged([jump], [DROP], sub=[[ACCEPT]]) == ("accept", True)
    assert judged([goto], [DROP], sub=[[meta("iifname", "x"), DROP]]) == ("accept", True), "its policy"
    assert judged([meta("iifname", "x"), jump], [ACCEPT], sub=[[DROP]]) == ("accept", True)
    assert judged([jump], sub=[[jump]]) == ("accept", False), "one without end is none in the kernel"


def test_no_set_is_read_for_a_rule_that_is_about_other_packets():
    """The rest of it says nothing, however large the set is that it names."""
    rule = {"expr": [meta("iifname", "other0"), field("saddr", "@huge"), DROP]}
    asked = []
    filters.judge(Chain("ip", "t", "base", "accept"), OUT, lambda *_: [rule], lambda *names: asked.append(names))
    assert asked == []


def test_ports_and_protocols_are_known_of_the_tunnels_packets():
    for expr, drops in (
        ([field("dport", 8472, protocol="udp")], True), ([field("dport", 22, protocol="tcp")], False),
        ([field("dport", {"range": [8000, 9000]}, protocol="th")], True), ([meta("l4proto", "udp")], True),
        ([meta("l4proto", "tcp", "!=")], True), ([field("dport", {"set": [1, 2]}, protocol="udp")], False),
        ([field("protocol", "udp")], True),
    ):  # fmt: skip
        assert judged([*expr, DROP], flow=TUNNEL)[0] == ("drop" if drops else "accept"), expr


@pytest.mark.parametrize(
    ("line", "action"),
    [
        ("-A FORWARD -j DROP", "drop"),
        ("-A FORWARD -s 10.244.0.0/16 -d 10.244.0.0/16 -j REJECT --reject-with icmp-port-unreachable", "reject"),
        ('-A FORWARD -i cni+ -m comment --comment "with ! and -j ACCEPT" -j DROP', "drop"),
        ("-A FORWARD ! -d 10.244.0.0/16 -j DROP", "accept"),
        ("-A FORWARD ! -s 10.245.0.0/16 -o flannel.1 -j DROP", "drop"),
        ("-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j DROP", "accept"),
        ("-A FORWARD -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP", "drop"),
        ("-A FORWARD -p tcp -m tcp --dport 80 -j DROP", "accept"),
        ("-A FORWARD -m mark --mark 0x1/0x1 -j DROP", "accept"),
        ("-A FORWARD -j LOG --log-prefix x", "accept"),
        ("-A FORWARD -m mark ! --mark 0x4000/0x4000 -j DROP", "drop"),
        ("-A FORWARD -m set --match-set nodes src -j DROP", "accept"),
        ("-A FORWARD -p tcp -m tcp --tcp-flags FIN,SYN SYN -j DROP", "accept"),
        ("-A FORWARD -m socket --transparent -j DROP", "accept"),
        ("-A FORWARD -m addrtype --dst-type LOCAL -j DROP", "accept"),
        ("-A FORWARD -m addrtype ! --dst-type LOCAL -j DROP", "drop"),
        ("-A FORWARD -j MASQUERADE --random-fully", "masquerade"),
        ("-A FORWARD -j OTHER", "drop"),
        ("-A FORWARD -g OTHER", "drop"),
        ('-A FORWARD -m comment --comment "an open quote -j DROP', "accept"),
    ],
)
def test_lines_of_iptables(line, action):
    chains = {"base": [line], "OTHER": ["-N OTHER", "-A OTHER -s 10.244.1.0/24 -j DROP"]}
    found = filters.judge(
        Chain("ip", "filter", "base", "accept"), OUT, lambda _f, _t, name: iptables_lines.rules(chains[name], "ip")
    )
    assert found.action == action


def test_a_policy_of_iptables():
    assert iptables_lines.policy(["-P INPUT DROP", "-A INPUT -j ACCEPT"]) == "drop"
    assert iptables_lines.policy(["-N OTHER"]) == "accept"


def lines(*rules, flow=OUT, policy="accept", **chains):
    """The same of lines of iptables."""
    there = {"base": rules, **chains}
    return filters.judge(
        Chain("ip", "t", "base", policy), flow, lambda _f, _t, name: iptables_lines.rules(list(there[name]), "ip")
    )


def test_an_accept_whose_options_are_not_known_is_an_accept_all_the_same():
    for option in ("-m set --match-set nodes src", "-m socket --transparent", "-m tcp --tcp-flags FIN,SYN SYN"):
        found = lines(f"-A base {option} -j ACCEPT", "-A base -j DROP", flow=TUNNEL)
        assert (found.action, found.sure) == ("drop", False), option


def test_kube_proxys_masquerade_is_no_matter_of_pods():
    found = lines(
        "-A base -m comment --comment x -j KUBE-POSTROUTING",
        **{"KUBE-POSTROUTING": ("-A K -m mark ! --mark 0x4000/0x4000 -j RETURN", "-A K -j MARK --set-xmark 0x4000/0x0",
                                "-A K -m comment --comment x -j MASQUERADE --random-fully")},
    )  # fmt: skip
    assert found.action == "accept"
    masked = match({"&": [{"meta": {"key": "mark"}}, 0x4000]}, 0x4000, "!=")
    assert judged([masked, RETURN], [{"masquerade": None}])[0] == "accept"


def test_ufw_with_and_without_the_tunnels_port():
    chains = {
        "ufw-before": ("-A x -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A x -j ufw-not-local"),
        "ufw-not-local": ("-A x -m addrtype --dst-type LOCAL -j RETURN", "-A x -m addrtype --dst-type MULTICAST -j RETURN",
                          "-A x -m limit --limit 3/min --limit-burst 10 -j LOG", "-A x -j DROP"),
        "ufw-user": ("-A x -p tcp -m tcp --dport 22 -j ACCEPT",),
    }  # fmt: skip
    base = ("-A base -j ufw-before", "-A base -j ufw-user")
    found = lines(*base, flow=TUNNEL, policy="drop", **chains)
    assert (found.action, found.rule, found.sure) == ("drop", None, True), "its policy"
    allowed = {**chains, "ufw-user": (*chains["ufw-user"], "-A x -p udp -m udp --dport 8472 -j ACCEPT")}
    assert lines(*base, flow=TUNNEL, policy="drop", **allowed).action == "accept"


def test_firewalld_that_rejects_what_no_zone_lets_through():
    dnat = match({"ct": {"key": "status"}}, "dnat", "in")
    assert judged([dnat, ACCEPT], [{"reject": {"type": "icmpx"}}]) == ("reject", True)


def test_a_chain_that_could_not_be_read_makes_nothing_sure():
    jump = {"jump": {"target": "unread"}}

    def rules_of(_family, _table, name):
        return None if name == "unread" else [{"expr": [jump]}, {"expr": [DROP]}]

    found = filters.judge(Chain("inet", "t", "base", "accept"), OUT, rules_of)
    assert (found.action, found.sure) == ("drop", False)


def test_an_extension_that_an_older_nft_does_not_describe():
    assert judged([{"xt": None}, DROP])[0] == "accept"
    assert judged([{"xt": None}, ACCEPT], [DROP]) == ("drop", False)


def test_a_drop_behind_a_return_that_cannot_be_judged_is_doubtful_and_the_way_goes_on():
    jump = {"jump": {"target": "sub"}}
    assert judged([jump], sub=[[UNKNOWN, RETURN], [DROP]]) == ("drop", False)
    assert judged([jump], [meta("iifname", "cni0"), DROP], sub=[[UNKNOWN, RETURN], [DROP]]) == ("drop", True)
