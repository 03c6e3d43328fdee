"""etcd v3 by etcd3's messages and stubs: failover, deadlines, authentication, TLS. Nothing else knows gRPC.

etcd3's own client and watcher are not used: the watcher spins while etcd is away and loses its watches, the client
ignores `limit` and `revision` and cannot authenticate without TLS (docs/dependencies.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lease.endpoint import LIKE, endpoint_parts, shown
from lease.etcd import protobuf as etcd_protobuf
from lease.etcd.channel import TOO_LARGE, Call, Channel, Method, RpcError
from lease.store import LeaseExpired, StoreUnavailable

if TYPE_CHECKING:
    import ssl

etcd_protobuf.load()

from etcd3 import etcdrpc as rpc  # noqa: E402

__all__ = ["EtcdClient", "EtcdSettings", "EtcdSettingsError", "rpc"]

WHOLE_LIST_S = 120.0
"""All pages of a list; more is no etcd's."""
LAST_REVISION = (1 << 63) - 1
"""After which none can be asked for."""
CALL_S, LIST_S = 5.0, 12.0
"""Deadlines: of one call, and of a list (100,000 records take some 2 s)."""
LARGEST_PAGE, SMALLER = 1 << 22, 4
"""Bytes of a page of a list, of which 1,000 records have 0.3 million; one that has more is asked for again, with so many
times fewer keys."""
PROBE_AFTER_S, PROBE_ANSWER_S = 5.0, 9.0
"""A watch silent for the first is probed, and given up when that is not answered within the second: 14 s in all."""
FIRST_ANSWER_S, ASKED_S = 4.0, 5.0
"""Instead of the second, where nobody knows yet whether probes are answered at all: then another question is asked."""
_PROGRESS_REQUEST = b"\x1a\x00"
"""WatchRequest{progress_request{}}, which etcd3's old messages lack; answered at once since etcd 3.4."""
_AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN", "UNIMPLEMENTED")
"""Not available from this endpoint, or it is not etcd; CANCELLED: another thread gave the connection up."""


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
    """One watch."""

    def __init__(self, watch: Method, call: Call, where: str, ask: Callable[[], None]) -> None:
        """ask: whether the server answers at all. Raises StoreUnavailable."""
        self._watch, self._call, self._where, self._ask = watch, call, where, ask

    @property
    def channel(self) -> Channel:
        """The connection it runs over."""
        return self._call.channel

    def answers(self) -> Iterator[Any]:
        """Every WatchResponse. Raises StoreUnavailable when it ends or falls silent."""
        probed = False
        answers_probes: bool | None = None
        """None: not known yet. etcd's grpc-proxy answers none, and serves watches well: there another question must do."""
        while True:
            try:
                patience = PROBE_ANSWER_S if answers_probes else FIRST_ANSWER_S
                answer = self._watch.next(self._call, patience if probed else PROBE_AFTER_S)
                if answer is None:
                    raise StoreUnavailable(f"{self._where}: the watch was closed by the server")
            except RpcError as error:
                if error.code != "DEADLINE_EXCEEDED":
                    raise StoreUnavailable(f"{self._where}: the watch ended: {_error_text(error)}") from error
                if probed and answers_probes:
                    silent = PROBE_AFTER_S + PROBE_ANSWER_S
                    raise StoreUnavailable(f"{self._where}: silent for {silent:.0f} s") from error
                if probed or answers_probes is False:
                    probed = answers_probes = False
                    self._ask()
                else:
                    probed = True
                    self._probe()
                continue
            if probed:
                answers_probes, probed = True, False
            yield answer

    def _probe(self) -> None:
        try:
            self._call.send(_PROGRESS_REQUEST)
        except RpcError as error:
            raise StoreUnavailable(f"{self._where}: the watch ended: {_error_text(error)}") from error

    def cancel(self) -> None:
        """End it."""
        self._call.cancel()


class EtcdClient:
    """Calls to whichever endpoint answers. Safe for several threads."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Raises EtcdSettingsError."""
        self._settings = settings
        if not settings.endpoints:
            raise EtcdSettingsError("etcd-endpoints: empty; give one like http://127.0.0.1:2379")
        self._targets = [_target(endpoint) for endpoint in settings.endpoints]
        if any(tls for *_, tls in self._targets):
            _tls(settings)  # refused now rather than at the first call
        self._dialing = threading.Lock()
        """Held while a connection is made, so that there is one."""
        self._lock = threading.Lock()
        self._at = 0
        self._channel: Channel | None = None
        self._times_given_up = 0
        self._token = ""
        self._closed = False

    @property
    def endpoint(self) -> str:
        """The endpoint in use."""
        return self._settings.endpoints[self._at]

    # --- calls -----------------------------------------------------------------------------------------------------

    def pages(self, key: bytes, range_end: bytes, size: int, most: int, later_than: int = 0) -> Iterator[Any]:
        """A range at one revision, linearizable, in pages of `size` keys, or larger ones where it would be more than `most`;
        smaller ones where a page has more than LARGEST_PAGE bytes. The next is on its way while one is read. A key whose
        value is larger than that comes with LARGEST_PAGE zero bytes in its place. later_than: only keys written after that
        revision. Raises StoreUnavailable."""
        request = rpc.RangeRequest(
            key=key, range_end=range_end, limit=size, min_mod_revision=later_than + 1 if later_than else 0
        )
        page = self._call(self._first_page, request, LIST_S)
        if not 0 < page.header.revision < LAST_REVISION or page.count < 0:
            raise StoreUnavailable(f"{self.endpoint}: revision {page.header.revision}, {page.count} keys: not etcd")
        request.revision, usual = int(page.header.revision), max(size, -(-int(page.count) // most))
        given_up, left = time.monotonic() + WHOLE_LIST_S, int(page.count) - len(page.kvs)
        while page.more and page.kvs:
            if left < 0 or not request.key <= page.kvs[-1].key < (range_end or key + b"\0"):
                raise StoreUnavailable(
                    f"{self.endpoint}: a list with keys again, of others or more than it has: not etcd"
                )
            if time.monotonic() > given_up:
                raise StoreUnavailable(f"{self.endpoint}: a list that takes more than {WHOLE_LIST_S:.0f} s")
            request.key = page.kvs[-1].key + b"\0"
            request.limit = usual if request.limit >= size else min(size, 2 * request.limit)
            endpoint, call = self.endpoint, None
            try:
                channel, metadata = self._connected()
                method = rpc.KVStub(channel).Range
                call = method.begin(request, LIST_S, metadata, largest=LARGEST_PAGE)
                yield page
                page = self._page(method, request, metadata, call)
                left -= len(page.kvs)
            except RpcError as error:
                if error.code in _AWAY:
                    self._next_endpoint(endpoint)
                raise StoreUnavailable(f"{endpoint}: {_error_text(error)}") from error
            except GeneratorExit:
                if call is not None:
                    call.cancel()
                raise
        yield page

    def _first_page(self, channel: Channel) -> Callable[..., Any]:
        method = rpc.KVStub(channel).Range
        return lambda request, _timeout_s, metadata: self._page(method, request, metadata)

    def _page(self, method: Method, request: Any, metadata: list[tuple[str, str]], call: Call | None = None) -> Any:
        """The page that is requested (call: it is on its way), or as much of it as fits. Raises RpcError."""
        while True:
            try:
                if call is not None:
                    return method.result(call, LIST_S)
                return method(request, LIST_S, metadata, largest=LARGEST_PAGE)
            except RpcError as error:
                if error.code != TOO_LARGE:
                    raise
            call = None
            if request.limit == 1:
                return self._without_value(method, request, metadata)
            request.limit = max(1, request.limit // SMALLER)

    def _without_value(self, method: Method, request: Any, metadata: list[tuple[str, str]]) -> Any:
        request.keys_only = True
        try:
            page = method(request, LIST_S, metadata)
        except RpcError as error:
            if error.code == TOO_LARGE:  # no single key is so long: this is no etcd
                raise RpcError("UNAVAILABLE", error.details) from error
            raise
        finally:
            request.keys_only = False
        for kv in page.kvs:
            kv.value = bytes(LARGEST_PAGE)
        return page

    def txn(self, compare: list[Any], success: list[Any], failure: list[Any] | None = None) -> Any:
        """One transaction."""
        request = rpc.TxnRequest(compare=compare, success=success, failure=failure or [])
        return self._call(lambda channel: rpc.KVStub(channel).Txn, request)

    def grant(self, ttl_s: int) -> int:
        """A new etcd lease; its ID."""
        answer = self._call(lambda channel: rpc.LeaseStub(channel).LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_s))
        if answer.ID <= 0:  # a record under none would never go
            raise StoreUnavailable(f"{self.endpoint}: gives an etcd lease {answer.ID}: not etcd")
        return int(answer.ID)

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
        request = rpc.LeaseKeepAliveRequest(ID=lease_id)
        answer = self._call(lambda channel: rpc.LeaseStub(channel).LeaseKeepAlive.first, request)
        if lease_id != answer.ID:
            raise StoreUnavailable(f"{self.endpoint}: answers for etcd lease {answer.ID:x}, asked for {lease_id:x}")
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
            watch = rpc.WatchStub(channel).Watch
            call = watch.begin(create, metadata=[*metadata, ("hasleader", "true")], last=False)
        except RpcError as error:
            raise StoreUnavailable(f"{self.endpoint}: {_error_text(error)}") from error

        def ask() -> None:
            request = rpc.RangeRequest(key=key, limit=1, keys_only=True)
            try:
                rpc.KVStub(channel).Range(request, ASKED_S, metadata)
            except RpcError as error:
                raise StoreUnavailable(f"{self.endpoint}: silent, also when asked: {_error_text(error)}") from error

        return WatchStream(watch, call, self.endpoint, ask)

    def forget(self, stream: WatchStream, failed: bool) -> None:
        """End a watch; when it failed, the next call goes to another endpoint over a new connection."""
        stream.cancel()
        with self._lock:
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
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.give_up("the store was closed")

    # --- how a call is made ------------------------------------------------------------------------------------------

    def _call(self, method: Callable[[Channel], Callable[..., Any]], request: Any, timeout_s: float = CALL_S) -> Any:
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
                return method(channel)(request, timeout_s, metadata)
            except RpcError as error:
                if _token_is_old(error) and self._token and not signed_in_again:
                    signed_in_again, self._token = True, ""
                    continue
                if error.code == "NOT_FOUND" and "lease" in error.details:
                    raise LeaseExpired(error.details) from error
                said.append(f"{endpoint}: {_error_text(error)}")
                if error.code not in _AWAY:
                    break  # it did answer: another member would say the same
                self._next_endpoint(endpoint)
        raise StoreUnavailable("; ".join(said))

    def _connected(self) -> tuple[Channel, list[tuple[str, str]]]:
        """The connection in use, and the metadata that signs a call. Raises RpcError."""
        with self._dialing:
            with self._lock:
                channel, times_given_up = self._channel, self._times_given_up
                (host, port, tls), closed = self._targets[self._at], self._closed
            if closed:
                raise StoreUnavailable("the store was closed")
            if channel is None or channel.broken:
                channel = Channel(host, port, self._fresh_tls() if tls else None)
                with self._lock:
                    stale = self._closed or times_given_up != self._times_given_up
                    self._channel = None if stale else channel
                if stale:  # given up while it was made: from our old address, maybe, or to an endpoint that was left
                    channel.give_up("given up")
        if self._settings.username and not self._token:
            request = rpc.AuthenticateRequest(name=self._settings.username, password=self._settings.password)
            self._token = rpc.AuthStub(channel).Authenticate(request, CALL_S).token
        return channel, [("token", self._token)] if self._token else []

    def _fresh_tls(self) -> ssl.SSLContext:
        """Read anew for each connection: certificates are rotated under a running agent."""
        try:
            return _tls(self._settings)
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
            self._times_given_up += 1
            channel, self._channel = self._channel, None
        if channel is not None:  # a watch that ran over it ends too: its owner lists and watches again
            channel.give_up("given up")


def _token_is_old(error: RpcError) -> bool:
    """A simple token ends after five minutes, and with each change of the users or roles (etcd server/auth)."""
    return error.code == "UNAUTHENTICATED" or "auth: revision" in error.details


def _error_text(error: RpcError) -> str:
    return "no answer in time" if error.code == "DEADLINE_EXCEEDED" else one_line(str(error))


def one_line(said: str) -> str:
    """What a server said, as it may stand in a message."""
    return " ".join(said[:2000].split())[:240]


def _target(endpoint: str) -> tuple[str, int, bool]:
    """Host, port, and whether it speaks TLS. `host:port` alone means http, as flannel takes it."""
    parts = endpoint_parts(endpoint)
    if parts is None:
        raise EtcdSettingsError(f"etcd-endpoints: {shown(endpoint)!r} {LIKE}")
    scheme, host, port = parts
    return host, port, scheme == "https"


def _tls(settings: EtcdSettings) -> ssl.SSLContext:
    """As Go takes the files: any certificate of the CA file is trusted, and its extensions may be those of an old CA."""
    import ssl  # 15 ms and 2 MiB, which an agent without TLS does not need

    if bool(settings.certfile) != bool(settings.keyfile):
        raise EtcdSettingsError("etcd-certfile and etcd-keyfile: give both or neither")
    files = {"etcd-cafile": settings.cafile, "etcd-certfile": settings.certfile, "etcd-keyfile": settings.keyfile}
    for flag, path in files.items():
        try:
            if path:
                with open(path, "rb"):
                    pass
        except OSError as error:
            raise EtcdSettingsError(f"{flag}: {path}: {error.strerror}") from error
    used = f"etcd-cafile {settings.cafile or '(none: the system has its own)'}"
    try:
        context = ssl.create_default_context(cafile=settings.cafile or None)
        if settings.certfile:
            used = f"etcd-certfile {settings.certfile}, etcd-keyfile {settings.keyfile}"
            context.load_cert_chain(settings.certfile, settings.keyfile, password="")
    except OSError as error:  # ssl.SSLError is one
        raise EtcdSettingsError(f"{used}: not usable: {error}") from error
    context.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    return context
