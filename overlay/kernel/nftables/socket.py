"""A socket to nftables in the kernel: transactions, and what is there. For our tables that change often (nf_wire.py)."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from overlay.kernel.netlink import NETLINK_NETFILTER, KernelError, RequestSocket, refusal_of
from overlay.kernel.nftables import content
from overlay.kernel.nftables import wire as nf_wire
from overlay.kernel.route import wire
from overlay.process.dry import dry

TRIES = 5
"""Others may change nftables while we read; then it is read again."""
LARGEST = 32 << 20
"""Bytes of one transaction; an element takes 16 to 20."""
SO_SNDBUFFORCE = 32
_RECV = 1 << 16
Elements = Mapping[str, Iterable[bytes]]
"""Keys, by the name of their set."""


class Named(Protocol):
    """A table, whatever its form is kept as."""

    @property
    def family(self) -> str:
        """nftables' name of it."""

    @property
    def name(self) -> str:
        """Its own."""


def _beside(name: str) -> str:
    return f"{name}-beside"


class NetfilterSocket(RequestSocket):
    """Requests and their answers. One thread only."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, LARGEST)

    def replace(self, table: nf_wire.Table, elements: Elements) -> None:
        """Make a table anew, at once. Raises KernelError."""
        self._commit(nf_wire.replace(table, elements), f"making nft table {table.family} {table.name}")

    def replace_judging(self, table: nf_wire.Table, elements: Elements) -> None:
        """The same of a table that decides what may pass. Raises KernelError."""
        self._replace_beside(table, lambda name: nf_wire.replace(table._replace(name=name), elements))

    def _replace_beside(self, table: Named, make: Callable[[str], list[nf_wire.Message]]) -> None:
        """Make a table anew, whatever stood under its name, while packets go through it. In one transaction some packets are
        lost, and some are judged by neither; so a second one, under another name, judges beside it meanwhile, and rules go
        before their table does. make: what makes it under a name."""
        if self.has(table.family, table.name):
            beside = _beside(table.name)
            self._commit(make(beside), f"making nft table {table.family} {beside}")
            self._take_out(table.family, table.name)
        self._commit(make(table.name), f"making nft table {table.family} {table.name}")
        self.drop_beside(table)

    def drop_beside(self, table: Named) -> None:
        """The second one, of an agent that was killed meanwhile, too. Raises KernelError."""
        if self.has(table.family, beside := _beside(table.name)):
            self._take_out(table.family, beside)

    def _take_out(self, family: str, name: str) -> None:
        rules = nf_wire.nfgenmsg(family, wire.attr(1, wire.text(name)))
        self._commit([(nf_wire.DELRULE, 0, rules)], f"emptying nft table {family} {name}")
        self._commit(nf_wire.remove(family, name), f"removing nft table {family} {name}")

    def has(self, family: str, name: str) -> bool:
        """Whether there is such a table; of a family that this kernel lacks there is none. Raises KernelError."""
        try:
            self.ask(lambda seq: nf_wire.get(nf_wire.GETTABLE, family, seq, name, ""))
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                return False
            raise KernelError(error.errno, f"reading nft table {family} {name}: {error}") from error
        return True

    def remove(self, family: str, name: str) -> bool:
        """Take a table away, and what a replacement that was broken off left; whether there was one. Raises KernelError."""
        found = [each for each in (name, _beside(name)) if self.has(family, each)]
        for each in found:
            self._commit(nf_wire.remove(family, each), f"removing nft table {family} {each}")
        return bool(found)

    def change(self, table: nf_wire.Table, add: Elements, take: Elements) -> None:
        """Put keys into sets of a table and take others out, all at once. add, take: keys by the name of the set. Raises
        KernelError, with ENOENT where the table or a key to be taken out is not there (nothing is done then)."""
        messages = [one for name, keys in take.items() for one in nf_wire.remove_elements(table, name, keys)]
        messages += [one for name, keys in add.items() for one in nf_wire.add_elements(table, name, keys)]
        if messages:
            self._commit(messages, f"sets of nft table {table.family} {table.name}")

    def is_formed(self, table: nf_wire.Table) -> bool:
        """Whether a table stands as it should, whatever is in its sets. Raises KernelError.

        Chains are asked by name, since the kernel dumps those of all tables, of which kube-proxy has thousands; that there
        are none beside them is known by the number of things in the table. (One without a hook has nothing but rules.)
        """
        try:
            size = self._get(nf_wire.GETTABLE, table, "")
            chains = [
                self._get(nf_wire.GETCHAIN, table, chain.name) for chain in table.chains if chain.hook is not None
            ]
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        rules, sets = (self._read(kind, table) for kind in (nf_wire.GETRULE, nf_wire.GETSET))
        return nf_wire.is_formed(table, nf_wire.Found(size, chains, rules, sets))

    def elements(self, table: nf_wire.Table, one: nf_wire.Set) -> list[bytes]:
        """The keys in a set; none where there is no such table. Raises KernelError."""
        bodies = self._read(nf_wire.GETSETELEM, table, one.name)
        return [key for body in bodies for key in nf_wire.elements(body, one.key_size)]

    def element_slices(self, table: nf_wire.Table, one: nf_wire.Set) -> Iterator[tuple[list[bytes], bool]]:
        """The same as they come, some 2,000 at a time, each time with whether nftables changed meanwhile (then some may be
        missing). Until it is done nothing else can be asked on this socket. Raises KernelError."""
        for bodies, changed in self._receipts(nf_wire.GETSETELEM, table, one.name):
            yield [key for body in bodies for key in nf_wire.elements(body, one.key_size)], changed

    def read_content(self, table: content.Table, wanted: content.Content) -> content.Content | None:
        """All of a table, in terms of what it should be; None where there is none. Raises KernelError."""
        if not self.has(table.family, table.name):
            return None
        sets = self._read(nf_wire.GETSET, table)
        elements = {name: self._read(nf_wire.GETSETELEM, table, name) for name in content.names_of(sets)}
        rules, chains = self._read(nf_wire.GETRULE, table), self._read(nf_wire.GETCHAIN, table)
        return content.understood(content.Bodies(sets, elements, nf_wire.of_table(table.name, chains), rules), wanted)

    def change_content(self, table: content.Table, there: content.Content | None, wanted: content.Content) -> bool:
        """Make one of the other, at once; whether there was anything to do. Raises KernelError; ENOENT, EEXIST: somebody
        altered the table meanwhile."""
        found = content.make(table, wanted) if there is None else content.difference(table, there, wanted)
        if found:
            self._commit(found, f"changing nft table {table.family} {table.name}")
        return bool(found)

    def replace_content(self, table: content.Table, wanted: content.Content) -> None:
        """Make a table anew, whatever stood under its name: packets are judged all the time. Raises KernelError."""
        self._replace_beside(
            table, lambda name: [*nf_wire.remove(table.family, name), *content.make(table._replace(name=name), wanted)]
        )

    def rules_counted(self, table: content.Table, beside: bool = False) -> list[tuple[str, str, int]]:
        """Of each rule that counts its chain, its comment and the packets it saw; beside: also of what a replacement that
        was broken off left. Raises KernelError."""
        bodies = self._read(nf_wire.GETRULE, table)
        if beside:
            bodies += self._read(nf_wire.GETRULE, table._replace(name=_beside(table.name)))
        return list(content.counted(bodies))

    def stands(self, table: Named) -> bool:
        """Whether there is a table, or what a replacement that was broken off left of it. Raises KernelError."""
        return any(self.has(table.family, name) for name in (table.name, _beside(table.name)))

    def counted(self, table: nf_wire.Table, counter: str) -> int:
        """The packets that a counter saw, 0 where there is no such counter. Raises KernelError."""
        try:
            return nf_wire.counted(self._get(nf_wire.GETOBJ, table, counter))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return 0
            raise

    def _get(self, kind: int, table: Named, name: str) -> memoryview:
        """The body of one thing. Raises KernelError, with ENOENT where it is not there."""
        try:
            return self.ask(lambda seq: nf_wire.get(kind, table.family, seq, table.name, name))
        except KernelError as error:
            raise KernelError(error.errno, f"reading nft table {table.family} {table.name}: {error}") from error

    def _commit(self, messages: list[nf_wire.Message], what: str) -> None:
        if dry.run:
            return
        first = self.take_seqs(len(messages) + 2)
        last = first + len(messages)
        try:
            self._socket.send(nf_wire.batch(messages, first))
            refused: KernelError | None = None
            while True:
                for message in wire.split(self._socket.recv(_RECV)):
                    if message.kind != wire.NLMSG_ERROR or not first <= message.seq <= last:
                        continue
                    refusal = refusal_of(message)
                    if refusal is not None and refused is None:
                        refused = KernelError(refusal.errno, f"{what}: {refusal}")
                    if message.seq == last or (refused and message.seq == first):  # the whole was refused at its start
                        if refused is not None:
                            raise refused
                        return
        except KernelError:
            raise
        except OSError as error:
            raise KernelError(error.errno or errno.ETIMEDOUT, f"{what}: no answer: {error}") from error

    def _read(self, kind: int, table: Named, name: str = "") -> list[memoryview]:
        """The bodies of a dump that nobody's change has spoilt."""
        for _ in range(TRIES):
            bodies: list[memoryview] = []
            spoilt = False
            try:
                for part, changed in self._receipts(kind, table, name):
                    bodies += part
                    spoilt |= changed
            except KernelError as error:
                if error.errno == errno.ENOENT:
                    return []
                raise
            if not spoilt:
                return bodies
        where = f"{table.family} {table.name}"
        raise KernelError(errno.EINTR, f"reading nft table {where}: others change nftables all the time")

    def _receipts(self, kind: int, table: Named, name: str) -> Iterator[tuple[list[memoryview], bool]]:
        """A dump as it comes: bodies, and whether somebody changed nftables meanwhile. Raises KernelError."""
        what = f"reading nft table {table.family} {table.name}"
        seq = self.take_seqs(1)
        try:
            self._socket.send(nf_wire.dump(kind, table.family, seq, table.name, name))
            ended = False
            while not ended:
                bodies: list[memoryview] = []
                changed = False
                for message in wire.split(self._socket.recv(_RECV)):
                    if message.seq != seq:
                        continue
                    changed |= bool(message.flags & wire.NLM_F_DUMP_INTR)
                    if message.kind not in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
                        bodies.append(message.body)
                    elif (refusal := refusal_of(message)) is not None:
                        raise KernelError(refusal.errno, f"{what}: {refusal}")
                    else:
                        ended = True
                yield bodies, changed
        except KernelError:
            raise
        except OSError as error:
            raise KernelError(error.errno or errno.ETIMEDOUT, f"{what}: no answer: {error}") from error
