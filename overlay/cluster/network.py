"""The network config as an input: read from the store or from a file, kept as it is where the new one cannot be used."""

from __future__ import annotations

from collections.abc import Mapping

from lease.config import ConfigError, NetworkConfig, parse_config
from lease.model import Prefix
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs
from overlay.process.log import log

UNBUILT = "needs an IPv6 datapath, which is not built yet; allowed is IPv4 alone"


class NetworkConfigInput:
    """It. place: where it stands, for messages."""

    def __init__(self, current: CurrentInputs, health: Health, place: str) -> None:
        self._current, self._health, self._place = current, health, place

    def read(self, text: bytes | None) -> None:
        """It says this now; None: there is none."""
        running = self._current.inputs.config
        keeps = "" if running is None else "; the running config is kept"
        if text is None:
            words = f"no network config at {self._place}; waiting for it{keeps}"
            self._health.problem("config", words, harmless=True)
            return
        try:
            config = parse_config(text)
            if config.v4 is None or config.v6 is not None:
                raise ConfigError(f"{'EnableIPv4: false' if config.v4 is None else 'EnableIPv6: true'} {UNBUILT}")
        except ConfigError as error:
            self._health.problem("config", f"{self._place}: {error}{keeps}", harmless=True)
            return
        end = self._current.inputs.end(4)
        if running is not None and end is not None and not self._fits(config, end.subnet):
            drain = "delete its Node" if self._current.inputs.settings.kube else "restart the agent"
            self._health.problem(
                "config",
                f"the new config ({config.v4}) does not hold our subnet {end.subnet}; the running config is kept:"
                f" drain this node and {drain}",
                harmless=True,
            )
            return
        if self._current.set(config=config):
            log.info("config", network=str(config.v4.network), subnets=str(config.v4), **backend_fields(config))
        self._health.solved("config")

    def _fits(self, config: NetworkConfig, subnet: Prefix) -> bool:
        """Whether we may hold a subnet: on Kubernetes the cluster gave it, and SubnetLen, Min and Max are not asked."""
        assert config.v4 is not None
        kube = self._current.inputs.settings.kube
        return config.v4.network.covers(subnet) if kube else config.v4.allows(subnet)


def network_status(config: NetworkConfig | None) -> Mapping[str, object] | None:
    """For the status."""
    if config is None:
        return None
    pools = (("ipv4", config.v4), ("ipv6", config.v6))
    return {
        "subnets": {
            name: {
                "network": str(pool.network),
                "length": pool.length,
                "first": str(pool.subnet(0)),
                "last": str(pool.subnet(pool.size - 1)),
            }
            for name, pool in pools
            if pool is not None
        },
        "backend": {"type": "vxlan", **config.backend._asdict()},
    }


def backend_fields(config: NetworkConfig) -> Mapping[str, object]:
    """The backend's part, for log and status."""
    backend = config.backend
    return {
        "vni": backend.vni,
        "port": backend.port,
        "mtu": backend.mtu or "the underlay's",
        "direct_routing": backend.direct_routing,
    }
