"""Rows of a table that a run of tests makes: each worker's, gathered by the first process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


def gather(session: pytest.Session, name: str, mine: list[Any], write: Callable[[Iterable[list[Any]]], None]) -> None:
    """At a session's end: each worker leaves its rows; the first process writes them all, in order, where none failed."""
    folder = Path(session.config.rootpath) / ".venv" / name
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker or mine:
        folder.mkdir(exist_ok=True)
        (folder / f"{worker or 'one'}.json").write_text(json.dumps(mine))
    if worker:
        return
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    for path in folder.glob("*.json"):
        path.unlink()
    if session.testscollected and not session.testsfailed:
        write(sorted(rows))
