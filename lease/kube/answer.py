"""A whole answer of the API server, within a deadline and a size. urllib3's time-outs are for each read: a server, or a
proxy before it, that sends a byte now and then would keep a request for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from lease.store import StoreUnavailable

LARGEST_ANSWER = 1 << 24
"""Bytes; a page of a hundred Nodes has some hundred thousand, the largest object 1.5 million (etcd's limit)."""
_CHUNK = 1 << 16


class AnswerRefused(StoreUnavailable):
    """It is too long, came too slowly, or is in a form that was not asked for."""


class AnswerTooLarge(AnswerRefused):
    """Less may be asked for."""


class _Request:
    """One that is under way."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        """What it goes by; the connection forgets it where an answer ends with it."""
        self.expired = False

    def sent_by(self, sock: socket.socket | None) -> None:
        """It goes by that socket; its time may be up already (credentials, or a connection, took so long)."""
        self.sock = sock
        if self.expired:
            self.end()

    def end(self) -> None:
        """Its time is up; from another thread."""
        self.expired = True
        if self.sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # TLS and all


class _Thread(threading.local):
    request = _Request()


_of_this_thread = _Thread()


class _Connection(HTTPConnection):
    def request(self, *arguments: Any, **more: Any) -> None:
        """Known to the deadline."""
        super().request(*arguments, **more)
        _of_this_thread.request.sent_by(self.sock)


class _TlsConnection(HTTPSConnection):
    def request(self, *arguments: Any, **more: Any) -> None:
        """Known to the deadline."""
        super().request(*arguments, **more)
        _of_this_thread.request.sent_by(self.sock)


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


POOLS = {"http": _Pool, "https": _TlsPool}
"""For a pool manager's `pool_classes_by_scheme`."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What this thread requests in here ends in time: its connection is shut down then. Raises AnswerRefused."""
    request = _of_this_thread.request = _Request()
    timer = threading.Timer(seconds, request.end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if request.expired:
            raise AnswerRefused(f"the answer took longer than {seconds:.0f} s") from error
        raise
    finally:
        timer.cancel()
    if request.expired:  # what was shut down may look like an end
        raise AnswerRefused(f"the answer took longer than {seconds:.0f} s")


def check_form(response: urllib3.BaseHTTPResponse) -> None:
    """Nothing compressed is asked for: a few bytes of it could be gigabytes. Raises AnswerRefused."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        response.close()
        raise AnswerRefused(f"an answer in {encoding[:20]!a} form, which was not asked for")


def whole(response: urllib3.BaseHTTPResponse) -> bytes:
    """The body. Raises AnswerTooLarge, and what urllib3 raises."""
    data = bytearray()
    for part in response.stream(_CHUNK, decode_content=False):
        data += part
        if len(data) > LARGEST_ANSWER:
            response.close()
            raise AnswerTooLarge(f"an answer of more than {LARGEST_ANSWER} bytes")
    return bytes(data)
