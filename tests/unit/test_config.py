"""net-conf.json: defaults, refusals, Go's way with keys."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.backend_config import HostGwConfig, IpipConfig, VxlanConfig, WireguardConfig
from lease.config import NetworkConfig, parse_config
from lease.families import V4, V6
from lease.fields import ConfigError
from lease.model import Prefix, ip_text, prefix
from overlay.backends.choose import backend_of
from overlay.cluster.network import backend_fields, network_status


def parse(**fields) -> NetworkConfig:
    return parse_config(json.dumps(fields))


def pool_of(**fields):
    pool = parse(**fields).v4
    assert pool is not None
    return ip_text(4, pool.first), ip_text(4, pool.last), pool.length, pool.size


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"Network": "10.244.0.0/16"}, ("10.244.1.0", "10.244.255.0", 24, 255), id="flannel's default"),
        pytest.param({"Network": "10.244.9.9/16"}, ("10.244.1.0", "10.244.255.0", 24, 255), id="host bits are masked"),
        pytest.param({"Network": "10.0.0.0/22"}, ("10.0.1.0", "10.0.3.0", 24, 3), id="/22 still has /24"),
        pytest.param(
            {"Network": "10.0.0.0/23"}, ("10.0.0.128", "10.0.1.128", 25, 3), id="/23 has four /25, one left out"
        ),
        pytest.param({"Network": "10.0.0.0/28"}, ("10.0.0.4", "10.0.0.12", 30, 3), id="the smallest network"),
        pytest.param(
            {"Network": "10.50.0.0/16", "SubnetLen": 26, "SubnetMin": "10.50.1.0", "SubnetMax": "10.50.9.0"},
            ("10.50.1.0", "10.50.9.0", 26, 33),
            id="the recorded config with its own length and bounds",
        ),
        pytest.param(
            {"network": "10.1.0.0/16", "SUBNETLEN": 20}, ("10.1.16.0", "10.1.240.0", 20, 15), id="keys in any case"
        ),
        pytest.param(
            {"Network": "10.1.0.0/16", "SubnetMin": "0.0.0.0", "X": 1},
            ("10.1.1.0", "10.1.255.0", 24, 255),
            id="zero means default, unknown keys are ignored",
        ),
        pytest.param(
            {"Network": "10.1.0.0/16", "SubnetLen": None, "Backend": None},
            ("10.1.1.0", "10.1.255.0", 24, 255),
            id="null is absent",
        ),
    ],
)
def test_pool(fields, expected):
    assert pool_of(**fields) == expected


def test_ipv6_is_parsed_beside_ipv4():
    config = parse(EnableIPv6=True, Network="10.244.0.0/16", IPv6Network="fd00:10:244::/48")
    assert config.v6 is not None
    assert str(config.v6) == "fd00:10:244:1::/64 .. fd00:10:244:ffff::/64"


def test_ipv6_alone():
    config = parse(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00::/56", IPv6SubnetLen=60)
    assert config.v4 is None
    assert config.v6 is not None
    assert config.v6.size == 15


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        pytest.param({"Type": "vxlan"}, VxlanConfig(), id="defaults"),
        pytest.param({"type": "VXLAN", "vni": 42}, VxlanConfig(vni=42), id="any case, of keys and of the type"),
        pytest.param({"Type": "vxlan", "Port": 0}, VxlanConfig(port=8472), id="port 0 is the kernel's default"),
        pytest.param(
            {
                "Type": "vxlan",
                "VNI": 42,
                "Port": 4789,
                "DirectRouting": True,
                "MTU": 1400,
                "GBP": True,
                "Learning": True,
                "MacPrefix": "0A-00",
            },
            VxlanConfig(42, 4789, 1400, True, True, True, "0A-00"),
            id="everything",
        ),
        pytest.param({"Type": "Host-GW"}, HostGwConfig(), id="host-gw"),
        pytest.param({"Type": "ipip", "DirectRouting": True}, IpipConfig(True), id="ipip"),
        pytest.param({"Type": "wireguard"}, WireguardConfig(51820, 51821, 0, b"", 0, "separate"), id="wireguard"),
        pytest.param(
            {
                "Type": "wireguard",
                "ListenPort": 7,
                "ListenPortV6": 8,
                "MTU": 1400,
                "PSK": "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=",
                "PersistentKeepaliveInterval": 25,
                "Mode": "auto",
            },
            WireguardConfig(7, 8, 1400, b"\x09" * 32, 25, "auto"),
            id="all of wireguard",
        ),
    ],
)
def test_backend(backend, expected):
    assert parse(Network="10.244.0.0/16", Backend=backend).backend == expected


def test_backends_of_two_kinds_are_never_equal():
    kinds = (
        {"Type": "host-gw"},
        {"Type": "ipip"},
        {"Type": "ipip", "DirectRouting": True},
        {"Type": "vxlan"},
        {"Type": "wireguard"},
    )
    made = [parse(Network="10.244.0.0/16", Backend=kind) for kind in kinds]
    assert len(set(made)) == len(kinds)
    for family in (V4, V6):
        backends = [backend_of(config.backend, family) for config in made]
        assert len(set(backends)) == len(kinds)


def test_a_pre_shared_key_is_in_no_text():
    config = parse(
        Network="10.244.0.0/16", Backend={"Type": "wireguard", "PSK": "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk="}
    )
    for wrong in (["CQkJCQkJ"], {"k": "CQkJCQkJ"}, 7):
        with pytest.raises(ConfigError, match=r"Backend\.PSK: it must be a string") as refused:
            parse(Network="10.244.0.0/16", Backend={"Type": "wireguard", "PSK": wrong})
        assert "CQkJ" not in str(refused.value)
    with pytest.raises(ConfigError, match="Backend: it must be an object") as refused:
        parse(Network="10.244.0.0/16", Backend='{"Type":"wireguard","PSK":"CQkJCQkJ"}')
    assert "CQkJ" not in str(refused.value)
    for text in (repr(config), str(config), json.dumps(network_status(config)), repr(backend_fields(config))):
        assert "CQkJ" not in text
        assert "\\t\\t" not in text


def test_a_missing_backend_is_vxlan_as_the_documentation_says():
    assert parse(Network="10.244.0.0/16").backend == VxlanConfig()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({}, ["Network", "missing", "10.244.0.0/16"], id="no network"),
        pytest.param({"Network": "10.244.0.0"}, ["Network", "10.244.0.0", "prefix like"], id="no length"),
        pytest.param({"Network": "10.244.0.0/255.255.0.0"}, ["Network", "prefix like"], id="a netmask"),
        pytest.param({"Network": "fd00::/48"}, ["Network", "IPv4 prefix"], id="wrong family"),
        pytest.param({"Network": 5}, ["Network", "5", "string"], id="wrong type"),
        pytest.param({"Network": "10.0.0.0/29"}, ["Network", "10.0.0.0/29", "/28"], id="too small"),
        pytest.param({"Network": "127.0.0.0/16"}, ["Network", "127.0.0.0/16", "loopback"], id="loopback"),
        pytest.param({"Network": "224.0.0.0/8"}, ["Network", "multicast"], id="multicast"),
        pytest.param({"Network": "128.0.0.0/1"}, ["Network", "128.0.0.0/1", "169.254.0.0/16"], id="half of all"),
        pytest.param({"Network": "169.254.0.0/16"}, ["Network", "link-local"], id="link-local"),
        pytest.param({"Network": "10.0.0.0/16", "SubnetLen": 31}, ["SubnetLen", "31", "30"], id="length above 30"),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetLen": 17}, ["SubnetLen", "17", "18", "four"], id="fewer than four subnets"
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetLen": "24"}, ["SubnetLen", "whole number"], id="length as a string"
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetLen": True}, ["SubnetLen", "whole number"], id="length as a bool"
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetMin": "10.1.0.0"},
            ["SubnetMin", "10.1.0.0", "inside 10.0.0.0/16"],
            id="min outside",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetMax": "10.0.5.7"},
            ["SubnetMax", "10.0.5.7", "base address of a /24"],
            id="max off boundary",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetMin": "10.0.9.0", "SubnetMax": "10.0.5.0"},
            ["SubnetMin", "10.0.9.0", "10.0.5.0"],
            id="min above max, which flannel accepts",
        ),
        pytest.param({"Network": "10.0.0.0/16", "EnableIPv4": False}, ["EnableIPv4", "EnableIPv6"], id="no family"),
        pytest.param({"Network": "10.0.0.0/16", "EnableIPv6": True}, ["IPv6Network", "missing"], id="no IPv6 network"),
        pytest.param(
            {"Network": "10.0.0.0/16", "EnableIPv6": True, "IPv6Network": "rubbish"},
            ["IPv6Network", "rubbish"],
            id="IPv6 is validated when it is off, too",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {}}, ["Backend.Type", "vxlan"], id="a backend without a type"
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00::/48", "Backend": {"Type": "ipip"}},
            ["Backend.Type", "ipip", "EnableIPv6"],
            id="ipip carries no IPv6",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "wireguard", "Mode": "both"}},
            ["Backend.Mode", "both", "separate"],
            id="a mode that is none",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "wireguard", "PSK": "c2hvcnQ="}},
            ["Backend.PSK", "5 bytes"],
            id="a pre-shared key that is too short",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "wireguard", "ListenPort": 51821}},
            ["Backend.ListenPortV6", "51821", "ListenPort"],
            id="one port for two devices",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "wireguard", "PersistentKeepaliveInterval": -1}},
            ["Backend.PersistentKeepaliveInterval", "-1"],
            id="a negative interval",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "udp"}},
            ["Backend.Type", "udp", "vxlan"],
            id="a backend we have not",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": "vxlan"}, ["Backend", "object"], id="a backend that is a string"
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "Port": 70000}},
            ["Backend.Port", "70000", "65535"],
            id="Port 70000, which flannel makes 4464",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1 << 24}},
            ["Backend.VNI", "9999999"],
            id="VNI out of range",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "VNI": 10_000_000}},
            ["Backend.VNI", "flannel.10000000", "16 characters", "15"],
            id="a VNI whose device Linux cannot name",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "MTU": 60}},
            ["Backend.MTU", "60", "118"],
            id="an MTU the kernel refuses",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "MacPrefix": "0G-00"}},
            ["Backend.MacPrefix", "0G-00"],
            id="MacPrefix",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "GBP": 1}},
            ["Backend.GBP", "true or false"],
            id="GBP as a number",
        ),
    ],
)
def test_refused_naming_field_value_and_what_is_allowed(fields, words):
    with pytest.raises(ConfigError) as caught:
        parse(**fields)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", b"\xff\xfe", "[" * 100_000, '{"Network":' + "[" * 900 + "]" * 900 + "}"]
)
def test_not_an_object(text):
    with pytest.raises(ConfigError):
        parse_config(text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["10.0.0.0/8", "fd00::/8", "vxlan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "Network",
        "SubnetLen",
        "SubnetMin",
        "SubnetMax",
        "Backend",
        "EnableIPv4",
        "EnableIPv6",
        "IPv6Network",
        "IPv6SubnetLen",
        "IPv6SubnetMin",
    ]
)


@given(st.dictionaries(keys, json_values))
def test_anything_is_a_config_or_one_line(fields):
    try:
        config = parse_config(json.dumps(fields))
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        for pool in (config.v4, config.v6):
            if pool is not None:
                assert pool.size >= 1
                assert pool.network.covers(pool.subnet(0))
                assert pool.network.covers(pool.subnet(pool.size - 1))


@given(st.integers(5, 28), st.data())  # larger ones hold what is no network
def test_every_subnet_of_a_pool_lies_in_the_network_and_is_allowed(length, data):
    network = Prefix(4, (10 << 24) & ~((1 << (32 - length)) - 1), length)
    subnet_len = data.draw(st.integers(length + 2, 30))
    pool = parse(Network=str(network), SubnetLen=subnet_len).v4
    assert pool is not None
    index = data.draw(st.integers(0, pool.size - 1))
    subnet = pool.subnet(index)
    assert network.covers(subnet)
    assert pool.allows(subnet)
    assert subnet != prefix(f"{ip_text(4, network.base)}/{subnet_len}"), "the first subnet is left out"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param({"EnableIPv6": False, "IPv6Network": "::/0"}, [], id="k3s: none"),
        pytest.param({"IPv6Network": "::/0"}, [], id="the same by default"),
        pytest.param({"IPv6Network": ""}, ["IPv6Network: missing"], id="an empty one"),
        pytest.param({"IPv6Network": "rubbish"}, ["IPv6Network", "rubbish"], id="a typing error"),
        pytest.param({"IPv6Network": "fd00::/48", "IPv6SubnetLen": 200}, ["IPv6SubnetLen", "200"], id="another"),
        pytest.param({"IPv6Network": 7}, ["IPv6Network", "string"], id="of another kind"),
    ],
)
def test_report_1_a_family_that_is_switched_off_stops_nothing(fields, told):
    config = parse(Network="10.42.0.0/16", Backend={"Type": "vxlan"}, **fields)
    assert config.pools.keys() == {4}
    assert len(config.ignored) == bool(told)
    for word in told:
        assert word in config.ignored[0]
    assert all("EnableIPv6 is false" in fault for fault in config.ignored)


def test_report_1_so_is_ipv4_in_a_network_of_ipv6():
    config = parse(EnableIPv4=False, EnableIPv6=True, Network="0.0.0.0/0", IPv6Network="fd00::/56")
    assert (config.pools.keys(), config.ignored) == ({6}, ())
    assert "Network" in parse(EnableIPv4=False, EnableIPv6=True, Network="x", IPv6Network="fd00::/56").ignored[0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"Subnetlen": 25, "backend": {"type": "vxlan", "vni": 2}}, []),  # names count in any case, as to Go
        ({"SubnetLenght": 25}, ["SubnetLenght: no such field (ignored)"]),
        ({"Backend": {"Type": "vxlan", "DirectRoute": True}}, ["Backend.DirectRoute: no such field (ignored)"]),
        ({"a\nb" + "c" * 100: 1}, ["a\\nb" + "c" * 53 + "...: no such field (ignored)"]),
    ],
)
def test_a_field_that_nobody_reads_is_told(fields, told):
    assert list(parse(Network="10.244.0.0/16", **fields).ignored) == told
