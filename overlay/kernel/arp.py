"""Who answers for an IPv4 address on a link: ARP probes (RFC 5227, section 1.1: sender address 0.0.0.0)."""

from __future__ import annotations

import select
import socket
import struct
import time

ETH_P_ARP = 0x0806
_FRAME = struct.Struct("!6s6sH HHBBH 6s4s6s4s".replace(" ", ""))
_REQUEST, _REPLY = 1, 2
PROBES, GAP_S = 3, 0.3
"""Three within a second: 0.9 s where nobody answers."""


def probe(interface: str, address: int, probes: int = PROBES, gap_s: float = GAP_S) -> int | None:
    """The MAC that answers for an address on the link of an interface, None where nobody does.

    Our own kernel does not hear the probe, so an address of this node is answered by others only.
    A proxy_arp router answers for hosts that are gone. Raises OSError (interface gone or down, no CAP_NET_RAW).
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_P_ARP)) as link:
        link.bind((interface, ETH_P_ARP))
        own = link.getsockname()[4]
        target = address.to_bytes(4, "big")
        request = _FRAME.pack(b"\xff" * 6, own, ETH_P_ARP, 1, 0x0800, 6, 4, _REQUEST, own, bytes(4), bytes(6), target)
        for _ in range(probes):
            link.send(request)
            until = time.monotonic() + gap_s
            while (left := until - time.monotonic()) > 0 and select.select([link], [], [], left)[0]:
                frame = link.recv(2048)
                if len(frame) < _FRAME.size:
                    continue
                _, _, _, _, _, _, _, kind, sender, sender_ip, _, _ = _FRAME.unpack_from(frame)
                # A second prober of the same address (two nodes starting at once) asks and does not answer: RFC 5227
                # counts that as a conflict too, but then nobody would start; the store's transaction decides.
                if kind == _REPLY and sender_ip == target and sender != own:
                    return int.from_bytes(sender, "big")
    return None
