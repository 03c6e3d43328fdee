"""What .ci/netpol's judges make of the output of cyclonus and of the conformance tests: recorded on a cluster, thinned of
tables and of what is said again and again. The failed ones are of an agent that did not enforce what was judged."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from overlay.lab.processes import LabError

NETPOL = Path(__file__).parents[2] / ".ci/netpol"
RECORDINGS = Path(__file__).parent / "recordings/netpol"


@pytest.fixture(scope="module")
def cyclonus() -> ModuleType:
    return judge("cyclonus_judge")


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    return judge("conformance_judge")


def judge(name: str) -> ModuleType:
    sys.path.insert(0, str(NETPOL))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(NETPOL))


def hear(listener, recording: str, *changes: tuple[str, str]) -> list[str]:
    """What is said of a recording, line by line; with changes of its text."""
    text = (RECORDINGS / recording).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return [words for line in text.split("\n") if (words := listener.told(line))]


def test_cases_that_passed_are_told_of_as_they_end(cyclonus):
    cases = cyclonus.Cases()
    assert hear(cases, "cyclonus-passed.log") == [
        "passed  #1 Create/delete policy: 2 steps, 144 cells",
        "passed  #2 Create/update policy: 2 steps, 144 cells",
        "passed  #3 Create/delete namespace: 3 steps, 254 cells",
    ]
    assert (cases.states, cases.cells, cases.asked_again) == (["passed"] * 3, 542, 0)


def test_a_run_that_ends_before_its_last_case_is_no_verdict(cyclonus):
    cases = cyclonus.Cases()
    hear(cases, "cyclonus-passed.log")
    with pytest.raises(LabError, match="ended after 3 of 6 cases: fatal"):
        cases.verdict("fatal")
    with pytest.raises(LabError, match="ended after 0 of 0 cases"):
        cyclonus.Cases().verdict("")


def test_wrong_cells_of_any_step_fail_a_case_and_second_tries_are_counted(cyclonus):
    cases = cyclonus.Cases()
    words = "failed  #1 Create/update policy: 2 steps, 112 cells, 32 wrong, asked again: 2"
    assert hear(cases, "cyclonus-failed.log") == [words]
    assert cases.verdict("") == {"failed": 1}
    assert cases.cells == 144
    late = cyclonus.Cases()
    right = ("Discrepancy found:16 wrong, 9 ignored, 56 correct", "0 wrong, 9 ignored, 72 correct")
    assert hear(late, "cyclonus-failed.log", right) == [
        "passed  #1 Create/update policy: 2 steps, 144 cells, asked again: 2"
    ]


def test_a_case_of_which_nothing_was_compared_has_not_passed(cyclonus):
    cases = cyclonus.Cases()
    hear(cases, "cyclonus-failed.log", (" wrong, 9 ignored", " of another form"))
    assert cases.verdict("") == {"failed": 1}


def test_tests_that_passed_and_one_of_a_feature_that_nobody_asked_for(conformance):
    tests = conformance.Tests()
    assert hear(tests, "conformance-passed.log") == [
        "passed       6 s  CNPAdminTierEgressNamedPort: 1 of 1",
        "skipped      0 s  CNPAdminTierEgressNodePeers",
        "passed      26 s  CNPAdminTierEgressTCP: 7 of 7",
    ]
    assert set(tests.ended()) == {"CNPAdminTierEgressNamedPort", "CNPAdminTierEgressTCP"}
    with pytest.raises(LabError, match="the suite did not pass: killed"):  # the recording ends before the suite does
        tests.verdict("killed")
    tests.told("\x16--- PASS: TestConformance (482.11s)")
    assert tests.verdict("") == {"passed": 2}


def test_parts_that_failed_are_told_of_with_their_reason(conformance):
    tests = conformance.Tests()
    (words,) = hear(tests, "conformance-failed.log")
    ways = (
        ("slytherin/draco-malfoy-0 to 10.244.1.2", "from slytherin to"),
        ("gryffindor/harry-potter-0 to 10.244.0.2", "to slytherin from"),
    )
    expected = ["failed      21 s  CNPAdminTierPriorityField: 1 of 3"]
    for way, way_of_test in ways:
        expected.append(f"{'':17} Should Deny traffic {way_of_test} gryffindor respecting admin CNP")
        why = "Condition never satisfied: Expected connection to fail from"
        expected.append(f"{'':19} {why} network-policy-conformance-{way}, but instead it successfully connected.")
    assert words.split("\n") == expected
    assert tests.text() == expected
    assert tests.verdict("") == {"failed": 1}
    assert tests.asked_again() == 0


def test_probes_that_were_right_only_later_are_counted(conformance):
    tests = conformance.Tests()
    changes = ("--- FAIL", "--- PASS"), ("Error:  ", "Once:  ")
    assert hear(tests, "conformance-failed.log", *changes) == [
        "passed      21 s  CNPAdminTierPriorityField: 3 of 3, asked again: 4"
    ]
    assert tests.verdict("") == {"passed": 1}
    assert tests.asked_again() == 4


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ("=== RUN   TestConformance/CNPAdminTierPriorityField/Should_respect", "ended within CNPAdminTierPriorityField/Should_respect_admin"),
        ("Creating harry-potter StatefulSet", "no test was run: the last words"),
        ("Deleting priority-50-example", "ended within CNPAdminTierPriorityField: the last words"),
    ],
)  # fmt: skip
def test_tests_that_did_not_come_to_their_end_are_no_verdict(conformance, kept, why):
    tests = conformance.Tests()
    text = (RECORDINGS / "conformance-failed.log").read_text()
    for line in text[: text.index("\n", text.index(kept))].split("\n"):
        tests.told(line)
    with pytest.raises(LabError, match=why):
        tests.verdict("the last words")


def test_a_suite_that_fails_by_itself_is_no_verdict(conformance):
    tests = conformance.Tests()
    hear(
        tests,
        "conformance-failed.log",
        ("--- PASS", "--- FAIL"),
        ("    apply.go:154: Deleting harry-potter", "\tError:  \tnot deleted: harry-potter"),
    )
    with pytest.raises(LabError, match="beside them the suite did not pass: not deleted: harry-potter"):
        tests.verdict("")
