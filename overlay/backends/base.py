"""The contract of a backend: how peers are reached, as values. Pure; controllers make it so.

A backend may start with `entries` alone, slow and correct. `bulk` is the same for 20,000 peers at once; tests
compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

from lease.families import Family
from lease.model import Endpoint, Prefix
from overlay.kernel.route.entries import RouteKey
from overlay.kernel.route.fast import DumpMatcher
from overlay.kernel.route.link_wire import DeviceAttributes, IpipDevice, VxlanDevice, WireguardDevice
from overlay.kernel.table import Table

Entry = tuple[int, Any, Any]
"""The number of its table, key and value."""


class View(NamedTuple):
    """What a backend needs to know of the network and of this node. neighbours: prefixes of the underlay whose hosts can be
    asked for by ARP."""

    family: Family
    network: Prefix
    neighbours: tuple[Prefix, ...]


class Lower(NamedTuple):
    """What carries the tunnel: the number of the interface, our address on it, its MTU."""

    ifindex: int
    address: int
    mtu: int


DeviceSpec = VxlanDevice | IpipDevice | WireguardDevice
"""What the tunnel's device must be, of any backend that has one."""


IPPROTO_UDP = 17


class Outer(NamedTuple):
    """What packets of peers look like on the underlay, for guard and nat. protocol: of IP; port: of UDP, 0: it has none;
    vni: of this network's frames, not of another's on the same port; None: it has none. sealed: what does not come from a
    peer is refused by the kernel, since it is encrypted."""

    protocol: int
    port: int
    vni: int | None
    sealed: bool = False


class PackedPeers(Protocol):
    """The table of peers, packed (peers.table.PeerTable)."""

    @property
    def packed(self) -> Mapping[int, bytes]:
        """The peers, by subnet number."""

    @property
    def by_mac(self) -> Mapping[int, int | set[int]]:
        """Subnet numbers of peers, by MAC."""

    @property
    def lengths(self) -> Collection[int]:
        """Lengths of the peers' subnets."""


class Bulk(Protocol):
    """The fast way for packed peers, each by the number of its subnet (lease/records/packed.py)."""

    def usable(self, own: Endpoint) -> Callable[[int, bytes], bool]:
        """Whether a peer of a VNI (-1: it says none) and MAC has surely no `fault`."""

    def direct(self, packed: bytes) -> bool:
        """Whether a peer is reached without the tunnel."""

    def messages(self, number: int, packed: bytes, bits: int, seq: int, oifs: Mapping[int, int]) -> bytes | None:
        """Messages that put a peer's entries of these tables, where none stands yet, numbered `seq` + table. oifs:
        interfaces that are up, by role. None: ask `entries`."""

    def matcher(self, peers: PackedPeers, oifs: Mapping[int, int]) -> DumpMatcher:
        """For reading a dump, and notifications."""


class TunnelDevice(Protocol):
    """The device of a backend that encapsulates."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """As rtnetlink says it (IFLA_INFO_KIND); the first is the one that we make."""

    @property
    def name(self) -> str:
        """flannel's."""

    @property
    def shared(self) -> bool:
        """Whether one device carries both families."""

    def mtu(self, underlay_mtu: int) -> tuple[int, str]:
        """The tunnel's MTU, and why it is not the configured one ("" when it is)."""

    def device(self, lower: Lower, own: Endpoint) -> DeviceSpec:
        """What it must be for what we publish."""

    def replace_reason(self, wanted: DeviceSpec, found: DeviceAttributes) -> str | None:
        """Why a device cannot be changed into the wanted one and must be made again; None where it can."""

    def conflict(self, wanted: DeviceSpec, name: str, other: DeviceAttributes) -> str | None:
        """Why the kernel may refuse the wanted device beside another one of the node, and what to do; None: it does not."""

    def live_changes(self, wanted: DeviceSpec, found: DeviceAttributes) -> dict[str, str]:
        """What to change on a device that stays: attribute -> "old -> new" for people."""


class Backend(Protocol):
    """How peers are reached. Backends are compared: equal ones give equal entries."""

    @property
    def type(self) -> str:
        """BackendType in records."""

    @property
    def network(self) -> int:
        """The number of this network among those of one node: it names our tables and files."""

    @property
    def tunnel(self) -> TunnelDevice | None:
        """The device; None: it needs none."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """The kinds of entries it uses, in the order in which they are put in place."""

    @property
    def full(self) -> int:
        """The tables in which a peer reached by the tunnel has an entry, as bits."""

    @property
    def reaches_directly(self) -> bool:
        """Whether some peers may be reached without the tunnel."""

    @property
    def overhead(self) -> int:
        """Bytes by which the underlay's MTU must be larger than the tunnel's."""

    @property
    def has_vteps(self) -> bool:
        """Whether the base of each peer's subnet is an address of its node, on the tunnel's device."""

    def fault_of_own(self, public_ip: int, addresses: frozenset[int]) -> str | None:
        """Why peers could not reach this node by its public IP. addresses: of this node."""

    def fault(self, view: View, own: Endpoint, peer: Endpoint) -> str | None:
        """Why what a peer publishes for this backend cannot be used; None where it can."""

    def entries(self, view: View, peer: Endpoint) -> list[Entry]:
        """The entries of a peer without fault."""

    def route_key(self, view: View, subnet: Prefix) -> RouteKey:
        """The key of the route that a subnet would get."""

    def outer(self) -> Outer | None:
        """None: nothing encapsulates."""

    def bulk(self, view: View) -> Bulk | None:
        """The fast way, where there is one."""
