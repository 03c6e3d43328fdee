"""The status server under more connections than it serves at once."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import socketserver
import threading
import time
from pathlib import Path

import pytest

from overlay.api import serve
from tests.support.clock import Clock
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


def test_who_asks_often_keeps_nobody_from_an_answer(tmp_path):
    """Forty that ask for what costs something, again and again, and take each answer: all others get theirs."""
    made, path, stop, clock = [0], str(tmp_path / "s"), threading.Event(), Clock()

    def costly() -> serve.Answer:
        made[0] += 1
        time.sleep(0.005)
        return serve.text(200, "much")

    routes = {"/metrics": serve.same_for_a_moment(costly, clock=clock), "/healthz": lambda: serve.text(200, "ok")}
    _SERVERS.append(serve.serve_unix(path, routes))

    def flood() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                serve.ask_unix(path, "/metrics", 5)

    threads = [threading.Thread(target=flood, daemon=True) for _ in range(40)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            assert serve.ask_unix(path, "/healthz") == (200, "ok\n")
        until("it was asked", lambda: made[0] == 1)
        clock.now += serve.SAME_FOR_S
        until("it is made again when its moment is over", lambda: made[0] == 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert made[0] == 2, "and once for all in each"


def test_a_door_that_closes_without_a_word_is_an_error_to_who_asked(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()

        def close_the_first() -> None:
            door.accept()[0].close()

        closer = threading.Thread(target=close_the_first)
        closer.start()
        with pytest.raises(OSError, match=r"without an answer|reset|Broken pipe"):
            serve.ask_unix(path, "/healthz")
        closer.join()


def test_a_socket_that_somebody_removed_comes_back(tmp_path):
    """In place, with no thread nor descriptor more, however often."""
    path = tmp_path / "s"
    server = serve.serve_unix(str(path), {"/healthz": lambda: serve.text(200, "ok")})
    _SERVERS.append(server)
    assert not server.keep()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        path.unlink()
        assert server.keep()
        assert serve.ask_unix(str(path), "/healthz") == (200, "ok\n")
        assert path.stat().st_mode & 0o777 == 0o600
    assert not server.keep()
    until("no thread more", lambda: threading.active_count() <= threads)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_where_no_descriptor_is_left_nothing_spins(tmp_path, monkeypatch):
    """A connection waits to be taken up, so that asking whether one waits returns at once."""
    server = serve.UnixServer(str(tmp_path / "s"), socketserver.BaseRequestHandler)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as waits:
        waits.connect(str(tmp_path / "s"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            server.serve_next()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    server.server_close()
    assert slept == [serve.NO_ROOM_S]


def test_a_path_that_a_unix_socket_just_can_have(tmp_path):
    folder = tmp_path / ("x" * (serve.LONGEST_PATH - 1 - len(str(tmp_path)) - len("//s")))
    folder.mkdir()
    _SERVERS.append(serve.serve_unix(f"{folder}/s", {"/healthz": lambda: serve.text(200, "ok")}))
    assert serve.ask_unix(f"{folder}/s", "/healthz") == (200, "ok\n")
    with pytest.raises(OSError, match="107 bytes at most"):
        serve.serve_unix(f"{folder}/ss", {})
