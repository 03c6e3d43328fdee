"""The chain that packets enter, and the generation of a table in the marks of connections. Pure.

A connection that was let through is marked with the table's generation, and not judged again in it. What takes something
away raises the generation, after the change itself: then each connection is judged again at its next packet.

The upper half of a mark is ours, the lower is others'. Agents of several networks on one node share it: each has numbers of
its own, so that none takes for judged what another let through.
"""

from __future__ import annotations

import struct

from overlay.kernel.nftables import expressions as nf
from overlay.kernel.nftables.content import Content, Hook, Rules, are_rules
from overlay.kernel.nftables.wire import differ, equal, goto, masked
from overlay.policy.model import EGRESS, INGRESS

_MARK_AT, _GENERATION_BITS, _SLOTS = 16, 12, 16
LAST_GENERATION = (1 << _GENERATION_BITS) - 1
MARK_MASK = 0xFFFF << _MARK_AT
DOUBTFUL = struct.pack("=I", nf.INVALID | nf.UNTRACKED)
"""States of packets that no connection has: no rule is about them."""
FORWARD, STRAYS = "forward", "stray"
_FORWARD_HOOK, _BEFORE_FILTER = 2, -5


def slot_of(network: int) -> int:
    """Which of the numbers a network has: networks on one node whose VNIs are 16 apart share them."""
    return (network - 1) % _SLOTS


def forward(generation: int, slot: int) -> Rules:
    """The chain that packets enter, in a generation, 1 to LAST_GENERATION."""
    number = slot << _GENERATION_BITS | generation
    current = struct.pack("=I", number << _MARK_AT)
    rest = struct.pack("=I", ~MARK_MASK & 0xFFFFFFFF)
    return Rules(
        (
            (nf.ct(nf.STATE) + masked(DOUBTFUL) + differ(bytes(4)) + goto(STRAYS), "no connection's"),
            (
                nf.ct(nf.MARK) + masked(struct.pack("=I", MARK_MASK)) + equal(current) + nf.ACCEPT,
                "judged already",
            ),
            (nf.jump(EGRESS), ""),
            (nf.jump(INGRESS), ""),
            (nf.ct(nf.MARK) + masked(rest, current) + nf.set_mark(), "judged now"),
        ),
        Hook(_FORWARD_HOOK, _BEFORE_FILTER),
    )


def unmarked() -> Rules:
    """The chain between what takes something away and the next generation: each packet is judged, and none is marked. Who
    finds it so knows that the generation is still to be raised."""
    rules = forward(1, 0)
    return rules._replace(rules=(rules.rules[0], *rules.rules[2:4]))


def generation_of(content: Content, slot: int) -> int:
    """The generation that a table found in the kernel is in; 0: of none that is ours."""
    found = content.chains.get(FORWARD)
    if found is None or found.hook is None or len(found.rules) != len(forward(1, slot).rules):
        return 0
    judged_already = found.rules[1][0]
    for place in range(0, len(judged_already) - 3, 4):  # netlink's attributes are aligned to 4 bytes
        number: int = struct.unpack_from("=I", judged_already, place)[0] >> _MARK_AT
        generation = number & LAST_GENERATION
        if generation and number >> _GENERATION_BITS == slot and are_rules(found, forward(generation, slot)):
            return generation
    return 0
