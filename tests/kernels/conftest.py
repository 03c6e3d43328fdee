"""The fixtures of whole agents."""

from tests.agent.conftest import _swept, world

__all__ = ["_swept", "world"]
