"""Input of others, fuzzed: whatever it is, it is used, or refused in one line; nothing else is ever raised."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lease.families import V4
from lease.model import prefix
from lease.records.codec import BadRecord, decode_lease
from lease.records.packed import decode, unpack
from overlay.cni import lists as cni
from overlay.peers import plan
from overlay.peers.table import PeerTable
from overlay.settings.flags import FLAGS
from overlay.settings.settings import SettingsError, read_live, read_settings
from tests.unit.hostile import GOOD_KEY, GOOD_VALUE, HOSTILE, NODE
from tests.unit.hostile import value as hostile_value

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def read(key: str, value: bytes):
    """As the feed does: quickly where it can, else plainly."""
    quick = decode(key.encode("utf-8", "surrogateescape"), value, 9, 9, 9)
    return unpack(quick) if quick is not None else decode_lease(key, value, 9, 9, 9)


def judge(key: str, value: bytes, table: PeerTable) -> str:
    """Why a record is no peer, "" where it is one."""
    try:
        lease = read(key, value)
    except BadRecord as error:
        return str(error)
    table.put(lease)
    return table.refused.get(lease.key, "")


@pytest.mark.parametrize(("name", "key", "value", "words"), HOSTILE, ids=[name for name, *_ in HOSTILE])
def test_each_of_the_corpus_is_refused_with_its_reason_and_costs_nobody_else(name, key, value, words):
    table = PeerTable(V4, lambda lease: plan.refusal(NODE, lease), plan.quick(NODE))
    table.put(decode_lease(GOOD_KEY, GOOD_VALUE, 5, 5, 5))
    reason = judge(key, value, table)
    assert words in reason, name
    assert "\n" not in reason
    assert len(reason) < 400
    assert [lease.key for lease in table.accepted()] == [GOOD_KEY]


@given(st.text(max_size=60) | st.sampled_from([key for _, key, _, _ in HOSTILE]), st.binary(max_size=300) | JSON)
def test_any_record_is_a_peer_or_refused(key, value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    table = PeerTable(V4, lambda lease: plan.refusal(NODE, lease), plan.quick(NODE))
    table.put(decode_lease(GOOD_KEY, GOOD_VALUE, 5, 5, 5))
    assert "\n" not in judge(key, data, table)
    assert GOOD_KEY in [lease.key for lease in table.accepted()]


RECORDS = st.lists(
    st.tuples(
        st.sampled_from(["10.244.5.0-24", "10.244.5.128-25", "10.244.4.0-22", "10.244.9.0-24", "10.244.9.0-25", "10.244.1.0-26",
                         "10.244.64.0-18", "10.96.0.0-24", "10.244.9.0-24&fd00::-64"]),
        st.sampled_from(["192.168.1.9", "192.168.1.5", "192.168.1.2", "192.168.1.255", "8.8.8.8", "10.244.5.1", "0.0.0.0"]),
        st.sampled_from(["0a:00:00:00:00:09", "0a:00:00:00:00:05", "0a:00:00:00:00:01", "01:00:5e:00:00:01"]),
        st.sampled_from([1, 1, 1, 2]),
        st.sampled_from(["vxlan", "vxlan", "vxlan", "host-gw"]),
        st.integers(1, 30),
    ),
    max_size=8,
)  # fmt: skip


@settings(max_examples=400)
@given(RECORDS)
def test_any_records_beside_a_good_one(records):
    """Most have the usual form, so that they come as far as disputes: none younger costs the good one anything, and no two
    peers are ever in each other's way."""
    table = PeerTable(V4, lambda lease: plan.refusal(NODE, lease), plan.quick(NODE))
    table.put(decode_lease(GOOD_KEY, GOOD_VALUE, 5, 5, 5))
    for place, (key, public_ip, mac, vni, backend, created) in enumerate(records):
        if key == GOOD_KEY:
            continue
        try:
            lease = read(key, hostile_value(public_ip, mac, vni, BackendType=backend))
        except BadRecord:
            continue
        table.put(lease._replace(created=created + 5, modified=40 + place))
    peers = list(table.accepted())
    assert GOOD_KEY in [lease.key for lease in peers]
    for one in peers:
        assert NODE.network.covers(one.v4.subnet)
        assert one.v4.public_ip not in NODE.addresses
        for other in peers:
            if other.key != one.key:
                assert not one.v4.subnet.overlaps(other.v4.subnet)
                assert one.v4.mac != other.v4.mac or one.v4.public_ip == other.v4.public_ip


@given(
    st.dictionaries(
        st.sampled_from(
            ["PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "OverlayNode", "OverlaySource"]
        ),
        JSON | st.sampled_from(["192.168.1.9", "vxlan", "fe80::1", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:09"}]),
    )
)
def test_any_fields_of_a_record(fields):
    table = PeerTable(V4, lambda lease: plan.refusal(NODE, lease), plan.quick(NODE))
    judge("10.244.9.0-24", json.dumps(fields).encode(), table)
    for lease in table.accepted():
        assert lease.v4.public_ip not in NODE.addresses
        assert plan.entries(NODE, lease)


@given(st.lists(st.text(max_size=30) | st.sampled_from([f"--{flag.name}" for flag in FLAGS]).flatmap(
    lambda name: st.text(max_size=20).map(lambda text: f"{name}={text}")
), max_size=5))  # fmt: skip
def test_any_command_line_is_settings_or_one_line(arguments):
    try:
        read_settings(arguments, {})
    except SettingsError as error:
        assert "\n" not in str(error)
    except SystemExit as stopped:
        assert stopped.code == 0, "--help"


@given(
    st.dictionaries(
        st.sampled_from([f"FLANNELD_{flag.name.upper().replace('-', '_')}" for flag in FLAGS]), st.text(max_size=30)
    ),
    st.none() | st.text(max_size=20).map(lambda text: f"of a password: {text}"),
)
def test_any_environment_is_settings_or_one_line(environ, password):
    """password: none that another flag has, too, whose text may be shown."""
    environ.pop("FLANNELD_ETCD_PASSWORD", None)
    if password is not None:
        environ["FLANNELD_ETCD_PASSWORD"] = password
    try:
        read_settings([], environ)
    except SettingsError as error:
        assert "\n" not in str(error)
        assert (password or "of a password") not in str(error)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_live_settings(data):
    settings, _ = read_settings([], {})
    try:
        read_live(data, settings)
    except SettingsError as error:
        assert "\n" not in str(error)


ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["flannel", "flannel", "portmap"]) | JSON},
        optional={
            "delegate": JSON | st.dictionaries(
                st.sampled_from(["type", "bridge", "name", "ipam", "mtu", "isDefaultGateway", "hairpinMode"]), JSON),
            "ipam": JSON | st.dictionaries(st.sampled_from(["routes", "type", "ranges", "dataDir"]), JSON),
        },
    ),
    max_size=3,
)  # fmt: skip
FILES = (
    st.binary(max_size=300)
    | JSON.map(lambda value: json.dumps({"plugins": value, "name": value}).encode())
    | st.tuples(ENTRIES, JSON).map(lambda made: json.dumps({"plugins": made[0], "cniVersion": made[1]}).encode())
)


@given(FILES)
def test_any_file_of_others(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "file"
    path.write_bytes(data)
    assert cni.previous_subnet(str(path), 4) is None or cni.previous_subnet(str(path), 4).family == 4
    cni.listed_subnet(str(path), 4)
    cni.names_plugin(str(path), "flannel")
    cni.bridges_in(data.decode(errors="replace"))
    try:
        made = cni.render_list(data, cni.network_list([cni.PodNetwork(prefix("10.244.0.0/16"), prefix("10.244.1.0/24"))], 1450, "cni0", "", ""),
                        prefix("10.244.0.0/16"), 1450, True)  # fmt: skip
        cni.bridges_in(made)
        made.encode()
    except ValueError as error:
        assert "\n" not in str(error)
