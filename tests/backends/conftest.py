"""Whole agents in namespaces, in networks of each backend that has no FDB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.backends.kinds import KINDS, Kind
from tests.support.world import World, ready_the_machine


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


@pytest.fixture(params=[kind for kind in KINDS if kind.needs_no_module], ids=str)
def kind(request) -> Kind:
    """Those that every kernel has, or a program in its place."""
    return request.param


@pytest.fixture
def network(kind, tmp_path) -> Iterator[World]:
    """Of that kind."""
    with closing(World(tmp_path / "world")) as made:
        made.use(*kind.families, Backend=kind.backend)
        yield made
