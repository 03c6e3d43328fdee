"""Whole agents in namespaces, in networks of IPv6 and of both families."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.world import KubeWorld, World, ready_the_machine


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


@pytest.fixture(params=[(4, 6), (6,)], ids=["dual stack", "IPv6 alone"])
def world6(request, tmp_path) -> Iterator[World]:
    """A network with IPv6."""
    with closing(World(tmp_path / "world")) as made:
        made.use(*request.param)
        yield made


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    """Of both families."""
    with closing(World(tmp_path / "world")) as made:
        made.use(4, 6)
        yield made


@pytest.fixture
def kube_world(tmp_path) -> Iterator[KubeWorld]:
    """Of both families, on Kubernetes."""
    with closing(KubeWorld(tmp_path / "world")) as made:
        made.use(4, 6)
        yield made
