"""TCP connections as fast as they are made, some at once: `python bench/connect.py serve|ask ADDRESS PORT [SECONDS]`.

Standard library alone, and nothing of ours: it runs in a pod's namespace, whoever enforces policies there.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time

AT_ONCE = 32
BY_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close by RST, so that no port waits."""


def serve(address: str, port: int) -> None:
    """Accept and close, for ever."""
    with socket.create_server((address, port), backlog=1024) as listening:
        while True:
            listening.accept()[0].close()


def ask(address: str, port: int, seconds: float) -> float:
    """Connections that were made, a second."""
    made, poll = 0, select.poll()
    under_way: dict[int, socket.socket] = {}
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        while len(under_way) < AT_ONCE:
            one = socket.socket()
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, BY_RESET)
            one.connect_ex((address, port))
            under_way[one.fileno()] = one
            poll.register(one, select.POLLOUT)
        for number, _ in poll.poll(100):
            one = under_way.pop(number)
            made += one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            poll.unregister(number)
            one.close()
    took = time.perf_counter() - began
    for one in under_way.values():
        one.close()
    return made / took


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    print(f"{ask(sys.argv[2], int(sys.argv[3]), float(sys.argv[4])):.0f}")
