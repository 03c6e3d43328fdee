"""Who listens at a Unix socket's name, by the kernel's word and without connecting: sock_diag(7), linux/unix_diag.h."""

from __future__ import annotations

import socket
import struct

from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route import wire

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_LISTENING = 1 << 10
"""1 << TCP_LISTEN: Unix sockets have TCP's states."""
_SHOW_NAME, _SHOW_UID = 0x01, 0x40
_NAME, _UID = 0, 7
_REQUEST = struct.Struct("=BBHIIIII")
_FIXED = 16
"""Of struct unix_diag_msg."""


def listener_uid(name: str) -> int | None:
    """The user whose socket listens at a name ("\\0..." where it is abstract) in this network namespace; None where there is
    none, or where the kernel does not say (before 5.3). Raises OSError: it has no unix_diag."""
    wanted = memoryview(name.encode())

    def uid(body: memoryview) -> int | None:
        found = wire.attributes(body, _FIXED)
        return wire.number(found[_UID]) if found.get(_NAME) == wanted and _UID in found else None

    asked = _REQUEST.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, _SHOW_NAME | _SHOW_UID, 0, 0)
    asking = RequestSocket(_NETLINK_SOCK_DIAG)
    try:
        return next(iter(asking.dump(lambda seq: wire.dump_request(_SOCK_DIAG_BY_FAMILY, seq, asked), uid)), None)
    finally:
        asking.close()
