"""What every start asks of links and addresses, as netlink messages by struct: a vxlan device read, made, set up, given its
address. Pure; tests compare every message, and what is read, with pyroute2's encoding of the same.

What is rare (a device mended or deleted) goes through pyroute2, in device.py; its modules cost 2 MiB and 20 ms, which an
agent that finds all as it should be, or makes it once, need not pay.

Source: include/uapi/linux/{rtnetlink,if_link,if_addr}.h.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lease.families import V4, Family
from overlay.kernel.route import wire
from overlay.kernel.route.entries import Link

IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
(
    VXLAN_ID, VXLAN_GROUP, VXLAN_LINK, VXLAN_LOCAL, VXLAN_LEARNING, VXLAN_L2MISS, VXLAN_PORT, VXLAN_GROUP6, VXLAN_LOCAL6,
    VXLAN_UDP_CSUM, VXLAN_UDP_ZERO_CSUM6_TX, VXLAN_UDP_ZERO_CSUM6_RX, VXLAN_GBP, VXLAN_COLLECT_METADATA,
) = (1, 2, 3, 4, 7, 13, 15, 16, 17, 18, 19, 20, 23, 25)  # fmt: skip
_IFINFO = struct.Struct("=BBHlLL")
IFINFO_SIZE = _IFINFO.size
IPTUN_LOCAL, IPTUN_REMOTE, IPTUN_PMTUDISC, IPTUN_ENCAP_TYPE, IPTUN_COLLECT_METADATA = 2, 3, 10, 15, 19
"""include/uapi/linux/if_tunnel.h: IFLA_IPTUN_..."""
_IFADDR = struct.Struct("=BBBBL")
IFA_F_NODAD = 0x02


class VxlanDevice(NamedTuple):
    """What a vxlan device is made of. local: underlay address; lower: number of the underlay interface."""

    name: str
    vni: int
    port: int
    local: int
    lower: int
    mtu: int
    mac: int
    gbp: bool
    learning: bool


class IpipDevice(NamedTuple):
    """What an ipip device is made of. local: underlay address."""

    name: str
    local: int
    mtu: int


class WireguardDevice(NamedTuple):
    """What a WireGuard device is made of; key, port and peers are set by generic netlink. local: underlay address, for
    messages."""

    name: str
    local: int
    mtu: int


class DeviceAttributes(NamedTuple):
    """A device as rtnetlink shows it. For one that is no vxlan, vni and port are -1; of one that is no ipip either, local is
    0.

    checksums: udpcsum set, no zero checksum for IPv6. special: what flannel's form never has, in words.
    """

    ifindex: int
    kind: str
    up: bool
    mtu: int
    mac: int
    vni: int
    port: int
    local: int
    lower: int
    gbp: bool
    learning: bool
    checksums: bool
    special: str


def link_by_name(seq: int, name: str) -> bytes:
    """RTM_GETLINK of one link."""
    body = _IFINFO.pack(0, 0, 0, 0, 0, 0) + wire.attr(wire.IFLA_IFNAME, wire.text(name))
    return wire.message(wire.RTM_GETLINK, 0, seq, body)


def vxlan_create(family: Family, seq: int, device: VxlanDevice) -> bytes:
    """RTM_NEWLINK of a vxlan device, down; one of that name must not be there. family: of its underlay."""
    name, vni, port, local, lower, mtu, mac, gbp, learning = device
    data = [
        wire.attr(VXLAN_ID, struct.pack("=L", vni)),
        wire.attr(VXLAN_PORT, struct.pack(">H", port)),
        wire.attr(VXLAN_LOCAL if family is V4 else VXLAN_LOCAL6, family.packed(local)),
        wire.attr(VXLAN_LINK, struct.pack("=L", lower)),
        wire.attr(VXLAN_LEARNING, bytes([learning])),
        *([wire.attr(VXLAN_GBP, b"")] if gbp else []),
    ]
    address = wire.attr(wire.IFLA_ADDRESS, mac.to_bytes(6, "big"))
    return _create(seq, name, mtu, "vxlan", b"".join(data), address)


def ipip_create(seq: int, device: IpipDevice) -> bytes:
    """RTM_NEWLINK of an ipip device to anybody, down: in flannel's form, which takes DF and TTL from the packet inside."""
    return _create(seq, device.name, device.mtu, "ipip", _ipip_data(device))


def ipip_change(seq: int, index: int, device: IpipDevice) -> bytes:
    """RTM_NEWLINK that gives an ipip device another address; traffic goes on."""
    info = _info("ipip", _ipip_data(device))
    body = _IFINFO.pack(0, 0, 0, index, 0, 0) + wire.attr(wire.IFLA_LINKINFO | wire.NESTED, info)
    return wire.message(wire.RTM_NEWLINK, 0, seq, body)


def _ipip_data(device: IpipDevice) -> bytes:
    return wire.attr(IPTUN_LOCAL, device.local.to_bytes(4, "big")) + wire.attr(IPTUN_PMTUDISC, b"\0")


def wireguard_create(seq: int, device: WireguardDevice) -> bytes:
    """RTM_NEWLINK of a WireGuard device, down."""
    return _create(seq, device.name, device.mtu, "wireguard", b"")


def _create(seq: int, name: str, mtu: int, kind: str, data: bytes, address: bytes = b"") -> bytes:
    """address: an attribute, where the device has one."""
    body = (
        _IFINFO.pack(0, 0, 0, 0, 0, 0)
        + wire.attr(wire.IFLA_IFNAME, wire.text(name))
        + address
        + wire.attr(wire.IFLA_MTU, struct.pack("=L", mtu))
        + wire.attr(wire.IFLA_LINKINFO | wire.NESTED, _info(kind, data))
    )
    return wire.message(wire.RTM_NEWLINK, wire.NLM_F_CREATE | wire.NLM_F_EXCL, seq, body)


def _info(kind: str, data: bytes) -> bytes:
    made = wire.attr(IFLA_INFO_KIND, wire.text(kind))
    return made + wire.attr(IFLA_INFO_DATA | wire.NESTED, data) if data else made


def link_up(seq: int, index: int, up: bool = True) -> bytes:
    """RTM_NEWLINK that sets a link up, or down."""
    return wire.message(wire.RTM_NEWLINK, 0, seq, _IFINFO.pack(0, 0, 0, index, wire.IFF_UP * up, wire.IFF_UP))


def address_add(family: Family, seq: int, index: int, address: int, length: int) -> bytes:
    """RTM_NEWADDR of an address that is not there yet; of IPv6 without duplicate address detection, which takes 1.4 s."""
    where = family.packed(address)
    body = _IFADDR.pack(family.af, length, 0 if family is V4 else IFA_F_NODAD, 0, index)
    body += wire.attr(wire.IFA_LOCAL, where) + wire.attr(wire.IFA_ADDRESS, where)
    return wire.message(wire.RTM_NEWADDR, wire.NLM_F_CREATE | wire.NLM_F_EXCL, seq, body)


def parse_device(body: memoryview) -> DeviceAttributes:
    """A link, with what is a vxlan's if it is one."""
    link = wire.parse_link(body)
    attrs = wire.attributes(body, _IFINFO.size)
    has: dict[int, memoryview] = {}
    if link.kind in ("vxlan", "ipip") and (info := attrs.get(wire.IFLA_LINKINFO)) is not None:
        data = wire.attributes(info, 0).get(IFLA_INFO_DATA)
        has = wire.attributes(data, 0) if data is not None else {}
    if link.kind == "ipip":
        return _parse_ipip(link, has)

    def flag(kind: int) -> bool:
        """A byte that is not 0."""
        return kind in has and bytes(has[kind]) != b"\0"

    special = []
    if VXLAN_GROUP in has and any(has[VXLAN_GROUP]):
        special.append(f"group {'.'.join(map(str, has[VXLAN_GROUP]))}")
    if VXLAN_GROUP6 in has and any(has[VXLAN_GROUP6]):
        special.append("an IPv6 group")
    if flag(VXLAN_COLLECT_METADATA):
        special.append("external (collect metadata) mode")
    if flag(VXLAN_L2MISS):
        special.append("l2miss")
    return DeviceAttributes(
        ifindex=link.ifindex,
        kind=link.kind,
        up=link.up,
        mtu=link.mtu,
        mac=link.mac,
        vni=wire.number(has[VXLAN_ID]) if VXLAN_ID in has else -1,
        port=int.from_bytes(has[VXLAN_PORT], "big") if VXLAN_PORT in has else -1,
        local=int.from_bytes(has.get(VXLAN_LOCAL, has.get(VXLAN_LOCAL6, b"")), "big"),
        lower=wire.number(has.get(VXLAN_LINK)),
        gbp=VXLAN_GBP in has,
        learning=flag(VXLAN_LEARNING),
        checksums=flag(VXLAN_UDP_CSUM) and not flag(VXLAN_UDP_ZERO_CSUM6_TX) and not flag(VXLAN_UDP_ZERO_CSUM6_RX),
        special=" and ".join(special),
    )


def _parse_ipip(link: Link, has: dict[int, memoryview]) -> DeviceAttributes:
    special = []
    if IPTUN_REMOTE in has and any(has[IPTUN_REMOTE]):
        special.append(f"remote {'.'.join(map(str, has[IPTUN_REMOTE]))}")
    if IPTUN_ENCAP_TYPE in has and any(has[IPTUN_ENCAP_TYPE]):
        special.append("an encapsulation of its own")
    if IPTUN_COLLECT_METADATA in has:
        special.append("external (collect metadata) mode")
    local = int.from_bytes(has.get(IPTUN_LOCAL, b""), "big")
    return DeviceAttributes(
        link.ifindex, link.kind, link.up, link.mtu, 0, -1, -1, local, 0, False, False, True, " and ".join(special)
    )
