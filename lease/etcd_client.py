"""etcd v3 by etcd3's messages and stubs: failover, deadlines, authentication, TLS. Nothing else knows gRPC.

etcd3's own client and watcher are not used: the watcher spins while etcd is away and loses its watches, the client
ignores `limit` and `revision` and cannot authenticate without TLS (docs/dependencies.md).
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lease import etcd_protobuf
from lease.store import LeaseExpired, StoreUnavailable

etcd_protobuf.load()

import grpc  # noqa: E402
from etcd3 import etcdrpc as rpc  # noqa: E402

__all__ = ["EtcdClient", "EtcdSettings", "EtcdSettingsError", "rpc"]

CALL_S, LIST_S = 5.0, 12.0
"""Deadlines: of one call, and of a list (100,000 records take some 2 s)."""
PROBE_AFTER_S, PROBE_ANSWER_S = 6.0, 5.0
"""A watch silent for the first is probed, and given up when that is not answered within the second: 11 s in all."""
_ENDPOINT = re.compile(
    r"(?:(?P<scheme>https?)://)?(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<host>[^\s/?#@:\[\]]+))(?::(?P<port>\d{1,5}))?/?",
    re.ASCII | re.IGNORECASE,
)
_PROGRESS_REQUEST = b"\x1a\x00"
"""WatchRequest{progress_request{}}, which etcd3's old messages lack; answered at once since etcd 3.4."""
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""Not had from this endpoint; CANCELLED: another thread gave the connection up."""
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
    # A pool of its own for each channel: one given up as frozen must not be found again by its successor.
    ("grpc.use_local_subchannel_pool", 1),
)


class EtcdSettingsError(ValueError):
    """An endpoint or a TLS file that cannot be used: says which, and what is allowed."""


class EtcdSettings(NamedTuple):
    """How to reach etcd. endpoints: `http://host:port` or `https://...`; cafile alone is enough for TLS."""

    endpoints: tuple[str, ...]
    cafile: str = ""
    certfile: str = ""
    keyfile: str = ""
    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"EtcdSettings({', '.join(self.endpoints)}, and no password here)"


class WatchStream:
    """One watch. A thread of its own reads it, so that silence can be noticed and ended."""

    def __init__(self, call_watch: Callable[[Iterator[Any]], Any], create: Any, where: str) -> None:
        self._where = where
        self.channel: Any = None
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests.put(create)
        self._call = call_watch(iter(self._requests.get, None))
        threading.Thread(target=self._read, name="watch-reader", daemon=True).start()

    def _read(self) -> None:
        try:
            for answer in self._call:
                self._answers.put(answer)
            self._answers.put(StoreUnavailable(f"{self._where}: the watch was closed by the server"))
        except grpc.RpcError as error:
            self._answers.put(StoreUnavailable(f"{self._where}: the watch ended: {_said(error)}"))
        except Exception as error:  # never a reader that is silently gone
            self._answers.put(StoreUnavailable(f"{self._where}: the watch ended: {error!r}"))

    def answers(self) -> Iterator[Any]:
        """Every WatchResponse. Raises StoreUnavailable when it ends or falls silent."""
        probed = False
        while True:
            try:
                answer = self._answers.get(timeout=PROBE_ANSWER_S if probed else PROBE_AFTER_S)
            except queue.Empty:
                if probed:
                    raise StoreUnavailable(
                        f"{self._where}: silent for {PROBE_AFTER_S + PROBE_ANSWER_S:.0f} s"
                    ) from None
                probed = True
                self._requests.put(rpc.WatchRequest.FromString(_PROGRESS_REQUEST))
                continue
            probed = False
            if isinstance(answer, StoreUnavailable):
                raise answer
            yield answer

    def cancel(self) -> None:
        """End it and both its threads."""
        self._call.cancel()
        self._requests.put(None)


class EtcdClient:
    """Calls to whichever endpoint answers. Safe for several threads."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Raises EtcdSettingsError."""
        self._settings = settings
        if not settings.endpoints:
            raise EtcdSettingsError("etcd-endpoints: empty; give one like http://127.0.0.1:2379")
        self._targets = [_target(endpoint) for endpoint in settings.endpoints]
        if any(tls for _, tls in self._targets):
            _credentials(settings)  # refused now rather than at the first call
        self._lock = threading.Lock()
        self._at = 0
        self._channel: Any = None
        self._token = ""
        self._watches: set[WatchStream] = set()
        self._closed = False

    @property
    def endpoint(self) -> str:
        """The endpoint in use."""
        return self._settings.endpoints[self._at]

    # --- calls -----------------------------------------------------------------------------------------------------

    def range(self, key: bytes, range_end: bytes = b"", limit: int = 0, revision: int = 0, later_than: int = 0) -> Any:
        """One linearizable range request. limit: of keys, 0 for all; revision: as of then, 0 for now; later_than: only keys
        written after that revision."""
        request = rpc.RangeRequest(
            key=key, range_end=range_end, limit=limit, revision=revision,
            min_mod_revision=later_than + 1 if later_than else 0,
        )  # fmt: skip
        return self._call(lambda channel: rpc.KVStub(channel).Range, request, LIST_S)

    def pages(self, key: bytes, range_end: bytes, size: int, most: int) -> Iterator[Any]:
        """A range at one revision in pages of `size` keys, or larger ones where it would be more than `most`; the next is on
        its way while one is looked at. Raises StoreUnavailable."""
        page = self.range(key, range_end, size)
        revision, size = int(page.header.revision), max(size, -(-int(page.count) // most))
        while page.more:
            start = page.kvs[-1].key + b"\0"
            request = rpc.RangeRequest(key=start, range_end=range_end, limit=size, revision=revision)
            endpoint = self.endpoint
            try:
                channel, metadata = self._connected()
                ahead = rpc.KVStub(channel).Range.future(request, timeout=LIST_S, metadata=metadata)
                yield page
                page = ahead.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                if not isinstance(error, grpc.RpcError) or error.code() in _AWAY:
                    self._next_endpoint(endpoint)
                said = _said(error) if isinstance(error, grpc.RpcError) else "the list was broken off"
                raise StoreUnavailable(f"{endpoint}: {said}") from error
            except ValueError as error:  # another thread gave the connection up meanwhile
                raise StoreUnavailable(f"{endpoint}: {error}") from error
        yield page

    def txn(self, compare: list[Any], success: list[Any], failure: list[Any] | None = None) -> Any:
        """One transaction."""
        request = rpc.TxnRequest(compare=compare, success=success, failure=failure or [])
        return self._call(lambda channel: rpc.KVStub(channel).Txn, request)

    def grant(self, ttl_s: int) -> int:
        """A new etcd lease; its ID."""
        return int(self._call(lambda channel: rpc.LeaseStub(channel).LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_s)).ID)

    def revoke(self, lease_id: int) -> None:
        """End an etcd lease, and every key on it."""
        self._call(lambda channel: rpc.LeaseStub(channel).LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))

    def time_to_live(self, lease_id: int) -> tuple[int, int]:
        """Seconds left and seconds granted. Raises LeaseExpired."""
        request = rpc.LeaseTimeToLiveRequest(ID=lease_id)
        answer = self._call(lambda channel: rpc.LeaseStub(channel).LeaseTimeToLive, request)
        if answer.TTL <= 0:
            raise LeaseExpired(f"etcd lease {lease_id:x} is gone")
        return int(answer.TTL), int(answer.grantedTTL)

    def keep_alive(self, lease_id: int) -> int:
        """Renew once; seconds it now has. Raises LeaseExpired (etcd says TTL 0 without an error then)."""

        def once(channel: Any) -> Callable[..., Any]:
            stream = rpc.LeaseStub(channel).LeaseKeepAlive
            return lambda request, **options: next(iter(stream(iter([request]), **options)))

        answer = self._call(once, rpc.LeaseKeepAliveRequest(ID=lease_id))
        if answer.TTL <= 0:
            raise LeaseExpired(f"etcd lease {lease_id:x} is gone")
        return int(answer.TTL)

    def watch(self, key: bytes, range_end: bytes, start_revision: int) -> WatchStream:
        """A watch on a range; ended by `forget`. It demands a leader, so that a cut-off member ends it."""
        create = rpc.WatchRequest(
            create_request=rpc.WatchCreateRequest(key=key, range_end=range_end, start_revision=start_revision)
        )
        try:
            channel, metadata = self._connected()
        except grpc.RpcError as error:
            raise StoreUnavailable(f"{self.endpoint}: signing in: {_said(error)}") from error
        metadata = [*metadata, ("hasleader", "true")]
        try:
            stream = WatchStream(
                lambda requests: rpc.WatchStub(channel).Watch(requests, metadata=metadata), create, self.endpoint
            )
        except ValueError as error:  # another thread gave the connection up meanwhile
            raise StoreUnavailable(f"{self.endpoint}: {error}") from error
        stream.channel = channel
        with self._lock:
            self._watches.add(stream)
            closed = self._closed
        if closed:
            stream.cancel()
        return stream

    def forget(self, stream: WatchStream, failed: bool) -> None:
        """End a watch; when it failed, the next call goes to another endpoint over a new connection."""
        stream.cancel()
        with self._lock:
            self._watches.discard(stream)
            in_use = self._channel is stream.channel
        if failed and in_use:
            self._next_endpoint()

    def reconnect(self) -> None:
        """Give up the connection in use, and every call on it: its local address may be gone."""
        self._give_up(self._at)

    def close(self) -> None:
        """End everything under way, in whatever thread."""
        with self._lock:
            self._closed = True
            watches, channel = tuple(self._watches), self._channel
            self._channel = None
        for stream in watches:
            stream.cancel()
        if channel is not None:
            channel.close()

    # --- how a call is made ------------------------------------------------------------------------------------------

    def _call(self, method: Callable[[Any], Callable[..., Any]], request: Any, timeout_s: float = CALL_S) -> Any:
        """Make a call, once at each endpoint at most; once more after signing in again.

        Raises:
            StoreUnavailable: names each endpoint and what it said.
        """
        said: list[str] = []
        signed_in_again = False
        while len(said) < len(self._targets):
            endpoint = self.endpoint
            try:
                channel, metadata = self._connected()
                return method(channel)(request, timeout=timeout_s, metadata=metadata)
            except StopIteration:
                said.append(f"{endpoint}: closed the stream without an answer")
                self._next_endpoint(endpoint)
            except grpc.RpcError as error:
                if _token_is_old(error) and self._token and not signed_in_again:
                    signed_in_again, self._token = True, ""
                    continue
                if error.code() == grpc.StatusCode.NOT_FOUND and "lease" in (error.details() or ""):
                    raise LeaseExpired(error.details()) from error
                said.append(f"{endpoint}: {_said(error)}")
                if error.code() not in _AWAY:
                    break  # it did answer: another member would say the same
                self._next_endpoint(endpoint)
            except ValueError as error:  # a channel closed by another thread
                said.append(f"{endpoint}: {error}")
                self._next_endpoint(endpoint)
        raise StoreUnavailable("; ".join(said))

    def _connected(self) -> tuple[Any, list[tuple[str, str]]]:
        """The channel in use, and the metadata that signs a call."""
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store was closed")
            if self._channel is None:
                target, tls = self._targets[self._at]
                self._channel = (
                    grpc.secure_channel(target, self._fresh_credentials(), options=_OPTIONS)
                    if tls
                    else grpc.insecure_channel(target, options=_OPTIONS)
                )
            channel = self._channel
        if self._settings.username and not self._token:
            request = rpc.AuthenticateRequest(name=self._settings.username, password=self._settings.password)
            self._token = rpc.AuthStub(channel).Authenticate(request, timeout=CALL_S).token
        return channel, [("token", self._token)] if self._token else []

    def _fresh_credentials(self) -> Any:
        """Read anew for each connection: certificates are rotated under a running agent."""
        try:
            return _credentials(self._settings)
        except EtcdSettingsError as error:
            raise StoreUnavailable(str(error)) from error

    def _next_endpoint(self, failed: str | None = None) -> None:
        """Leave the endpoint in use (if it still is the one that failed), and its connection."""
        with self._lock:
            if failed is not None and failed != self.endpoint:
                return
            following = (self._at + 1) % len(self._targets)
        self._give_up(following)

    def _give_up(self, following: int) -> None:
        """Close the connection in use; the next call makes one to the endpoint of that number."""
        with self._lock:
            if self._closed:
                return
            self._at = following
            channel, self._channel = self._channel, None
            watches = tuple(self._watches)
        for stream in watches:  # they ran over that connection: their owner lists and watches again
            stream.cancel()
        if channel is not None:
            channel.close()


def _token_is_old(error: grpc.RpcError) -> bool:
    """A simple token ends after five minutes, and with each change of the users or roles (etcd server/auth)."""
    return error.code() == grpc.StatusCode.UNAUTHENTICATED or "auth: revision" in (error.details() or "")


def _said(error: grpc.RpcError) -> str:
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return f"{details[:200]} ({code.name})" if details else str(code.name)


def _target(endpoint: str) -> tuple[str, bool]:
    """gRPC's name for an endpoint, and whether it speaks TLS. `host:port` alone means http, as flannel takes it."""
    parts = endpoint_parts(endpoint)
    if parts is None:
        raise EtcdSettingsError(f"etcd-endpoints: {endpoint!r} must be like http://127.0.0.1:2379 or https://host:2379")
    scheme, host, port = parts
    return f"dns:///{f'[{host}]' if ':' in host else host}:{port}", scheme == "https"


def endpoint_parts(endpoint: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of `http://host:port`, `host:port` or `host`; None where it is none of these. (urllib.parse
    would say more, and cost the agent 0.4 MiB and 5 ms for it.)"""
    found = _ENDPOINT.fullmatch(endpoint.strip())
    port = int(found["port"] or 2379) if found is not None else 0
    if found is None or not 0 < port < 65536:
        return None
    return (found["scheme"] or "http").lower(), (found["six"] or found["host"]).lower(), port


def _credentials(settings: EtcdSettings) -> Any:
    if bool(settings.certfile) != bool(settings.keyfile):
        raise EtcdSettingsError("etcd-certfile and etcd-keyfile: give both or neither")

    def read(flag: str, path: str) -> bytes | None:
        try:
            if not path:
                return None
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise EtcdSettingsError(f"{flag}: {path}: {error.strerror}") from error

    return grpc.ssl_channel_credentials(
        root_certificates=read("etcd-cafile", settings.cafile),
        private_key=read("etcd-keyfile", settings.keyfile),
        certificate_chain=read("etcd-certfile", settings.certfile),
    )
