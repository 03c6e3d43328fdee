"""Whole agents in namespaces, in which faults are planted."""

from tests.agent.conftest import _swept, world  # noqa: F401 (fixtures)
