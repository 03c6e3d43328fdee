"""The way to the Kubernetes API: configuration and credentials by the kubernetes client, requests through its pool.

Neither its typed models (20 times the CPU) nor its Watch class (dies of an ERROR event) are used; `call_api` neither
adds credentials nor raises on 401 (docs/decisions.md, "The Kubernetes client").
"""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import urllib3

from lease.endpoint import shown
from lease.kube import answer
from lease.kube.objects import MALFORMED, PROTOBUF, Answer
from lease.regular import Stamp, stamp
from lease.store import StoreUnavailable

TIMEOUT_S, ANSWER_S = 10.0, 20.0
"""Until a server says something (more), and for an answer as a whole."""
_REFUSAL = 16_384
"""Bytes of a refusal that are read."""
_CHUNK_LINE = 100
"""The longest line with a chunk's length; extensions, which nobody uses, included."""
LARGEST_EVENT = 1 << 24
"""Bytes; etcd stores no object above 1.5 MiB unless configured to."""
CREDENTIALS_S = 15.0
"""Longer than a silent watch is probed (see NodeStore): an event that comes then finds them ready."""
AGENT = "overlayd"
SERVICE_HOST = "KUBERNETES_SERVICE_HOST"
_KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 11_000),
]
"""A black hole is noticed within 11 s (tcp(7)); a frozen server acknowledges still: see NodeStore's probe."""


_A = TypeVar("_A")
_Way = tuple[Any, dict[str, str]]
"""The client, and its credentials."""


class KubeSettings(NamedTuple):
    """Where the API is. Both empty: in a pod, by its service account."""

    api_url: str = ""
    kubeconfig: str = ""


class KubeSettingsError(ValueError):
    """Names the flag or variable and what to do."""


FORBIDDEN = 403
"""An API server's answer of it is a Status whose message has "forbidden: " (apimachinery, errors.NewForbidden). A proxy's
is no Status, and its message is HTTP's own."""


class ApiError(StoreUnavailable):
    """The API server answered with something other than success. about: what its Status says was not found, "" where the
    answer is no such Status (a proxy's 404, say)."""

    def __init__(self, code: int, message: str, about: str = "") -> None:
        super().__init__(message)
        self.code, self.about = code, about
        self.refused = code == FORBIDDEN and "forbidden: " in message


class Stream:
    """The events of a watch, as they arrive."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response, self.protobuf = response, _is_protobuf(response)
        self.raw = _raw(response)
        """What the chunks are read from, without urllib3 between (docs/decisions.md, "A watch is read under urllib3"). None:
        read by urllib3."""

    def events(self) -> Iterator[list[Answer]]:
        """Whole ones. Ends when the server ends; raises StoreUnavailable when the connection breaks."""
        rest, cut = b"", _frames if self.protobuf else _lines
        # (not without a limit: a chunk is then taken whole, however large it says it is)
        pieces = self._response.stream(1 << 16, decode_content=True) if self.raw is None else _pieces(self.raw)
        try:
            for piece in pieces:
                bodies, rest = cut(rest + piece if rest else piece)
                if len(rest) > LARGEST_EVENT:
                    raise ValueError(f"an event of more than {LARGEST_EVENT} bytes")
                if bodies:
                    yield [Answer(body, self.protobuf) for body in bodies]
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # ValueError, AttributeError: what http.client says when its socket is shut down under it
            raise StoreUnavailable(f"the watch broke: {_words(error)}") from error

    def end(self) -> None:
        """Wake the reader: its `events` ends or raises."""
        try:
            self._response.shutdown()
        except (OSError, ValueError, AttributeError, RuntimeError):
            return

    def close(self) -> None:
        """Give the connection back; called by the reader alone."""
        self._response.close()


def _raw(response: urllib3.BaseHTTPResponse) -> io.BufferedIOBase | None:
    """The socket's reader under an answer that comes in plain chunks. tests/store/test_kube_chunks.py fails when a new
    urllib3 keeps it elsewhere (the agent works on, slower)."""
    plain = response.headers.get("transfer-encoding") == "chunked" and "content-encoding" not in response.headers
    reader = getattr(getattr(response, "_fp", None), "fp", None)
    return reader if plain and isinstance(reader, io.BufferedIOBase) else None


def _pieces(reader: io.BufferedIOBase) -> Iterator[bytes]:
    """What came in chunks (RFC 9112, 7.1), all of one receipt together: an event's length and the event are two. Raises
    ValueError where they are none, or end before the last."""
    kept = b""
    while True:
        more = reader.read1(1 << 16)
        if not more:
            raise ValueError("the connection ended within an answer")
        kept += more
        pieces: list[bytes] = []
        at, last = 0, False
        while True:
            line = kept.find(b"\r\n", at, at + _CHUNK_LINE)
            if line < 0:
                if len(kept) >= at + _CHUNK_LINE:
                    raise ValueError("no length of a chunk")
                break
            size = int(kept[at:line].partition(b";")[0], 16)
            if not 0 <= size <= LARGEST_EVENT:
                raise ValueError(f"a chunk of {size} bytes")
            if size == 0:  # trailers may follow, which nobody reads
                last = True
                break
            if len(kept) < line + size + 4:
                break
            if kept[line + 2 + size : line + size + 4] != b"\r\n":
                raise ValueError("a chunk that does not end where it should")
            pieces.append(kept[line + 2 : line + 2 + size])
            at = line + size + 4
        kept = kept[at:]
        if pieces:
            yield b"".join(pieces)
        if last:
            return


def _lines(data: bytes) -> tuple[list[bytes], bytes]:
    """JSON's events end with a newline."""
    *lines, rest = data.split(b"\n")
    return lines, rest


def _frames(data: bytes) -> tuple[list[bytes], bytes]:
    """Protobuf's stand behind their length in four bytes (apimachinery pkg/util/framer)."""
    bodies: list[bytes] = []
    at = 0
    while len(data) >= at + 4:
        size = int.from_bytes(data[at : at + 4], "big")
        if size > LARGEST_EVENT:
            raise ValueError(f"an event of {size} bytes")
        if len(data) < at + 4 + size:
            break
        bodies.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return bodies, data[at:]


def _is_protobuf(response: urllib3.BaseHTTPResponse) -> bool:
    return response.headers.get("content-type", "").startswith(PROTOBUF)


class KubeClient:
    """Requests as this agent. Any thread may call; each call is one request."""

    def __init__(self, settings: KubeSettings) -> None:
        """Raises KubeSettingsError when nothing says where the API is."""
        if not settings.api_url and not settings.kubeconfig and not os.environ.get(SERVICE_HOST):
            raise KubeSettingsError(
                f"--kube-subnet-mgr: not in a pod ({SERVICE_HOST} is not set); set --kubeconfig-file or --kube-api-url"
            )
        self._settings = settings
        self._lock, self._connecting = threading.Lock(), threading.Lock()
        """The second is held while credentials are read, which a kubeconfig's plugin may do for as long as it likes."""
        self._api: Any = None
        self._kept: tuple[Any, dict[str, str], float] = (None, {}, 0.0)
        self._ending = False
        self._made_of: dict[str, Stamp | None] = {}
        """The files that the connection was made by, and what shows whether they were written since."""

    @property
    def place(self) -> str:
        """The API server, for messages."""
        if self._api is not None:
            return shown(str(self._api.configuration.host))
        return self._settings.api_url or self._settings.kubeconfig or f"https://{os.environ.get(SERVICE_HOST)}"

    def get(self, path: str) -> Any:
        """A JSON answer. Raises ApiError, StoreUnavailable."""
        return self._json(self._whole("GET", path, {}, {"Accept": "application/json"}, None, TIMEOUT_S).data)

    def ask(self, path: str, query: Mapping[str, str | int], accept: str, timeout_s: float = TIMEOUT_S) -> Answer:
        """An answer in one of the forms accepted. Raises ApiError, AnswerTooLarge, StoreUnavailable."""
        return self._whole("GET", path, query, {"Accept": accept}, None, timeout_s)

    def patch(self, path: str, body: object) -> Any:
        """A strategic merge patch. Raises ApiError, StoreUnavailable."""
        headers = {"Accept": "application/json", "Content-Type": "application/strategic-merge-patch+json"}
        return self._json(self._whole("PATCH", path, {}, headers, json.dumps(body), TIMEOUT_S).data)

    def post(self, path: str, body: object) -> Any:
        """Create an object. Raises ApiError, StoreUnavailable."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        return self._json(self._whole("POST", path, {}, headers, json.dumps(body), TIMEOUT_S).data)

    def watch(self, path: str, query: Mapping[str, str | int], accept: str) -> Stream:
        """Open a watch: the answer must begin in time, what follows may take as long as it likes (who waits for it must
        doubt it). Raises ApiError, StoreUnavailable."""

        def ask(way: _Way) -> urllib3.BaseHTTPResponse:
            with self._limited(ANSWER_S):
                return self._request(way, "GET", path, query, {"Accept": accept}, None, TIMEOUT_S)

        response = self._by_some_way(ask)
        sock = getattr(getattr(response, "connection", None), "sock", None)
        if sock is not None:
            sock.settimeout(None)
        return Stream(response)

    def reconnect(self) -> None:
        """Use no connection made before."""
        with self._lock:
            self._drop()

    def close(self) -> None:
        """No request from now on."""
        self._ending = True
        self.reconnect()

    @property
    def closed(self) -> bool:
        """Whether no request is made any more."""
        return self._ending

    def _whole(
        self, method: str, path: str, query: Mapping[str, str | int], headers: dict[str, str], body: str | None,
        read_s: float,
    ) -> Answer:  # fmt: skip
        """With its body. A larger answer than may be is an AnswerTooLarge."""

        def ask(way: _Way) -> Answer:
            with self._limited(min(ANSWER_S, 2 * read_s)):
                response = self._request(way, method, path, query, headers, body, read_s)
                return Answer(answer.whole(response), _is_protobuf(response))

        return self._by_some_way(ask)

    def _by_some_way(self, ask: Callable[[_Way], _A]) -> _A:
        """Ask; once more where the credentials are refused, and others stand there by now: the file has the next token.
        Raises ApiError, StoreUnavailable."""
        way = self._way()
        try:
            return ask(way)
        except ApiError as refused:
            if refused.code != 401 or (next_way := self._way())[1] == way[1]:
                raise
        return ask(next_way)

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """What does not end in time, or breaks within an answer, is a store that is away."""
        try:
            with answer.within(seconds):
                yield
        except answer.AnswerTooLarge:
            raise
        except (answer.AnswerRefused, urllib3.exceptions.HTTPError, OSError) as error:
            raise StoreUnavailable(f"{self.place}: {_words(error)}") from error

    def _way(self) -> _Way:
        """The client, and its credentials: a kubeconfig's plugin may take as long as it likes for these, so that no answer's
        deadline has begun. Raises StoreUnavailable."""
        if self._ending:
            raise StoreUnavailable("the agent is stopping")
        api = self._connected()
        try:
            return api, self._credentials(api)
        except Exception as error:  # the client's own: a token file that is missing or empty just now
            self.reconnect()
            raise StoreUnavailable(f"credentials for {api.configuration.host}: {_words(error)}") from error

    def _request(
        self, way: _Way, method: str, path: str, query: Mapping[str, str | int],
        headers: dict[str, str], body: str | None, read_s: float,
    ) -> urllib3.BaseHTTPResponse:  # fmt: skip
        api, credentials = way
        url = f"{api.configuration.host.rstrip('/')}{path}{'?' if query else ''}{urlencode(query)}"
        try:
            response: urllib3.BaseHTTPResponse = api.pool_manager.urlopen(
                method, url, headers={**credentials, **headers}, body=body, preload_content=False,
                retries=False, redirect=False, timeout=urllib3.Timeout(connect=4.0, read=read_s),
            )  # fmt: skip
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if self._made_of != {path: stamp(path) for path in self._made_of}:
                self.reconnect()  # a kubeconfig may name another server by now, or another authority
            raise StoreUnavailable(f"{api.configuration.host}: {_words(error)}") from error
        answer.check_form(response)
        if response.status // 100 == 2:
            return response
        message, about = _refusal(response)
        if response.status == 401:
            self.reconnect()  # the token may have been rotated: read everything again
        raise ApiError(
            response.status, f"{api.configuration.host}: {method} {path}: {response.status} {message}", about
        )

    def _credentials(self, api: Any) -> dict[str, str]:
        """What the kubernetes client adds to a request; asked for anew after a while, because a kubeconfig's goes through
        all of the environment (a fifth of a request's CPU). A token file is read by it each minute."""
        of, headers, until = self._kept
        now = time.monotonic()
        if of is not api or now >= until:
            said = {setting["key"]: setting["value"] for setting in api.configuration.auth_settings().values()}
            headers = {"User-Agent": AGENT, **said}
            self._kept = api, headers, now + CREDENTIALS_S
        return headers

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StoreUnavailable(f"{self.place}: answered with something that is not JSON: {error}") from error

    def _connected(self) -> Any:
        with self._connecting:
            api = self._api
            if api is None:
                api = self._connect()
                with self._lock:
                    self._api = api
            return api

    def _connect(self) -> Any:
        from kubernetes.client.configuration import Configuration
        from kubernetes.client.rest import RESTClientObject

        settings, made = self._settings, Configuration()
        read = {settings.kubeconfig: stamp(settings.kubeconfig)} if settings.kubeconfig else {}
        try:
            if settings.kubeconfig:
                from kubernetes.config import kube_config as loader

                load: Any = loader.load_kube_config  # untyped
                load(settings.kubeconfig, client_configuration=made, persist_config=False)
            elif not settings.api_url:
                from kubernetes.config import incluster_config

                load = incluster_config.load_incluster_config
                load(made)
        except Exception as error:  # ConfigException, FileNotFoundError, YAML's: whatever stands in that file
            where = f"--kubeconfig-file: {settings.kubeconfig}" if settings.kubeconfig else "service account"
            raise StoreUnavailable(f"{where}: {_words(error)}") from error
        self._made_of = read | ({made.ssl_ca_cert: stamp(made.ssl_ca_cert)} if made.ssl_ca_cert else {})
        if settings.api_url:
            made.host = settings.api_url
        made.socket_options = _KEEPALIVE
        made.retries = None
        rest = RESTClientObject(made)
        rest.pool_manager.pool_classes_by_scheme = answer.POOLS
        return rest

    def _drop(self) -> None:
        if self._api is not None:
            self._api.pool_manager.clear()
        self._api = None


def _words(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        error = reason
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refusal(response: urllib3.BaseHTTPResponse) -> tuple[str, str]:
    """A Status's message, and what it says was not found: `nodes/node1`."""
    data = b""
    try:
        data = response.read(_REFUSAL, decode_content=False)
        message, about = Answer(data, _is_protobuf(response)).refusal()
    except (*MALFORMED, OSError, urllib3.exceptions.HTTPError):
        message = about = ""
    if len(data) < _REFUSAL:
        response.release_conn()
    else:
        response.close()  # the rest of it would be taken for the next answer
    return " ".join(message.split())[:300] or response.reason or "", about
