"""Status: an immutable picture of the agent, and its JSON. What serve, the operator's command and tests read.

The JSON is an interface: names are only added (docs/operations.md has each of them).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
    peers: tuple[PeerStatus, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    in_the_way: tuple[str, ...] = ()
    retained: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    uptime_s: float = 0.0

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)
