"""What one record becomes in the kernel, or why it becomes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.backend_config import VxlanConfig
from lease.families import V4, V6
from lease.model import Endpoint, Lease, ip_number, mac_number, prefix
from lease.records.codec import encode_key
from lease.records.packed import pack, unpack
from overlay.backends.base import Lower, View
from overlay.backends.choose import backend_of
from overlay.backends.vxlan import Vxlan
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, UNDERLAY, FdbValue, NeighbourValue, RouteKey, RouteValue
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.route.link_wire import DeviceAttributes, VxlanDevice
from overlay.peers.plan import entries, quick, refusal
from tests.support.make import lease, node, node_in


def ip(text: str) -> int:
    return ip_number(text, 4)


DIRECT = {"backend": backend_of(VxlanConfig(direct_routing=True), V4)}


def test_a_peer_by_tunnel():
    base, mac = ip("10.244.9.0"), mac_number("0a:00:00:00:00:09")
    assert entries(node(), lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:09")) == [
        (NEIGHBOURS, base, NeighbourValue(mac)),
        (FDB, mac, FdbValue(ip("192.168.1.9"))),
        (ROUTES, RouteKey(base, 24, 10), RouteValue(TUNNEL, base, True, PROTOCOL)),
    ]


def test_a_peer_of_ipv6_by_tunnel():
    """The same three; the metric is one for all, behind flannel's 1024 (dualstack.md)."""
    there = View(V6, prefix("fd00:10:244::/48"), ())
    peer = Endpoint(prefix("fd00:10:244:9::/64"), ip_number("fd01::9", 6), 1, mac_number("0a:00:00:00:00:09"))
    base, gateway = ip_number("fd00:10:244:9::", 6), ip_number("fe80::800:ff:fe00:9", 6)
    assert Vxlan(VxlanConfig(), V6).entries(there, peer) == [
        (NEIGHBOURS, gateway, NeighbourValue(0x0A0000000009)),
        (FDB, 0x0A0000000009, FdbValue(ip_number("fd01::9", 6))),
        (ROUTES, RouteKey(base, 64, 2048), RouteValue(TUNNEL, gateway, True, PROTOCOL)),
    ]


def test_a_peer_reached_directly_has_a_route_alone():
    route = RouteValue(UNDERLAY, ip("192.168.1.9"), False, PROTOCOL)
    assert entries(node(**DIRECT), lease("10.244.9.0/24", "192.168.1.9")) == [
        (ROUTES, RouteKey(ip("10.244.9.0"), 24, 10), route)
    ]


def test_a_peer_behind_a_router_goes_by_tunnel_also_with_direct_routing():
    far = lease("10.244.9.0/24", "172.16.0.9")
    assert entries(node(**DIRECT), far) == entries(node(), far)


def test_each_route_has_a_metric_of_its_own():
    peers = [lease(f"10.244.{n}.0/24", f"192.168.1.{n}") for n in range(3, 250)]
    assert len({entries(node(), peer)[ROUTES][1].metric for peer in peers}) == len(peers)


GOOD = lease("10.244.9.0/24", "192.168.1.9")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        pytest.param(lease("10.245.9.0/24", "192.168.1.9"), "outside Network", id="outside Network"),
        pytest.param(lease("192.168.1.0/24", "192.168.1.9"), "outside Network", id="the underlay, as once took every node down"),
        pytest.param(lease("0.0.0.0/1", "192.168.1.9"), "outside Network", id="half the world"),
        pytest.param(lease("10.244.0.0/17", "192.168.1.9"), "too large", id="half the network"),
        pytest.param(lease("10.244.2.0/25", "192.168.1.9"), "overlaps our own", id="part of our own subnet"),
        pytest.param(lease("10.244.9.0/24", "10.244.9.5"), "its own subnet", id="a VTEP behind itself"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.2"), "is our own", id="our address"),
        pytest.param(lease("10.244.9.0/24", "0.0.0.0"), "cannot be a node's", id="zero"),
        pytest.param(lease("10.244.9.0/24", "127.0.0.1"), "cannot be a node's", id="loopback"),
        pytest.param(lease("10.244.9.0/24", "239.1.1.1"), "cannot be a node's", id="multicast"),
        pytest.param(lease("10.244.9.0/24", "255.255.255.255"), "cannot be a node's", id="broadcast"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.255"), "broadcast address of", id="the underlay's broadcast"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.0"), "broadcast address of", id="the underlay's base"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:02"), "VtepMAC 0a:00:00:00:00:02 is our own", id="our MAC"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.9", vni=42), "VNI 42", id="another VNI"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.9", backend="host-gw"), "host-gw", id="another backend"),
        pytest.param(lease("10.244.9.0/24", "192.168.1.9", backend=""), "BackendType", id="udp's record without a type"),
        pytest.param(Lease("k", "vxlan", None, None, "", 1, 1, 0), "it has no IPv4 part", id="no IPv4 part"),
    ],
)  # fmt: skip
def test_refused_with_its_reason(record, words):
    reason = refusal(node(), record)
    assert reason is not None
    assert words in reason


def test_an_underlay_inside_the_network_is_protected():
    wide = node(network=prefix("192.168.0.0/16"), own=lease("192.168.77.0/24", "192.168.1.2"))
    reason = refusal(wide, lease("192.168.1.0/24", "172.16.0.9"))
    assert reason is not None
    assert "underlay" in reason


WIDE = {
    "network": prefix("10.0.0.0/8"),
    "own": lease("10.244.2.0/24", "10.1.1.2"),
    "on_link": (prefix("10.1.1.0/24"),),
    "addresses": frozenset({ip("10.1.1.2")}),
}


@pytest.mark.parametrize(
    ("subnet", "public_ip", "words"),
    [
        ("10.244.9.0/24", "10.1.3.9", None),
        ("10.1.2.0/24", "10.1.3.9", "overlaps the underlay's 10.1.0.0/16 (--underlay-cidr)"),
        ("10.1.0.0/12", "10.1.3.9", "overlaps our underlay 10.1.1.0/24"),
        ("10.244.9.0/24", "10.244.2.1", "is an address of a subnet of ours"),
        ("10.244.9.0/24", "10.244.7.1", "is an address of a subnet of ours"),
        ("10.244.9.0/24", "10.2.0.1", "outside --underlay-cidr"),
    ],
)
def test_a_routed_underlay_inside_the_network_is_protected_where_the_operator_says_what_it_is(subnet, public_ip, words):
    here = node(**WIDE, allowed=(prefix("10.1.0.0/16"),), retained=(prefix("10.244.7.0/24"),))
    found = refusal(here, lease(subnet.replace("10.1.0.0/12", "10.0.0.0/12"), public_ip))
    assert (found is None) if words is None else (found is not None and words in found), found
    assert not quick(here)(pack(lease("10.1.2.0/24", "10.1.3.9")))


@pytest.mark.parametrize("own", ["192.168.1.2", "203.0.113.5"])
def test_nodes_inside_the_network_may_be_where_the_operator_says_or_we_are(own):
    """Some of the nodes, or all of them behind addresses of a router's."""
    said = node(**{**WIDE, "own": lease("10.244.2.0/24", own), "addresses": frozenset({ip(own)}), "on_link": ()})
    assert "is an address of Network" in (refusal(said, lease("10.244.9.0/24", "10.1.3.9")) or "")
    said = said._replace(allowed=(prefix("192.168.1.0/24"), prefix("203.0.113.0/24"), prefix("10.1.0.0/16")))
    assert refusal(said, lease("10.244.9.0/24", "10.1.3.9")) is None
    ours = node(**{**WIDE, "own": lease("10.244.2.0/24", own)})
    assert refusal(ours, lease("10.244.9.0/24", "10.1.3.9")) is None, "its own interface has an address there"


def test_an_underlay_that_is_all_of_the_network_leaves_room_for_pods():
    assert refusal(node(**WIDE, allowed=(prefix("10.0.0.0/8"),)), lease("10.244.9.0/24", "10.1.3.9")) is None


def test_a_good_one_is_not():
    assert refusal(node(), GOOD) is None


def test_report_2_a_record_without_a_vni_has_the_networks():
    """Older flannels, and load balancers that publish Nodes without pods."""
    silent = GOOD._replace(v4=GOOD.v4._replace(vni=None))
    assert refusal(node(), silent) is None
    assert unpack(pack(silent)) == silent
    assert entries(node(), silent) == entries(node(), GOOD)


def test_a_subnet_our_pods_still_run_on_is_kept_from_its_new_owner():
    reason = refusal(node(retained=(prefix("10.244.9.0/24"),)), GOOD)
    assert reason is not None
    assert "still run" in reason


@pytest.mark.parametrize(
    ("configured", "underlay", "expected", "told"),
    [(0, 1500, 1450, False), (1400, 1500, 1350, False), (9000, 1500, 1450, True), (1500, 1500, 1450, False)],
)
def test_mtu(configured, underlay, expected, told):
    mtu, why = Vxlan(VxlanConfig(mtu=configured), V4).tunnel.mtu(underlay)
    assert mtu == expected
    assert bool(why) == told


DEVICE = VxlanDevice("flannel.1", 1, 8472, ip("192.168.1.2"), 2, 1450, 5, False, False)
PLAIN = Vxlan(VxlanConfig(), V4).tunnel


def found(**change) -> DeviceAttributes:
    return DeviceAttributes(
        4, "vxlan", True, 1450, 5, 1, 8472, ip("192.168.1.2"), 2, False, False, checksums=True, special=""
    )._replace(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"special": "external (collect metadata) mode"}, ["vx", "port 8472", "external", "ip link del vx"]),
        ({"gbp": True, "vni": 9}, ["port 8472 with GBP", "Backend.Port"]),
        ({}, ["VNI 1 on port 8472", "Backend.VNI"]),
        ({"vni": 9}, None),
        ({"port": 4789}, None),
        ({"kind": "dummy"}, None),
    ],
)
def test_report_10_a_device_in_the_way_is_named_with_what_to_do(change, words):
    why = PLAIN.conflict(DEVICE, "vx", found(**change))
    assert (why is None) == (words is None)
    assert all(word in why for word in words or [])


def test_the_device_is_what_config_underlay_and_lease_say():
    config = VxlanConfig(vni=7, port=4789, mtu=1400, gbp=True, learning=True)
    for family, overhead, name in ((V4, 50, "flannel.7"), (V6, 70, "flannel-v6.7")):
        made = Vxlan(config, family).tunnel.device(Lower(2, 99, 1500), lease("10.244.2.0/24", "192.168.1.2").first)
        assert made == VxlanDevice(name, 7, 4789, 99, 2, 1400 - overhead, made.mac, True, True)
        assert made.mac == lease("10.244.2.0/24", "192.168.1.2").first.mac


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vni": 2}, "VNI"),
        ({"port": 4789}, "port"),
        ({"gbp": True}, "GBP"),
        ({"checksums": False}, "checksum"),
        ({"special": "group 239.1.1.1"}, "group"),
        ({"kind": "dummy"}, "dummy"),
    ],
)
def test_a_device_is_replaced_only_where_the_kernel_cannot_change_it(change, word):
    reason = PLAIN.replace_reason(DEVICE, found(**change))
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"local": 1}, {"local"}),
        ({"lower": 9}, {"lower"}),
        ({"learning": True}, {"learning"}),
        ({"mtu": 1400}, {"mtu"}),
        ({"mac": 6}, {"mac"}),
        ({"up": False}, {"up"}),
    ],
)
def test_everything_else_is_changed_live(change, expected):
    assert PLAIN.replace_reason(DEVICE, found(**change)) is None
    assert PLAIN.live_changes(DEVICE, found(**change)).keys() == expected


@given(
    st.builds(
        lease,
        st.sampled_from(
            ["10.244.9.0/24", "10.244.1.0/24", "10.244.1.128/25", "10.245.0.0/24", "10.244.0.0/17", "10.244.0.0/18", "10.244.7.0/24",
             "192.168.1.0/24", "0.0.0.0/1", "10.244.255.0/24"]
        ),
        st.sampled_from(
            ["192.168.1.9", "192.168.1.2", "192.168.1.0", "192.168.1.255", "0.0.0.1", "127.0.0.1", "224.0.0.1", "255.255.255.255",
             "10.244.9.9", "172.16.0.1", "192.168.1.3"]
        ),
        st.sampled_from(["0a:00:00:00:00:09", "0a:00:00:00:00:02", "0a:00:00:00:00:01"]),
        vni=st.sampled_from([1, 1, 1, 2]),
    ),
    st.sampled_from([(), (prefix("10.244.7.0/24"),)]),
    st.sampled_from([1, 2]),
)  # fmt: skip
def test_the_quick_judge_says_what_the_plain_one_says(record, retained, widest):
    here = node(retained=retained, widest=widest)
    assert quick(here)(pack(record)) == (refusal(here, record) is None)


@given(
    st.builds(
        lambda subnet, ip, mac, vni: Endpoint(prefix(subnet), ip_number(ip, 6), vni, mac_number(mac)),
        st.sampled_from(
            ["fd00:10:244:9::/64", "fd00:10:244:1::/64", "fd00:10:244:1::/65", "fd00:10:245::/64", "fd00:10:244::/49",
             "fd00:10:244:8000::/50", "fd00:10:244:7::/64", "fd01::/64", "fd00:10:244:2::/63", "fd00:10:244:ffff::/64"]
        ),
        st.sampled_from(
            ["fd01::9", "fd01::2", "fd01::", "::9", "::1", "ff02::1", "fe80::9", "fd00:10:244:9::9", "fd00:10:244:8::8", "fd05::9",
             "::ffff:1.2.3.4", "fd00:10:249:7::1"]
        ),
        st.sampled_from(["0a:00:00:00:00:09", "0a:00:00:00:00:02", "0a:00:00:00:00:01"]),
        st.sampled_from([1, 1, 1, 2]),
    ),
    st.sampled_from([(), (prefix("fd00:10:244:7::/64"),), (prefix("fd00:10:249:7::/64"),)]),
    st.sampled_from([1, 2]),
    st.sampled_from([(), (prefix("fd01::/64"),)]),
)  # fmt: skip
def test_the_quick_judge_of_ipv6_lets_nothing_pass_that_the_plain_one_refuses(end, retained, widest, allowed):
    ours = Endpoint(prefix("fd00:10:244:2::/64"), ip_number("fd01::2", 6), 1, mac_number("0a:00:00:00:00:02"))
    here = node_in(6)._replace(
        network=prefix("fd00:10:244::/48"),
        own=Lease("", "vxlan", None, ours, "", 1, 1, 0),
        on_link=(prefix("fd01::/64"),),
        neighbours=(),
        addresses=frozenset({ours.public_ip}),
        retained=retained,
        widest=widest,
        allowed=allowed,
    )
    first = lease("10.244.9.0/24", "192.168.1.9")
    record = first._replace(key=encode_key(first.v4.subnet, end.subnet), v6=end)
    assert quick(here)(pack(record)) == (refusal(here, record) is None)
    assert not quick(here)(pack(record._replace(v4=None))), "left to the plain one"
