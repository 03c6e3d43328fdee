"""What a WireGuard device holds, as values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

NO_KEY = bytes(32)
Net = tuple[int, int, int]
"""A prefix: family (4 or 6), base, length."""


class Place(NamedTuple):
    """An address and a UDP port of the underlay."""

    family: int
    address: int
    port: int


class WgPeer(NamedTuple):
    """A peer. allowed: what it may send from and is sent to. place: where it was heard last, or where it is sent to first;
    None: not known. psk: NO_KEY where there is none."""

    allowed: frozenset[Net]
    place: Place | None
    psk: bytes = NO_KEY
    keepalive_s: int = 0
    adds: bool = False
    """To be put: the device has nothing of it that is to go, so that prefixes are added. (To replace them all takes each
    away for a moment, in which its packets are lost.)"""

    def __repr__(self) -> str:
        return f"WgPeer({sorted(self.allowed)}, {self.place})"  # no secret


class WgDevice(NamedTuple):
    """A device as it is. private_key: NO_KEY where it has none; peers: by their public keys."""

    private_key: bytes
    port: int
    peers: Mapping[bytes, WgPeer]

    def __repr__(self) -> str:
        return f"WgDevice(port={self.port}, {len(self.peers)} peers)"
