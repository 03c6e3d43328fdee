"""What tests without a kernel share."""

import pytest

from tests.support.bench import Bench


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)
