"""Whole agents in namespaces, and what is done to them. `make faults` runs these and writes docs/reliability.md."""

from __future__ import annotations

import pytest

from tests.agent.conftest import _swept, kube_world, world  # noqa: F401 (fixtures)
from tests.support.faults import Row, Scene, asked_for, write
from tests.support.rows import gather
from tests.support.world import KubeWorld, World

_ROWS: list[Row] = []
NAMES = {(4,): "IPv4", (4, 6): "dual stack", (6,): "IPv6 alone"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each in a network of IPv4 and in one of both families; what is done to the node also in one of IPv6 alone."""
    if "families" in metafunc.fixturenames:
        networks = [(4,), (4, 6), (6,)] if metafunc.module.__name__.endswith("test_node") else [(4,), (4, 6)]
        metafunc.parametrize("families", networks, ids=[NAMES[network] for network in networks])


def _scene(request: pytest.FixtureRequest, where: World, families: tuple[int, ...]) -> Scene:
    """Its area is the first line of the test's module, and the network's families."""
    area = (request.module.__doc__ or "").split("\n")[0].rstrip(".")
    return Scene(where, area if families == (4,) else f"{area} ({NAMES[families]})", _ROWS)


@pytest.fixture
def scene(request: pytest.FixtureRequest, world: World, families: tuple[int, ...]) -> Scene:  # noqa: F811
    world.keeps_families = True
    world.use(*families, SubnetMax="10.244.89.0")  # made-up peers have those behind
    return _scene(request, world, families)


@pytest.fixture
def kube_scene(request: pytest.FixtureRequest, kube_world: KubeWorld, families: tuple[int, ...]) -> Scene:  # noqa: F811
    """The same on Kubernetes."""
    kube_world.keeps_families = True
    kube_world.use(*families)
    return _scene(request, kube_world, families)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The page, where it is asked for."""
    if asked_for():
        gather(session, "fault-rows", _ROWS, lambda rows: write([Row(*row) for row in rows]))
