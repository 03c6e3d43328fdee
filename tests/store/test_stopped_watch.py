"""A watch that is given up while it is being opened."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lease.kube.client import KubeSettings
from overlay.policy.feeds import POLICIES
from overlay.policy.kube import KubeFeeds
from tests.support.wait import until


def feeds_alive() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "feed"}


def test_it_ends_at_once_and_leaves_no_connection():
    """Else its thread reads until the server ends the watch, five to ten minutes later."""
    asked, may_answer, gone = threading.Event(), threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            if "watch=true" not in self.path:
                body = json.dumps({"metadata": {"resourceVersion": "5"}, "items": []}).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            asked.set()
            may_answer.wait(30)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            with suppress(OSError):
                self.connection.recv(1)
            gone.set()
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = feeds_alive()
    feeds = KubeFeeds(KubeSettings(api_url=f"http://127.0.0.1:{server.server_address[1]}"), lambda _event: None)
    try:
        feeds.start(POLICIES)
        assert asked.wait(20)
        feeds.stop(POLICIES)
        may_answer.set()
        until("its thread ends", lambda: feeds_alive() <= before, 10)
        assert gone.wait(10), "the server sees its connection go"
    finally:
        may_answer.set()
        feeds.close()
        server.shutdown()
        server.server_close()
