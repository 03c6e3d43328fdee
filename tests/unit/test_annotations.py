"""flannel's Node annotations, against what a real flanneld left (recordings/kube-vxlan.txt)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from lease.kube.objects import NO_TIME
from lease.model import Endpoint, Lease, Prefix, prefix
from lease.records.annotations import DEFAULT_PREFIX, Hints, Names, decode_node, encode, hints, node_subnets, seniority
from lease.records.codec import BadRecord

NAMES = Names.of(DEFAULT_PREFIX)
RECORDING = Path(__file__).parent / "recordings/kube-vxlan.txt"


def recorded() -> list[dict]:
    """The Node objects of the recording."""
    text = RECORDING.read_text()
    return [json.loads(found) for found in re.findall(r"### node object \d.*?\n(\{.*?\n\})\n", text, re.S)]


def lease(v6: Endpoint | None = None) -> Lease:
    return Lease("n", "vxlan", Endpoint(prefix("10.244.0.0/24"), 0xC0A80102, 1, 0x3A353FC52448), v6, "n", 1, 0, 2)


def test_flannels_own_annotations_are_read_and_written_byte_for_byte():
    nodes = recorded()
    assert len(nodes) == 2
    for node in nodes:
        found = decode_node("n", node["annotations"], node_subnets(node["podCIDRs"]), NAMES, 1, 2)
        assert found is not None
        written = {name: text for name, text in encode(found, NAMES).items() if text is not None}
        assert written == {name: text for name, text in node["annotations"].items() if name.startswith(DEFAULT_PREFIX)}


def test_both_families_are_written_and_read():
    both = lease(Endpoint(prefix("fd00:10::/64"), 0xFD00 << 112 | 2, 1, 0x0A0000000002))
    notes = encode(both, NAMES)
    assert notes[f"{DEFAULT_PREFIX}/backend-v6-data"] == '{"VNI":1,"VtepMAC":"0a:00:00:00:00:02"}'
    assert notes[f"{DEFAULT_PREFIX}/public-ipv6"] == "fd00::2"
    subnets = node_subnets(["fd00:10::/64", "10.244.0.0/24"])
    assert decode_node("n", notes, subnets, NAMES, 1, 2) == both


def test_a_family_we_lack_is_taken_off():
    """A node that was dual-stack under flannel must not draw IPv6 traffic it does not serve."""
    notes = encode(lease(), NAMES)
    assert notes[f"{DEFAULT_PREFIX}/backend-v6-data"] is None
    assert notes[f"{DEFAULT_PREFIX}/public-ipv6"] is None


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/kube-subnet-manager"),
        ("example.com/", "example.com/kube-subnet-manager"),
        ("example.com/net", "example.com/net-kube-subnet-manager"),
        ("example.com/net-", "example.com/net-kube-subnet-manager"),
    ],
)
def test_the_prefix_is_completed_as_flannel_does(text, first):
    assert Names.of(text).managed == first


@pytest.mark.parametrize("text", ["a/b/c", "", "/x", "UPPER.com", "a b", "-a"])
def test_a_prefix_that_cannot_be_one(text):
    with pytest.raises(ValueError, match="must be a DNS name"):
        Names.of(text)


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"public-ip": "x"}, "public-ip"),
        ({"public-ip": None}, "public-ip is missing"),
        ({"backend-data": None}, "backend-data: missing"),
        ({"backend-data": "{"}, "backend-data: not JSON"),
        ({"backend-data": "[" * 4000}, "backend-data: not JSON"),
        ({"backend-data": "x" * 5000}, "has 5000 bytes"),
        ({"backend-data": '{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}'}, "multicast"),
        ({"backend-data": '{"VNI":-1,"VtepMAC":"0a:00:00:00:00:01"}'}, "VNI"),
        ({"backend-data": "null"}, "missing"),
    ],
)
def test_a_bad_annotation_is_named(notes, words):
    good = encode(lease(), NAMES)
    mixed = {**good, **{f"{DEFAULT_PREFIX}/{name}": text for name, text in notes.items()}}
    with pytest.raises(BadRecord) as caught:
        decode_node("n", {k: v for k, v in mixed.items() if v is not None}, {4: prefix("10.244.0.0/24")}, NAMES, 1, 2)
    assert words in str(caught.value)


def test_a_node_nobody_manages_is_no_peer():
    assert decode_node("n", {}, {4: prefix("10.244.0.0/24")}, NAMES, 1, 2) is None
    notes = {**encode(lease(), NAMES), NAMES.managed: "false"}
    assert decode_node("n", notes, {4: prefix("10.244.0.0/24")}, NAMES, 1, 2) is None


def test_pod_cidrs_in_every_order():
    assert node_subnets(["fd00::/64", "10.1.2.3/24", "10.9.9.0/24"]) == {
        6: Prefix(6, 0xFD00 << 112, 64),
        4: prefix("10.1.2.0/24"),
    }
    assert node_subnets([]) == {}
    with pytest.raises(BadRecord, match="podCIDR 'x' is not a prefix"):
        node_subnets(["x"])


def test_hints_of_an_operator():
    notes = {NAMES.node_public_ip[4]: "192.168.1.7", NAMES.overwrite[4]: "203.0.113.5"}
    assert hints(notes, NAMES) == Hints({4: 0xC0A80107}, {4: 0xCB007105})
    bad = hints({NAMES.overwrite[4]: "fd00::1"}, NAMES)
    assert bad.overwrite == {4: None}
    assert "must be an IPv4 address" in bad.faults[0]
    six = hints({NAMES.overwrite[6]: "fd00::1", NAMES.node_public_ip[6]: "fd00::2"}, NAMES)
    assert six == Hints({6: 0xFD00 << 112 | 2}, {6: 0xFD00 << 112 | 1})


NOTES = st.fixed_dictionaries(
    {},
    optional={
        NAMES.managed: st.sampled_from(["true", "true", "true", "false", "True"]),
        NAMES.backend_type: st.sampled_from(["vxlan", "vxlan", "host-gw", ""]) | st.text(max_size=9),
        NAMES.data[4]: st.sampled_from(['{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}', "null", "[]", "{", '{"VNI":true}'])
        | st.text(max_size=60)
        | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(
            st.sampled_from(["VNI", "VtepMAC", "x"]), inner)).map(json.dumps),
        NAMES.public_ip[4]: st.sampled_from(["192.168.1.2", "fd00::1", "0.0.0.0", "192.168.001.2"]) | st.text(max_size=20),
        NAMES.public_ip[6]: st.sampled_from(["fd00::1", "192.168.1.2"]) | st.text(max_size=20),
        NAMES.overwrite[4]: st.sampled_from(["203.0.113.5"]) | st.text(max_size=20),
        NAMES.node_public_ip[4]: st.sampled_from(["203.0.113.5"]) | st.text(max_size=20),
        NAMES.source: st.sampled_from(["192.168.1.3"]) | st.text(max_size=20),
    },
)  # fmt: skip


def test_the_fuzz_below_reaches_what_it_is_for():
    """Else it would only try Nodes that nobody manages."""
    found = find(NOTES, lambda notes: notes.get(NAMES.managed) == "true" and _is_peer(notes))
    assert found
    assert find(NOTES, lambda notes: notes.get(NAMES.managed) == "true" and not _is_peer(notes)) is not None


def _is_peer(notes: dict[str, str]) -> bool:
    try:
        return decode_node("n", notes, {4: prefix("10.244.0.0/24")}, NAMES, 1, 2) is not None
    except BadRecord:
        return False


@given(NOTES | st.dictionaries(st.sampled_from(NAMES.read()), st.text(max_size=60)))
def test_no_annotation_raises_anything_else(notes):
    try:
        found = decode_node("n", notes, {4: prefix("10.244.0.0/24")}, NAMES, 1, 2)
    except BadRecord as error:
        assert "\n" not in str(error)
    else:
        assert found is None or found.key == "n"
    hints(notes, NAMES)


def test_the_older_comes_first_then_the_uid():
    assert seniority(0, "zzz") < seniority(1, "a")
    assert seniority(0, "00000000-0000-0000-0000-000000000001") < seniority(0, "00000000-0000-0000-0000-000000000002")
    assert seniority(0, "x") < seniority(NO_TIME, "x")
