"""Threads that receive the kernel's notifications and post them as events; an overrun means "dump again"."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterable

from lease.families import V4, Family
from overlay.kernel.events import (
    SELDOM_S,
    ForeignRulesSeen,
    KernelEvent,
    NeighbourMessages,
    NftSeen,
    Overrun,
    RoutingSeen,
    parse_event,
)
from overlay.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, RECV, SOL_NETLINK, netlink_socket
from overlay.kernel.route import wire

NETLINK_ADD_MEMBERSHIP = 1
SO_ATTACH_FILTER = 26
RTNLGRP_LINK, RTNLGRP_NEIGH = 1, 3
GROUPS = {4: (5, 7, 24, 8), 6: (9, 11, 25, 19)}
"""By family: RTNLGRP_IPV4_IFADDR, _ROUTE, _NETCONF and _RULE, RTNLGRP_IPV6_IFADDR, _ROUTE, _NETCONF and _RULE."""
NFNLGRP_NFTABLES = 7
NFTA_TABLE = 1
"""The table's name is attribute 1 of each nftables message: table, chain, rule, set, set element, object."""
MONITOR_BUFFER = 128 << 20
"""Bytes; an event costs about 1 KiB of it, so 128 MiB hold some 40,000 (only what waits is allocated)."""
_RULES_OR_CHAINS = frozenset((0, 2, 3, 5, 6, 8))
"""NFT_MSG_NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE: not what sets have, which changes all day."""
_NFGENMSG = 4
AT_ONCE = 512


class _Listener(threading.Thread):
    """Receives notifications until it is stopped. What it raises ends the thread (main sees to that)."""

    def __init__(self, name: str, protocol: int, groups: tuple[int, ...], post: Callable[[KernelEvent], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._post = post
        self._socket = netlink_socket(protocol, MONITOR_BUFFER)
        self._ending = os.eventfd(0, os.EFD_CLOEXEC)
        for group in groups:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def run(self) -> None:
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        waiting.register(self._ending, select.POLLIN)
        while True:
            if any(number == self._ending for number, _ in waiting.poll()):
                return
            try:
                data = self._socket.recv(RECV, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._overrun()
                continue
            self._received(data)

    def stop(self) -> None:
        """End the thread; returns when it has ended. May be called once."""
        os.eventfd_write(self._ending, 1)
        if self.ident is not None:
            self.join()  # only then: a number that is closed is the next file's, and the thread would read from that
        self._socket.close()
        os.close(self._ending)

    def _overrun(self) -> None:
        """Notifications were lost."""
        raise NotImplementedError

    def _received(self, data: bytes) -> None:
        """Messages came."""
        raise NotImplementedError


class _Seldom:
    """Lets something through once in SELDOM_S; who hears it looks a moment later, so nothing is missed."""

    def __init__(self) -> None:
        self._not_before = 0.0

    def now(self) -> bool:
        """Whether it may pass."""
        now = time.monotonic()
        if now < self._not_before:
            return False
        self._not_before = now + SELDOM_S
        return True


class Monitor(_Listener):
    """Turns rtnetlink's notifications into events."""

    def __init__(self, post: Callable[[KernelEvent], None], own_port: int, families: Iterable[Family] = (V4,)) -> None:
        families = tuple(families)
        groups = [group for family in families for group in GROUPS[family.number]]
        super().__init__("monitor", NETLINK_ROUTE, (RTNLGRP_LINK, RTNLGRP_NEIGH, *groups), post)
        self._families, self._seldom = families, _Seldom()
        _drop_echoes(self._socket, own_port)

    def _overrun(self) -> None:
        self._post(Overrun())

    def _received(self, data: bytes) -> None:
        if wire.is_neighbour(data):
            data = self._received_neighbours(data)
        for message in wire.split(data):
            event = parse_event(message, self._families)
            if event is None or (isinstance(event, RoutingSeen) and not self._seldom.now()):
                continue
            self._post(event)

    def _received_neighbours(self, data: bytes) -> bytes:
        """All notifications of neighbours and FDB entries that wait, in one event; the first of another kind, if one came
        behind them."""
        messages = [data]
        try:
            while len(messages) < AT_ONCE:
                data = self._socket.recv(RECV, socket.MSG_DONTWAIT)
                if not wire.is_neighbour(data):
                    break
                messages.append(data)
            else:
                data = b""
        except BlockingIOError:
            data = b""
        except OSError as error:
            data = b""
            if error.errno == errno.ENOBUFS:
                self._overrun()  # of any other the next receipt says the same
        self._post(NeighbourMessages(messages))
        return data


class NftMonitor(_Listener):
    """Says when an nftables table of ours (by the start of its name), or one that we have rules in, was touched, by
    whomever."""

    def __init__(
        self, prefix: str, others: tuple[str, ...], post: Callable[[KernelEvent], None], own_port: int = 0
    ) -> None:
        super().__init__("nft-monitor", NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), post)
        if own_port:
            _drop_echoes(self._socket, own_port)
        self._prefix, self._others = prefix.encode(), {other.encode() for other in others}
        self._seldom = _Seldom()

    def _overrun(self) -> None:
        self._post(NftSeen(""))

    def _received(self, data: bytes) -> None:
        touched, foreign = set(), False
        for message in wire.split(data):
            name = wire.attributes(message.body, _NFGENMSG).get(NFTA_TABLE)
            text = bytes(name).rstrip(b"\0") if name is not None else b""
            if name is not None and (text.startswith(self._prefix) or text in self._others):
                touched.add(text.decode("utf-8", "replace"))
            foreign |= not text.startswith(self._prefix) and message.kind & 0xFF in _RULES_OR_CHAINS
        if foreign and self._seldom.now():
            self._post(ForeignRulesSeen())
        for table in touched:
            self._post(NftSeen(table))


def _drop_echoes(listening: socket.socket, own_port: int) -> None:
    """Let the kernel leave out the events that we cause: their nlmsg_pid (offset 12) is our port id.

    Each event is one message in one buffer, or (nftables) one transaction in some, so looking at the first header is enough.
    (FDB events say 0: they come.)
    """
    ld_word, jump_equal, ret = 0x20, 0x15, 0x06
    program = b"".join(
        struct.pack("=HBBL", *step)
        for step in (
            (ld_word, 0, 0, 12),  # loads in network order
            (jump_equal, 0, 1, socket.htonl(own_port)),
            (ret, 0, 0, 0),
            (ret, 0, 0, 0xFFFFFFFF),
        )
    )
    code = array("B", program)
    address, _ = code.buffer_info()
    listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", len(program) // 8, address))
