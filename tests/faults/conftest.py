"""Whole agents in namespaces, and what is done to them. `make faults` runs these and writes docs/reliability.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.agent.conftest import _swept, kube_world, world  # noqa: F401 (fixtures)
from tests.support.faults import Row, Scene, asked_for, write
from tests.support.world import KubeWorld, World

_ROWS: list[Row] = []


def _scene(request: pytest.FixtureRequest, where: World) -> Scene:
    """Its area is the first line of the test's module."""
    return Scene(where, (request.module.__doc__ or "").split("\n")[0].rstrip("."), _ROWS)


@pytest.fixture
def scene(request: pytest.FixtureRequest, world: World) -> Scene:  # noqa: F811
    world.config(SubnetMax="10.244.89.0")  # made-up peers have those behind
    return _scene(request, world)


@pytest.fixture
def kube_scene(request: pytest.FixtureRequest, kube_world: KubeWorld) -> Scene:  # noqa: F811
    """The same on Kubernetes."""
    return _scene(request, kube_world)


def _parts(config: pytest.Config) -> Path:
    return Path(config.rootpath) / ".venv/fault-rows"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each worker leaves its rows; the first process writes them all."""
    if not asked_for():
        return
    folder = _parts(session.config)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker or _ROWS:
        folder.mkdir(exist_ok=True)
        (folder / f"{worker or 'one'}.json").write_text(json.dumps(_ROWS))
    if worker:
        return
    rows = [Row(*row) for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    for path in folder.glob("*.json"):
        path.unlink()
    if session.testscollected and not session.testsfailed:
        write(sorted(rows))
