"""Status: an immutable picture of the agent, and its JSON. What serve, the operator's command and tests read.

The JSON is an interface: names are only added (docs/operations.md has each of them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lease.model import ip_text, mac_text
from lease.records.packed import number, unpack
from overlay.kernel.route.entries import Kind
from overlay.peers import plan


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """Our own lease. left_s: until the etcd lease ends, None for a reservation."""

    subnet: str
    key: str
    public_ip: str
    vtep_mac: str
    identity: str
    how: str
    left_s: float | None


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """The vxlan device as it should be, and whether it is."""

    name: str
    index: int
    vni: int
    port: int
    local: str
    lower: str
    mtu: int
    in_order: bool


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One peer. entries: "ok", or what is missing."""

    subnet: str
    public_ip: str
    vtep_mac: str
    node: str
    path: str
    entries: str


class Peers:
    """All peers as they were, still packed: the owner thread hands them over in a moment, and who asked writes them out."""

    def __init__(self, node: plan.Node | None, packed: tuple[bytes, ...], missing: dict[int, int]) -> None:
        self._node, self._packed, self._missing = node, packed, missing

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[PeerStatus]:
        node = self._node
        if node is None:
            return
        for lease in map(unpack, self._packed):
            end = lease.v4
            assert end is not None
            entries = plan.entries(node, lease)
            bits = self._missing.get(number(end.subnet), 0)
            missing = [kind.name.lower() for kind in Kind if bits & 1 << kind]
            yield PeerStatus(
                str(end.subnet),
                ip_text(4, end.public_ip),
                mac_text(end.mac or 0),
                lease.node.split("/")[1] if lease.node.count("/") == 2 else "",
                "vxlan" if entries.fdb is not None else "direct",
                "ok" if not missing else "missing " + ", ".join(missing),
            )


@dataclass(frozen=True, slots=True)
class Difference:
    """One kernel entry that is not as it should be."""

    kind: str
    entry: str
    state: str
    refused: str
    tries: int


@dataclass(frozen=True, slots=True)
class Status:
    """All of it. problems: by subject, one line each; refused: records by key."""

    version: str
    ready: bool
    store: str
    store_down: str
    underlay: str
    network: str
    lease: LeaseStatus | None
    device: DeviceStatus | None
    peers: Peers | tuple[PeerStatus, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    in_the_way: tuple[str, ...] = ()
    retained: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    uptime_s: float = 0.0
    differing: int = 0

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        made = dataclasses.asdict(dataclasses.replace(self, peers=()))
        return made | {"peers": [dataclasses.asdict(peer) for peer in self.peers]}
