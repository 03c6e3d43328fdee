"""Whole agents in namespaces, in which faults are planted. `make diagnosis` runs these and writes docs/diagnosis.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.agent.conftest import _swept, world  # noqa: F401 (fixtures)
from tests.support.diagnosis import Row, asked_for, write
from tests.support.rows import gather

_ROWS: list[Row] = []


@pytest.fixture
def row() -> Callable[[Row], None]:
    """Enters a row into the table."""
    return _ROWS.append


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The page, where it is asked for."""
    if asked_for():
        gather(session, "diagnosis-rows", _ROWS, lambda rows: write(Row(*row) for row in rows))
