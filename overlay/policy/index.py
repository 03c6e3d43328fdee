"""Which pods a selector means, for ten thousand of them: each label's value has the pods that have it, as bits of a number.

Built for one label's key when a selector first names it. A pod that comes, changes or goes changes bits alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lease.families import FAMILIES
from lease.model import Prefix
from overlay.policy.columns import Columns
from overlay.policy.model import EXISTS, IN, NOT_IN, Expression, Labels, Pod, PodPeer, Selector, matches


class Index:
    """Pods and namespaces. A pod has a place; that of one that went is given to the next."""

    def __init__(self, pods: Iterable[Pod] = (), namespaces: Mapping[str, Labels] | None = None) -> None:
        self._columns = Columns()
        self._places: dict[str, int] = {}
        """By key."""
        self.namespaces: dict[str, Labels] = dict(namespaces or {})
        self._free: list[int] = []
        self._all = 0
        self._of_namespace: dict[str, int] = {}
        self._of_node: dict[str, int] = {}
        self._values: dict[str, dict[str, int]] = {}
        """By label's key and value."""
        self._load(pods)

    def _load(self, pods: Iterable[Pod]) -> None:
        """At once: a bit of a large number set alone costs the whole number."""
        namespaces: dict[str, list[int]] = {}
        nodes: dict[str, list[int]] = {}
        there = []
        for place, pod in enumerate(pods):
            self._columns.put(place, pod)
            self._places[pod.key] = place
            if not pod.alone:
                there.append(place)
                namespaces.setdefault(pod.namespace, []).append(place)
                nodes.setdefault(pod.node, []).append(place)
        self._all = _bits(there)
        self._of_namespace = {name: _bits(places) for name, places in namespaces.items()}
        self._of_node = {name: _bits(places) for name, places in nodes.items()}

    def put(self, pod: Pod) -> Pod | None:
        """A pod came or changed; what it was."""
        was = self.remove(pod.key)
        place = self._free.pop() if self._free else len(self._columns.keys)
        self._columns.put(place, pod)
        self._places[pod.key] = place
        if not pod.alone:
            self._mark(pod, 1 << place)
        return was

    def remove(self, key: str) -> Pod | None:
        """A pod went; what it was."""
        place = self._places.pop(key, None)
        if place is None:
            return None
        pod = self._columns.pod(place)
        self._columns.take_out(place)
        self._free.append(place)
        if not pod.alone:
            self._mark(pod, 1 << place)
        return pod

    def _mark(self, pod: Pod, bit: int) -> None:
        """Set what is not set, and the reverse."""
        self._all ^= bit
        _flip(self._of_namespace, pod.namespace, bit)
        _flip(self._of_node, pod.node, bit)
        for key, values in self._values.items():
            if (value := pod.labels.get(key)) is not None:
                _flip(values, value, bit)

    # --- what is asked

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Pod]:
        """All pods, also those that no policy means; while none comes or goes."""
        return map(self._columns.pod, self._places.values())

    def get(self, key: str) -> Pod | None:
        """A pod by its key."""
        place = self._places.get(key)
        return None if place is None else self._columns.pod(place)

    def holders(self, address: bytes) -> int:
        """How many pods have an address."""
        return sum(not self._columns.common(place).alone for place in self._columns.having(address))

    def on_node(self, node: str) -> int:
        """The pods of a node, as bits."""
        return self._of_node.get(node, 0)

    def uses(self, node: str, subnet: Prefix) -> bool:
        """Whether a pod of a node has an address of a subnet."""
        size = FAMILIES[subnet.family].size
        addresses = (each for pod in self.members(self.on_node(node)) for each in pod.addresses)
        return any(len(each) == size and subnet.holds(int.from_bytes(each, "big")) for each in addresses)

    def in_namespace(self, name: str) -> int:
        """Those of a namespace."""
        return self._of_namespace.get(name, 0)

    def selected(self, selector: Selector) -> int:
        """Those whose labels match."""
        bits = self._all
        for each in selector:
            bits &= self._matching(each)
        return bits

    def of_peer(self, peer: PodPeer, namespace: str) -> int:
        """Those that a rule of a policy in that namespace means."""
        if peer.namespaces is None:
            bits = self.in_namespace(namespace)
        elif not peer.namespaces:
            bits = self._all
        else:
            bits = 0
            for name, labels in self.namespaces.items():
                if matches(peer.namespaces, labels):
                    bits |= self.in_namespace(name)
        return bits if peer.pods is None else bits & self.selected(peer.pods)

    def values_of(self, key: str) -> Iterable[str]:
        """The values that a label has somewhere."""
        return self._of_key(key)

    def members(self, bits: int) -> Iterator[Pod]:
        """The pods behind bits."""
        return map(self._columns.pod, self.places(bits))

    def places(self, bits: int) -> Iterator[int]:
        """The places behind bits."""
        data = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        for at, byte in enumerate(data):
            left = byte
            while left:
                low = left & -left
                yield (at << 3) + low.bit_length() - 1
                left ^= low

    def addresses(self, place: int) -> tuple[bytes, ...]:
        """The addresses of the pod of a place."""
        return self._columns.addresses(place)

    def named_ports(self) -> dict[tuple[str, int], dict[int, list[int]]]:
        """Of each port's name and protocol, by number the places of pods that have it."""
        return self._columns.named_ports()

    def _matching(self, expression: Expression) -> int:
        values = self._of_key(expression.key)
        named = expression.values if expression.operator in (IN, NOT_IN) else values
        bits = 0
        for value in named:
            bits |= values.get(value, 0)
        return bits if expression.operator in (IN, EXISTS) else ~bits

    def _of_key(self, key: str) -> dict[str, int]:
        found = self._values.get(key)
        if found is None:
            places: dict[str, list[int]] = {}
            for place in self.places(self._all):
                value = self._columns.common(place).labels.get(key)
                if value is not None:
                    places.setdefault(value, []).append(place)
            found = self._values[key] = {value: _bits(those) for value, those in places.items()}
        return found


def _flip(bits: dict[str, int], name: str, bit: int) -> None:
    """What has none left is not kept."""
    if now := bits.get(name, 0) ^ bit:
        bits[name] = now
    else:
        del bits[name]


def _bits(places: list[int]) -> int:
    if not places:
        return 0
    data = bytearray(max(places) // 8 + 1)
    for place in places:
        data[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(data, "little")
