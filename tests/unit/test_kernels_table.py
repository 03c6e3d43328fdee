"""The table of other kernels, from what a run left."""

from __future__ import annotations

import pytest

from tests.support.kernels import BEGIN, END, rewritten, table

RESULTS = """tests/kernel/test_device.py::test_a call passed 0.1
tests/kernel/test_device.py::test_b[VLAN on a bond-by tunnel] call failed 1.2
some lines of the failure
tests/kernel/test_device.py::test_b[VLAN on a bond-by tunnel] teardown failed 0.1
tests/agent/test_guard.py::test_c call passed 3.0
"""


def left_by(folder, results=RESULTS, ended=True):
    folder.mkdir()
    (folder / "output.txt").write_text("Linux 6.1.0 #1\nmore\n")
    (folder / "results.txt").write_text(results)
    if ended:
        (folder / "status").write_text("1\n")
    return folder


def test_files_by_kernels(tmp_path):
    made = table([left_by(tmp_path / "6.1"), left_by(tmp_path / "5.10", RESULTS[:57], ended=False), tmp_path / "6.12"])
    lines = made.splitlines()
    assert lines[:2] == ["- 6.1: `Linux 6.1.0 #1`", "- 5.10: `Linux 6.1.0 #1; cut off by the time`"]
    assert lines[2].startswith("- 6.12: `not run: ")
    assert "| tests | 6.1 | 5.10 | 6.12 |" in lines
    assert "| tests/kernel/test_device.py | 1 passed, 1 failed | 1 passed | not run |" in lines
    assert "| tests/agent/test_guard.py | 1 passed | not run | not run |" in lines


def test_the_page_needs_a_place_for_it():
    assert rewritten(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    with pytest.raises(ValueError, match="lacks the lines"):
        rewritten("a", "new")
