"""What another program writes is read within bounds."""

from __future__ import annotations

import sys

import pytest

from overlay.kernel.nftables import program


def test_what_it_writes():
    assert program._bounded(["echo", "{}"]) == b"{}\n"


@pytest.mark.parametrize(
    "command",
    [
        ["yes"],
        ["false"],
        ["no-such-program"],
        [sys.executable, "-c", "import time; time.sleep(0.3); held = bytearray(1 << 30); print(len(held))"],
    ],
    ids=["without end", "fails", "not there", "takes too much memory"],
)
def test_what_is_not_within_bounds_is_nothing(command):
    assert program._bounded(command) == b""


def test_one_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(program, "NFT_S", 0.2)
    assert program._bounded(["sleep", "600"]) == b""
