"""A deadline and a size for each answer of the API server, or of whoever stands before it: by a server on loopback that says
what it likes, as slowly as it likes."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from lease.kube import answer, client
from lease.kube.client import KubeClient, KubeSettings
from lease.kube.watch import Watch
from lease.store import StoreUnavailable

Say = Callable[[socket.socket, bytes, threading.Event], None]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Server:
    """Says `say` to each request, of which it reads the head."""

    def __init__(self) -> None:
        self.say: Say = whole(b"{}")
        self.ending = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while head := self._head(connection):
                    self.say(connection, head, self.ending)
            except OSError:
                return

    @staticmethod
    def _head(connection: socket.socket) -> bytes:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (more := connection.recv(4096)):
                return b""
            head += more
        return head

    def close(self) -> None:
        self.ending.set()
        self._socket.close()


def whole(body: bytes, *headers: bytes) -> Say:
    head = OK + b"".join(header + b"\r\n" for header in headers)

    def say(connection: socket.socket, _head: bytes, _ending: threading.Event) -> None:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    return say


def dripping(first: bytes) -> Say:
    """And then a byte now and then, for ever."""

    def say(connection: socket.socket, _head: bytes, ending: threading.Event) -> None:
        connection.sendall(first)
        while not ending.wait(0.1):
            connection.sendall(b"1")

    return say


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def api(server, closing) -> KubeClient:
    return closing(KubeClient(KubeSettings(api_url=server.url)))


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nX: ", id="within a header"),
        pytest.param(OK + b"Content-Length: 100000\r\n\r\n", id="within a body"),
        pytest.param(OK + b"\r\n", id="a body that ends with the connection"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n", id="within a chunk's length"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n", id="within a chunk"),
    ],
)
@pytest.mark.parametrize("call", ["get", "ask", "patch"])
def test_an_answer_that_drips_is_given_up(server, api, monkeypatch, first, call):
    """Each read gets something in time. (Without the deadline this never ends: pytest's time-out.)"""
    monkeypatch.setattr(client, "ANSWER_S", 1.0)
    server.say = dripping(first)
    calls = {
        "get": lambda: api.get("/x"),
        "ask": lambda: api.ask("/x", {}, "application/json"),
        "patch": lambda: api.patch("/x", {}),
    }
    with pytest.raises(StoreUnavailable, match="longer than 1 s"):
        calls[call]()
    server.say = whole(b'{"a": 1}')
    assert api.get("/x") == {"a": 1}, "by another connection"


def test_a_deadline_that_passes_before_there_is_a_connection_holds_all_the_same(server, api, monkeypatch):
    """What it would have shut down is not known yet when it does."""
    monkeypatch.setattr(client, "ANSWER_S", 0.2)
    connect, late = answer._Connection.connect, threading.Event()

    def slowly(connection: answer._Connection) -> None:
        late.wait(0.5)
        connect(connection)

    monkeypatch.setattr(answer._Connection, "connect", slowly)
    server.say = dripping(OK + b"\r\n")
    with pytest.raises(StoreUnavailable, match="longer than 0 s"):
        api.get("/x")


def test_so_is_a_watch_that_never_begins(server, api, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_S", 1.0)
    server.say = dripping(b"HTTP/1.1 200 OK\r\nX: ")
    with pytest.raises(StoreUnavailable, match="longer than 1 s"):
        api.watch("/x", {"watch": "true"}, "application/json")
    # one that has begun may take as long as it likes
    server.say = dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"3\r\n{}\n\r\n")
    stream = api.watch("/x", {"watch": "true"}, "application/json")
    events = stream.events()
    assert next(events)[0].data == b"{}"
    threading.Timer(1.5, stream.end).start()
    with pytest.raises(StoreUnavailable):
        next(events)


@pytest.mark.parametrize("call", ["get", "watch"])
def test_a_compressed_answer_is_taken_for_none(server, api, call):
    """A megabyte stands for a gigabyte."""
    server.say = whole(gzip.compress(bytes(1 << 24)), b"Content-Encoding: gzip")
    tracemalloc.start()
    try:
        with pytest.raises(StoreUnavailable, match="gzip"):
            api.get("/x") if call == "get" else api.watch("/x", {"watch": "true"}, "application/json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 22


def test_an_answer_has_a_size(server, api, monkeypatch):
    monkeypatch.setattr(answer, "LARGEST_ANSWER", 1 << 20)
    server.say = whole(b" " * (1 << 20) + b"{}")
    with pytest.raises(answer.AnswerTooLarge) as refused:
        api.get("/x")
    assert isinstance(refused.value, StoreUnavailable), "whoever asks for no page takes it for a store that is away"
    server.say = whole(b" " * ((1 << 20) - 2) + b"{}")
    assert api.get("/x") == {}


def test_pages_shrink_until_they_fit(server, api, monkeypatch):
    """Objects of 100 kB in a server that says as many as it is asked for."""
    monkeypatch.setattr(answer, "LARGEST_ANSWER", 1 << 20)
    names = [f"n{number}" for number in range(150)]
    limits = []

    def say(connection: socket.socket, head: bytes, ending: threading.Event) -> None:
        query = dict(part.split("=") for part in head.split(b" ")[1].decode().partition("?")[2].split("&"))
        limit, start = int(query["limit"]), int(query.get("continue", "0"))
        limits.append(limit)
        items = [
            {"metadata": {"name": name, "note": "x" * (100_000 if name < "n2" else 10)}}
            for name in names[start:][:limit]
        ]
        token = str(start + limit) if start + limit < len(names) else ""
        body = {"metadata": {"resourceVersion": "5", "continue": token}, "items": items}
        whole(json.dumps(body).encode())(connection, head, ending)

    class Page:
        def __init__(self, given) -> None:
            value = json.loads(given.data)
            self.token, self.names = (
                value["metadata"]["continue"],
                [item["metadata"]["name"] for item in value["items"]],
            )

    server.say = say
    watch = Watch(api, "/x", lambda: None)
    found = [name for page in watch.pages("application/json", 100, Page) for name in page.names]
    assert found == names
    assert limits[:3] == [100, 25, 6]
    assert limits[-1] > 6, "and grow again"


def test_an_object_that_never_fits_is_a_store_that_is_away(server, api, monkeypatch):
    monkeypatch.setattr(answer, "LARGEST_ANSWER", 1 << 10)
    server.say = whole(b" " * 5000)
    with pytest.raises(StoreUnavailable, match="more than 1024 bytes"):
        list(Watch(api, "/x", lambda: None).pages("application/json", 100, lambda given: given))
