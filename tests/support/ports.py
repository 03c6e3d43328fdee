"""Ports of servers that a test starts."""

from __future__ import annotations

import itertools
import os
import random
import socket
from contextlib import suppress

MOST_PORTS = 2000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.count(random.randrange(MOST_PORTS))


def free_port() -> int:
    """One of this worker's own, below those that the kernel gives to connections: what is bound seconds later is still
    free then, unless another run of the tests takes it."""
    for number in itertools.islice(_PORTS, MOST_PORTS):
        port = 12_000 + MOST_PORTS * (_WORKER % 10) + number % MOST_PORTS
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("every port of this worker is taken")
