"""Inputs: all that controllers share, as one frozen value, made anew when something in it changed.

Who owns a field sets it (compose.py wires them): links and addresses by node/links.py, the underlay by
node/underlay_source.py, configuration by cluster/records.py and cluster/live.py, the lease by cluster/ownership.py, the
tunnel device and `standing` by node/device.py, bridges and retained subnets by node/bridges.py, `synced_families` by
peers/controller.py, `bridge_filtered` by node/sysctls.py, `policed`, `policies_known` and `policies_settled` by
policy/controller.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lease.backend_config import BackendConfig
from lease.config import NetworkConfig, Pool
from lease.model import Endpoint, Lease, Prefix
from overlay.kernel.route.entries import Address, Link
from overlay.settings.settings import Settings

AddressKey = tuple[int, int, int]
"""Interface, address, prefix length."""


class Underlay(NamedTuple):
    """What carries the tunnel: the interface by which the kernel sends from `local`. local: the tunnel's source, an address
    of this node, mostly of the interface. public_ip: what we advertise. on_link: the interface's prefixes; neighbours: those
    of them whose hosts are ARP neighbours. arp: whether neighbours there can be asked. up: the interface is. carrier: it has
    one."""

    name: str
    ifindex: int
    mtu: int
    mac: int
    local: int
    public_ip: int
    on_link: tuple[Prefix, ...]
    arp: bool
    reason: str
    up: bool = True
    carrier: bool = True
    neighbours: tuple[Prefix, ...] = ()
    vrf: int = 0
    """The number of the VRF that the interface is in, 0: of none."""


class Tunnel(NamedTuple):
    """The tunnel device of a family, as its controller left it and events changed it since. ifindex: 0 while there is none.

    rising: we set it up, and the notification of that has not come: what older ones say is from before. downs, makes: how
    often its routes and neighbours, and how often also its FDB, were lost; a controller that remembers the counts it saw
    last knows what was lost meanwhile. checks: how often it was made sure of. mark: what the file of our device says
    (node/owned.py): the device, and behind it those of networks before, until nothing is left of these.
    """

    name: str
    ifindex: int
    mtu: int
    up: bool = True
    rising: bool = False
    downs: int = 0
    makes: int = 0
    checks: int = 0
    mark: str = ""


class Policed(NamedTuple):
    """There are policies. isolated: the addresses (packed) of pods of this node that some policy selects; former: subnets of
    a family that the network has not any more, and pods of this node have."""

    isolated: frozenset[bytes]
    former: tuple[Prefix, ...] = ()


class Inputs(NamedTuple):
    """What is known just now. None or empty: not yet."""

    settings: Settings
    """With what --live-settings and the Node's annotations say now."""
    config: NetworkConfig | None = None
    listed: bool = False
    """The first list from the store is in."""
    own: Lease | None = None
    """Our lease, without revisions: a write of our own record changes nothing for anybody."""
    displaced: bool = False
    """The lease is lost, or its Node is gone, and there is no other yet: no pod may get an address of it."""
    links: Mapping[int, Link] = {}
    addresses: Mapping[int, Mapping[AddressKey, Address]] = {}
    """By family."""
    underlays: Mapping[int, Underlay] = {}
    """By family."""
    tunnels: Mapping[int, Tunnel] = {}
    """By family; only while the device is ours to keep."""
    standing: Mapping[int, BackendConfig] = {}
    """By family: the backend by which the tunnel was made last. The network config may name another, whose lease or device
    is not had yet."""
    bridges: frozenset[str] = frozenset()
    """Names of the bridges that pods are attached to."""
    retained: tuple[Prefix, ...] = ()
    """Subnets that this node lost, on which pods of it still run."""
    cni_template: bytes | None = None
    """flannel's cni-conf.json, where there is one."""
    synced_families: frozenset[int] = frozenset()
    """Those of which all peers were in the kernel once, since we hold this lease."""
    public_key: bytes = b""
    """Of WireGuard; empty while there is none, or another backend."""
    published_key: bytes = b""
    """The one that our record is to say: after a rotation that of before, until our device has the new one."""
    bridge_filtered: bool | None = None
    """Whether br_netfilter shows the node's rules what is bridged; None: not looked yet."""
    policies_known: bool = False
    """Whether it is known which policies there are, or that they cannot be read and an agent before us enforced none."""
    policies_settled: bool = False
    """Whether a new pod meets all policies there are: they are in the kernel, or the store refuses this agent."""
    policed: Policed | None = None
    """What policies say of this node's pods; None: there is no policy, or none is enforced."""
    lost: bool = False
    """The lease is somebody else's, or its Node is gone: not that it was not renewed in time only (`displaced`)."""
    displacements: int = 0
    """How often we were displaced: what ended before anybody was asked is seen by this."""

    @property
    def synced(self) -> bool:
        """All peers were in the kernel once: of each family that our lease has and that can work here now."""
        able = {end.subnet.family for end in self.own.ends} & self.underlays.keys() if self.own is not None else set()
        return bool(self.synced_families) and able <= self.synced_families

    def pool(self, family: int) -> Pool | None:
        """The subnets of a family, None where it is not enabled or not known."""
        return self.config.pool(family) if self.config is not None else None

    def backend(self, family: int) -> BackendConfig | None:
        """The backend in force: of the tunnel that was made last; where there was none yet, that of the network config."""
        return self.standing.get(family) or (self.config.backend if self.config is not None else None)

    def others_devices(self, family: int) -> frozenset[str]:
        """The devices of the other families: WireGuard has modes with one for both."""
        return frozenset(tunnel.name for number, tunnel in self.tunnels.items() if number != family)

    def addresses_of(self, family: int) -> Mapping[AddressKey, Address]:
        """This node's addresses of a family."""
        return self.addresses.get(family, {})

    def end(self, family: int) -> Endpoint | None:
        """Our own endpoint of a family."""
        return self.own.endpoint(family) if self.own is not None else None


class CurrentInputs:
    """The inputs as they are now. Belongs to the owner thread."""

    def __init__(self, settings: Settings) -> None:
        self.inputs = Inputs(settings)

    def set(self, **fields: Any) -> bool:
        """Replace fields; whether any of them has another value now."""
        changed = {name: value for name, value in fields.items() if getattr(self.inputs, name) != value}
        if changed:
            self.inputs = self.inputs._replace(**changed)
        return bool(changed)

    def set_family(self, field: str, family: int, value: object | None) -> bool:
        """Replace one family's value in a field that is a mapping by family; None takes it out."""
        values = {number: other for number, other in getattr(self.inputs, field).items() if number != family}
        return self.set(**{field: values if value is None else {**values, family: value}})
