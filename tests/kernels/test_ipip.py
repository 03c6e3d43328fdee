"""The contract of backends by ipip, whose module not every kernel has."""

import pytest

from tests.backends.conftest import network  # noqa: F401 (a fixture)
from tests.backends.contract import *  # noqa: F403 (its tests)
from tests.backends.kinds import KINDS


@pytest.fixture(params=[kind for kind in KINDS if not kind.needs_no_module], ids=str)
def kind(request):
    """Those that need one."""
    return request.param
