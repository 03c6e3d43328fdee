"""Health and readiness over TCP, status over a Unix socket."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from socketserver import BaseRequestHandler, BaseServer, TCPServer, ThreadingMixIn, UnixStreamServer
from typing import Any, NamedTuple

from overlay.process.log import log

SOCKET_NAME = "overlay.sock"
LONGEST_REQUEST = 1 << 16
ASKED_WITHIN_S, ANSWERED_WITHIN_S = 5.0, 10.0
"""For a whole request, however it trickles in, and to take the whole answer."""
MOST_AT_ONCE = 16
"""Connections of one server. Where one more comes, the oldest goes that has not asked yet, or has not taken its answer
within SLOW_S; where there is none, the new one waits for that: who asks at once is served."""
SLOW_S = 1.0
LONGEST_PATH = 108
"""sizeof(sun_path), with its end (unix(7))."""
SAME_FOR_S = 0.5
NO_ROOM_S = 0.2
"""Where a connection cannot be taken up, for want of descriptors, it waits, and so does the server."""
REASONS = {
    200: "OK", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict",
    503: "Service Unavailable",
}  # fmt: skip
Answer = tuple[int, str, str]
"""HTTP status, content type, body."""
Routes = dict[str, Callable[[], Answer]]


def text(status: int, line: str) -> Answer:
    """One line of plain text."""
    return status, "text/plain; charset=utf-8", line + "\n"


def as_json(status: int, value: object) -> Answer:
    """A JSON body."""
    return status, "application/json", json.dumps(value) + "\n"


def same_for_a_moment(
    answer: Callable[[], Answer], same_for_s: float = SAME_FOR_S, clock: Callable[[], float] = time.monotonic
) -> Callable[[], Answer]:
    """An answer that costs something, made once in so many seconds at most however many ask."""
    lock = threading.Lock()
    last: list[tuple[float, Answer]] = []

    def remembered() -> Answer:
        with lock:
            if not last or clock() >= last[0][0] + same_for_s:
                made = answer()
                last[:] = [(clock(), made)]
            return last[0][1]

    return remembered


class Request(NamedTuple):
    """What was asked. target: path and query as they came; headers: by their names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def path(self) -> str:
        """Without the query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """What stands behind the question mark."""
        return self.target.partition("?")[2]


def parsed(data: bytes) -> Request:
    """A request's head; what is no HTTP has an empty method."""
    first, *lines = data.decode("latin-1").splitlines() or [""]
    method, _, rest = first.partition(" ")
    fields = (line.partition(":") for line in lines if line)
    return Request(
        method, rest.partition(" ")[0].strip(), {name.strip().lower(): value.strip() for name, _, value in fields}
    )


class Handler(BaseRequestHandler):
    """One request, one answer. http.server would do the same with 6 MiB more (email, mimetypes, ssl...)."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # nobody waits for the answer any more, or did not say in time what it wants
            request = parsed(self._request())
            if self.server.asked(self.request):  # type: ignore[attr-defined]
                self.answer(request)

    def answer(self, request: Request) -> None:
        """Give the answer, by `reply`."""
        raise NotImplementedError

    def _request(self) -> bytes:
        """What was sent until an empty line, the end, or more than anybody needs. Raises TimeoutError."""
        end = time.monotonic() + ASKED_WITHIN_S
        data = b""
        while len(data) < LONGEST_REQUEST and b"\r\n\r\n" not in data and b"\n\n" not in data:
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError
            self.request.settimeout(left)
            chunk = self.request.recv(LONGEST_REQUEST)
            if not chunk:
                break
            data += chunk
        self.request.settimeout(ANSWERED_WITHIN_S)
        return data

    def reply(self, answer: Answer, method: str, fields: str = "") -> None:
        """Write it. fields: header lines more."""
        status, kind, body = answer
        data = body.encode()
        head = f"HTTP/1.0 {status} {REASONS.get(status, '')}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
        self.request.sendall(f"{head}{fields}Connection: close\r\n\r\n".encode() + (data if method == "GET" else b""))


class _RoutesHandler(Handler):
    """Answers by path alone, whoever asks."""

    routes: Routes

    def answer(self, request: Request) -> None:
        """By its path."""
        route = self.routes.get(request.path)
        if request.method not in ("GET", "HEAD"):
            made = text(405, "only GET")
        elif route is None:
            made = text(404, f"available: {', '.join(self.routes)}")
        else:
            made = route()
        self.reply(made, request.method)


class _Server(ThreadingMixIn, BaseServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._changed = threading.Condition()
        self._ended = False
        self._open: dict[socket.socket, float] = {}
        """Connections that are served, the oldest first, and until when each may stay where others want its place."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Until `end`."""
        del poll_interval
        while not self._ended:
            self.serve_next()

    def end(self) -> None:
        """Listen no more."""
        listening: socket.socket = self.socket  # type: ignore[attr-defined]
        self._ended = True
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # the thread that waits there sees it
        listening.close()

    def serve_next(self) -> None:
        """Wait for one connection, and serve it in a thread of its own."""
        listening: socket.socket = self.socket  # type: ignore[attr-defined]
        try:
            request, address = listening.accept()
        except OSError:
            if not self._ended and listening is self.socket:  # type: ignore[attr-defined]
                time.sleep(NO_ROOM_S)  # it still waits to be taken up, so that accepting would fail again at once
            return
        try:
            self.process_request(request, address)
        except Exception:
            self.handle_error(request, address)
            self.shutdown_request(request)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own."""
        with self._changed:
            while len(self._open) >= MOST_AT_ONCE:
                self._evict_one()
            self._open[request] = 0.0
        super().process_request(request, client_address)

    def _evict_one(self) -> None:
        """Or wait a moment for the answers under way."""
        first = min(self._open, key=self._open.__getitem__)
        if (left := self._open[first] - time.monotonic()) > 0:
            self._changed.wait(left)
            return
        with contextlib.suppress(OSError):
            first.shutdown(socket.SHUT_RDWR)  # its thread sees the end of it
        del self._open[first]

    def asked(self, request: socket.socket) -> bool:
        """It waits for its answer from now on; False: it had to go, and gets none."""
        with self._changed:
            if request not in self._open:
                return False
            self._open[request] = time.monotonic() + SLOW_S
            return True

    def shutdown_request(self, request: Any) -> None:
        """It was answered, or gave up."""
        with self._changed:
            self._open.pop(request, None)
            self._changed.notify()
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """A bug in an answer: say so, and serve on."""
        log.error("serve", error=repr(sys.exc_info()[1]), effect="one request got no answer")


class _TcpServer(_Server, TCPServer):
    def __init__(self, where: tuple[str, int], handler: type[Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        super().__init__(where, handler)


class UnixServer(_Server, UnixStreamServer):
    """On a Unix socket that root alone may use."""

    _inode = 0

    def server_bind(self) -> None:
        """Also where a crash left one."""
        _bind_for_root(self.socket, str(self.server_address))

    def keep(self) -> bool:
        """Listen at the path again where it was removed or replaced; whether it was. Raises OSError."""
        path = str(self.server_address)
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == self._inode:
                return False
        made, before = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), self.socket
        try:
            _bind_for_root(made, path)
            made.listen(self.request_queue_size)
            self._inode = os.stat(path).st_ino
        except OSError:
            made.close()
            raise
        self.socket = made
        with contextlib.suppress(OSError):
            before.shutdown(socket.SHUT_RDWR)  # the thread that waits there is to wait at the new one
        before.close()
        return True

    def server_activate(self) -> None:
        """Listen."""
        super().server_activate()
        self._inode = os.stat(str(self.server_address)).st_ino


def _bind_for_root(made: socket.socket, path: str) -> None:
    """Under a name of its own first: whoever sees it at its path sees its mode."""
    if len(os.fsencode(path)) >= LONGEST_PATH:
        raise OSError(errno.ENAMETOOLONG, f"a Unix socket's path has {LONGEST_PATH - 1} bytes at most", path)
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        made.bind(f"/proc/self/fd/{folder}/{os.path.basename(temporary)}")  # which may be too long otherwise
    finally:
        os.close(folder)
    os.chmod(temporary, 0o600)
    os.rename(temporary, path)


def by_path(routes: Routes) -> type[Handler]:
    """What answers by these paths."""
    return type("_Routes", (_RoutesHandler,), {"routes": routes})


class TcpDoor:
    """A TCP port to serve at, in a thread of its own, as soon as it is free: any user may have taken it."""

    def __init__(self, host: str, port: int, handler: type[Handler], name: str) -> None:
        """name: of its thread."""
        self._where, self._handler, self._name = (host, port), handler, name
        self.server: _TcpServer | None = None
        """None while others have the port."""

    def open(self) -> bool:
        """Listen, where nobody else does; whether we do. Raises OSError: not because of others."""
        if self.server is None:
            try:
                self.server = _TcpServer(self._where, self._handler)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return False
            try:
                _start(self.server, self._name)
            except RuntimeError:  # no thread can be had just now
                self.server.server_close()
                self.server = None
                return False
        return True

    def close(self) -> None:
        """Listen no more; its thread ends."""
        if self.server is not None:
            self.server.end()
            self.server = None


def serve_unix(path: str, routes: Routes) -> UnixServer:
    """Serve on a Unix socket that root alone may use; one left over by a crash is replaced. Raises OSError."""
    server = UnixServer(path, by_path(routes))
    _start(server, "status")
    return server


def _start(server: BaseServer, name: str) -> None:
    threading.Thread(target=server.serve_forever, name=name, daemon=True).start()


def ask_unix(path: str, route: str, timeout_s: float = 10.0) -> tuple[int, str]:
    """Ask an agent over its socket: HTTP status and body. Raises OSError (no agent listens there)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        end = time.monotonic() + timeout_s
        while True:
            try:
                connection.connect(path)
                break
            except BlockingIOError:  # its queue is full for a moment
                if time.monotonic() >= end:
                    raise
                time.sleep(0.02)
        connection.sendall(f"GET {route} HTTP/1.0\r\n\r\n".encode())
        data = b""
        while chunk := connection.recv(1 << 16):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionResetError("it closed the connection without an answer: too many requests at once")
    return int(head.split()[1]), body.decode()
