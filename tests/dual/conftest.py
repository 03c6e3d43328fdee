"""Whole agents in namespaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.world import KubeWorld, World, ready_the_machine


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    ready_the_machine()


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    """An underlay with etcd and the default config."""
    made = World(tmp_path / "world")
    try:
        made.config()
        yield made
    finally:
        made.close()


@pytest.fixture
def kube_world(tmp_path) -> Iterator[KubeWorld]:
    """An underlay with an API server, and flannel's ConfigMap as files."""
    made = KubeWorld(tmp_path / "world")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def bare_world(tmp_path) -> Iterator[World]:
    """The same without a config."""
    made = World(tmp_path / "world")
    try:
        yield made
    finally:
        made.close()
