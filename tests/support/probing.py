"""Who may talk to whom, by real packets: TCP connections and datagrams between namespaces, many at once."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from typing import NamedTuple

from overlay.lab import netns
from overlay.lab.matrix import End

ANSWER_S = 0.35
"""What was dropped does not come later than this after anything else that came."""
TRIES = 4
KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}


class Probe(NamedTuple):
    source: End
    target: End
    protocol: str
    port: int


class Field:
    """Servers in namespaces, that answer whoever asks."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, str, str, int], socket.socket] = {}

    def serve(self, end: End, protocol: str, port: int) -> None:
        """Listen, where nobody does."""
        key = end.namespace, end.address, protocol, port
        if key not in self._servers:
            self._servers[key] = netns.inside(end.namespace, lambda: _listen(end, protocol, port))

    def forget(self, namespace: str) -> None:
        for key in [key for key in self._servers if key[0] == namespace]:
            self._servers.pop(key).close()

    def close(self) -> None:
        for each in self._servers.values():
            each.close()
        self._servers.clear()

    def ask(self, probes: Iterable[Probe], answer_s: float = ANSWER_S) -> list[bool]:
        """Of each, whether an answer came. All at once; a connection from a port of its own, which no other had."""
        every = list(probes)
        asking: dict[socket.socket, tuple[int, bytes]] = {}
        answered = [False] * len(every)
        poll = select.poll()
        by_number: dict[int, socket.socket] = {}
        serving: dict[int, tuple[str, socket.socket]] = {}
        accepted: dict[int, socket.socket] = {}
        for (_, _, protocol, _), server in self._servers.items():
            serving[server.fileno()] = protocol, server
            poll.register(server, select.POLLIN)
        try:
            for place, probe in enumerate(every):
                made = netns.inside(probe.source.namespace, lambda probe=probe: _begin(probe))
                token = os.urandom(8)
                asking[made] = place, token
                by_number[made.fileno()] = made
                if probe.protocol == "UDP":
                    made.send(token)
                poll.register(made, select.POLLIN if probe.protocol == "UDP" else select.POLLOUT)
            end = time.monotonic() + answer_s
            while (left := end - time.monotonic()) > 0 and not all(answered):
                ready = poll.poll(left * 1000)
                if ready:
                    end = max(end, time.monotonic() + answer_s)
                for number, events in ready:
                    if number in serving:
                        protocol, server = serving[number]
                        if protocol == "UDP":
                            data, there = server.recvfrom(64)
                            server.sendto(data, there)
                        else:
                            connection = server.accept()[0]
                            accepted[connection.fileno()] = connection
                            poll.register(connection, select.POLLIN)
                    elif number in accepted:
                        data = accepted[number].recv(64)
                        if data:
                            accepted[number].send(data)
                        else:
                            poll.unregister(number)
                    else:
                        self._came(by_number[number], events, asking, every, answered, poll)
        finally:
            for made in asking:
                _reset(made)
            for connection in accepted.values():
                _reset(connection)
        return answered

    def wrong(self, wanted: Iterable[tuple[Probe, bool]]) -> list[tuple[Probe, bool]]:
        """Those that are answered and should not be, or the reverse; what should be is asked again, for a machine may be slow:
        what is dropped is dropped each time."""
        left = list(wanted)
        for _ in range(TRIES):
            found = self.ask(probe for probe, _ in left)
            left = [(probe, want) for (probe, want), got in zip(left, found, strict=True) if want != got]
            if not all(want for _, want in left):
                break
        return left

    @staticmethod
    def _came(made, events, asking, every, answered, poll) -> None:
        place, token = asking[made]
        if (
            every[place].protocol == "TCP"
            and events & select.POLLOUT
            and not events & (select.POLLERR | select.POLLHUP)
        ):
            made.send(token)
            poll.modify(made, select.POLLIN)
            return
        with contextlib.suppress(OSError):  # refused
            answered[place] |= made.recv(64) == token
        poll.unregister(made)


def _listen(end: End, protocol: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if end.family == 6 else socket.AF_INET, KINDS[protocol])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((end.address, port))
    if protocol == "TCP":
        made.listen(256)
    return made


def _begin(probe: Probe) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if probe.target.family == 6 else socket.AF_INET, KINDS[probe.protocol])
    made.setblocking(False)
    made.bind((probe.source.address, 0))
    made.connect_ex((probe.target.address, probe.port))
    return made


def _reset(made: socket.socket) -> None:
    """No connection lingers."""
    with contextlib.suppress(OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.close()
