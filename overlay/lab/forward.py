"""A port of this machine's loopback that leads to the page of a lab's agent, whose own loopback is in a namespace.

Started by the lab as a process of its own: `python -m overlay.lab.forward LAB FOLDER`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

from overlay.lab import netns

PORT = 8474
"""The agents' --page, and the one here where it is free."""
PORT_FILE = "page-port"
WAIT_S = 60.0


def listen(folder: Path) -> socket.socket:
    """Listen at PORT, or any other; which one is written beside the lab's files."""
    for port in (PORT, 0):
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            server.close()
            continue
        server.listen(16)
        (folder / PORT_FILE).write_text(str(server.getsockname()[1]))
        return server
    raise OSError("no port of 127.0.0.1 is free")


def serve(server: socket.socket, lab: str) -> None:
    """Each connection leads to the first node whose agent takes it."""
    while True:
        here, _ = server.accept()
        threading.Thread(target=_connect, args=(here, lab), daemon=True).start()


def _connect(here: socket.socket, lab: str) -> None:
    def open_there() -> socket.socket:
        return socket.create_connection(("127.0.0.1", PORT), 2.0)

    with here:
        for namespace in netns.existing(f"overlay-{lab}-node"):
            with contextlib.suppress(OSError):
                there = netns.inside(namespace, open_there)
                break
        else:
            here.sendall(b"HTTP/1.0 503 Service Unavailable\r\n\r\nno agent of the lab serves its page\n")
            return
        with there:
            for each in (here, there):
                each.settimeout(WAIT_S)
            back = threading.Thread(target=_copy, args=(there, here), daemon=True)
            back.start()
            _copy(here, there)
            back.join(WAIT_S)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    os.umask(0o077)
    serve(listen(Path(sys.argv[2])), sys.argv[1])
