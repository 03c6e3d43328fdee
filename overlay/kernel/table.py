"""A table: one kind of entry that the kernel holds for peers, with all that is particular to it. Pure.

The reconciler, the reading of the kernel whole and the status take a list of tables, in the order in which a peer's entries
are put in place, and know nothing else of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from overlay.kernel.route.entries import TUNNEL


class Where(NamedTuple):
    """How it is known which entries are ours. roles: of devices, by interface number. network: first and last address of
    the pod network. is_wanted: whether an entry of a key is wanted. is_copy: whether an entry, as found, leads where one of
    ours does, by another key: flannel's of the same peer."""

    roles: Mapping[int, int]
    network: tuple[int, int]
    is_wanted: Callable[[Any], bool]
    is_copy: Callable[[Any], bool] = lambda _found: False


class Table:
    """One kind of entry. Subclasses say how it is put, removed, dumped and parsed (kernel/route/tables.py)."""

    name: ClassVar[str]
    """In status, metrics and log."""
    stands_on: ClassVar[tuple[int, ...]] = (TUNNEL,)
    """The roles of the devices on which its entries can stand."""
    needs_up: ClassVar[bool] = False
    """An entry can be put on a device that is up alone."""
    lost_when_down: ClassVar[bool] = True
    """Its entries go when their device goes down; all go when the device is deleted."""
    takes_over: ClassVar[bool] = False
    """An entry of another key (another metric) may serve the same peer: it is removed only after ours stands. Such
    entries lead traffic, so they are removed before all others."""
    watched: ClassVar[bool] = False
    """Entries of others may be preferred to ours: it is reported."""
    empty: ClassVar[tuple[int, ...]] = ()
    """What the kernel says to a dump where there is nothing at all."""

    def role(self, value: Any) -> int:
        """The role of the device that an entry stands on."""
        del value
        return TUNNEL

    def put(self, seq: int, key: Any, value: Any, oif: int, replace: bool) -> bytes:
        """The message that puts an entry. replace: one of ours stands there."""
        raise NotImplementedError

    def remove(self, seq: int, key: Any, value: Any, oif: int) -> bytes:
        """The message that removes an entry; oif: 0 where its device is none of ours."""
        raise NotImplementedError

    def dump(self, seq: int, oif: int) -> bytes:
        """The request for all entries; oif: the tunnel device."""
        raise NotImplementedError

    def parse(self, body: Any) -> Any:
        """An entry as the kernel shows it, None for anything else."""
        raise NotImplementedError

    def ours(self, found: Any, where: Where) -> tuple[Any, Any] | None:
        """Key and value of an entry of ours, None for one that is not."""
        raise NotImplementedError

    def text(self, key: Any) -> str:
        """An entry's key as people write it."""
        raise NotImplementedError
