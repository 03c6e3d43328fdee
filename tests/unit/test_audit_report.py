"""What `make audit` says and how it ends, for each way in which pip-audit ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / ".ci/audit_report.py"
GOOD = {"name": "a", "version": "1", "vulns": []}
FAULTY = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("found", "said", "code", "words"),
    [
        ([GOOD], "", 0, "1 packages, no known fault"),
        ([GOOD, FAULTY], "", 1, "b 2: PYSEC-1; mended in: 3"),
        ([GOOD, UNKNOWN], "", 0, "does not know 1 of 2"),
        ([UNKNOWN], "", 0, "NOT DONE, the service knows none of 1"),
        (None, "requests.exceptions.ConnectionError: Max retries exceeded", 0, "NOT DONE, the service cannot be asked"),
        (None, "", 0, "NOT DONE, the service cannot be asked: nothing, within its time"),
        (None, "ERROR:pip_audit._cli:package certifi: hash mismatch", 1, "FAILED: ERROR:pip_audit._cli:package certifi: hash mismatch"),
        (None, "ERROR: requirement is not hashed", 1, "FAILED"),
        (None, "WARNING: Retrying after connection broken by ReadTimeout\nERROR: hash mismatch, line 503 of x", 1, "FAILED"),
        (None, "HTTPError: 404 Client Error", 1, "FAILED"),
    ],
)  # fmt: skip
def test_a_fault_and_a_failure_end_with_1_and_silence_is_no_verdict(tmp_path, found, said, code, words):
    if found is not None:
        (tmp_path / "found").write_text(json.dumps({"dependencies": found}))
    (tmp_path / "said").write_text(said)
    done = subprocess.run(
        [sys.executable, REPORT, "pins.txt", tmp_path / "found", tmp_path / "said"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    assert words in done.stdout
