"""Whole agents in namespaces, in which faults are planted. `make diagnosis` runs these and writes docs/diagnosis.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agent.conftest import _swept, world  # noqa: F401 (fixtures)
from tests.support.diagnosis import Row, asked_for, write

_ROWS: list[Row] = []


@pytest.fixture
def row() -> Callable[[Row], None]:
    """Enters a row into the table."""
    return _ROWS.append


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each worker leaves its rows; the first process writes them all."""
    if not asked_for():
        return
    folder = Path(session.config.rootpath) / ".venv/diagnosis-rows"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker or _ROWS:
        folder.mkdir(exist_ok=True)
        (folder / f"{worker or 'one'}.json").write_text(json.dumps(_ROWS))
    if worker:
        return
    rows = [Row(*each) for path in sorted(folder.glob("*.json")) for each in json.loads(path.read_text())]
    for path in folder.glob("*.json"):
        path.unlink()
    if session.testscollected and not session.testsfailed:
        write(rows)
