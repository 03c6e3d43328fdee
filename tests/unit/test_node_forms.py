"""JSON and protobuf of an API server (1.34.4) say the same; whatever is neither is refused, and nothing hangs."""

from __future__ import annotations

import json
from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.kube import protobuf
from lease.kube.client import _frames
from lease.kube.objects import MALFORMED, NO_TIME, Answer, Event, NodeSeen, Page
from tests.support import upb_nodes
from tests.unit.recordings import FOLDER

SAID = {name: b64decode(text) for name, text in json.loads((FOLDER / "nodes.json").read_text()).items()}
NOTES = tuple(f"flannel.alpha.coreos.com/{name}" for name in ("backend-data", "public-ip", "kube-subnet-manager"))
ERROR = (
    b"\n\x05ERROR\x12\xad\x01\n\xaa\x01k8s\x00\n\x0c\n\x02v1\x12\x06Status\x12\x91\x01\n\x06\n\x00\x12\x00\x1a\x00\x12\x07Failure"
    b"\x1ala watch stream was requested by the client but the required storage feature RequestWatchProgress is disabled"
    b'"\rInternalError0\xf4\x03\x1a\x00"\x00'
)


def both(name: str) -> tuple[Answer, Answer]:
    return Answer(SAID[f"{name} json"], False), Answer(SAID[f"{name} protobuf"], True)


def test_a_node():
    plain, quick = (answer.node(NOTES) for answer in both("node"))
    assert quick._replace(raw=0) == plain
    assert plain.name == "node1"
    assert len(plain.uid) == 36
    assert plain.pod_cidrs == ["10.255.255.0/24"]
    assert set(plain.annotations) == set(NOTES)
    assert 1_700_000_000 < plain.created < 2_000_000_000


def test_a_list_of_metadata():
    plain, quick = (answer.page(NOTES) for answer in both("metadata list"))
    # the token holds nothing of the form it was asked in, and the list was read twice at one version
    assert quick._replace(nodes=[node._replace(raw=0) for node in quick.nodes]) == plain
    assert len(plain.nodes) == 2
    assert plain.token
    assert all(node.annotations and node.pod_cidrs == [] for node in plain.nodes)


def test_events():
    plain = [Answer(line, False).event(NOTES) for line in SAID["watch json"].splitlines()]
    frames, rest = _frames(SAID["watch protobuf"])
    assert rest == b""
    quick = [Answer(frame, True).event(NOTES) for frame in frames]
    assert [event._replace(node=event.node and event.node._replace(raw=0)) for event in quick] == plain
    assert [event.kind for event in plain][:2] == ["ADDED", "MODIFIED"]


def test_frames_that_are_cut_anywhere_come_whole():
    data = SAID["watch protobuf"]
    for cut in range(len(data)):
        first, rest = _frames(data[:cut])
        second, rest = _frames(rest + data[cut:])
        assert [*first, *second] == _frames(data)[0]
        assert rest == b""
    with pytest.raises(ValueError, match="an event of 2155905152 bytes"):
        _frames(b"\x80\x80\x80\x80")


def test_refusals():
    plain, quick = (answer.refusal() for answer in both("not found"))
    assert plain == quick == ('nodes "nope" not found', "nodes/nope")


def test_an_error_in_a_watch():
    found = Answer(ERROR, True).event(NOTES)
    assert found.kind == "ERROR"
    assert found.node is None
    assert found.error.startswith("500 a watch stream was requested")
    text = b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}'
    assert Answer(text, False).event(NOTES) == Event("ERROR", None, "410 too old")


def test_a_bookmark_has_no_name():
    text = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7","creationTimestamp":null}}}'
    plain = Answer(text, False).event(NOTES)
    meta = b"\x32\x017"
    inner = b"k8s\0\x12" + bytes([len(meta) + 2]) + b"\x0a" + bytes([len(meta)]) + meta
    raw = b"\x0a" + bytes([len(inner)]) + inner
    quick = Answer(b"\x0a\x08BOOKMARK\x12" + bytes([len(raw)]) + raw, True).event(NOTES)
    assert quick.node is not None
    assert plain.node is not None
    assert quick.node.version == plain.node.version == "7"
    assert quick.node.created == plain.node.created == NO_TIME


@pytest.mark.parametrize("name", ["node", "metadata list", "not found"])
@given(data=st.data())
def test_what_is_damaged_is_refused_or_read_and_never_hangs(name, data):
    body = bytearray(SAID[f"{name} protobuf"])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.integers(0, len(body)))])
    for read in (Answer(cut, True).node, Answer(cut, True).page, Answer(cut, True).event):
        try:
            found = read(NOTES)
        except MALFORMED:
            continue
        assert isinstance(found, tuple)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data):
    for form in (True, False):
        for read in (Answer(data, form).node, Answer(data, form).page, Answer(data, form).event):
            try:
                found = read(NOTES)
            except MALFORMED:
                continue
            assert isinstance(found, tuple)


def test_a_number_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="without end"):
        Answer(b"k8s\0\x08" + b"\xff" * 200, True).node(NOTES)


def test_a_node_with_the_old_field_alone():
    assert Answer(
        json.dumps(
            {"metadata": {"name": "n", "uid": "u", "resourceVersion": "1"}, "spec": {"podCIDR": "10.1.0.0/24"}}
        ).encode(),
        False,
    ).node(()) == NodeSeen("n", "u", "1", NO_TIME, {}, ["10.1.0.0/24"])


def summary(frame: bytes):
    return Answer(frame, True).summary()


def test_a_summary_says_what_the_whole_says():
    frames, _ = _frames(SAID["watch protobuf"])
    seen = {}
    for frame in frames:
        event = Answer(frame, True).event(NOTES)
        if event.kind == "MODIFIED":
            seen[frame] = event.node
            assert summary(frame) == (event.node.name, event.node.uid, event.node.version, event.node.raw)
        else:
            assert summary(frame) is None
    assert seen
    assert all(node.raw for node in seen.values())


@given(data=st.data())
def test_a_summary_at_what_is_damaged_says_what_the_whole_says_or_nothing(data):
    frame = bytearray(max(_frames(SAID["watch protobuf"])[0], key=len))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.sampled_from([len(frame), len(frame), data.draw(st.integers(0, len(frame)))]))])
    try:
        found = summary(cut)
        event = Answer(cut, True).event(NOTES)
    except MALFORMED:
        return  # the list is read again, unless it is as it was before: what follows is of no interest then
    if found is not None and event.kind == "MODIFIED":
        assert found[:3] == (event.node.name, event.node.uid, event.node.version)


def test_a_name_that_damage_makes_be_said_twice_is_refused():
    """managedFields, cut short, reads on as metadata: a summary has the first name, the whole would have the last."""
    frame = bytearray(max(_frames(SAID["watch protobuf"])[0], key=len))
    at = frame.index(b"\x8a\x01", frame.index(b"flannel.alpha.coreos.com/public-ip"))  # field 17
    assert Answer(bytes(frame), True).event(NOTES).node.name == "node1"
    frame[at + 2 : at + 4] = b"\x80\x00"
    assert summary(bytes(frame)).name == "node1"
    with pytest.raises(ValueError, match="'node1' is followed by another"):
        Answer(bytes(frame), True).event(NOTES)


def test_protobufs_own_parser_says_the_same():
    for recorded in ("node", "metadata list", "not found"):
        body = SAID[f"{recorded} protobuf"]
        reads = {"node": (protobuf.node, upb_nodes.node), "metadata list": (protobuf.page, upb_nodes.page)}
        if recorded in reads:
            ours, theirs = (without_raw(read(body, NOTES)) for read in reads[recorded])
            assert ours == theirs
        else:
            assert protobuf.status(body) == upb_nodes.status(body)
    for frame in _frames(SAID["watch protobuf"])[0]:
        assert without_raw(protobuf.event(frame, NOTES)) == without_raw(upb_nodes.event(frame, NOTES))
        ours, theirs = protobuf.summary(frame), upb_nodes.summary(frame)
        assert ours is None or ours[:3] == theirs[:3]


@given(data=st.data())
def test_of_what_is_damaged_protobufs_own_parser_reads_nothing_else(data):
    """Either may refuse what the other lets pass: one does not look at what is of no interest."""
    body = bytearray(SAID["node protobuf"])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        ours, theirs = protobuf.node(bytes(body), NOTES), upb_nodes.node(bytes(body), NOTES)
    except MALFORMED:
        return
    assert without_raw(ours) == without_raw(theirs)


def without_raw(found):
    """`raw` is a hash of the bytes, which each takes in its own way."""
    if isinstance(found, NodeSeen):
        return found._replace(raw=0)
    if isinstance(found, Page):
        return found._replace(nodes=[without_raw(node) for node in found.nodes])
    return found._replace(node=found.node and without_raw(found.node))


def field(number: int, value: bytes) -> bytes:
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def test_a_field_that_an_annotation_does_not_have_is_no_value_of_it():
    note = field(12, field(1, NOTES[1].encode()) + field(2, b"x") + field(3, b"y"))
    meta = field(1, b"n") + field(5, b"u") + field(6, b"7") + note
    page = Answer(b"k8s\0" + field(2, field(1, field(2, b"9")) + field(2, field(1, meta))), True).page(NOTES)
    assert page.nodes[0].annotations == {NOTES[1]: "x"}


def test_an_annotation_that_is_no_text_costs_nobody_else():
    """Kubernetes does not check the values of annotations: one Node must not end the list of all agents."""
    note = field(12, field(1, NOTES[1].encode()) + field(2, b"\xff\xfe"))
    meta = field(1, b"n") + field(5, b"u") + field(6, b"7") + note
    page = Answer(b"k8s\0" + field(2, field(1, field(2, b"9")) + field(2, field(1, meta))), True).page(NOTES)
    assert page.nodes[0].annotations == {NOTES[1]: "\ufffd\ufffd"}


def test_a_summary_says_nothing_of_a_node_without_annotations():
    """Else the event that takes the last one away would be no news where the list was read in JSON."""
    meta = b"".join((
        field(1, b"n"), b"\x12\0\x1a\0\"\0", field(5, b"0" * 36), field(6, b"7"), b"8\0B\x08\x08\x81\x80\x80\x80\x06\x10\0",
    ))  # fmt: skip
    kind = field(1, b"meta.k8s.io/v1") + field(2, b"PartialObjectMetadata")
    inner = b"k8s\0" + field(1, kind) + field(2, field(1, meta))
    bare = field(1, b"MODIFIED") + field(2, field(1, inner))
    assert Answer(bare, True).event(NOTES).node.name == "n"
    assert summary(bare) is None


def test_a_version_that_cannot_be_asked_for_again_is_refused():
    text = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"\\ud800"}}}'
    with pytest.raises(ValueError, match="surrogates"):
        Answer(text, False).event(NOTES)
