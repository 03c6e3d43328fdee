"""What every test may use. Deeper needs (etcd, namespaces, agents) stand in tests/support/."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

Closes = TypeVar("Closes", bound=Any)

settings.register_profile(
    "ci",
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("deep", settings.get_profile("ci"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A failed test with a world shows what its agents said last."""
    report = yield
    there = getattr(item, "funcargs", {})
    world = there.get("world") or there.get("bare_world") or there.get("kube_world")
    if report.when == "call" and report.failed and hasattr(world, "agents"):
        for agent in world.agents:
            report.sections.append((f"log of {agent.node}", agent.log()[-6000:]))
    return report


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


@pytest.fixture
def closing() -> Iterator[Callable[[Closes], Closes]]:
    """Keeps what a test opens, and closes it at the end."""
    with ExitStack() as opened:

        def keep(one: Closes) -> Closes:
            opened.callback(one.close)
            return one

        yield keep


def pytest_runtest_logreport(report):
    """Each result at once, where OVERLAY_TEST_RESULTS names a file: a run on another kernel may be cut off."""
    path = os.environ.get("OVERLAY_TEST_RESULTS")
    if path and not os.environ.get("PYTEST_XDIST_WORKER") and (report.when == "call" or report.failed):
        with open(path, "a", encoding="utf-8") as out:
            out.write(f"{report.nodeid} {report.when} {report.outcome} {report.duration:.1f}\n")
            if report.failed:
                out.write(f"{report.longreprtext}\n")
