"""Which backend a network config names, and which devices of any backend are a network's. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from lease.config import VxlanConfig
from lease.families import Family
from overlay.backends import vxlan
from overlay.backends.base import Backend
from overlay.backends.direct import Direct


def backend_of(config: VxlanConfig, family: Family) -> Backend:
    """The backend that the network config names."""
    made = vxlan.Vxlan(config._replace(direct_routing=False), family)
    return Direct(made) if config.direct_routing else made


def network_of(device: str) -> int | None:
    """The number of the network whose tunnel device has that name, None where it is no name of ours or flannel's."""
    return vxlan.network_of(device)


def tunnel_devices(networks: Iterable[int], family: Family) -> dict[str, str]:
    """The names and kinds of the tunnel devices that these networks may have for a family."""
    return {vxlan.device_name(network, family): vxlan.KIND for network in networks}
