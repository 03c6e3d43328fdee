"""The status server under more connections than it serves at once."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from pathlib import Path

import pytest

from overlay import serve
from tests.support.wait import until

_SERVERS: list[socketserver.BaseServer] = []
"""They end with the process, as an agent's do."""


@pytest.fixture
def busiest(tmp_path) -> tuple[Path, list[int]]:
    """A socket whose one route takes a while, and how many were in it at once, at most."""
    at_once, most, lock = [0], [0], threading.Lock()

    def slow() -> serve.Answer:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.3)
        with lock:
            at_once[0] -= 1
        return serve.text(200, "done")

    path = tmp_path / "s"
    _SERVERS.append(serve.serve_unix(str(path), {"/slow": slow}))
    return path, most


def _connect(path: Path, said: bytes) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))  # waits while the queue is full
    made.settimeout(5)
    with contextlib.suppress(BrokenPipeError):
        made.sendall(said)
    return made


@pytest.mark.parametrize("said", [b"GET /slow HTTP/1.0\r\n\r\n", b"GET /slow HTTP/1.0\r\n", b""])
def test_no_more_than_so_many_are_served_at_once(busiest, said):
    """Also those that had to go before they said all they had to say."""
    path, most = busiest
    before = threading.active_count()
    there = [_connect(path, said) for _ in range(8 * serve.MOST_AT_ONCE)]
    until("threads end", lambda: threading.active_count() <= before + serve.MOST_AT_ONCE, 2)
    assert most[0] <= serve.MOST_AT_ONCE
    for one in there:
        one.close()
    until("all of them", lambda: threading.active_count() <= before, 10)
    with _connect(path, b"GET /slow HTTP/1.0\r\n\r\n") as honest:
        assert honest.recv(1000).startswith(b"HTTP/1.0 200")
