"""Whole agents in namespaces, in networks of IPv6 and of both families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.world import KubeWorld, World, ready_the_machine


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


@pytest.fixture(params=[(4, 6), (6,)], ids=["dual stack", "IPv6 alone"])
def world6(request, tmp_path) -> Iterator[World]:
    """A network with IPv6."""
    made = World(tmp_path / "world")
    try:
        made.use(*request.param)
        yield made
    finally:
        made.close()


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    """Of both families."""
    made = World(tmp_path / "world")
    try:
        made.use(4, 6)
        yield made
    finally:
        made.close()


@pytest.fixture
def kube_world(tmp_path) -> Iterator[KubeWorld]:
    """Of both families, on Kubernetes."""
    made = KubeWorld(tmp_path / "world")
    try:
        made.use(4, 6)
        yield made
    finally:
        made.close()
