"""Frames taken apart, and the file that Wireshark reads."""

from __future__ import annotations

import struct

import pytest

from lease.model import ip_number, prefix
from overlay.capture import frames
from overlay.cli.capture import Goal
from overlay.trace import probe
from overlay.trace.probe import Probe

INNER = probe.packet(Probe(ip_number("10.244.1.2", 4), ip_number("10.244.2.2", 4), "tcp", 80, 1234, 7, 40), 0)


def framed(packet: bytes, source: str = "02:00:00:00:00:01", target: str = "02:00:00:00:00:02") -> bytes:
    return bytes.fromhex(target.replace(":", "")) + bytes.fromhex(source.replace(":", "")) + b"\x08\x00" + packet


def tunnelled(inner: bytes, port: int = 8472, flags: int = 8, vni: int = 5) -> bytes:
    vxlan = bytes([flags, 0, 0, 0]) + vni.to_bytes(3, "big") + b"\0" + inner
    udp = struct.pack("!HHHH", 40000, port, 8 + len(vxlan), 0) + vxlan
    head = struct.pack(
        "!BBHHHBBHLL", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, ip_number("192.168.1.2", 4), ip_number("192.168.1.3", 4)
    )
    return framed(head + udp)


def test_a_packet_of_the_tunnel_is_taken_apart():
    found = frames.parse(tunnelled(framed(INNER)), [8472])
    assert frames.line(found) == "192.168.1.2 > 192.168.1.3 vni 5 | 10.244.1.2 > 10.244.2.2 tcp 1234 > 80 [S], 40 bytes"
    assert found.inner_macs == ("02:00:00:00:00:01", "02:00:00:00:00:02")


def test_what_is_beside_it_is_shown_as_it_is():
    assert frames.line(frames.parse(framed(INNER), [8472])) == "10.244.1.2 > 10.244.2.2 tcp 1234 > 80 [S], 40 bytes"
    assert frames.parse(tunnelled(framed(INNER), port=4789), [8472]).outer is None
    assert frames.parse(tunnelled(framed(INNER)), [0]).outer is None
    assert frames.parse(tunnelled(framed(INNER), flags=0), [8472]) is None
    assert frames.parse(b"\0" * 60, [8472]) is None


def of_ip(protocol: int, payload: bytes) -> bytes:
    ends = ip_number("192.168.1.2", 4), ip_number("192.168.1.3", 4)
    return framed(struct.pack("!BBHHHBBHLL", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, *ends) + payload)


def test_a_packet_of_ipip_is_taken_apart():
    found = frames.parse(of_ip(4, INNER), [0], "ipip")
    assert frames.line(found) == "192.168.1.2 > 192.168.1.3 ipip | 10.244.1.2 > 10.244.2.2 tcp 1234 > 80 [S], 40 bytes"
    assert found.vni is None
    assert Goal(prefix("10.244.2.2/32"), "").wants(found)
    assert frames.parse(of_ip(4, b"\x45"), [0], "ipip") is None
    assert frames.parse(of_ip(4, INNER), [8472]).outer is None, "it is none of a network with VXLAN"


@pytest.mark.parametrize(
    ("message", "words"), [(1, "handshake initiation"), (2, "handshake response"), (4, "data"), (9, "of type 9")]
)
@pytest.mark.parametrize("ports", [(51820, 40000), (40000, 51820)])
def test_what_wireguard_encrypts_is_shown_by_its_kind_and_length(message, words, ports):
    sealed = of_ip(17, struct.pack("!HHHH", *ports, 8 + 32, 0) + bytes([message, 0, 0, 0]) + b"x" * 28)
    found = frames.parse(sealed, [51820], "wireguard")
    assert frames.line(found) == f"192.168.1.2 > 192.168.1.3 wireguard {words}, 60 bytes"
    assert found.inner is None
    assert Goal(prefix("10.244.2.0/24"), "192.168.1.3").wants(found)
    assert not Goal(prefix("10.244.2.2/32"), "").wants(found), "whose packet it is nobody can read"


def test_a_packet_of_a_device_without_a_link_layer_goes_into_the_same_file():
    found = frames.parse_bare(INNER)
    assert frames.line(found) == "10.244.1.2 > 10.244.2.2 tcp 1234 > 80 [S], 40 bytes"
    assert frames.parse(frames.with_link_layer(INNER), [0], "wireguard").inner == found.inner
    six = ipv6(58, ECHO6)[14:]
    assert frames.line(frames.parse_bare(six)).endswith("icmpv6 echo request id 7 seq 1, 48 bytes")
    assert frames.parse_bare(b"") is None


def ipv6(header: int, payload: bytes, source: str = "fd00:1::2", target: str = "fd00:2::2") -> bytes:
    ends = b"".join(ip_number(end, 6).to_bytes(16, "big") for end in (source, target))
    return framed(b"")[:12] + b"\x86\xdd" + struct.pack("!LHBB", 6 << 28, len(payload), header, 64) + ends + payload


def tunnelled6(inner: bytes) -> bytes:
    vxlan = bytes([8, 0, 0, 0]) + (5).to_bytes(3, "big") + b"\0" + inner
    return ipv6(17, struct.pack("!HHHH", 40000, 8472, 8 + len(vxlan), 0) + vxlan, "fd01::2", "fd01::3")


ECHO6 = struct.pack("!BBHHH", 128, 0, 0, 7, 1)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (ipv6(58, ECHO6), "fd00:1::2 > fd00:2::2 icmpv6 echo request id 7 seq 1, 48 bytes"),
        (ipv6(6, struct.pack("!HHLLBB", 1234, 80, 0, 0, 0x50, 2)), "fd00:1::2 > fd00:2::2 tcp 1234 > 80 [S], 54 bytes"),
        (ipv6(0, bytes([58, 0, 1, 4, 0, 0, 0, 0]) + ECHO6), "icmpv6 echo request id 7 seq 1, 56 bytes"),
        (ipv6(44, bytes([17, 0, 0x05, 0xA8, 0, 0, 0, 1]) + b"x" * 8), "fragment of udp, 56 bytes"),
        (ipv6(44, bytes([58, 0, 0, 1, 0, 0, 0, 1]) + ECHO6), "icmpv6 echo request id 7 seq 1, 56 bytes"),
        (ipv6(58, struct.pack("!BBHL", 135, 0, 0, 0)), "icmpv6 neighbour solicitation code 0, 48 bytes"),
        (framed(INNER), "10.244.1.2 > 10.244.2.2 tcp 1234 > 80 [S], 40 bytes"),
    ],
)
def test_a_packet_of_ipv6_is_taken_apart(inner, words):
    found = frames.parse(tunnelled6(inner), [8472])
    assert frames.line(found).startswith("fd01::2 > fd01::3 vni 5 | ")
    assert frames.line(found).endswith(words)
    assert frames.line(frames.parse(inner, [8472])).endswith(words)
    assert Goal(None, "fd01::3").wants(found)
    assert Goal(prefix("fd00:2::/64"), "").wants(found) == (":" in found.inner.source)
    assert not Goal(prefix("fd00:3::/64"), "").wants(found)
    assert Goal(prefix("10.244.2.0/24"), "").wants(found) == ("10.244" in words)


def test_no_length_of_a_frame_is_too_short():
    for whole in (tunnelled(framed(INNER)), tunnelled6(ipv6(0, bytes([58, 0, 1, 4, 0, 0, 0, 0]) + ECHO6))):
        for cut in range(len(whole)):
            frames.parse(whole[:cut], [8472])


@pytest.mark.parametrize(
    ("goal", "wants"),
    [
        (Goal(None, "192.168.1.3"), True),
        (Goal(None, "192.168.1.4"), False),
        (Goal(prefix("10.244.2.2/32"), ""), True),
        (Goal(prefix("10.244.2.0/24"), "x"), True),
        (Goal(prefix("10.244.3.0/24"), "192.168.1.3"), True),
        (Goal(prefix("10.244.3.0/24"), ""), False),
    ],
)
def test_which_packets_are_meant(goal, wants):
    assert goal.wants(frames.parse(tunnelled(framed(INNER)), [8472])) == wants


def test_a_file_begins_and_goes_on_as_libpcap_says():
    head = frames.pcap_head()
    assert struct.unpack("=LHHlLLL", head) == (0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
    assert struct.unpack("=LLLL", frames.pcap_record(b"12345", 3_000_000_007)[:16]) == (3, 7, 5, 5)
