"""Whole agents in namespaces, and what is done to them. `make faults` runs these and writes docs/reliability.md."""

from __future__ import annotations

import pytest

from tests.agent.conftest import _swept, kube_world, world  # noqa: F401 (fixtures)
from tests.support.faults import Row, Scene, asked_for, write
from tests.support.rows import gather
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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The page, where it is asked for."""
    if asked_for():
        gather(session, "fault-rows", _ROWS, lambda rows: write([Row(*row) for row in rows]))
