"""Subnets that this node lost, on which pods of it still run: kept from their new owners until the last of those is gone.

Belongs to the agent's owner thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from lease.config import NetworkConfig
from lease.model import Lease, Prefix, ip_text
from overlay.control.health import Health
from overlay.kernel.netlink import KernelError
from overlay.node.links import Host
from overlay.process.log import log


class Retained:
    """Them, by what we lost while we ran and by the bridges that are there."""

    def __init__(self, host: Host, health: Health) -> None:
        self._host, self._health = host, health
        self.subnets: list[Prefix] = []

    def lost(self, subnet: Prefix) -> None:
        """It is not ours any more."""
        self.subnets.append(subnet)

    def held(self, subnet: Prefix) -> None:
        """It is ours (again)."""
        if subnet in self.subnets:
            self.subnets.remove(subnet)

    def find(self, config: NetworkConfig, own: Prefix) -> None:
        """Those that an earlier run lost are on their bridges yet."""
        for subnet in self._host.lost_subnets(config, own):
            if subnet not in self.subnets:
                self.subnets.append(subnet)
                log.warning(
                    "subnet.retained", subnet=str(subnet), because="a bridge of pods on this node has its gateway"
                )

    def let_go(self, tunnel: int) -> bool:
        """Forget those that no pod uses any more; whether there was one. tunnel: the device's number, 0: there is none."""
        before = len(self.subnets)
        for subnet in list(self.subnets):
            try:
                used = self._host.still_used(subnet, tunnel)
            except KernelError as error:
                self._health.problem("bridge", str(error))
                continue
            self._health.solved("bridge")
            if not used:
                self.subnets.remove(subnet)
                log.info("subnet.let_go", subnet=str(subnet), because="no pod of this node uses it any more")
        return len(self.subnets) < before

    def tell(self, refused: Iterable[Lease]) -> None:
        """What their pods suffer from, an operator must see. refused: records, among them their owners'."""
        records = list(refused) if self.subnets else []
        self._health.tell("retained", "; ".join(_about(subnet, records) for subnet in self.subnets))


def _about(subnet: Prefix, refused: Iterable[Lease]) -> str:
    whose = "nobody holds it now"
    for lease in refused:
        if lease.v4 is not None and lease.v4.subnet.overlaps(subnet):
            whose = f"{lease.key} is {ip_text(4, lease.v4.public_ip)}'s"
            break
    return (
        f"{subnet} is not ours any more ({whose}), and pods of this node run on it: no other node reaches them;"
        " make them again (kubectl delete pod, or detach and attach)"
    )
