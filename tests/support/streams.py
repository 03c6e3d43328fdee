"""Datagrams of a pod, all the time: as many as it can, or numbered ones that are counted where they come."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress

from overlay.lab import matrix, netns
from tests.support.wait import PATIENCE


class Talk:
    """Datagrams from a pod to an address, ten each millisecond or two, through one connected socket."""

    def __init__(self, source: matrix.End, address: str, port: int) -> None:
        self._ended = threading.Event()

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.connect((address, port))
            return made

        self._socket = netns.inside(source.namespace, make)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.001):
            for _ in range(10):
                with suppress(OSError):
                    self._socket.send(b"x")

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(10)
        self._socket.close()


class Stream:
    """Datagrams from one pod to another, some 200 a second, each numbered; those that never arrived are known."""

    def __init__(self, source: matrix.End, target: matrix.End, gap_s: float) -> None:
        self.wires = matrix.Wires([source, target])
        listening = self.wires._listening[target.name]
        sending = netns.inside(source.namespace, lambda: matrix._connect(target, listening.getsockname()[1]))
        self._ending = threading.Event()
        self.sent = 0
        self.came: set[int] = set()
        self.errors: list[str] = []

        def send() -> None:
            while not self._ending.is_set():
                try:
                    sending.send(self.sent.to_bytes(8, "big"))
                except OSError as error:
                    self.errors.append(str(error))
                self.sent += 1
                time.sleep(gap_s)

        def receive() -> None:
            while not self._ending.is_set() or select.select([listening], [], [], 0.3 * PATIENCE)[0]:
                if select.select([listening], [], [], 0.1)[0]:
                    self.came.add(int.from_bytes(listening.recv(64), "big"))

        self._threads = [threading.Thread(target=send), threading.Thread(target=receive)]
        self._sending = sending
        assert isinstance(sending, socket.socket)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        if not self._ending.is_set():
            self._ending.set()
            for thread in self._threads:
                thread.join()
            self._sending.close()
            self.wires.close()

    def lost(self, since: int = 0) -> int:
        """How many of those from a number on; it ends the stream."""
        self.stop()
        return sum(number not in self.came for number in range(since, self.sent))
