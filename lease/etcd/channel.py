"""gRPC's wire (PROTOCOL-HTTP2.md in grpc/grpc) over the library h2: one connection, no thread of its own.

It offers the generated stubs what they ask of a channel. Whichever thread waits for an answer reads the connection and hands
the others theirs; nothing runs while nobody waits. grpcio's own channel keeps a dozen threads, some of which wake ten times
a second, and 8 MiB (docs/decisions.md has the figures).
"""

from __future__ import annotations

import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

if TYPE_CHECKING:
    import ssl

__all__ = ["Call", "Channel", "Method", "RpcError"]

CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
"""Names of gRPC's status codes, by number (grpc/grpc doc/statuscodes.md)."""
CONNECT_S, SEND_S = 3.0, 5.0
"""How long a connection may take to come about, and the kernel to take what is sent."""
_WINDOW = (1 << 31) - 1
"""Flow control is left to TCP: every window is as wide as HTTP/2 allows."""
_CHUNK = 1 << 16
"""Bytes read at a time: of small frames these are thousands, and others have their turn after them."""
_KEPT = 64
"""Bytes that a message takes beside its own."""
_RESETS = {0x7: "UNAVAILABLE", 0x8: "CANCELLED", 0xB: "RESOURCE_EXHAUSTED", 0xC: "PERMISSION_DENIED"}
"""HTTP/2's error codes (RFC 9113, 7) as gRPC maps them; any other is INTERNAL."""
LARGEST = 1 << 25
"""Bytes of an answer, where a call does not say less; etcd's own limit of a request is 1.5 MB."""
TOO_LARGE = "RESOURCE_EXHAUSTED"
"""What a call ends with whose answer is longer than it may be, here or (gRPC's own limits) on the way."""

Metadata = Iterable[tuple[str, str]]


class RpcError(Exception):
    """What a call ended with: a gRPC status code by name, and what the server, or the connection, said."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{details} ({code})" if details else code)
        self.code, self.details = code, details


class _Http2(h2.connection.H2Connection):
    MAX_CLOSED_STREAMS = (
        64  # remembered, to distinguish a late frame from a wrong one; one per call, for ever, otherwise
    )


class Call:
    """One stream of a connection."""

    def __init__(self, channel: Channel, number: int, largest: int) -> None:
        self.channel, self._number, self._largest = channel, number, largest
        self._inbox: deque[bytes] = deque()
        self._waiting = 0
        """What is in there, in bytes."""
        self._half = bytearray()
        self._answered = False
        self._ended: RpcError | None = None
        """None while it lasts; the code is OK when it ended well."""

    def send(self, message: bytes, last: bool = False) -> None:
        """One more message. Raises RpcError."""
        self.channel._send(self, b"\0" + len(message).to_bytes(4, "big") + message, last)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message; None when there are no more. Raises RpcError: DEADLINE_EXCEEDED when none came in time, and
        the call stands."""
        return self.channel._receive(self, timeout_s)

    def cancel(self) -> None:
        """End it, in whatever thread."""
        self.channel._cancel(self)

    def _take(self, data: bytes) -> None:
        """Bytes of the stream: length-prefixed messages."""
        half = self._half
        if self._ended is not None:  # what is still under way is not kept
            half.clear()
            return
        half += data
        while len(half) >= 5:
            end = 5 + int.from_bytes(half[1:5], "big")
            if half[0]:
                self._end("UNAVAILABLE", "a compressed message that was not requested: not etcd's gRPC")
                return
            if end > self._largest:
                self._end(TOO_LARGE, f"a message of {end} bytes; at most {self._largest} are taken")
                return
            if len(half) < end:
                return
            self._waiting += end + _KEPT
            if self._inbox and self._waiting > LARGEST:
                self._end(TOO_LARGE, f"more than {LARGEST} bytes of messages came faster than they are read")
                return
            self._inbox.append(bytes(half[5:end]))
            del half[:end]

    def _take_headers(self, headers: Iterable[tuple[bytes, bytes]], first: bool) -> None:
        found = dict(headers)
        if first and (status := found.get(b":status", b"")) != b"200":
            # a proxy's, or another server's: nothing that etcd said of our call
            self._end("UNAVAILABLE", f"HTTP status {status.decode('ascii', 'replace')}, not gRPC")
        elif (code := found.get(b"grpc-status")) is not None:
            number = int(code) if code.isdigit() and len(code) < 4 else 2
            self._end(CODES[number if number < len(CODES) else 2], _unquote(found.get(b"grpc-message", b"")))

    def _end(self, code: str, details: str) -> None:
        if self._ended is None:
            self._ended = RpcError(code, details)


class Method:
    """One method of a service, as a generated stub calls it."""

    def __init__(
        self, channel: Channel, path: str, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]
    ) -> None:
        self._channel, self._path, self._encode, self._decode = channel, path.encode(), encode, decode

    def __call__(self, request: Any, timeout: float, metadata: Metadata = (), largest: int = LARGEST) -> Any:
        """One request, one answer. Raises RpcError."""
        return self.result(self.begin(request, timeout, metadata, largest=largest), timeout)

    def first(self, request: Any, timeout: float, metadata: Metadata = ()) -> Any:
        """One request on a stream that stays open, and its first answer; the stream is ended then. (etcd's grpc-proxy gives
        a keep-alive up whose sender has nothing more to say.) Raises RpcError."""
        call = self.begin(request, timeout, metadata, last=False)
        try:
            return self._one(call, timeout)
        finally:
            call.cancel()

    def begin(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = (),
        last: bool = True,
        largest: int = LARGEST,
    ) -> Call:
        """Send a request, not waiting for an answer. last: the only one of this call; largest: an answer's bytes. Raises
        RpcError."""
        call = self._channel._open(self._path, timeout, metadata, largest)
        call.send(self._encode(request), last)
        return call

    def result(self, call: Call, timeout: float) -> Any:
        """The one answer. Raises RpcError, and the call is over then."""
        try:
            answer = self._one(call, timeout)
            if call.receive(timeout) is not None:
                raise RpcError("UNKNOWN", "the server gave a second answer")
        except BaseException:
            call.cancel()
            raise
        return answer

    def _one(self, call: Call, timeout: float) -> Any:
        answer = self.next(call, timeout)
        if answer is None:
            raise RpcError("UNKNOWN", "the server ended the call without an answer")
        return answer

    def next(self, call: Call, timeout: float) -> Any:
        """One answer of several; None when there are no more. Raises RpcError."""
        message = call.receive(timeout)
        if message is None:
            return None
        try:
            return self._decode(message)
        except Exception as error:  # protobuf's own, whose module only etcd3's messages import
            raise RpcError("INTERNAL", f"an answer that cannot be decoded: {error}") from error


class Channel:
    """A connection. Safe for several threads: one of those that wait reads, the others are woken by it."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Connect. Raises RpcError."""
        self._turn = threading.Condition(threading.Lock())
        """Held for everything below, except while the reader waits for the socket."""
        self._reading = False
        self._broken = ""
        self._calls: dict[int, Call] = {}
        self._authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._scheme = "https" if tls else "http"
        try:
            self._socket = socket.create_connection((host, port), CONNECT_S)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=host)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ValueError, UnicodeError) as error:  # ValueError: a name that TLS cannot check
            raise RpcError("UNAVAILABLE", _reason(error)) from error
        self._socket.setblocking(False)
        self._undelivered: Callable[[], int] = getattr(self._socket, "pending", int)
        """Bytes that TLS has decrypted, at most one record, of which poll knows nothing."""
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable.register(self._socket, select.POLLOUT)
        config = h2.config.H2Configuration(
            client_side=True, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self._http = _Http2(config)
        kinds = h2.settings.SettingCodes
        self._http.local_settings = h2.settings.Settings(
            client=True, initial_values={kinds.ENABLE_PUSH: 0, kinds.INITIAL_WINDOW_SIZE: _WINDOW}
        )
        self._http.initiate_connection()
        self._http.increment_flow_control_window(_WINDOW - 65_535)
        with self._turn:
            self._flush()

    # --- what stubs ask for ----------------------------------------------------------------------------------------

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any) -> Method:
        """A method of one request and one answer."""
        return Method(self, path, request_serializer, response_deserializer)

    stream_stream = unary_unary

    # --- the life of the connection ----------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """End it and every call on it, in whatever thread."""
        with self._turn:
            self._break(why)

    @property
    def broken(self) -> str:
        """Why it can be used no more; "" while it can."""
        with self._turn:
            self._check_closed()
            return self._broken

    def _break(self, why: str) -> None:
        if self._broken:
            return
        self._broken = why
        for call in self._calls.values():
            call._end("UNAVAILABLE", why)
        self._calls.clear()
        with suppress(OSError):
            self._socket.shutdown(
                socket.SHUT_RDWR
            )  # wakes the reader, who closes it: the number is not used anew under him
        if not self._reading:
            self._socket.close()
        self._turn.notify_all()

    # --- for Call and Method -----------------------------------------------------------------------------------------

    def _open(self, path: bytes, timeout_s: float | None, metadata: Metadata, largest: int) -> Call:
        headers = [
            (b":method", b"POST"),
            (b":scheme", self._scheme.encode()),
            (b":path", path),
            (b":authority", self._authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"overlay"),
            *((name.encode(), value.encode()) for name, value in metadata),
        ]
        if timeout_s is not None:
            headers.append((b"grpc-timeout", b"%dm" % (timeout_s * 1000)))
        with self._turn:
            self._check_closed()
            if self._broken:
                raise RpcError("UNAVAILABLE", self._broken)
            try:
                number = self._http.get_next_available_stream_id()
                self._http.send_headers(number, headers)
            except h2.exceptions.H2Error as error:
                raise RpcError("RESOURCE_EXHAUSTED", _reason(error)) from error
            call = self._calls[number] = Call(self, number, largest)
            return call

    def _send(self, call: Call, data: bytes, last: bool) -> None:
        deadline = time.monotonic() + SEND_S
        with self._turn:
            while call._ended is None:
                try:
                    room = self._http.local_flow_control_window(call._number)
                    part = data[: min(room, self._http.max_outbound_frame_size)]
                    data = data[len(part) :]
                    self._http.send_data(call._number, part, end_stream=last and not data)
                except h2.exceptions.H2Error as error:
                    call._end("UNAVAILABLE", _reason(error))
                    break
                self._flush()
                if not data:
                    return
                if len(part) == room and not self._until(lambda: self._window(call), deadline):
                    self._break("accepts no more data")
            raise call._ended or RpcError("UNKNOWN", "")

    def _window(self, call: Call) -> bool:
        return call._ended is not None or self._http.local_flow_control_window(call._number) > 0

    def _receive(self, call: Call, timeout_s: float) -> bytes | None:
        with self._turn:
            in_time = self._until(lambda: call._inbox or call._ended is not None, time.monotonic() + timeout_s)
            if call._inbox:
                message = call._inbox.popleft()
                call._waiting -= len(message) + 5 + _KEPT
                return message
            if not in_time:
                raise RpcError("DEADLINE_EXCEEDED", "no answer in time")
            assert call._ended is not None
            if call._ended.code == "OK":
                return None
            raise call._ended

    def _cancel(self, call: Call) -> None:
        with self._turn:
            call._end("CANCELLED", "given up")
            call._inbox.clear()
            if self._calls.pop(call._number, None) is not None:
                with suppress(h2.exceptions.H2Error):  # the server may have been faster
                    self._http.reset_stream(call._number, 0x8)
                    self._flush()
            self._turn.notify_all()

    # --- the socket; the turn is held ---------------------------------------------------------------------------------

    def _until(self, done: Callable[[], Any], deadline: float) -> bool:
        """Read, or let another thread read, until something is so; False when the time is up."""
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._reading:
                self._turn.wait(left)
                continue
            self._reading = True
            self._turn.release()
            try:
                ready = self._readable.poll(left * 1000 + 1)
            finally:
                self._turn.acquire()
                self._reading = False
                # Handed over whatever becomes of this thread: one of the others has to read on.
                self._turn.notify_all()
            if self._broken:
                self._socket.close()
            elif ready:
                self._take()
        return True

    def _check_closed(self) -> None:
        """Notice, before it is used, that the server closed it while nobody read."""
        if not self._reading and not self._broken:
            self._take()

    def _take(self) -> None:
        """What is there to be read, some of it where there is much: who sends without end must not keep the turn."""
        more = True
        while more and not self._broken:
            try:
                data = self._socket.recv(_CHUNK)
            except OSError as error:
                if not _later(error):
                    self._break(_reason(error))
                return
            if not data:
                self._break("closed the connection")
                return
            try:
                for event in self._http.receive_data(data):
                    self._handle(event)
                more = self._undelivered() > 0
            except h2.exceptions.H2Error as error:
                self._break(f"does not speak HTTP/2 as etcd does ({_reason(error)})")
                return
            self._flush()

    def _handle(self, event: Any) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self._break("is closing the connection")
            return
        number = getattr(event, "stream_id", 0)
        call = self._calls.get(number) if number else None
        if isinstance(event, h2.events.DataReceived):
            self._http.acknowledge_received_data(event.flow_controlled_length, number)
        if call is None:
            return
        if isinstance(event, h2.events.DataReceived):
            call._take(event.data)
        elif isinstance(event, h2.events.ResponseReceived):
            call._take_headers(event.headers, first=True)
        elif isinstance(event, h2.events.TrailersReceived):
            call._take_headers(event.headers, first=False)
        elif isinstance(event, h2.events.StreamReset):
            call._end(_RESETS.get(int(event.error_code), "INTERNAL"), f"the stream was reset ({int(event.error_code)})")
            del self._calls[number]
        elif isinstance(event, h2.events.StreamEnded):
            call._end("UNKNOWN", "the stream ended without a status")
            del self._calls[number]

    def _flush(self) -> None:
        """Send what HTTP/2 has to say."""
        data = self._http.data_to_send()
        deadline = time.monotonic() + SEND_S
        while data and not self._broken:
            try:
                data = data[self._socket.send(data) :]
            except OSError as error:
                left = deadline - time.monotonic()
                if not _later(error):
                    self._break(_reason(error))
                elif left <= 0 or not self._writable.poll(left * 1000):
                    self._break(f"accepted no data for {SEND_S:.0f} s")


def _later(error: OSError) -> bool:
    """Nothing to read, or no space to write, just now. (TLS says it with errors of its own.)"""
    return isinstance(error, BlockingIOError) or type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no connection in time"
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if "_ALERT_" in said and any(word in said.lower() for word in ("certificate", "unknown_ca")):
        return f"refuses our certificate (etcd-certfile): {said}"
    return said


def _unquote(text: bytes) -> str:
    """grpc-message is percent-encoded UTF-8."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda found: bytes((int(found[1], 16),)), text).decode("utf-8", "replace")
