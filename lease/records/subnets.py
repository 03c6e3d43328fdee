"""An index of subnets: who overlaps whom, answered without looking at everybody. Pure.

The store may hold subnets of any length (flannel allows SubnetLen to change under a running cluster), nearly always of
one. So: one dict of bases for each length that occurs; a question costs one look-up for each of these lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lease.model import WIDTH, Prefix, mask

Keys = str | dict[str, None]
"""The key of a base, or its keys in the order in which they came."""


class SubnetIndex:
    """A multiset of (prefix, key) pairs of one family: several keys may claim one prefix."""

    def __init__(self, family: int, length: int = 0, bases: dict[int, Keys] | None = None) -> None:
        """bases: of subnets of that length, to begin with."""
        self._family = family
        self._by_length: dict[int, dict[int, Keys]] = {length: bases} if bases else {}

    @classmethod
    def of(cls, family: int, claims: Iterable[tuple[Prefix, str]]) -> SubnetIndex:
        """An index of many claims at once."""
        index = cls(family)
        for subnet, key in claims:
            index.add(subnet, key)
        return index

    def add(self, subnet: Prefix, key: str) -> None:
        """Enter a claim; entering it twice is once."""
        bases = self._by_length.setdefault(subnet.length, {})
        keys = bases.setdefault(subnet.base, key)
        if isinstance(keys, dict):
            keys[key] = None
        elif keys != key:
            bases[subnet.base] = {keys: None, key: None}

    def remove(self, subnet: Prefix, key: str) -> None:
        """Take a claim out; one that is not there is no error."""
        bases = self._by_length.get(subnet.length, {})
        keys = bases.get(subnet.base)
        if isinstance(keys, dict):
            keys.pop(key, None)
            if len(keys) == 1:
                (bases[subnet.base],) = keys
        elif keys == key:
            del bases[subnet.base]
            if not bases:
                del self._by_length[subnet.length]

    def overlapping(self, subnet: Prefix) -> Iterator[str]:
        """The keys of all claims that share an address with a subnet."""
        for length, bases in self._by_length.items():
            if length <= subnet.length:
                yield from _each(bases.get(subnet.base & mask(self._family, length)))
            elif 1 << (length - subnet.length) < len(bases):
                step = WIDTH[self._family] - length
                for index in range(1 << (length - subnet.length)):
                    yield from _each(bases.get(subnet.base + (index << step)))
            else:
                for base, keys in bases.items():
                    if subnet.holds(base):
                        yield from _each(keys)

    def free(self, subnet: Prefix) -> bool:
        """Whether nobody claims an address of it."""
        return next(self.overlapping(subnet), None) is None


def _each(keys: Keys | None) -> Iterable[str]:
    return (keys,) if isinstance(keys, str) else keys or ()
