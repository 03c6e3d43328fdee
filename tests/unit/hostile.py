"""Records that somebody hostile, or broken, may write into the store: key, value, and words of the reason for which each is refused.

The node that reads them is 192.168.1.2 with 10.244.1.0/24 of 10.244.0.0/16; one good peer has 10.244.5.0/24.
"""

from __future__ import annotations

import json
from typing import Any

from lease.config import parse_config
from lease.families import V4
from lease.model import Endpoint, Lease, ip_number, mac_number, prefix
from overlay.backends.choose import backend_of
from overlay.peers.plan import Node

OWN_MAC, PEER_MAC = "0a:00:00:00:00:01", "0a:00:00:00:00:05"
CONFIG = b'{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'
_BACKEND = backend_of(parse_config(CONFIG).backend, V4)
NODE = Node(
    prefix("10.244.0.0/16"), _BACKEND,
    Lease("10.244.1.0-24", "vxlan",
          Endpoint(prefix("10.244.1.0/24"), ip_number("192.168.1.2", 4), 1, mac_number(OWN_MAC)), None, "", 1, 1, 1),
    (prefix("192.168.1.0/24"),), frozenset({ip_number("192.168.1.2", 4)}),
    allowed=(prefix("192.168.0.0/16"),),
)  # fmt: skip


def value(public_ip: Any = "192.168.1.9", mac: Any = "0a:00:00:00:00:09", vni: Any = 1, **more: Any) -> bytes:
    """flannel's, with one thing wrong."""
    fields = {"PublicIP": public_ip, "BackendType": "vxlan", "BackendData": {"VNI": vni, "VtepMAC": mac}} | more
    return json.dumps(fields).encode()


GOOD_KEY, GOOD_VALUE = "10.244.5.0-24", value("192.168.1.5", PEER_MAC)
KEY = "10.244.9.0-24"
HOSTILE: list[tuple[str, str, bytes, str]] = [
    ("empty", KEY, b"", "not JSON"),
    ("no JSON", KEY, b"{", "not JSON"),
    ("a number", KEY, b"3", "not a JSON object"),
    ("a list", KEY, b"[]", "not a JSON object"),
    ("null", KEY, b"null", "not a JSON object"),
    ("deep", KEY, b"[" * 100_000 + b"]" * 100_000, "value has 200000 bytes"),
    ("deep but short", KEY, b"[" * 8_000 + b"]" * 8_000, "value is not"),  # JSON to a Python that takes such depth, else none
    ("megabytes", KEY, b'{"PublicIP":"' + b"x" * 3_000_000 + b'"}', "value has 30000"),
    ("no UTF-8", KEY, b'{"PublicIP":"\xff\xfe"}', "not JSON"),
    ("UTF-16", KEY, json.dumps({"PublicIP": "192.168.1.9"}).encode("utf-16"), "not JSON"),
    ("digits of another script", KEY, value("\uff11\uff19\uff12.168.1.9"), "must be an IPv4 address"),
    ("leading zeros", KEY, value("192.168.001.9"), "must be an IPv4 address"),
    ("an IPv6 address", KEY, value("fd00::9"), "must be an IPv4 address"),
    ("a number as an address", KEY, value(3232235785), "PublicIP: missing"),
    ("a list as an address", KEY, value(["192.168.1.9"]), "PublicIP: missing"),
    ("half a surrogate", KEY, b'{"PublicIP":"\\ud800"}', "must be an IPv4 address"),
    ("no PublicIP", KEY, b'{"BackendType":"vxlan"}', "PublicIP: missing"),
    ("another backend", KEY, value(BackendType="host-gw"), "BackendType is 'host-gw'"),
    ("a backend that is none", KEY, value(BackendType=7), "BackendType"),
    ("no BackendData", KEY, value(BackendData=None), "BackendData: missing"),
    ("BackendData as text", KEY, value(BackendData='{"VNI":1}'), "BackendData: '{"),
    ("another VNI", KEY, value(vni=2), "VNI 2 is not this network's 1"),
    ("a VNI too large", KEY, value(vni=1 << 24), "VNI"),
    ("a VNI below zero", KEY, value(vni=-1), "VNI"),
    ("a VNI that is true", KEY, value(vni=True), "VNI"),
    ("a VNI with a point", KEY, value(vni=1.0), "VNI"),
    ("a MAC of zeros", KEY, value(mac="00:00:00:00:00:00"), "all zero"),
    ("a multicast MAC", KEY, value(mac="01:00:5e:00:00:01"), "multicast"),
    ("the broadcast MAC", KEY, value(mac="ff:ff:ff:ff:ff:ff"), "multicast"),
    ("our own MAC", KEY, value(mac=OWN_MAC), "is our own"),
    ("a peer's MAC", KEY, value(mac=PEER_MAC), "already used by 10.244.5.0-24"),
    ("a MAC too short", KEY, value(mac="0a:00:00"), "six colon-separated"),
    ("a MAC with dashes", KEY, value(mac="0a-00-00-00-00-09"), "six colon-separated"),
    ("a MAC that is none", KEY, value(mac=7), "VtepMAC: missing"),
    ("our own address", KEY, value("192.168.1.2"), "is our own"),
    ("no address", KEY, value("0.0.0.0"), "cannot be a node's"),
    ("this network", KEY, value("0.1.2.3"), "cannot be a node's"),
    ("loopback", KEY, value("127.0.0.1"), "cannot be a node's"),
    ("multicast", KEY, value("224.0.0.1"), "cannot be a node's"),
    ("reserved", KEY, value("240.0.0.1"), "cannot be a node's"),
    ("limited broadcast", KEY, value("255.255.255.255"), "cannot be a node's"),
    ("the underlay's broadcast", KEY, value("192.168.1.255"), "network or broadcast address"),
    ("the underlay itself", KEY, value("192.168.1.0"), "network or broadcast address"),
    ("an address in its own subnet", KEY, value("10.244.9.9"), "lies in its own subnet"),
    ("an address of another's subnet", KEY, value("10.244.5.9"), "is an address of Network 10.244.0.0/16"),
    ("an address of our bridge", KEY, value("10.244.1.1"), "is an address of Network 10.244.0.0/16"),
    ("a source in Network", KEY, value(OverlaySource="10.244.5.9"), "OverlaySource 10.244.5.9 is an address of Network"),
    ("outside --underlay-cidr", KEY, value("8.8.8.8"), "outside --underlay-cidr 192.168.0.0/16"),
    ("a source outside --underlay-cidr", KEY, value(OverlaySource="8.8.8.8"), "OverlaySource 8.8.8.8 is outside"),
    ("a source that is none", KEY, value(OverlaySource="x"), "OverlaySource: 'x' must be an IPv4 address"),
    ("a source of another kind", KEY, value(OverlaySource=[1]), "OverlaySource"),
    ("a source of loopback", KEY, value(OverlaySource="127.0.0.1"), "OverlaySource 127.0.0.1 cannot be"),
    ("everything", "0.0.0.0-0", value(), "from 1 to 31"),
    ("half of everything", "0.0.0.0-1", value(), "outside Network"),
    ("all of Network", "10.244.0.0-16", value(), "too large a part"),
    ("half of Network", "10.244.128.0-17", value(), "too large a part"),
    ("more than Network", "10.0.0.0-8", value(), "outside Network"),
    ("the underlay as a subnet", "192.168.1.0-24", value(), "outside Network"),
    ("the service range", "10.96.0.0-12", value(), "outside Network"),
    ("one service", "10.96.0.0-24", value(), "outside Network"),
    ("loopback as a subnet", "127.0.0.0-8", value(), "outside Network"),
    ("multicast as a subnet", "224.0.0.0-4", value(), "outside Network"),
    ("our own subnet, in another form", "10.244.1.0-25", value(), "overlaps our own"),
    ("around our own subnet", "10.244.0.0-22", value(), "overlaps our own"),
    ("a part of a peer's", "10.244.5.128-25", value(), "overlaps 10.244.5.0-24, which is older"),
    ("around a peer's", "10.244.4.0-23", value(), "overlaps 10.244.5.0-24, which is older"),
    ("one address", "10.244.9.9-32", value(), "from 1 to 31"),
    ("host bits", "10.244.9.9-24", value(), "host bits"),
    ("no key", "", value(), "not of the form"),
    ("rubbish for a key", "not-a-subnet", value(), "not of the form"),
    ("a key with a path", "../config", value(), "not of the form"),
    ("a key with a newline", "10.244.9.0-24\n", value(), "not of the form"),
    ("a key in another script", "\u0661\u0660.244.9.0-24", value(), "not of the form"),
    ("a key too long", "10.244.9.0-24" + "&" * 5000, value(), "not of the form"),
    ("octets too large", "10.244.900.0-24", value(), "is not an IPv4 address"),
]  # fmt: skip
