"""What a DeviceController tells a Datapath, without one."""

from __future__ import annotations

from overlay.control.inputs import Tunnel
from overlay.peers.datapath import Datapath


class TunnelNews:
    """The tunnel device as its controller would leave it, told to a datapath."""

    def __init__(self) -> None:
        self.tunnel = Tunnel("flannel.1", 0, 1450, up=False)

    def stands(self, path: Datapath, index: int) -> bool:
        """It was there, and up."""
        return self._tell(path, ifindex=index, up=True, checks=self.tunnel.checks + 1)

    def went_down(self, path: Datapath) -> bool:
        return self._tell(path, up=False, downs=self.tunnel.downs + 1)

    def set_up(self, path: Datapath) -> bool:
        """It had been found down; the notification that it is up has not come."""
        tunnel = self.tunnel
        return self._tell(path, up=True, rising=True, downs=tunnel.downs + 1, checks=tunnel.checks + 1)

    def went(self, path: Datapath) -> bool:
        return self._tell(path, ifindex=0, up=False, downs=self.tunnel.downs + 1, makes=self.tunnel.makes + 1)

    def made(self, path: Datapath, index: int) -> bool:
        tunnel = self.tunnel
        return self._tell(path, ifindex=index, up=True, rising=True, makes=tunnel.makes + 1, checks=tunnel.checks + 1)

    def _tell(self, path: Datapath, **fields: object) -> bool:
        self.tunnel = self.tunnel._replace(**fields)  # type: ignore[arg-type]
        return path.set_tunnel(self.tunnel)
