"""The device against the real kernel: what is changed live keeps everything, and ARP probes tell the truth."""

import errno
import subprocess

import pytest
from pyroute2 import IPRoute

from lease.backend_config import VxlanConfig
from lease.families import V4
from lease.model import ip_number, mac_number, prefix
from overlay.backends.vxlan import Vxlan
from overlay.firewall.nat import nat_table
from overlay.kernel.arp import probe
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.nftables import program as nft
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.kernel.route.links import Links
from overlay.lab import netns
from overlay.node import device as tunnel
from overlay.node import sysctls
from overlay.node.device_address import ensure_address

MAC = mac_number("0e:2a:00:00:00:01")


class InNamespace:
    """Links whose every call is made inside the namespace: pyroute2 opens its socket in the thread that calls."""

    def __init__(self, inside) -> None:
        self._inside = inside

    def __getattr__(self, name):
        def call(*arguments):
            def act():
                links = Links()
                try:
                    return getattr(links, name)(*arguments)
                finally:
                    links.close()

            return self._inside(act)

        return call


TUNNEL = Vxlan(VxlanConfig(), V4).tunnel


@pytest.fixture
def links(inside):
    return InNamespace(inside)


def spec(links, **change) -> VxlanDevice:
    lower = links.read("eth0")
    fields = {
        "name": "flannel.1",
        "vni": 1,
        "port": 8472,
        "local": ip_number("192.168.1.2", 4),
        "lower": lower.ifindex,
        "mtu": 1450,
        "mac": MAC,
        "gbp": False,
        "learning": False,
    }
    return VxlanDevice(**(fields | change))


def test_a_right_device_is_left_alone(links):
    done = tunnel.ensure(links, TUNNEL, spec(links))
    assert (done.did, done.lost, done.made) == ({}, False, False)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"local": ip_number("192.168.1.7", 4)}, False),
        ({"learning": True}, False),
        ({"mtu": 1300}, False),
        ({"mac": MAC + 1}, False),
    ],
)
def test_live_changes_keep_the_device(links, change, lost):
    before = links.read("flannel.1")
    done = tunnel.ensure(links, TUNNEL, spec(links, **change))
    assert (done.ifindex, done.lost, done.made) == (before.ifindex, lost, False)
    after = links.read("flannel.1")
    for name, value in change.items():
        assert getattr(after, name) == value
    assert tunnel.ensure(links, TUNNEL, spec(links, **change)).did == {}


@pytest.mark.parametrize(("change", "word"), [({"port": 4789}, "port"), ({"gbp": True}, "GBP")])
def test_the_rest_makes_it_again_and_says_why(links, change, word):
    before = links.read("flannel.1")
    done = tunnel.ensure(links, TUNNEL, spec(links, **change))
    assert done.made
    assert word in done.why
    assert done.ifindex != before.ifindex
    after = links.read("flannel.1")
    assert (after.mac, after.up) == (MAC, True)


@pytest.mark.parametrize("words", ["noudpcsum", "udp6zerocsumtx", "group 239.1.1.1"])
def test_a_device_with_flags_the_kernel_cannot_change_is_made_again(links, inside, words):
    import subprocess

    links.delete(links.read("flannel.1").ifindex)
    inside(
        lambda: subprocess.run(
            [
                "ip",
                "link",
                "add",
                "flannel.1",
                "type",
                "vxlan",
                "id",
                "1",
                "dstport",
                "8472",
                "dev",
                "eth0",
                *words.split(),
            ],
            check=True,
        )
    )
    done = tunnel.ensure(links, TUNNEL, spec(links))
    assert done.made
    assert done.why


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("external dstport 8473", ["vx9 has port 8473 with external", "ip link del vx9"]),
        ("id 8 dstport 8473 gbp", ["vx9 has port 8473 with GBP"]),
        ("id 7 dstport 8473", ["vx9 has VNI 7 on port 8473"]),
    ],
)
def test_report_10_what_is_in_the_way_of_our_device_is_named(inside, links, form, words):
    inside(lambda: subprocess.run(f"ip link add vx9 type vxlan {form} && ip link set vx9 up", shell=True, check=True))
    wanted = spec(links, name="flannel.7", vni=7, port=8473)
    with pytest.raises(KernelError) as refused:
        tunnel.ensure(links, TUNNEL, wanted)
    assert refused.value.errno in (errno.EADDRINUSE, errno.EEXIST)
    (why,) = [
        why
        for link in links.all()
        if link.name != wanted.name  # which stands, down: the port is taken when it is set up
        and (why := TUNNEL.conflict(wanted, link.name, links.read(link.name))) is not None
    ]
    for word in words:
        assert word in why


def test_an_mtu_the_underlay_does_not_bear_is_a_kernel_error_with_words(links):
    with pytest.raises(KernelError, match="MTU 1480"):
        tunnel.ensure(links, TUNNEL, spec(links, mtu=1480))


def test_the_base_address_comes_before_another_goes(links, inside):
    requests = inside(RequestSocket)
    index = links.read("flannel.1").ifindex
    links.add_address(index, ip_number("10.244.9.0", 4), 32)
    links.add_address(index, ip_number("172.30.0.1", 4), 32)
    links.add_address(index, ip_number("10.99.9.0", 4), 32)
    networks = [prefix("10.244.0.0/16"), prefix("10.99.0.0/16")]  # the second is that of before
    did = ensure_address(links, index, ip_number("10.244.2.0", 4), networks, requests.addresses(V4))
    assert did == ["added 10.244.2.0/32", "removed 10.244.9.0/32", "removed 10.99.9.0/32"]
    there = {a.address for a in requests.addresses(V4) if a.oif == index}
    assert there == {ip_number("10.244.2.0", 4), ip_number("172.30.0.1", 4)}
    assert ensure_address(links, index, ip_number("10.244.2.0", 4), networks, requests.addresses(V4)) == []
    requests.close()


@pytest.mark.parametrize(
    ("there", "direct", "wrong"),
    [
        ({"net/ipv4/ip_forward": "1"}, False, {}),
        ({"net/ipv4/ip_forward": "0"}, False, {"net/ipv4/ip_forward": "1"}),
        ({"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "1"}, False, {"net/ipv4/conf/f/rp_filter": "2"}),
        ({"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "2"}, True, {}),
        ({"net/ipv4/ip_forward": "1", "net/ipv4/conf/e/rp_filter": "1"}, True, {"net/ipv4/conf/e/rp_filter": "2"}),
        ({"net/ipv4/ip_forward": "1", "net/ipv6/conf/f/accept_ra": "1"}, False, {"net/ipv6/conf/f/accept_ra": "0"}),
    ],
)
def test_sysctls(there, direct, wrong):
    assert sysctls.wanted_sysctls("f", "e", direct, ("b",), there.get) == wrong


def test_arp_probes(space, inside):
    """p0's namespace is another: it answers for its own address, and nobody for others or for ours."""
    other = f"{space}-peer"
    netns.create(other)
    import os

    handle = os.open(netns.path(other), os.O_RDONLY)

    def move() -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=ipr.link_lookup(ifname="p0")[0], net_ns_fd=handle)

    def address() -> int:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname="p0")[0]
            ipr.addr("add", index=index, address="192.168.1.9", prefixlen=24)
            ipr.link("set", index=index, state="up")
            return mac_number(ipr.get_links(index)[0].get_attr("IFLA_ADDRESS"))

    try:
        inside(move)
        theirs = netns.inside(other, address)
        assert inside(lambda: probe("eth0", ip_number("192.168.1.9", 4))) == theirs
        assert inside(lambda: probe("eth0", ip_number("192.168.1.8", 4), gap_s=0.05)) is None
        assert inside(lambda: probe("eth0", ip_number("192.168.1.2", 4), gap_s=0.05)) is None, "ourselves do not count"
        with pytest.raises(OSError, match="No such device"):
            inside(lambda: probe("nope0", 1))
    finally:
        os.close(handle)
        netns.delete(other)


def test_the_nat_table_is_listed_as_it_was_loaded(inside):
    """So that a restart over an unchanged kernel writes nothing."""
    for masq, random_ports, forward in ((True, True, True), (True, False, False), (False, True, True)):
        table = nat_table(
            "overlay-1", prefix("10.244.0.0/16"), prefix("10.244.5.0/24"), masq, random_ports, forward, 8472
        )
        inside(lambda table=table: nft.load_table("ip", "overlay-1", table))
        assert inside(lambda: nft.read_table("ip", "overlay-1")) == table
    inside(lambda: nft.load_table("ip", "overlay-1", []))
    assert inside(lambda: nft.read_table("ip", "overlay-1")) == []
    with pytest.raises(KernelError, match="nft"):
        inside(
            lambda: nft.load_table(
                "ip", "overlay-1", [{"rule": {"family": "ip", "table": "overlay-1", "chain": "none", "expr": []}}]
            )
        )
