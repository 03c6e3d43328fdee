"""flannel's keys and values, byte for byte."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.config import parse_config
from lease.model import Endpoint, Lease, Prefix, ip_number, ip_text, mac_fault, prefix
from lease.records.codec import NODE_FIELD, BadRecord, decode_key, decode_lease, encode_key, encode_value
from lease.records.packed import pack, unpack
from tests.unit import recordings

ETCD = [name for name in recordings.FILES if name.startswith("etcd")]
KEY, VALUE = (
    "10.244.76.0-24",
    b'{"PublicIP":"192.168.1.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"e2:32:57:67:ca:0b"}}',
)


def test_every_recording_is_here():
    assert len(recordings.FILES) == 5
    assert sum(len(recordings.read(name).keys) for name in ETCD) == 8


@pytest.mark.parametrize("name", ETCD)
def test_every_recorded_record_is_read_and_written_back_byte_for_byte(name):
    recording = recordings.read(name)
    for key, value in recording.keys.items():
        lease = decode_lease(key, value, 5, 7, 9)
        assert lease.v4 is not None
        assert encode_key(lease.v4.subnet, lease.v6.subnet if lease.v6 else None) == key
        assert encode_value(lease) == value
        assert (lease.created, lease.modified, lease.handle, lease.node) == (5, 7, 9, "")


@pytest.mark.parametrize("name", [name for name in recordings.FILES if "hostgw" not in name])
def test_every_recorded_vxlan_config_is_accepted(name):
    config = parse_config(recordings.read(name).config)
    assert config.v4 is not None


def test_the_recorded_host_gw_record_is_read_without_backend_data():
    key, value = next(iter(recordings.read("etcd-hostgw.txt").keys.items()))
    lease = decode_lease(key, value)
    assert lease.backend == "host-gw"
    assert lease.v4 is not None
    assert lease.v4.mac is None


def test_our_identity_stands_behind_flannels_fields():
    lease = decode_lease(KEY, VALUE)._replace(node="abc/n1/02:00:00:00:00:01")
    written = encode_value(lease)
    assert written.startswith(VALUE[:-1] + b',"' + NODE_FIELD.encode())
    assert decode_lease(KEY, written) == lease
    assert {k: v for k, v in json.loads(written).items() if k != NODE_FIELD} == json.loads(VALUE)


@pytest.mark.parametrize(
    "key",
    ["", "not-a-subnet", "10.244.1.0", "10.244.1.0/24", "10.244.1.0-33", "10.244.1.0-32", "10.244.1.0-0", "10.244.1.5-24", "x10.244.1.0-24",
     "10.244.1.0-24&", "10.244.1.0-24&fd00::-128", "10.244.1.0-24&fd00::1-64", "300.1.1.0-24", "10.244.1.0-24\n", "٣.1.1.0-24", "10.244.01.0-24", "fd00::-64"],
)  # fmt: skip
def test_bad_keys(key):
    with pytest.raises(BadRecord) as caught:
        decode_key(key)
    assert "\n" not in str(caught.value)


def with_value(**change) -> bytes:
    fields = json.loads(VALUE)
    for name, item in change.items():
        fields[name] = item
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(b"", ["JSON"], id="empty"),
        pytest.param(b"x", ["JSON"], id="garbage"),
        pytest.param(b"\xff\xff", ["JSON"], id="not UTF-8"),
        pytest.param(b"[" * 10_000, ["JSON"], id="deep nesting"),
        pytest.param(b"[1]", ["object"], id="a list"),
        pytest.param(b'"' + b"x" * 20_000 + b'"', ["20002 bytes"], id="huge"),
        pytest.param(with_value(PublicIP=None), ["PublicIP", "missing"], id="PublicIP null is garbage, as for flannel"),
        pytest.param(with_value(PublicIP=""), ["PublicIP"], id="PublicIP empty"),
        pytest.param(with_value(PublicIP="fd00::1"), ["PublicIP", "IPv4"], id="PublicIP of the wrong family"),
        pytest.param(with_value(PublicIP=["1.2.3.4"]), ["PublicIP"], id="PublicIP a list"),
        pytest.param(with_value(BackendType=5), ["BackendType", "string"], id="BackendType a number"),
        pytest.param(with_value(BackendData=None), ["BackendData"], id="no BackendData"),
        pytest.param(with_value(BackendData={"VNI": 1}), ["VtepMAC", "missing"], id="no MAC"),
        pytest.param(
            with_value(BackendData={"VNI": 0, "VtepMAC": 5}), ["VtepMAC", "missing"], id="a MAC that is a number"
        ),
        pytest.param(with_value(BackendData={"VNI": 1, "VtepMAC": "xx"}), ["VtepMAC"], id="MAC garbage"),
        pytest.param(
            with_value(BackendData={"VNI": 1, "VtepMAC": "01:00:5e:00:00:01"}), ["multicast"], id="MAC multicast"
        ),
        pytest.param(with_value(BackendData={"VNI": 1, "VtepMAC": "00:00:00:00:00:00"}), ["zero"], id="MAC zero"),
        pytest.param(with_value(BackendData={"VNI": "1", "VtepMAC": "0e:00:00:00:00:01"}), ["VNI"], id="VNI a string"),
        pytest.param(
            with_value(BackendData={"VNI": 1 << 24, "VtepMAC": "0e:00:00:00:00:01"}), ["VNI"], id="VNI too large"
        ),
    ],
)
def test_bad_values(value, words):
    with pytest.raises(BadRecord) as caught:
        decode_lease(KEY, value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_fields_of_others_are_ignored():
    assert decode_lease(KEY, with_value(Colour="blue")) == decode_lease(KEY, VALUE)


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.text(max_size=40))
def test_anything_is_a_lease_or_a_bad_record(value, key):
    for name in (key, KEY):
        try:
            decode_lease(name, value)
        except BadRecord as error:
            assert "\n" not in str(error)


v4_prefixes = st.builds(
    lambda base, length: Prefix(4, base >> (32 - length) << (32 - length), length),
    st.integers(0, (1 << 32) - 1),
    st.integers(1, 31),
)
v6_prefixes = st.builds(
    lambda base, length: Prefix(6, base >> (128 - length) << (128 - length), length),
    st.integers(0, (1 << 128) - 1),
    st.integers(1, 127),
)
macs = st.integers(1, (1 << 48) - 1).filter(lambda mac: mac_fault(mac) is None)
addresses, vnis = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 24) - 1)
addresses6, nobody, none = st.integers(0, (1 << 128) - 1), st.none(), st.just(0)
keys, ports = st.binary(min_size=32, max_size=32).filter(any), st.integers(1, 65535)


def _ends(prefixes, public_ips, sources):
    """Endpoints as each backend publishes them, by its name."""
    sources = none | sources

    def made(vni, mac, source, key, port):
        ends = st.builds(Endpoint, prefixes, public_ips, vni, mac, source, key, port)
        return ends.filter(lambda end: end.source != end.public_ip or not end.source)

    return {
        "vxlan": made(vnis, macs, sources, st.just(b""), none),
        "host-gw": made(nobody, nobody, none, st.just(b""), none),
        "ipip": made(nobody, nobody, sources, st.just(b""), none),
        "wireguard": made(nobody, nobody, none, keys, ports),
    }


V4_ENDS, V6_ENDS = _ends(v4_prefixes, addresses, addresses), _ends(v6_prefixes, addresses6, none)


@pytest.mark.parametrize("backend", V4_ENDS)
@given(st.data())
def test_round_trip(backend, data):
    v4, v6 = data.draw(V4_ENDS[backend]), data.draw(st.none() | V6_ENDS[backend])
    key = encode_key(v4.subnet, v6.subnet if v6 else None)
    lease = Lease(key, backend, v4, v6, data.draw(st.text(max_size=60)), 1, 2, 3)
    assert decode_lease(key, encode_value(lease), 1, 2, 3) == lease
    assert unpack(pack(lease)) == lease


def test_prefix_arithmetic():
    network = prefix("10.244.0.0/16")
    assert network.covers(prefix("10.244.255.0/24"))
    assert not prefix("10.244.255.0/24").covers(network)
    assert prefix("10.244.255.0/24").overlaps(network)
    assert not network.overlaps(prefix("10.245.0.0/24"))
    assert not network.overlaps(prefix("fd00::/8"))


@pytest.mark.parametrize(
    "text",
    [
        "fe80::1%eth0",
        "fd00::9%",
        "fd00::9%junk",
        "",
        "fd00::9\0",
        "1.2.3.4",
        "fd00::/64",
        " fd00::9",
        "fd00:::9",
        "\uff11::",
        "[::1]",
    ],
)
def test_what_is_no_address_of_ipv6(text):
    """A zone least of all: it says on which link, and what stands before it would be somebody else's."""
    with pytest.raises(ValueError):
        ip_number(text, 6)


@given(st.integers(0, (1 << 128) - 1))
def test_an_address_of_ipv6_is_read_as_it_is_written(address):
    assert ip_number(ip_text(6, address), 6) == address
