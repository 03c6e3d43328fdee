"""A lab that nobody harms. `make healthy` runs this."""

from __future__ import annotations

from tests.agent.conftest import _swept, world  # noqa: F401 (fixtures)
