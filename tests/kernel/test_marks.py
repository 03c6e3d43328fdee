"""Marks of connections in a real kernel."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from overlay.kernel.nftables.marks import clear_marks
from overlay.lab import netns

RULES = """table inet marking { chain output { type filter hook output priority 0;
 ct mark set 0x00070005
}
}
"""


@pytest.fixture
def namespace():
    name = f"overlay-t{os.getpid()}x-marks"
    netns.create(name)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "netns", "exec", name, "nft", "-f", "-"], input=RULES, text=True, check=True)
        yield name
    finally:
        netns.delete(name)


def test_some_bits_are_taken_out_and_the_others_stay(namespace):
    def talk() -> None:
        for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            with socket.socket(family, socket.SOCK_DGRAM) as there, socket.socket(family, socket.SOCK_DGRAM) as one:
                there.bind((address, 0))
                one.sendto(b"x", there.getsockname()[:2])

    netns.inside(namespace, talk)
    assert netns.inside(namespace, lambda: clear_marks(0xFFFF0000)) == 2
    assert netns.inside(namespace, lambda: clear_marks(0xFFFF0000)) == 0, "none has them"
    assert netns.inside(namespace, lambda: clear_marks(0x5)) == 2, "they kept the others"
