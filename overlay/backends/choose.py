"""Which backend a network config names, and which devices of any backend are a network's. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lease.backend_config import BackendConfig, HostGwConfig, IpipConfig, VxlanConfig
from lease.families import V4, Family
from overlay.backends import hostgw, ipip, vxlan, wireguard
from overlay.backends.base import Backend
from overlay.backends.direct import Direct


def backend_of(config: BackendConfig, family: Family) -> Backend:
    """The backend that the network config names."""
    if isinstance(config, VxlanConfig):
        made = vxlan.Vxlan(config._replace(direct_routing=False), family)
        return Direct(made) if config.direct_routing else made
    if isinstance(config, HostGwConfig):
        return hostgw.HostGw(family)
    if isinstance(config, IpipConfig):
        plain = ipip.Ipip(config._replace(direct_routing=False), family)
        return Direct(plain) if config.direct_routing else plain
    return wireguard.Wireguard(config, family)


def mark_of(backend: Backend) -> str:
    """What the file of our device says of a backend: the device's name, or the type where it has none."""
    return backend.tunnel.name if backend.tunnel is not None else backend.type


_NETWORKS: Mapping[str, int] = {
    hostgw.TYPE: hostgw.NETWORK,
    ipip.NAME: ipip.NETWORK,
    wireguard.NAME: wireguard.NETWORK,
    wireguard.NAME6: wireguard.NETWORK,
}


def network_of(mark: str) -> int | None:
    """The number of the network of such a mark, None where it is no name of ours or flannel's."""
    return _NETWORKS.get(mark, vxlan.network_of(mark))


def tunnel_devices(networks: Iterable[int], family: Family) -> dict[str, tuple[str, ...]]:
    """The names and kinds of the tunnel devices that these networks may have for a family."""
    found: dict[str, tuple[str, ...]] = {}
    for network in networks:
        if network == ipip.NETWORK:
            found |= {ipip.NAME: (ipip.KIND,)} if family is V4 else {}
        elif network == wireguard.NETWORK:
            kinds = wireguard.KIND, wireguard.USERSPACE
            found |= {wireguard.NAME: kinds} if family is V4 else {wireguard.NAME6: kinds, wireguard.NAME: kinds}
        elif network != hostgw.NETWORK:
            found[vxlan.device_name(network, family)] = (vxlan.KIND,)
    return found
