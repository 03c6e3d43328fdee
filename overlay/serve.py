"""Health and readiness over TCP, status over a Unix socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

SOCKET_NAME = "overlay.sock"
Answer = tuple[int, str, str]
"""HTTP status, content type, body."""
Routes = dict[str, Callable[[], Answer]]


def text(status: int, line: str) -> Answer:
    """One line of plain text."""
    return status, "text/plain; charset=utf-8", line + "\n"


def as_json(status: int, value: object) -> Answer:
    """A JSON body."""
    return status, "application/json", json.dumps(value) + "\n"


def _handler(routes: Routes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            route = routes.get(self.path.split("?")[0])
            status, kind, body = route() if route else text(404, f"there is {', '.join(routes)}")
            data = body.encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Probes are not worth a line."""

        def address_string(self) -> str:
            return "local"

    return Handler


class _TcpServer(ThreadingHTTPServer):
    daemon_threads = True


class _UnixServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 16


def serve_tcp(host: str, port: int, routes: Routes) -> ThreadingHTTPServer:
    """Serve in a thread of its own. Raises OSError (the port is taken)."""
    server = _TcpServer((host, port), _handler(routes))
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server


def serve_unix(path: str, routes: Routes) -> UnixStreamServer:
    """Serve on a Unix socket that root alone may use; one left over by a crash is replaced. Raises OSError."""
    Path(path).unlink(missing_ok=True)
    server = _UnixServer(path, _handler(routes))
    Path(path).chmod(0o600)
    threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
    return server


def ask_unix(path: str, route: str, timeout_s: float = 10.0) -> tuple[int, str]:
    """Ask an agent over its socket: HTTP status and body. Raises OSError (no agent listens there)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(path)
        connection.sendall(f"GET {route} HTTP/1.0\r\n\r\n".encode())
        data = b""
        while chunk := connection.recv(1 << 16):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()
