"""What bench.policy_beside measures between two pods, whoever enforces their policies."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from bench.policy_packets import SECONDS, iperf
from overlay.lab import netns
from overlay.lab.matrix import End
from tests.support.kube import Kube
from tests.support.wait import until

CONNECT = Path(__file__).with_name("connect.py")
PATCH = "application/strategic-merge-patch+json"
PORT = 7777
FRESH_S = 20.0
"""A connection to the API server that was used since is open."""
GAP_S = 0.001
"""Between two probes."""
SILENCE_S = 0.4
"""No probe came for so long: they are denied."""
ENDED_S = 20.0
"""How long an established connection is watched."""


class Api:
    """One connection to the API server, as admin, that stays open: one that waited for long is made anew."""

    def __init__(self, kube: Kube) -> None:
        context = ssl.create_default_context(cafile=str(kube.folder / "tls.crt"))
        self._connection = HTTPSConnection(kube.host, kube.port, timeout=30, context=context)
        self._namespace, self._used = kube.namespace, float("-inf")

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        """Raises AssertionError."""
        if time.monotonic() > self._used + FRESH_S:
            self._connection.close()
            netns.inside(self._namespace, self._connection.connect)
        self._used = time.monotonic()
        headers = {"Authorization": "Bearer admin-token", "Content-Type": kind}
        self._connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = self._connection.getresponse()
        data = answer.read()
        assert answer.status < 300, f"{method} {path}: {answer.status} {data[:300]!r}"
        return dict(json.loads(data))

    def close(self) -> None:
        self._connection.close()


@contextmanager
def listening(command: list[str]) -> Iterator[None]:
    """A server's program meanwhile."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        yield
    finally:
        server.kill()
        server.wait(10)


def datagram_ns(client: End, server: End) -> float:
    """Nanoseconds a small datagram of one flow, as many as arrive."""
    with listening(["ip", "netns", "exec", server.namespace, "iperf3", "-s"]):
        for _ in range(3):
            answer = iperf(client.namespace, server.address, "-u", "-b", "0", "-l", "64")
            if found := answer["end"].get("sum"):
                return SECONDS / float(found["packets"] * (1 - found["lost_percent"] / 100)) * 1e9
            print(
                f"  iperf3 again: {answer.get('error')}", flush=True
            )  # it waits a second for its own control, no more
            time.sleep(1)
    raise AssertionError(answer)


def connections(client: End, server: End) -> float:
    """New TCP connections a second."""
    where = [server.address, str(PORT)]
    with listening(["ip", "netns", "exec", server.namespace, sys.executable, str(CONNECT), "serve", *where]):
        command = ["ip", "netns", "exec", client.namespace, sys.executable, str(CONNECT), "ask", *where, "3"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Probes:
    """A datagram each millisecond, each from a socket and a port of its own, never answered: each is a new connection."""

    def __init__(self, client: End, server: End) -> None:
        def bound() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.bind((server.address, PORT))
            made.settimeout(0.1)
            return made

        self._there = netns.inside(server.namespace, bound)
        self._client, self._server = client, server
        self._ended = threading.Event()
        self.last = 0.0
        """perf_counter() when the last that arrived was sent."""
        self.first: float | None = None
        """The same of the first since this was None."""
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for each in self._threads:
            each.start()

    def _send(self) -> None:
        netns.enter(self._client.namespace)
        while not self._ended.wait(GAP_S):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, suppress(OSError):
                one.sendto(struct.pack("d", time.perf_counter()), (self._server.address, PORT))

    def _receive(self) -> None:
        while not self._ended.is_set():
            with suppress(TimeoutError):
                sent = struct.unpack("d", self._there.recv(16))[0]
                self.last = max(self.last, sent)
                if self.first is None:
                    self.first = sent

    def arrived(self) -> float:
        """When the first was sent; 0: none yet."""
        return self.first or 0.0

    def silent(self) -> bool:
        return time.perf_counter() > self.last + SILENCE_S

    def close(self) -> None:
        self._ended.set()
        for each in self._threads:
            each.join(10)
        self._there.close()


def label_changes(api: Api, client: End, server: End, count: int) -> tuple[list[float], list[float]]:
    """Seconds from a PATCH of the client's label until its first probe arrives, and until the last that does."""
    path = "/api/v1/namespaces/{}/pods/{}".format(*client.name.split("/"))

    def relabel(app: str) -> float:
        began = time.perf_counter()
        api.ask("PATCH", path, {"metadata": {"labels": {"app": app}}}, PATCH)
        return began

    api.ask("GET", path)
    probes = Probes(client, server)
    allowed, denied = [], []
    try:
        until("probes arrive", probes.arrived)
        for _ in range((count + 1) // 2):
            time.sleep(0.2)
            began = relabel("nobody")
            until("they are denied", probes.silent, 30, 0.01)
            denied.append(max(probes.last - began, 0.0))
            time.sleep(0.2)
            probes.first = None
            began = relabel("client")
            allowed.append(until("they arrive", probes.arrived, 30, 0.01) - began)
    finally:
        probes.close()
    return allowed, denied


def ended_after(client: End, server: End, deny: Callable[[], object]) -> float | None:
    """Seconds from a policy's POST until the last answer on a connection that was open before; None: it goes on."""
    listen = netns.inside(server.namespace, lambda: socket.create_server((server.address, PORT + 1)))
    with (
        listen,
        netns.inside(client.namespace, lambda: socket.create_connection((server.address, PORT + 1), 5)) as here,
    ):
        there = listen.accept()[0]
        here.settimeout(0.005)
        with there:
            threading.Thread(target=_echo, args=(there,), daemon=True).start()
            last = _talk(here, time.perf_counter() + 1)
            assert last, "the connection works before"
            began = time.perf_counter()
            posting = threading.Thread(target=deny)
            posting.start()
            last = _talk(here, began + ENDED_S)
            posting.join()
            there.shutdown(socket.SHUT_RDWR)
    return None if last > began + ENDED_S - 2 else max(last - began, 0.0)


def _echo(there: socket.socket) -> None:
    with suppress(OSError):
        while data := there.recv(64):
            there.send(data)


def _talk(here: socket.socket, end: float) -> float:
    """A byte every few milliseconds until then; when the last answer came."""
    last = 0.0
    while time.perf_counter() < end:
        with suppress(OSError):
            here.send(b"x")
        with suppress(TimeoutError):
            if here.recv(64):
                last = time.perf_counter()
                time.sleep(0.003)
    return last
