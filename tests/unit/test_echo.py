"""ICMP echo: messages, the sockets' filters, and sources, on loopback."""

from __future__ import annotations

import struct

import pytest

from lease.families import V4, V6
from lease.model import ip_number, prefix
from overlay.probes import echo


@pytest.mark.parametrize("size", [8, 56, 57, 1422])
def test_a_request_is_as_rfc_792_says(size):
    made = echo.request(V4, 0x1234, 7, b"8 bytes.", size)
    assert struct.unpack("!BBxxHH", made[:8]) == (8, 0, 0x1234, 7)
    assert len(made) == 8 + size
    assert echo.sum_of(made) == 0xFFFF
    assert echo.data_of(V4, 1450) == 1422
    assert echo.data_of(V6, 1430) == 1382


def test_answers_of_loopback_are_recognised_in_both_families(closing):
    for family, address in ((V4, "127.0.0.1"), (V6, "::1")):
        one, other = closing(echo.EchoSocket(family)), closing(echo.EchoSocket(family))
        target = ip_number(address, family.number)
        assert [one.send(target, sequence, 1000) for sequence in (1, 2)] == [0, 0]
        found: list[echo.Seen] = []
        for _ in range(200):
            found += one.seen(10)
            if len(found) == 2:
                break
        assert [(each.source, each.answer, each.sequence) for each in found] == [(target, True, 1), (target, True, 2)]
        assert list(other.seen(10)) == [], "somebody else's"


@pytest.mark.parametrize(
    ("family", "network", "length", "place", "source", "heard"),
    [
        (V4, "127.0.0.0/8", 24, 0, "127.0.9.0", True),
        (V4, "127.0.0.0/8", 24, 0, "127.0.9.1", False),
        (V4, "127.0.0.0/8", 24, 1, "127.0.9.1", True),
        (V4, "127.0.0.0/8", 24, 1, "127.0.9.2", False),
        (V4, "127.0.0.0/8", 26, 1, "127.0.9.193", True),
        (V4, "127.1.0.0/16", 24, 0, "127.0.9.0", False),
        (V6, "::/64", 127, 1, "::1", True),
        (V6, "::/64", 127, 0, "::1", False),
        (V6, "fd00::/64", 127, 1, "::1", False),
    ],
)
def test_who_asks_is_heard_at_one_place_of_his_subnet(closing, family, network, length, place, source, heard):
    """A request is sent from that address; of all others the filter lets none in."""
    asker = closing(echo.EchoSocket(family))
    hears = closing(echo.EchoSocket(family, prefix(network), length, place))
    there, here = ip_number("127.0.0.1" if family is V4 else "::1", family.number), ip_number(source, family.number)
    assert asker.send(there, 1, echo.SMALL, here) == 0
    for _ in range(200):
        if list(asker.seen(10)):
            break
    assert {each.source for each in hears.seen(10) if not each.answer} == ({here} if heard else set())
