"""Which networks of ours this node is in, or was in before: by the file that names our device, and the network config.

What uninstalls, and what takes an earlier network's things away, asks here; names alone say what is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from lease.config import parse_config
from lease.families import FAMILIES
from lease.fields import ConfigError
from lease.model import Prefix
from overlay.backends.choose import backend_of, network_of
from overlay.cni import lists
from overlay.process.files import read, read_text
from overlay.settings.settings import Settings

MOST = 8
"""Names that are read of a device file."""
FIRST = 4
"""The family whose files have no family in their names."""


class Owned:
    """The traces of ours on this node, in files."""

    def __init__(self, settings: Settings, named: Iterable[int] = ()) -> None:
        """named: numbers of networks that are known to be ours without a trace."""
        self._settings, self._named = settings, tuple(named)
        self._of_env = lists.networks_of(settings.subnet_file)
        """Read now: who uninstalls takes that file away first."""
        self.planned: dict[int, Prefix] = {}
        """By family: the pod network whose routes this agent has in the kernel, or may have. Set by peers/controller.py."""

    def device_file(self, family: int) -> str:
        """The file that names our device of a family."""
        return f"{self._settings.run_dir}/device{'' if family == FIRST else '-v6'}"

    def recorded_devices(self, family: int) -> list[str]:
        """What the file names: our device, and those of networks before of which something is left."""
        return read_text(self.device_file(family)).split()[:MOST]

    def networks(self) -> list[int]:
        """The numbers of our networks on this node."""
        names = [name for family in FAMILIES for name in self.recorded_devices(family)]
        found = {*map(network_of, names), *self._named}
        with suppress(ConfigError):
            config = parse_config(read(self._settings.net_config_path) or b"")
            found |= {backend_of(config.backend, FAMILIES[family]).network for family in config.pools}
        return sorted(network for network in found if network is not None)

    def prefixes(self, family: int) -> list[Prefix]:
        """The pod networks of a family that this node is or was in."""
        recorded = (*lists.recorded_networks(self._settings.run_dir), *self._of_env, *self.planned.values())
        found = {network for network in recorded if network.family == family}
        with suppress(ConfigError):
            pool = parse_config(read(self._settings.net_config_path) or b"").pool(family)
            found |= {pool.network} if pool is not None else set()
        return sorted(found)

    def flannel_has_it(self) -> bool:
        """Whether the node is flannel's (again): its network list names flannel's plugin. Then device, list, subnet.env,
        bridges and annotations are flannel's, too."""
        folder = self._settings.cni_conf_dir
        return bool(folder) and lists.names_plugin(f"{folder}/{lists.CONFLIST}", "flannel")
