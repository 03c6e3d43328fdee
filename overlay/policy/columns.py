"""Ten thousand pods in little memory: what pods of one Deployment have in common is kept once, and of each pod its key, two
numbers and its addresses, in columns. A Pod is made of them when it is asked for.

A place is a pod's index in every column.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from lease.families import FAMILIES
from overlay.policy.model import ContainerPort, Labels, Pod

T = TypeVar("T")


class Common(NamedTuple):
    """What pods of one Deployment have in common: the fields of a Pod of these names."""

    labels: Labels
    ports: tuple[ContainerPort, ...]
    alone: bool
    owner: str


class _Once(Generic[T]):
    """Values by a number each, as long as somebody uses them."""

    def __init__(self) -> None:
        self.values: list[T | None] = []
        self._uses = array("I")
        self._numbers: dict[Hashable, int] = {}
        self._free: list[int] = []

    def take(self, key: Hashable, value: T) -> int:
        """The number of a value, used once more. key: what it is known by, while it is used."""
        number = self._numbers.get(key)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.values[number] = value
            else:
                number = len(self.values)
                self.values.append(value)
                self._uses.append(0)
            self._numbers[key] = number
        self._uses[number] += 1
        return number

    def give(self, key: Hashable, number: int) -> None:
        """It is used once less."""
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._numbers[key]
            self.values[number] = None
            self._free.append(number)

    def __getitem__(self, number: int) -> T:
        value = self.values[number]
        assert value is not None
        return value


def _known_by(common: Common) -> Hashable:
    """Labels are shared where they are equal (sharing.py), and live as long as this; those that are not are other ones."""
    return common._replace(labels=id(common.labels))  # type: ignore[arg-type]


class Columns:
    """Pods by place."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        """None: nobody has the place."""
        self._commons: _Once[Common] = _Once()
        self._nodes: _Once[str] = _Once()
        self._common, self._node = array("I"), array("I")
        self._addresses = {number: bytearray() for number in FAMILIES}
        """The one of each family, zeros where there is none; as long as the last place that has one needs."""
        self._more: dict[int, tuple[bytes, ...]] = {}
        """All addresses of pods of which the columns cannot say them."""

    def put(self, place: int, pod: Pod) -> None:
        """A pod at a place that nobody has, at most one behind the last."""
        if place == len(self.keys):
            self.keys.append(None)
            self._common.append(0)
            self._node.append(0)
        common = Common(pod.labels, pod.ports, pod.alone, pod.owner)
        self.keys[place] = pod.key
        self._common[place] = self._commons.take(_known_by(common), common)
        self._node[place] = self._nodes.take(pod.node, pod.node)
        for number, family in FAMILIES.items():
            found = [each for each in pod.addresses if len(each) == family.size]
            if found:
                self._write(number, place, found[0])
        if self._said(place) != pod.addresses:
            self._more[place] = pod.addresses

    def take_out(self, place: int) -> None:
        """Nobody has a place any more."""
        common, node = self.common(place), self._nodes[self._node[place]]
        self._commons.give(_known_by(common), self._common[place])
        self._nodes.give(node, self._node[place])
        self.keys[place] = None
        self._more.pop(place, None)
        for number, family in FAMILIES.items():
            if len(self._addresses[number]) > place * family.size:
                self._write(number, place, bytes(family.size))

    def _write(self, number: int, place: int, address: bytes) -> None:
        column, size = self._addresses[number], FAMILIES[number].size
        if len(column) < (place + 1) * size:
            column += bytes((place + 1) * size - len(column))
        column[place * size : (place + 1) * size] = address

    def _said(self, place: int) -> tuple[bytes, ...]:
        """The addresses that stand in the columns, by family."""
        found = []
        for number, family in FAMILIES.items():
            address = bytes(self._addresses[number][place * family.size : (place + 1) * family.size])
            if any(address):
                found.append(address)
        return tuple(found)

    def common(self, place: int) -> Common:
        """What it has in common with others."""
        return self._commons[self._common[place]]

    def addresses(self, place: int) -> tuple[bytes, ...]:
        """All addresses of a pod."""
        return self._more.get(place) or self._said(place)

    def pod(self, place: int) -> Pod:
        """The pod of a place that somebody has."""
        key = self.keys[place]
        assert key is not None
        labels, ports, alone, owner = self.common(place)
        return Pod(
            key,
            key.partition("/")[0],
            self._nodes[self._node[place]],
            labels,
            self.addresses(place),
            ports,
            alone,
            owner,
        )

    def having(self, address: bytes) -> Iterator[int]:
        """The places of pods that have an address."""
        for number, family in FAMILIES.items():
            if family.size == len(address) and any(address):
                column, at = self._addresses[number], -1
                while (at := column.find(address, at + 1)) >= 0:
                    if at % family.size == 0 and at // family.size not in self._more:
                        yield at // family.size
        for place, those in self._more.items():
            if address in those:
                yield place

    def named_ports(self) -> dict[tuple[str, int], dict[int, list[int]]]:
        """Of each port's name and protocol, by number the places of pods that have it and are not alone."""
        ports = {
            number: common.ports
            for number, common in enumerate(self._commons.values)
            if common is not None and common.ports and not common.alone
        }
        found: dict[tuple[str, int], dict[int, list[int]]] = {}
        for place, number in enumerate(self._common):
            if number in ports and self.keys[place] is not None:
                for port in ports[number]:
                    found.setdefault((port.name, port.protocol), {}).setdefault(port.number, []).append(place)
        return found
