"""An etcd that says what a test tells it to, down to the frame; else it is a small honest one: a list, and a silent watch."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from lease.etcd.client import rpc
from tests.support.feed import ROOT, value

RANGE, WATCH = "Range", "Watch"
OK = [(":status", "200"), ("content-type", "application/grpc")]
DONE = [("grpc-status", "0")]
REVISION = 7
LAST = 4
"""END_HEADERS."""
FRAME = 16_384
"""Bytes of a frame at most, where nothing else was agreed on."""


def framed(body: bytes) -> bytes:
    """A gRPC message."""
    return b"\0" + len(body).to_bytes(4, "big") + body


def frame(kind: int, stream: int = 0, body: bytes = b"", flags: int = 0) -> bytes:
    """An HTTP/2 frame (RFC 9113, 4.1)."""
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def record(n: int, key: bytes | None = None, **fields: Any) -> Any:
    """A peer's record, as etcd has it."""
    name, data = value(n)
    fields = {"create_revision": REVISION, "mod_revision": REVISION} | fields
    return {"key": f"{ROOT}/subnets/{name}".encode() if key is None else key, "value": data, **fields}


def page(*kvs: Any, revision: int = REVISION, **fields: Any) -> Any:
    """A part of a list."""
    return rpc.RangeResponse(header=rpc.ResponseHeader(revision=revision), kvs=kvs, **{"count": len(kvs)} | fields)


def told(*kvs: Any, revision: int = REVISION + 1, **fields: Any) -> Any:
    """What a watch says."""
    events = [{"type": "PUT", "kv": kv} for kv in kvs]
    return rpc.WatchResponse(header=rpc.ResponseHeader(revision=revision), events=events, **fields)


class Wire:
    """One connection, as the server has it."""

    def __init__(self, connection: socket.socket, ending: threading.Event) -> None:
        self.socket, self.ending = connection, ending
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.http.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def begin(self, stream: int) -> None:
        """An answer's headers."""
        self.http.send_headers(stream, OK)
        self.flush()

    def say(self, stream: int, *messages: Any) -> None:
        """Messages, whole."""
        for message in messages:
            data = framed(message.SerializeToString())
            self.raw(b"".join(frame(0, stream, data[at : at + FRAME]) for at in range(0, len(data), FRAME)))

    def answer(self, stream: int, message: Any) -> None:
        """One message, and the end."""
        self.begin(stream)
        self.say(stream, message)
        self.http.send_headers(stream, DONE, end_stream=True)
        self.flush()

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self.socket.sendall(data)

    def flood(self, data: bytes) -> None:
        """The same again and again, until the client hangs up, or the test is over."""
        while not self.ending.is_set():
            self.socket.sendall(data)


Say = Callable[[Wire, str, int], bool]
"""What to say to a call of a method, on a stream. False: be honest."""


class HostileEtcd:
    """Asks `say` first, at each call."""

    def __init__(self) -> None:
        self.say: Say = lambda _wire, _method, _stream: False
        self.kvs = [record(1)]
        self._later: list[Any] = []
        self.asked: list[str] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self.ending = threading.Event()
        """Ends what floods now; a new one is made for what floods next."""
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, h2.exceptions.H2Error):  # the client hangs up when it likes
            wire = Wire(connection, self.ending)
            methods: dict[int, str] = {}
            while data := connection.recv(1 << 16):
                for event in wire.http.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        path = dict(event.headers)[b":path"].decode()
                        methods[event.stream_id] = path.rpartition("/")[2]
                    elif isinstance(event, h2.events.DataReceived):
                        wire.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        method = methods.get(event.stream_id, "")
                        first = methods.pop(event.stream_id, None) is not None
                        if first:
                            self.asked.append(method)
                        if first and not self.say(wire, method, event.stream_id):
                            self._honest(wire, method, event.stream_id)
                        elif not first and event.data:
                            wire.say(event.stream_id, told())  # a probe's answer
                wire.flush()

    def _honest(self, wire: Wire, method: str, stream: int) -> None:
        if method == RANGE:
            wire.answer(stream, page(*self.kvs))
        elif method == WATCH:
            wire.begin(stream)
            wire.say(stream, told(revision=REVISION, created=True))
            if self._later:  # all watches begin at the list's revision
                wire.say(stream, told(*self._later))

    def add(self, kv: Any) -> None:
        """One record more: whoever listed before it came is told of it by the watch."""
        self.kvs.append(kv)
        self._later.append(kv)

    def behave(self) -> None:
        """Be honest from now on, as one that was started again: by new connections."""
        self.say = lambda _wire, _method, _stream: False
        self.ending.set()
        self.ending = threading.Event()
        open_now, self._open = self._open, []
        for connection in open_now:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.ending.set()
        self._server.close()
