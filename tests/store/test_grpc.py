"""Our gRPC before a server that answers oddly: HTTP/2 of ours on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from lease.etcd import channel as grpc_channel
from lease.etcd.client import EtcdClient, EtcdSettings, rpc
from lease.store import StoreUnavailable

OK = [(":status", "200"), ("content-type", "application/grpc")]
DONE = [("grpc-status", "0")]


def framed(body: bytes) -> bytes:
    return b"\0" + len(body).to_bytes(4, "big") + body


def answer(revision: int = 7, **fields: Any) -> bytes:
    return framed(rpc.RangeResponse(header=rpc.ResponseHeader(revision=revision), **fields).SerializeToString())


class Odd:
    """Answers every call with `headers`, `body`, `trailers`."""

    def __init__(self) -> None:
        self.headers, self.body, self.trailers = OK, answer(), DONE
        self.asked = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        with connection, contextlib.suppress(OSError):  # the client may hang up at any time
            connection.sendall(http.data_to_send())
            while data := connection.recv(1 << 16):
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.StreamEnded):
                        self.asked += 1
                        http.send_headers(event.stream_id, self.headers, end_stream=not self.body)
                        if self.body:
                            http.send_data(event.stream_id, self.body)
                            http.send_headers(event.stream_id, self.trailers, end_stream=True)
                connection.sendall(http.data_to_send())

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def odd() -> Iterator[Odd]:
    made = Odd()
    yield made
    made.close()


@pytest.fixture
def healthy() -> Iterator[Odd]:
    made = Odd()
    yield made
    made.close()


@pytest.fixture
def client(odd, healthy) -> Iterator[EtcdClient]:
    """Of `odd` alone."""
    made = EtcdClient(EtcdSettings((odd.endpoint,)))
    yield made
    made.close()


def ask(client: EtcdClient) -> Any:
    return next(client.pages(b"x", b"", 1, 1))


def test_it_answers(client):
    assert ask(client).header.revision == 7


@pytest.mark.parametrize(
    ("headers", "body", "trailers", "said"),
    [
        pytest.param(OK, framed(b"\xff\xff\xff"), DONE, "cannot be decoded", id="no message"),
        pytest.param(OK, answer(), [("grpc-status", "9" * 5000)], "UNKNOWN", id="a status without end"),
        pytest.param(OK, answer(), [("grpc-status", "13"), ("grpc-message", "broken")], "broken", id="internal"),
        pytest.param([(":status", "404")], b"", [], "HTTP status 404", id="another server"),
        pytest.param(OK, b"<html>not here</html>", DONE, "not etcd's gRPC", id="HTML"),
        pytest.param(OK, b"\0\xff\xff\xff\xff", DONE, "4294967300 bytes", id="4 GiB"),
    ],
)
def test_an_odd_answer_is_a_store_that_is_away_and_the_next_endpoint_is_asked(
    odd, healthy, client, headers, body, trailers, said
):
    odd.headers, odd.body, odd.trailers = headers, body, trailers
    with pytest.raises(StoreUnavailable, match=said):
        ask(client)
    both = EtcdClient(EtcdSettings((odd.endpoint, healthy.endpoint)))
    try:
        assert ask(both).header.revision == 7
        asked = odd.asked
        ask(both)
        assert odd.asked == asked, "it stays where it was answered"
    finally:
        both.close()


def test_more_without_any_key_ends_the_list(odd, client):
    odd.body = answer(more=True, count=5)
    assert len(list(client.pages(b"a", b"b", 10, 5))) == 1


def test_a_connection_that_was_begun_before_a_reconnect_is_not_kept(client, monkeypatch):
    """Our address changed while it was made."""
    real, begun = grpc_channel.Channel.__init__, threading.Event()
    go_on = threading.Event()

    def slow(self, *arguments: Any) -> None:
        real(self, *arguments)
        begun.set()
        go_on.wait(10)

    monkeypatch.setattr(grpc_channel.Channel, "__init__", slow)
    said: list[str] = []

    def try_it() -> None:
        try:
            ask(client)
        except StoreUnavailable as error:
            said.append(str(error))

    thread = threading.Thread(target=try_it)
    thread.start()
    assert begun.wait(10)
    client.reconnect()
    go_on.set()
    thread.join(10)
    assert len(said) == 1
    assert "given up" in said[0]
    assert ask(client).header.revision == 7
