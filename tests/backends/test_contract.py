"""The contract of backends, by those that every kernel has, or a program in its place."""

from tests.backends.contract import *  # noqa: F403 (its tests)
