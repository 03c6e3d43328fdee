"""The kernel's WireGuard devices: read, given a key and a port, and peers, by generic netlink.

Hand-packed: pyroute2's class needs its asyncio socket. Source: include/uapi/linux/{wireguard,genetlink}.h.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping

from lease.families import BY_AF, FAMILIES
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route import wire
from overlay.kernel.wireguard.device import NO_KEY, Net, Place, WgDevice, WgPeer

NETLINK_GENERIC = 16
_CTRL, _CTRL_GETFAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_GET_DEVICE, _SET_DEVICE = 0, 1
_IFNAME, _PRIVATE_KEY, _LISTEN_PORT, _PEERS = 2, 3, 6, 8
_PUBLIC_KEY, _PSK, _FLAGS, _ENDPOINT, _KEEPALIVE, _ALLOWED = 1, 2, 3, 4, 5, 9
_REMOVE_ME, _REPLACE_ALLOWED = 1, 2
_AF, _ADDRESS, _CIDR = 1, 2, 3
_HEAD = struct.Struct("=BBH")
MOST_BYTES = 32 << 10
"""Of peers in one message: a nested attribute has 64 KiB at most."""
MOST_ALLOWED = 400
"""Prefixes of a peer in one attribute, 36 bytes each: more follow in another of the same peer."""


def family_request(seq: int, name: str) -> bytes:
    """Asks for the number of a family of generic netlink."""
    return wire.request(_CTRL, seq, _HEAD.pack(_CTRL_GETFAMILY, 1, 0) + wire.attr(_FAMILY_NAME, wire.text(name)))


def set_device(number: int, seq: int, name: str, key: bytes, port: int) -> bytes:
    """Gives a device its private key and port. number: of the family."""
    body = (
        _HEAD.pack(_SET_DEVICE, 1, 0)
        + wire.attr(_IFNAME, wire.text(name))
        + wire.attr(_PRIVATE_KEY, key)
        + wire.attr(_LISTEN_PORT, struct.pack("=H", port))
    )
    return wire.message(number, 0, seq, body)


def set_peers(number: int, seq: int, name: str, peers: Iterable[tuple[bytes, WgPeer | None]]) -> bytes:
    """Puts peers as they are to be, or (None) takes them away; of one without a place the place stays as it is. All must fit
    one message."""
    return _set_encoded(number, seq, name, (part for key, peer in peers for part in _parts(key, peer)))


def batches(peers: Iterable[tuple[bytes, WgPeer | None]]) -> Iterator[list[bytes]]:
    """The same of any number of peers: encoded, for one message each."""
    some: list[bytes] = []
    size = 0
    for part in (part for key, peer in peers for part in _parts(key, peer)):
        if some and size + len(part) > MOST_BYTES:
            yield some
            some, size = [], 0
        some.append(part)
        size += len(part)
    if some:
        yield some


def _set_encoded(number: int, seq: int, name: str, parts: Iterable[bytes]) -> bytes:
    made = b"".join(parts)
    body = _HEAD.pack(_SET_DEVICE, 1, 0) + wire.attr(_IFNAME, wire.text(name)) + wire.attr(_PEERS | wire.NESTED, made)
    return wire.message(number, 0, seq, body)


def _parts(key: bytes, peer: WgPeer | None) -> Iterator[bytes]:
    """A peer's attribute; more where it has many prefixes, which the later ones add."""
    head = wire.attr(_PUBLIC_KEY, key)
    if peer is None:
        yield wire.attr(0 | wire.NESTED, head + wire.attr(_FLAGS, struct.pack("=L", _REMOVE_ME)))
        return
    nets = sorted(peer.allowed)
    first = (
        head
        + wire.attr(_FLAGS, struct.pack("=L", 0 if peer.adds else _REPLACE_ALLOWED))
        + wire.attr(_PSK, peer.psk)
        + (wire.attr(_ENDPOINT, _sockaddr(peer.place)) if peer.place is not None else b"")
        + wire.attr(_KEEPALIVE, struct.pack("=H", peer.keepalive_s))
    )
    for at in range(0, max(1, len(nets)), MOST_ALLOWED):
        allowed = b"".join(wire.attr(0 | wire.NESTED, _allowed(there)) for there in nets[at : at + MOST_ALLOWED])
        yield wire.attr(0 | wire.NESTED, (head if at else first) + wire.attr(_ALLOWED | wire.NESTED, allowed))


def _allowed(there: Net) -> bytes:
    number, base, length = there
    family = FAMILIES[number]
    return (
        wire.attr(_AF, struct.pack("=H", family.af))
        + wire.attr(_ADDRESS, family.packed(base))
        + wire.attr(_CIDR, bytes([length]))
    )


def _sockaddr(place: Place) -> bytes:
    """struct sockaddr_in, sockaddr_in6."""
    family = FAMILIES[place.family]
    head = struct.pack("=H", family.af) + struct.pack(">H", place.port)
    if place.family == 4:
        return head + family.packed(place.address) + bytes(8)
    return head + bytes(4) + family.packed(place.address) + bytes(4)


def get_device(number: int, seq: int, name: str) -> bytes:
    """Asks for a device, whole."""
    body = _HEAD.pack(_GET_DEVICE, 1, 0) + wire.attr(_IFNAME, wire.text(name))
    return wire.message(number, wire.NLM_F_DUMP, seq, body)


def parse_device(bodies: Iterable[memoryview]) -> WgDevice:
    """A device from the messages of a dump: a peer whose prefixes fill more than one goes on in the next."""
    key, port, peers = NO_KEY, 0, dict[bytes, WgPeer]()
    for body in bodies:
        attrs = wire.attributes(body, _HEAD.size)
        key = bytes(attrs[_PRIVATE_KEY]) if _PRIVATE_KEY in attrs else key
        port = wire.number(attrs[_LISTEN_PORT]) if _LISTEN_PORT in attrs else port
        for each in _each(attrs.get(_PEERS)):
            name, peer = _parse_peer(each)
            known = peers.get(name)
            peers[name] = peer if known is None else known._replace(allowed=known.allowed | peer.allowed)
    return WgDevice(key, port, peers)


def _each(nested: memoryview | None) -> Iterator[memoryview]:
    """The attributes of a list, which all have one type."""
    at = 0
    while nested is not None and at + 4 <= len(nested):
        (length,) = struct.unpack_from("=H", nested, at)
        if length < 4:
            return
        yield nested[at + 4 : at + length]
        at += (length + 3) & ~3


def _parse_peer(body: memoryview) -> tuple[bytes, WgPeer]:
    attrs = wire.attributes(body, 0)
    allowed = frozenset(_parse_allowed(each) for each in _each(attrs.get(_ALLOWED)))
    place = _parse_sockaddr(attrs[_ENDPOINT]) if _ENDPOINT in attrs else None
    psk = bytes(attrs[_PSK]) if _PSK in attrs else NO_KEY
    return bytes(attrs[_PUBLIC_KEY]), WgPeer(allowed, place, psk, wire.number(attrs.get(_KEEPALIVE)))


def _parse_allowed(body: memoryview) -> Net:
    attrs = wire.attributes(body, 0)
    return BY_AF[wire.number(attrs[_AF])].number, wire.address_of(attrs[_ADDRESS]), attrs[_CIDR][0]


def _parse_sockaddr(body: memoryview) -> Place | None:
    af, port = int.from_bytes(body[:2], sys.byteorder), int.from_bytes(body[2:4], "big")
    family = BY_AF.get(af)
    if family is None:
        return None
    start = 4 if family.number == 4 else 8
    return Place(family.number, int.from_bytes(body[start : start + family.size], "big"), port)


class KernelWireguard:
    """A device of the kernel. To be closed. Raises KernelError."""

    program = ""
    """None encrypts: the kernel does."""

    def __init__(self, name: str) -> None:
        self._name, self._requests = name, RequestSocket(NETLINK_GENERIC)
        try:
            body = self._requests.ask(lambda seq: family_request(seq, "wireguard"))
        except KernelError as error:
            self._requests.close()
            raise KernelError(error.errno, f"this kernel has no WireGuard: {error}; modprobe wireguard") from error
        self._number = wire.number(wire.attributes(body, _HEAD.size)[_FAMILY_ID])

    def read(self) -> WgDevice:
        """The device whole. Raises KernelError."""
        try:
            bodies = self._requests.dump(lambda seq: get_device(self._number, seq, self._name), bytes)
        except KernelError as error:
            raise KernelError(error.errno, f"reading {self._name}: {error}") from error
        return parse_device(map(memoryview, bodies))

    def set(self, key: bytes, port: int) -> None:
        """Its private key and port. Raises KernelError."""
        seq = self._requests.take_seqs(1)
        refusal = self._requests.execute([set_device(self._number, seq, self._name, key, port)], seq).get(0)
        if refusal is not None:
            what = "another program has that port" if refusal.errno == errno.EADDRINUSE else str(refusal)
            raise KernelError(refusal.errno, f"giving {self._name} its key and port {port}: {what}")

    def put(self, peers: Mapping[bytes, WgPeer | None]) -> None:
        """Peers, by their keys, as they are to be; None: away. Raises KernelError."""
        for parts in batches(peers.items()):
            seq = self._requests.take_seqs(1)
            refusal = self._requests.execute([_set_encoded(self._number, seq, self._name, parts)], seq).get(0)
            if refusal is not None:
                raise KernelError(refusal.errno, f"peers of {self._name}: {refusal}")

    def close(self) -> None:
        """Close its socket."""
        self._requests.close()
