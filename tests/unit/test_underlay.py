"""Which interface carries the tunnel, and why."""

import pytest

from lease.families import V4
from lease.model import ip_number, prefix
from overlay.kernel.route.entries import Address, Link
from overlay.kernel.route.lookup import Way
from overlay.node.underlay import Interfaces, UnderlayError, on_link_interface, refresh
from overlay.node.underlay import choose as choose_any
from overlay.settings.settings import Settings


def ip(text: str) -> int:
    return ip_number(text, 4)


def link(index: int, name: str, mtu: int = 1500, kind: str = "", loopback: bool = False, up: bool = True) -> Link:
    return Link(index, name, up, mtu, 0x020000000000 | index, kind, not loopback, True, loopback)


def address(oif: int, text: str, length: int = 24, **change) -> Address:
    return Address(4, oif, ip(text), length, 0, False, False, True)._replace(**change)


LO, ETH0, ETH1, FLANNEL = (
    link(1, "lo", 65536, loopback=True),
    link(2, "eth0"),
    link(3, "eth1", 9000),
    link(4, "flannel.1", 1450, "vxlan"),
)
THERE = Interfaces(
    V4,
    [LO, ETH0, ETH1, FLANNEL],
    [
        address(1, "127.0.0.1", 8, scope=254), address(2, "10.0.2.15"), address(3, "192.168.1.77", secondary=True),
        address(3, "192.168.1.2"), address(4, "10.244.5.0", 32),
    ],
)  # fmt: skip
STORE = {"etcd.example": ip("192.168.1.1")}


def kernel(target: int, source: int = 0, oif: int = 0):
    """192.168.1.0/24 is on eth1, loopback on lo, everything else goes by eth0's default route."""
    if prefix("192.168.1.0/24").holds(target):
        found = Way(3, ip("192.168.1.2"), 0)
    elif prefix("127.0.0.0/8").holds(target):
        found = Way(1, ip("127.0.0.1"), 0)
    else:
        found = Way(2, ip("10.0.2.15"), ip("10.0.2.2"))
    return found if oif in (0, found.oif) else None


def nowhere(_target: int, source: int = 0, oif: int = 0):
    return None


def choose(settings, there, lookup, store):
    return choose_any(settings, there, lookup, store).underlay


@pytest.mark.parametrize(
    ("settings", "store", "name", "local", "reason"),
    [
        pytest.param(
            Settings(), STORE, "eth1", "192.168.1.2", "routes to the store etcd.example", id="the route to the store"
        ),
        pytest.param(
            Settings(),
            {"127.0.0.1": ip("127.0.0.1")},
            "eth0",
            "10.0.2.15",
            "default route",
            id="a store on this machine",
        ),
        pytest.param(
            Settings(iface=("eth9", "eth1")),
            STORE,
            "eth1",
            "192.168.1.2",
            "--iface eth1",
            id="first iface that is there",
        ),
        pytest.param(
            Settings(iface=("192.168.1.77",)),
            STORE,
            "eth1",
            "192.168.1.77",
            "--iface 192.168.1.77",
            id="iface by address",
        ),
        pytest.param(
            Settings(iface_regex=("10\\.0\\..*",)),
            STORE,
            "eth0",
            "10.0.2.15",
            "--iface-regex",
            id="regex over addresses first",
        ),
        pytest.param(
            Settings(iface_regex=("h1$",)),
            STORE,
            "eth1",
            "192.168.1.2",
            "--iface-regex",
            id="regex over names, unanchored",
        ),
        pytest.param(
            Settings(iface=("nope",), iface_regex=("eth0",)),
            STORE,
            "eth0",
            "10.0.2.15",
            "--iface-regex",
            id="regex after iface",
        ),
        pytest.param(
            Settings(iface_can_reach=(4, ip("192.168.1.99"))),
            STORE,
            "eth1",
            "192.168.1.2",
            "--iface-can-reach 192.168.1.99",
            id="can reach",
        ),
        pytest.param(
            Settings(public_ip=ip("10.0.2.15")),
            STORE,
            "eth0",
            "10.0.2.15",
            "--public-ip",
            id="a public IP that is local",
        ),
    ],
)
def test_choice(settings, store, name, local, reason):
    found = choose(settings, THERE, kernel, store)
    assert (found.name, found.local) == (name, ip(local))
    assert reason in found.reason


def test_a_public_ip_that_is_not_local_is_advertised_and_never_the_tunnels_source():
    found = choose(Settings(public_ip=ip("203.0.113.5")), THERE, kernel, STORE)
    assert (found.name, found.local, found.public_ip) == ("eth1", ip("192.168.1.2"), ip("203.0.113.5"))


def test_of_several_addresses_the_public_one_is_the_source():
    found = choose(Settings(iface=("eth1",), public_ip=ip("192.168.1.77")), THERE, kernel, STORE)
    assert found.local == found.public_ip == ip("192.168.1.77")


def test_the_only_interface_is_taken_without_any_route():
    there = Interfaces(V4, [LO, ETH1, FLANNEL], [address(3, "192.168.1.2"), address(4, "10.244.5.0", 32)])
    assert choose(Settings(), there, nowhere, STORE).name == "eth1"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(), ["--iface", "eth0 10.0.2.15", "eth1 192.168.1.2"]),
        (Settings(iface=("ens5",)), ["--iface ens5", "eth0 10.0.2.15"]),
        (Settings(iface_regex=("^wg",)), ["--iface-regex ^wg"]),
        (Settings(iface_can_reach=(4, ip("8.8.8.8"))), ["--iface-can-reach 8.8.8.8"]),
    ],
)
def test_no_choice_says_what_there_is_and_which_flag_decides(settings, words):
    with pytest.raises(UnderlayError) as caught:
        choose(settings, THERE, nowhere, {})
    for word in words:
        assert word in str(caught.value)


def test_a_store_name_that_does_not_resolve_yet_is_waited_for():
    with pytest.raises(UnderlayError, match=r"etcd.example does not resolve yet"):
        choose(Settings(), THERE, kernel, {"etcd.example": None})
    assert choose(Settings(), THERE, kernel, {"a.example": None, **STORE}).name == "eth1"
    assert choose(Settings(iface=("eth0",)), THERE, kernel, {"etcd.example": None}).name == "eth0"


def test_an_interface_without_an_address():
    with pytest.raises(UnderlayError, match="no IPv4 address"):
        choose(Settings(iface=("eth2",)), Interfaces(V4, [link(5, "eth2")], []), nowhere, {})


def test_the_choice_is_kept_while_its_address_stands():
    current = choose(Settings(), THERE, kernel, STORE)
    wider = Interfaces(V4, [LO, ETH0, ETH1._replace(mtu=1400)], THERE.addresses)
    refreshed = refresh(Settings(), current, wider, kernel, STORE)
    assert refreshed is not None
    assert (refreshed.mtu, refreshed.local, refreshed.reason) == (1400, current.local, current.reason)
    assert refresh(Settings(), current, Interfaces(V4, [ETH1], [address(3, "192.168.1.9")]), kernel, STORE) is None
    assert refresh(Settings(), current, Interfaces(V4, [], []), kernel, STORE) is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("192.168.1.99", "eth1"),
        ("192.168.1.2", "eth1"),
        ("10.0.2.99", "eth0"),
        ("203.0.113.5", None),
        ("127.0.0.5", None),
        ("10.244.5.0", None),
    ],
)
def test_where_an_address_can_be_asked_for(asked, expected):
    assert on_link_interface(V4, ip(asked), THERE.links.values(), THERE.addresses) == expected


# --- report 3: a fallback address kept for good


VIP = address(2, "192.168.1.100", 32)
HOME = address(2, "192.168.1.2")
SETTINGS = [
    Settings(iface=("eth0",)),
    Settings(iface_regex=("eth0",)),
    Settings(iface_regex=(r"192\.168\.1\.",)),
    Settings(iface_can_reach=(4, ip("192.168.1.99"))),
    Settings(),
]


def by_eth0(source):
    """A kernel whose routes leave by eth0, with that source where it has one."""
    return lambda *_, **__: Way(2, source, 0)


@pytest.mark.parametrize(
    "settings", SETTINGS, ids=["iface", "regex of names", "regex of addresses", "can reach", "store"]
)
def test_report_3_a_virtual_ip_that_stands_first_is_not_taken(settings):
    there = Interfaces(V4, [LO, ETH0], [VIP, HOME])
    found = choose_any(settings, there, by_eth0(HOME.address), STORE)
    assert (found.underlay.local, found.lasting) == (HOME.address, True)
    assert choose(settings._replace(iface_can_reach=None), there, nowhere, {}).local == HOME.address, (
        "no route says which"
    )


@pytest.mark.parametrize(
    "settings", SETTINGS, ids=["iface", "regex of names", "regex of addresses", "can reach", "store"]
)
def test_report_3_a_virtual_ip_alone_is_used_but_not_for_good(settings):
    there = Interfaces(V4, [LO, ETH0], [VIP])
    found = choose_any(settings, there, by_eth0(VIP.address), STORE)
    assert (found.underlay.local, found.lasting) == (VIP.address, False)


def test_report_3_the_recorded_one_of_equal_addresses_is_kept_and_a_bare_one_yields_to_one_with_a_prefix():
    other = address(2, "192.168.1.3", secondary=True)
    there = Interfaces(V4, [LO, ETH0], [HOME, other, VIP])
    settings = Settings(iface=("eth0",))
    for recorded, expected in ((other.address, other.address), (VIP.address, HOME.address), (0, HOME.address)):
        assert choose_any(settings, there, by_eth0(HOME.address), STORE, recorded).underlay.local == expected


def test_report_3_an_address_that_the_operator_names_is_taken_though_it_is_bare():
    there = Interfaces(V4, [LO, ETH0], [HOME, VIP])
    for settings in (Settings(iface=("192.168.1.100",)), Settings(iface=("eth0",), public_ip=VIP.address)):
        found = choose_any(settings, there, by_eth0(HOME.address), STORE)
        assert (found.underlay.local, found.lasting) == (VIP.address, True)


# --- report 4: properties of the address's holder instead of the route's


@pytest.mark.parametrize("holder", [LO, link(1, "dummy0", 65535, "dummy")], ids=["loopback", "dummy"])
@pytest.mark.parametrize("settings", [Settings(iface=("10.9.9.1",)), Settings(public_ip=ip("10.9.9.1")), Settings()])
def test_report_4_mtu_and_state_are_those_of_the_interface_by_which_the_kernel_sends(holder, settings):
    there = Interfaces(V4, [holder, ETH0._replace(mtu=1400, carrier=False)], [address(1, "10.9.9.1", 32)])

    def kernel_of_it(target, source=0, oif=0):
        return Way(2, ip("10.9.9.1"), 0) if oif in (0, 2) else None

    found = choose_any(settings, there, kernel_of_it, STORE)
    under = found.underlay
    assert (under.name, under.ifindex, under.mtu, under.carrier) == ("eth0", 2, 1400, False)
    assert (under.local, under.public_ip) == (ip("10.9.9.1"), ip("10.9.9.1"))
    wider = Interfaces(V4, [holder, ETH0._replace(mtu=1300)], there.addresses)
    refreshed = refresh(settings, under, wider, kernel_of_it, STORE)
    assert refreshed is not None
    assert (refreshed.name, refreshed.mtu, refreshed.reason) == ("eth0", 1300, under.reason)


def test_report_4_a_point_to_point_link_has_an_address_without_prefix_and_carries_all_the_same():
    tunnel = link(7, "ip0", 1480)._replace(arp=False)
    there = Interfaces(V4, [LO, ETH0, tunnel], [address(2, "192.168.1.2"), address(7, "10.99.0.2", 32)])
    found = choose(Settings(iface=("ip0",)), there, by_eth0(ip("192.168.1.2")), STORE)
    assert (found.name, found.mtu, found.local, found.neighbours) == ("ip0", 1480, ip("10.99.0.2"), ())


def test_report_4_an_interface_with_a_prefix_carries_its_own_link():
    assert choose(Settings(iface=("eth1",)), THERE, kernel, {}).name == "eth1", (
        "though the default route leaves by eth0"
    )


# --- report 5: "no gateway" taken for "a neighbour"


def neighbours(underlay_link, lookup=kernel, length=24):
    there = Interfaces(V4, [underlay_link], [address(3, "192.168.1.2", length)])
    return choose(Settings(iface=(underlay_link.name,)), there, lookup, {}).neighbours


def test_report_5_neighbours_are_those_that_are_asked_by_arp_without_a_gateway():
    assert neighbours(ETH1) == (prefix("192.168.1.0/24"),)
    assert neighbours(ETH1._replace(name="tun0", arp=False)) == ()
    assert neighbours(ETH1, length=32) == neighbours(ETH1, length=31) == ()
    assert neighbours(ETH1, lambda *_, **__: Way(3, ip("192.168.1.2"), ip("192.168.1.1"))) == (), "by a gateway"
    assert neighbours(ETH1, lambda *_, **__: Way(7, ip("192.168.1.2"), 0)) == (), "by another interface"
    assert neighbours(ETH1, nowhere) == (), "no route (noprefixroute)"
    assert neighbours(ETH1._replace(up=False), nowhere) == (prefix("192.168.1.0/24"),), "its routes come back with it"
