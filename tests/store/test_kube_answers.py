"""The Kubernetes store before a server that answers oddly, or not at all: a plain HTTP server of ours on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lease.kube import client as kube_client
from lease.kube.client import KubeSettings
from lease.records.annotations import DEFAULT_PREFIX, Names
from lease.store import StoreUnavailable
from lease.stores.kubernetes import NodeGone, NodeStore

PEER = {
    "kube-subnet-manager": "true",
    "backend-type": "vxlan",
    "backend-data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}',
    "public-ip": "192.168.1.1",
}
GOOD_META = {"name": "n", "uid": "u", "resourceVersion": "5", "creationTimestamp": "2026-01-01T00:00:00Z"}


def listed(items: Any, version: Any = "5") -> dict[str, Any]:
    return {"metadata": {"resourceVersion": version}, "items": items}


class Odd:
    """Says `answer` to every GET that is no watch; to a watch `stream`, or nothing at all (None)."""

    def __init__(self) -> None:
        self.answer: Any = listed([])
        self.code = 200
        self.stream: bytes | None = b""
        self.asked = 0
        self.behind = False
        """504 to whoever names a resourceVersion, but for watches."""
        self.ending = threading.Event()
        odd = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                odd.asked += 1
                if "watch=true" in self.path:
                    if odd.stream is None:
                        odd.ending.wait(30)
                        self.close_connection = True
                        return
                    body = odd.stream
                else:
                    body = odd.answer if isinstance(odd.answer, bytes) else json.dumps(odd.answer).encode()
                late = odd.behind and "resourceVersion" in self.path
                self.send_response(200 if "watch=true" in self.path else 504 if late else odd.code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ending.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def odd() -> Iterator[Odd]:
    made = Odd()
    yield made
    made.close()


@pytest.fixture
def store(odd) -> Iterator[NodeStore]:
    where = KubeSettings(api_url=f"http://127.0.0.1:{odd.server.server_address[1]}")
    made = NodeStore(where, Names.of(DEFAULT_PREFIX), "me", "/nowhere")
    yield made
    made.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"<html>", b"[" * 100_000, [], None, 3, {"status": "ok"}, listed(None), listed([None]), listed([{}]),
        listed([{"metadata": {}}]), listed([{"metadata": {"name": "n"}}]), listed([], 7),
        listed([{"metadata": GOOD_META, "spec": {"podCIDRs": 5}}]), listed([{"metadata": GOOD_META, "spec": []}, 1]),
        listed([{"metadata": {**GOOD_META, "annotations": [1]}}]),
    ],
)  # fmt: skip
def test_a_list_that_is_none_is_a_store_that_is_away(odd, store, answer):
    odd.answer = answer
    with pytest.raises(StoreUnavailable):
        store.read()
    with pytest.raises(StoreUnavailable):
        store.own()


@pytest.mark.parametrize("spec", [None, {}, {"podCIDRs": None}, {"podCIDR": ""}, {"podCIDRs": ["x", "10.1.1.0/24"]}])
def test_a_node_without_a_usable_spec_is_read(odd, store, spec):
    odd.answer = listed([{"metadata": {**GOOD_META, "annotations": None}, "spec": spec}])
    assert store.read().leases == {}


@pytest.mark.parametrize(
    "stream",
    [
        b"rubbish\n",
        b"[]\n",
        b'{"type":"MODIFIED"}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"n"}}}\n',
        b'{"type":"ERROR","object":{"code":410,"message":"too old"}}\n',
        b"",
    ],
)
def test_a_watch_that_says_rubbish_or_ends_at_once_means_list_again(odd, store, stream):
    odd.stream = stream
    store.read()
    with pytest.raises(StoreUnavailable):
        list(store.watch(0))


NOT_FOUND = {"kind": "Status", "reason": "NotFound", "details": {"kind": "nodes", "name": "me"}, "code": 404}


@pytest.mark.parametrize(
    "answer", [b"<html>not here</html>", {}, {**NOT_FOUND, "details": {"kind": "nodes", "name": "you"}}]
)
def test_a_404_that_does_not_speak_of_our_node_is_a_store_that_is_away(odd, store, answer):
    """A front end's: whoever took it for the Node's end would take every node's network list away."""
    odd.code, odd.answer = 404, answer
    with pytest.raises(StoreUnavailable):
        store.own()
    odd.answer = NOT_FOUND
    with pytest.raises(NodeGone):
        store.own()


def test_a_watch_that_never_begins_is_given_up(odd, store, monkeypatch):
    monkeypatch.setattr(kube_client, "TIMEOUT_S", 1.0)
    odd.stream = None
    store.read()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="timed out"):
        list(store.watch(0))
    assert time.monotonic() - began < 15


def test_huge_annotations_are_not_kept(odd, store):
    huge = {f"{DEFAULT_PREFIX}/kube-subnet-manager": "true", f"{DEFAULT_PREFIX}/backend-data": "x" * 200_000}
    odd.answer = listed([{"metadata": {**GOOD_META, "annotations": huge}, "spec": {"podCIDR": "10.1.1.0/24"}}])
    found = store.read()
    assert found.leases == {}
    assert len(str(store._nodes["n"])) < 600
    assert len(str(found.refused)) < 400


def test_after_a_restore_the_list_is_read_whole(odd, store):
    """A resourceVersion that went backwards: even the podCIDR of a uid may be another."""
    notes = {f"{DEFAULT_PREFIX}/{name}": text for name, text in PEER.items()}
    odd.answer = listed([{"metadata": {**GOOD_META, "annotations": notes}, "spec": {"podCIDR": "10.1.1.0/24"}}], "9")
    assert str(store.read().leases["n"].v4.subnet) == "10.1.1.0/24"
    odd.answer = listed([{"metadata": {**GOOD_META, "annotations": notes}, "spec": {"podCIDR": "10.1.2.0/24"}}], "12")
    assert str(store.read().leases["n"].v4.subnet) == "10.1.1.0/24", "fixed for a uid"
    odd.answer = listed([{"metadata": {**GOOD_META, "annotations": notes}, "spec": {"podCIDR": "10.1.2.0/24"}}], "5")
    assert str(store.read().leases["n"].v4.subnet) == "10.1.2.0/24"


def test_hints_of_a_list_that_failed_are_not_kept(odd, store):
    mine = {**GOOD_META, "name": "me"}
    odd.answer = listed([{"metadata": mine, "spec": {"podCIDR": "10.1.1.0/24"}}])
    assert store.read().hints.overwrite == {}
    overwritten = {**mine, "annotations": {f"{DEFAULT_PREFIX}/public-ip-overwrite": "9.9.9.9"}}
    odd.answer = listed([{"metadata": overwritten, "spec": {"podCIDR": "10.1.1.0/24"}}, None])
    with pytest.raises(StoreUnavailable):
        store.read()
    odd.answer = listed([{"metadata": mine, "spec": {"podCIDR": "10.1.1.0/24"}}])
    assert store.read().hints.overwrite == {}


def test_a_server_that_lags_behind_is_asked_without_a_version(odd, store):
    notes = {f"{DEFAULT_PREFIX}/{name}": text for name, text in PEER.items()}
    odd.answer = listed([])
    store.read()
    meta = {**GOOD_META, "annotations": notes}
    odd.stream = json.dumps({"type": "ADDED", "object": {"metadata": meta}}).encode() + b"\n"
    odd.answer = {"metadata": meta, "spec": {"podCIDR": "10.1.1.0/24"}}
    odd.behind = True
    watching = store.watch(0)
    assert str(next(watching).changes[0].v4.subnet) == "10.1.1.0/24"
    watching.close()
