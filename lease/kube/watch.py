"""Watching a resource of the Kubernetes API: listed in pages, watched with bookmarks, doubted when silent, listed again.

One way for all resources. stores/kubernetes.py reads Nodes with it, in forms of its own that save CPU at 5,000 Nodes;
`Objects` is the plain form for any other (Pods, Namespaces, policies), turned by the Feed of lease/store.py, which has the
back-off.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

from lease.kube.answer import AnswerTooLarge
from lease.kube.changes import Changed, Listed, Resource, Unusable
from lease.kube.client import ApiError, KubeClient, Stream
from lease.kube.objects import MALFORMED, Answer
from lease.store import StoreUnavailable

SILENT_S, PROBE_S = 8.0, 5.0
"""A watch silent for so long is doubted: is the server there at all? Together below 15 s."""
NO_BOOKMARK_S = 100.0
"""Bookmarks come every minute; without them (a restored etcd) the list is read again."""
MANY_PER_S, PAUSE_S, WAITED_S = 50, 0.1, 0.0005
"""When so many events come, they are read in lumps: a wake for each would cost more than the events."""
PAGE = 100
"""Objects asked for at once: what a page takes is never given back, and larger ones are no faster."""
SMALLER = 4
"""So many times fewer are asked for where a page is too large."""
JSON = "application/json"


class SomePage(Protocol):
    """A part of a list."""

    @property
    def token(self) -> str:
        """Asks for the next, "" at its end."""


_P = TypeVar("_P", bound=SomePage)


class Watch:
    """The way to one resource. `pages` and `events` may be called again and again, by one thread."""

    def __init__(self, client: KubeClient, path: str, probe: Callable[[], None]) -> None:
        """path: `/api/v1/nodes`. probe: asks the server for anything. Raises StoreUnavailable when it does not answer."""
        self._client, self._path, self._probe = client, path, probe
        self._stream: Stream | None = None
        self.restored = False
        """Whether etcd may have been restored from a backup under the last watch: what is known is worth nothing."""

    def pages(self, accept: str, limit: int, decode: Callable[[Answer], _P]) -> Iterator[_P]:
        """A list, page by page. Without a resourceVersion: with it, `limit` would be ignored. Raises StoreUnavailable."""
        query: dict[str, str | int] = {"limit": limit}
        at_once = limit
        while True:
            query["limit"] = at_once
            try:
                with answers_of(self._client.place):
                    page = decode(self._client.ask(self._path, query, accept))
            except AnswerTooLarge as error:
                if at_once == 1:
                    raise StoreUnavailable(f"{self._client.place}: {error}") from error
                at_once = max(1, at_once // SMALLER)
                continue
            yield page
            if not page.token:
                return
            at_once = min(limit, 2 * at_once)
            query["continue"] = page.token

    def events(self, version: str, accept: str) -> Iterator[list[Answer]]:
        """What comes after a version, some events at a time, until the server ends the watch. Raises StoreUnavailable."""
        query: dict[str, str | int] = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": random.randint(300, 600),  # noqa: S311 (spreads load, guards nothing)
        }
        place = self._client.place
        stream = self._client.watch(self._path, query, accept)
        self._stream, opened = stream, time.monotonic()
        if self._client.closed:  # while it was opened
            stream.end()
        doubts, pace = _Doubts(stream, self._probe), _Pace()
        try:
            doubts.start()
        except RuntimeError as error:  # at the limit of what the container may have
            stream.end()
            raise StoreUnavailable(f"{place}: no thread to watch with: {error}") from error
        try:
            for events in stream.events():
                doubts.heard()
                pace.came(len(events))
                yield events
                pace.rest()
        except StoreUnavailable as error:
            raise StoreUnavailable(f"{place}: {doubts.why or error}") from error
        finally:
            self.restored = doubts.restored
            doubts.stop()
            stream.close()
        if doubts.why:
            raise StoreUnavailable(f"{place}: {doubts.why}")
        if time.monotonic() - opened < 1.0:
            raise StoreUnavailable(f"{place}: ends the watch as soon as it is opened")

    def end(self) -> None:
        """Wake the reader of a watch that is open; for any thread."""
        if self._stream is not None:
            self._stream.end()


class _Doubts(threading.Thread):
    """Ends a watch whose server is gone: frozen, or silent for longer than bookmarks are apart."""

    def __init__(self, stream: Stream, probe: Callable[[], None]) -> None:
        super().__init__(name="watch-doubts", daemon=True)
        self._stream, self._probe = stream, probe
        self._heard = self._answered = time.monotonic()
        self._ending = threading.Event()
        self.why = ""
        self.restored = False

    def heard(self) -> None:
        """Something came."""
        self._heard = time.monotonic()

    def stop(self) -> None:
        """The watch ended."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(1.0):
            now = time.monotonic()
            if now - self._heard > NO_BOOKMARK_S:
                self.restored = True
                self.why = f"no event and no bookmark for {NO_BOOKMARK_S:.0f} s; the list is read again"
            elif now - max(self._heard, self._answered) > SILENT_S:
                try:
                    self._probe()
                    self._answered = time.monotonic()
                except StoreUnavailable as error:
                    self.why = f"the watch is silent and the server does not answer: {error}"
            if self.why:
                self._stream.end()
                return


class _Pace:
    """Rests when many events come, so that those of a tenth of a second are read with one wake."""

    def __init__(self) -> None:
        self._since = self._asked = time.monotonic()
        self._count, self._many, self._waited = 0, False, False

    def came(self, events: int) -> None:
        """So many were read."""
        now = time.monotonic()
        self._waited = now - self._asked > WAITED_S
        self._count += events
        if now - self._since >= 0.5:
            self._many = self._count > MANY_PER_S * (now - self._since)
            self._since, self._count = now, 0

    def rest(self) -> None:
        """They were dealt with. While others wait already there is no rest."""
        if self._many and self._waited:
            time.sleep(PAUSE_S)
        self._asked = time.monotonic()


@contextmanager
def answers_of(place: str) -> Iterator[None]:
    """An answer that has not the form it must have (a proxy's, a broken server's) is no answer. Raises StoreUnavailable."""
    try:
        yield
    except MALFORMED as error:
        raise StoreUnavailable(f"{place}: not an answer of this API: {error!r}") from error


def revision(version: str) -> int:
    """A resourceVersion for messages and order; it is opaque, though every server writes a number."""
    return int(version) if version.isdecimal() and len(version) < 20 else 0


# --- any resource, plainly


class _JsonPage(NamedTuple):
    version: str
    token: str
    items: list[Mapping[str, Any]]


class Objects:
    """A resource as lists and changes, for a Feed."""

    def __init__(self, client: KubeClient, resource: Resource) -> None:
        self._client, self._resource = client, resource
        self._watch = Watch(client, resource.path, self._probe)
        self._version = ""

    def move(self, path: str) -> None:
        """It is found there; not while it is watched."""
        if path != self._resource.path:
            self._resource = self._resource._replace(path=path)
            self._watch = Watch(self._client, path, self._probe)

    def read(self) -> Listed:
        """All of them. Raises StoreUnavailable."""
        items: dict[str, Any] = {}
        version = ""
        for page in self._watch.pages(JSON, PAGE, _json_page):
            version = page.version
            for item in page.items:
                with answers_of(self._client.place):
                    items[_key(item)] = self._decoded(item)
        self._version = version
        return Listed(self._resource.name, revision(version), items)

    def watch(self, after: int) -> Iterator[Changed]:
        """What changes after the last list, until the history is gone or the server. Raises StoreUnavailable."""
        del after  # the list before says it, in the server's own words
        while True:
            for events in self._watch.events(self._version, JSON):
                items: dict[str, Any] = {}
                with answers_of(self._client.place):
                    for answer in events:
                        self._take(json.loads(answer.data), items)
                if items:
                    yield Changed(self._resource.name, revision(self._version), items)

    def close(self) -> None:
        """End every call under way; none follows."""
        self._client.close()
        self._watch.end()

    def _take(self, event: Mapping[str, Any], items: dict[str, Any]) -> None:
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            raise StoreUnavailable(f"{item.get('code')} {item.get('message')}; the list is read again")
        self._version = str(item["metadata"]["resourceVersion"])
        if kind != "BOOKMARK":
            items[_key(item)] = None if kind == "DELETED" else self._decoded(item)

    def _decoded(self, item: Mapping[str, Any]) -> Any:
        """One that somebody wrote wrongly costs itself alone."""
        try:
            return self._resource.decode(item)
        except MALFORMED as error:
            return Unusable(str(error) or repr(error))

    def _probe(self) -> None:
        """Does the server answer? One object is enough; with a resourceVersion, `limit` would be ignored."""
        try:
            self._client.ask(self._resource.path, {"limit": 1}, JSON, timeout_s=PROBE_S)
        except ApiError:
            return


def _json_page(answer: Answer) -> _JsonPage:
    page = json.loads(answer.data)
    meta = page["metadata"]
    return _JsonPage(str(meta["resourceVersion"]), str(meta.get("continue") or ""), list(page["items"] or []))


def _key(item: Mapping[str, Any]) -> str:
    meta = item["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta["name"])
