"""Sockets to the kernel: send a batch and match its errors, dump, monitor; an overrun means "dump again"."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from lease.families import FAMILIES, V4, Family
from overlay.kernel.route import wire
from overlay.kernel.route.entries import Address, FoundFdb, FoundNeighbour, FoundRoute, Link, PodEnd
from overlay.kernel.route.fast import Matched

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
SO_RCVBUFFORCE, SO_ATTACH_FILTER = 33, 26
RTNLGRP_LINK, RTNLGRP_NEIGH = 1, 3
GROUPS = {4: (5, 7, 24), 6: (9, 11, 25)}
"""By family: RTNLGRP_IPV4_IFADDR, _ROUTE and _NETCONF, RTNLGRP_IPV6_IFADDR, _ROUTE and _NETCONF."""
NFNLGRP_NFTABLES = 7
NFTA_TABLE = 1
"""The table's name is attribute 1 of each nftables message: table, chain, rule, set, set element, object."""
REQUEST_BUFFER, MONITOR_BUFFER = 8 << 20, 128 << 20
"""Bytes; an event costs about 1 KiB of it, so 128 MiB hold some 40,000 (only what waits is allocated)."""
ANSWER_S = 5.0
_RECV = 1 << 16
"""The kernel fills at most 32 KiB at a time (af_netlink.c, netlink_dump)."""
_NFGENMSG = 4
AT_ONCE = 512

_T = TypeVar("_T")


class KernelError(OSError):
    """The kernel refused an operation, or did not answer. str() has the operation and the kernel's own words."""

    def __str__(self) -> str:
        return str(self.strerror)


def words_of(error: Exception) -> str:
    """What was refused, and where: of a file its name stands first."""
    if isinstance(error, OSError) and not isinstance(error, KernelError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or repr(error)


class Refusal(NamedTuple):
    """Why one message of a batch was refused. text: the kernel's extended answer, "" where it gave none."""

    errno: int
    text: str

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{name} ({self.text or os.strerror(self.errno)})"


class RequestSocket:
    """Requests and their answers. One thread only."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = _netlink(protocol, REQUEST_BUFFER)
        self._socket.settimeout(ANSWER_S)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._seq = 0

    @property
    def port(self) -> int:
        """Our netlink port id, which the kernel writes into the events that we cause."""
        return int(self._socket.getsockname()[0])

    def take_seqs(self, count: int) -> int:
        """The first of `count` sequence numbers for a batch."""
        if self._seq + count > 0x7FFFFFF0:
            self._seq = 0
        first, self._seq = self._seq + 1, self._seq + count + 1  # one more for the end mark of a batch
        return first

    def execute(self, messages: list[bytes], first: int, count: int = 0) -> dict[int, Refusal]:
        """Send messages numbered from `first`; the refusals by place in the batch. count: how many numbers they have, where
        some stand together in one bytes object, or numbers are left out; 0: one in each.

        The kernel takes them in order and answers each one that it refuses; an ACK is asked of an empty message behind them
        alone, since 20,000 ACKs cost as much as 20,000 messages. Where that one does not come, what was not refused counts
        as refused with ETIMEDOUT: it is looked at again.
        """
        refused: dict[int, Refusal] = {}
        count = count or len(messages)
        try:
            self._socket.send(b"".join(messages) + wire.end_mark(first + count))
            while True:
                for message in wire.split(self._socket.recv(_RECV)):
                    place = message.seq - first
                    if place == count:
                        return refused
                    if message.kind == wire.NLMSG_ERROR and 0 <= place < count and (refusal := refusal_of(message)):
                        refused[place] = refusal
        except OSError as error:
            code = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EIO
            return {place: Refusal(code, "the kernel's answer was lost") for place in range(count)} | refused

    def ask(self, request: Callable[[int], bytes]) -> memoryview:
        """The body of the one message that answers a request. Raises KernelError."""
        seq = self.take_seqs(1)
        try:
            self._socket.send(request(seq))
            while True:
                data = self._socket.recv(_RECV)
                for message in wire.split(data):
                    if message.seq == seq:
                        if message.kind == wire.NLMSG_ERROR:
                            refusal = refusal_of(message)
                            assert refusal is not None, "no ACK was asked for"
                            raise KernelError(refusal.errno, str(refusal))
                        return message.body
        except KernelError:
            raise
        except OSError as error:
            raise KernelError(error.errno or errno.ETIMEDOUT, f"no answer: {error}") from error

    def dump(self, request: Callable[[int], bytes], parse: Callable[[memoryview], _T | None]) -> list[_T]:
        """Everything a dump request yields. Raises KernelError, also for errors that arrive inside NLMSG_DONE."""
        seq = self.take_seqs(1)
        found: list[_T] = []
        for message in self._answers(request(seq), seq):
            item = parse(message.body)
            if item is not None:
                found.append(item)
        return found

    def matched(self, request: Callable[[int], bytes], match: Callable[[bytes], Matched]) -> Iterator[Matched]:
        """A dump, buffer by buffer as it comes (some 450 entries), put through a matcher.

        Until it is done no other dump can be made on this socket; after one that was broken off, none. Raises KernelError.
        """
        seq = self.take_seqs(1)
        try:
            self._socket.send(request(seq))
            while True:
                agreed, rest = match(self._socket.recv(_RECV))
                others, ended = [], False
                for view in rest:
                    message = next(wire.split(view))
                    if message.kind in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
                        _check_end(message)
                        ended = True
                    else:
                        others.append(view)
                yield agreed, others
                if ended:
                    return
        except TimeoutError as error:
            raise KernelError(errno.ETIMEDOUT, "reading from the kernel: no answer") from error
        except KernelError:
            raise
        except OSError as error:
            raise KernelError(error.errno or errno.EIO, f"reading from the kernel: {error.strerror}") from error

    def lookup(self, family: Family, address: int) -> tuple[int, int, int] | None:
        """Interface, source address and gateway by which the kernel reaches an address; None: no route."""
        seq = self.take_seqs(1)
        try:
            for message in self._answers(wire.route_lookup(family, seq, address), seq, single=True):
                return wire.parse_lookup(message.body)
        except KernelError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
                return None
            raise
        return None

    def _answers(self, request: bytes, seq: int, single: bool = False) -> Iterator[wire.Message]:
        try:
            self._socket.send(request)
            while True:
                for message in wire.split(self._socket.recv(_RECV)):
                    if message.seq != seq:
                        continue
                    if message.kind in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
                        _check_end(message)
                        return
                    yield message
                    if single:
                        return
        except TimeoutError as error:
            raise KernelError(errno.ETIMEDOUT, "reading from the kernel: no answer") from error
        except KernelError:
            raise
        except OSError as error:
            raise KernelError(error.errno or errno.EIO, f"reading from the kernel: {error.strerror}") from error

    def links(self) -> list[Link]:
        """All interfaces."""
        return self.dump(wire.link_dump, wire.parse_link)

    def addresses(self, family: Family) -> list[Address]:
        """All addresses of a family."""
        return self.dump(partial(wire.address_dump, family), partial(wire.parse_address, family))

    def pod_end(self, link: Link) -> PodEnd | None:
        """The other end of a veth, in its own namespace; None when it is gone. Raises KernelError."""
        try:
            body = self.ask(lambda seq: wire.link_elsewhere(seq, link.netnsid, link.peer))
            found = self.dump(
                lambda seq: wire.addresses_elsewhere(seq, link.netnsid, link.peer), wire.parse_address_elsewhere
            )
        except KernelError as error:
            if error.errno in (errno.ENODEV, errno.EINVAL):  # the interface, the namespace
                return None
            raise
        addresses = {number: frozenset(each for family, each in found if family == number) for number in FAMILIES}
        return PodEnd(wire.parse_link(body).mac, addresses)

    def routes(self, family: Family) -> list[FoundRoute]:
        """All unicast routes of the main table."""
        try:
            return self.dump(partial(wire.route_dump, family), partial(wire.parse_route, family))
        except KernelError as error:
            if error.errno == errno.ENOENT:  # a namespace that never had a route has no main table yet
                return []
            raise

    def neighbours(self, family: Family, oif: int) -> list[FoundNeighbour]:
        """The neighbours of a device."""
        return self.dump(lambda seq: wire.neighbour_dump(family, seq, oif), partial(wire.parse_neighbour, family))

    def fdb(self, family: Family, oif: int) -> list[FoundFdb]:
        """The forwarding table of a vxlan device whose underlay is of that family."""
        return self.dump(lambda seq: wire.fdb_dump(seq, oif), partial(wire.parse_fdb, family))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def exists(ifindex: int) -> bool:
    """Whether there is an interface of that number."""
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True


class LinkSeen(NamedTuple):
    """An interface was made, changed or (gone) deleted."""

    link: Link
    gone: bool


class AddressSeen(NamedTuple):
    """An address came or went. family: 4 or 6."""

    address: Address
    gone: bool
    family: int = 4


class RouteSeen(NamedTuple):
    """A route of the main table came, changed or went. family: 4 or 6."""

    route: FoundRoute
    gone: bool
    family: int = 4


class NeighbourSeen(NamedTuple):
    """A neighbour came, changed or went. family: 4 or 6."""

    neighbour: FoundNeighbour
    gone: bool
    family: int = 4


class FdbSeen(NamedTuple):
    """An entry of a vxlan's forwarding table came, changed or went. family: of its underlay."""

    entry: FoundFdb
    gone: bool
    family: int = 4


class NeighbourMessages(NamedTuple):
    """Notifications of neighbours and FDB entries, not taken apart: a device that goes takes 40,000 with it, our own FDB
    entries come back (they do not say whose doing they are), and a matcher sees at a glance what is no news."""

    messages: list[bytes]

    @property
    def weight(self) -> int:
        """How many events it stands for."""
        return len(self.messages)


class DeviceUnknown(NamedTuple):
    """The kernel refused an entry because it does not know the tunnel's device, and has not said that it went."""


class Overrun(NamedTuple):
    """Events were lost: only a dump tells the truth now."""


class NftSeen(NamedTuple):
    """Somebody touched one of our nftables tables; "": events were lost, maybe one of these."""

    table: str


class SysctlSeen(NamedTuple):
    """Somebody wrote a sysctl of IPv4 that the kernel tells of: forwarding, rp_filter."""


KernelEvent = (
    LinkSeen | AddressSeen | RouteSeen | NeighbourSeen | NeighbourMessages | FdbSeen | Overrun | NftSeen | SysctlSeen
)


def parse_event(message: wire.Message, families: Sequence[Family] = (V4,)) -> KernelEvent | None:
    """What one notification says, of these families; None for what nobody here needs. Pure."""
    kind, body = message.kind, message.body
    if kind in (wire.RTM_NEWLINK, wire.RTM_DELLINK):
        # A bridge announces its ports with family AF_BRIDGE: not the interface itself.
        return None if body[0] == wire.AF_BRIDGE else LinkSeen(wire.parse_link(body), kind == wire.RTM_DELLINK)
    if kind == wire.RTM_NEWNETCONF:
        return SysctlSeen()
    for family in families:
        event = _parse_event(message, family)
        if event is not None:
            return event
    return None


def _parse_event(message: wire.Message, family: Family) -> KernelEvent | None:
    kind, body, number = message.kind, message.body, family.number
    if kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
        route = wire.parse_route(family, body)
        return None if route is None else RouteSeen(route, kind == wire.RTM_DELROUTE, number)
    if kind in (wire.RTM_NEWNEIGH, wire.RTM_DELNEIGH):
        gone = kind == wire.RTM_DELNEIGH
        if body[0] == wire.AF_BRIDGE:
            entry = wire.parse_fdb(family, body)
            return None if entry is None else FdbSeen(entry, gone, number)
        neighbour = wire.parse_neighbour(family, body)
        return None if neighbour is None else NeighbourSeen(neighbour, gone, number)
    if kind in (wire.RTM_NEWADDR, wire.RTM_DELADDR):
        address = wire.parse_address(family, body)
        return None if address is None else AddressSeen(address, kind == wire.RTM_DELADDR, number)
    return None


class _Listener(threading.Thread):
    """Receives notifications until it is stopped. What it raises ends the thread (main sees to that)."""

    def __init__(self, name: str, protocol: int, groups: tuple[int, ...], post: Callable[[KernelEvent], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._post = post
        self._socket = _netlink(protocol, MONITOR_BUFFER)
        for group in groups:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def run(self) -> None:
        while True:
            try:
                data = self._socket.recv(_RECV)
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._overrun()
                    continue
                if error.errno == errno.EBADF:
                    return  # closed by stop()
                raise
            if not data:
                return
            self._received(data)

    def stop(self) -> None:
        """End the thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _overrun(self) -> None:
        """Notifications were lost."""
        raise NotImplementedError

    def _received(self, data: bytes) -> None:
        """Messages came."""
        raise NotImplementedError


class Monitor(_Listener):
    """Turns rtnetlink's notifications into events."""

    def __init__(self, post: Callable[[KernelEvent], None], own_port: int, families: Sequence[Family] = (V4,)) -> None:
        groups = [group for family in families for group in GROUPS[family.number]]
        super().__init__("monitor", NETLINK_ROUTE, (RTNLGRP_LINK, RTNLGRP_NEIGH, *groups), post)
        self._families = families
        _drop_echoes(self._socket, own_port)

    def _overrun(self) -> None:
        self._post(Overrun())

    def _received(self, data: bytes) -> None:
        if wire.is_neighbour(data):
            data = self._received_neighbours(data)
        for message in wire.split(data):
            event = parse_event(message, self._families)
            if event is not None:
                self._post(event)

    def _received_neighbours(self, data: bytes) -> bytes:
        """All notifications of neighbours and FDB entries that wait, in one event; the first of another kind, if one came
        behind them."""
        messages = [data]
        try:
            while len(messages) < AT_ONCE:
                data = self._socket.recv(_RECV, socket.MSG_DONTWAIT)
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

    def _overrun(self) -> None:
        self._post(NftSeen(""))

    def _received(self, data: bytes) -> None:
        touched = set()
        for message in wire.split(data):
            name = wire.attributes(message.body, _NFGENMSG).get(NFTA_TABLE)
            text = bytes(name).rstrip(b"\0") if name is not None else b""
            if name is not None and (text.startswith(self._prefix) or text in self._others):
                touched.add(text.decode("utf-8", "replace"))
        for table in touched:
            self._post(NftSeen(table))


def _check_end(message: wire.Message) -> None:
    """The end of a dump; an error may stand in it, and unread looks like an empty kernel. Raises KernelError."""
    if (refusal := refusal_of(message)) is not None:
        raise KernelError(refusal.errno, f"reading from the kernel: {os.strerror(refusal.errno)}")


def refusal_of(message: wire.Message) -> Refusal | None:
    """What an NLMSG_ERROR, or the end of a dump, says was refused; None where all was well."""
    code = -struct.unpack_from("=l", message.body)[0] if len(message.body) >= 4 else 0
    if code == 0:
        return None
    text = ""
    if message.flags & 0x200:  # NLM_F_ACK_TLVS; with NETLINK_CAP_ACK only the request's header stands before them
        attr = wire.attributes(message.body, 4 + 16).get(1)  # NLMSGERR_ATTR_MSG
        text = bytes(attr).rstrip(b"\0").decode("utf-8", "replace") if attr is not None else ""
    return Refusal(code, text)


def _netlink(protocol: int, buffer: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
    except PermissionError:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.bind((0, 0))
    return made


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
