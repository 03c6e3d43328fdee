"""Sockets to the kernel: send a batch and match its errors, ask, dump."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

from lease.families import FAMILIES, Family
from overlay.kernel.route import lookup, wire
from overlay.kernel.route.entries import Address, FoundFdb, FoundNeighbour, FoundRoute, Link, PodEnd
from overlay.kernel.route.fast import Matched
from overlay.kernel.route.lookup import AnyRoute, Packet, Rule, Way
from overlay.process.dry import dry

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
SOL_NETLINK = 270
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 10, 11, 12
SO_RCVBUFFORCE = 33
REQUEST_BUFFER = 8 << 20
"""Bytes."""
ANSWER_S = 5.0
RECV = 1 << 16
"""The kernel fills at most 32 KiB at a time (af_netlink.c, netlink_dump)."""

_T = TypeVar("_T")


class KernelError(OSError):
    """The kernel refused an operation, or did not answer. str() has the operation and the kernel's own words."""

    def __str__(self) -> str:
        return str(self.strerror)


def error_text(error: Exception) -> str:
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
        self._socket = netlink_socket(protocol, REQUEST_BUFFER)
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
        as refused with ETIMEDOUT: it is read again.
        """
        if dry.run:
            return {}
        refused: dict[int, Refusal] = {}
        count = count or len(messages)
        try:
            self._socket.send(b"".join(messages) + wire.end_mark(first + count))
            while True:
                for message in wire.split(self._socket.recv(RECV)):
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
                data = self._socket.recv(RECV)
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
                agreed, rest = match(self._socket.recv(RECV))
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

    def way(self, family: Family, packet: Packet) -> Way:
        """Where the kernel would send a packet, or (`error`) why nowhere. Raises KernelError."""
        seq = self.take_seqs(1)
        try:
            for message in self._answers(lookup.route_lookup(family, seq, packet), seq, single=True):
                return lookup.parse_lookup(message.body)
        except KernelError as error:
            if error.errno in lookup.NO_WAY:
                return Way(0, 0, 0, 0, error.errno)
            raise
        return Way(0, 0, 0, 0, errno.ENETUNREACH)

    def lookup(self, family: Family, address: int, source: int = 0, oif: int = 0) -> Way | None:
        """By which way the kernel reaches an address; None: by none. Raises KernelError."""
        found = self.way(family, Packet(address, source, oif=oif))
        return None if found.error else found

    def rules(self, family: Family) -> list[Rule]:
        """All routing policy rules of a family, in the order in which they are asked. Raises KernelError."""
        found = self.dump(partial(lookup.rule_dump, family), lookup.parse_rule)
        return sorted(found, key=lambda rule: rule.priority)

    def routes_of(self, family: Family, table: int) -> list[AnyRoute]:
        """All routes of one table, of any type. Raises KernelError."""
        try:
            return self.dump(lambda seq: lookup.table_dump(family, seq, table), lookup.parse_any_route)
        except KernelError as error:
            if error.errno == errno.ENOENT:  # no such table (yet)
                return []
            raise

    def _answers(self, request: bytes, seq: int, single: bool = False) -> Iterator[wire.Message]:
        try:
            self._socket.send(request)
            while True:
                for message in wire.split(self._socket.recv(RECV)):
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
        end = wire.parse_link(body)
        return PodEnd(end.mac, addresses, end.up)

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


def _check_end(message: wire.Message) -> None:
    """The end of a dump; an error may stand in it, unread it seems an empty kernel. Raises KernelError."""
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


def netlink_socket(protocol: int, buffer: int) -> socket.socket:
    """A netlink socket whose receive buffer has so many bytes, where it may. Raises OSError."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
    except PermissionError:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.bind((0, 0))
    return made
