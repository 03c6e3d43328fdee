"""A whole Kubernetes of two nodes (overlay/lab/cluster.py), for the tests of one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from overlay.lab.cluster import Cluster
from overlay.lab.proof import Proof


@contextmanager
def two_nodes(
    letter: str = "", families: tuple[int, ...] = (4,), patience: float = 1, plugins: bool = False
) -> Iterator[Proof]:
    """Without a network yet; removed again. letter: of its name; plugins: as of Cluster.up."""
    cluster = Cluster(f"test{os.getpid()}{letter}", families=families, patience=patience)
    try:
        cluster.up(2, plugins=plugins)
        yield Proof(cluster)
    finally:
        cluster.down()
