"""The network config as an input: read from the store or from a file, kept as it is where the new one cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lease.config import NetworkConfig, parse_config
from lease.families import FAMILIES
from lease.fields import ConfigError
from lease.model import Prefix
from lease.tenure.asked import asked_fault
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs
from overlay.process.log import log


class NetworkConfigInput:
    """It. place: where the config stands, for messages."""

    def __init__(self, current: CurrentInputs, health: Health, place: str) -> None:
        self._current, self._health, self._place = current, health, place
        self._refused: bytes | None = None
        """What the config says that this node's lease does not allow."""

    def judge_again(self) -> None:
        """The lease is another now, or is lost."""
        if self._refused is not None:
            self.read(self._refused)

    def read(self, text: bytes | None) -> None:
        """It says this now; None: there is none."""
        self._refused = None
        running = self._current.inputs.config
        keeps = "" if running is None else "; the running config is kept"
        if text is None:
            words = f"no network config at {self._place}; waiting for it{keeps}"
            self._health.problem("config", words, harmless=True)
            return
        try:
            config = parse_config(text)
        except ConfigError as error:
            self._health.problem("config", f"{self._place}: {error}{keeps}", harmless=True)
            return
        if running is not None and (fault := self._against_our_lease(config)):
            self._refused = text
            self._health.problem("config", fault, harmless=True)
            return
        if self._current.set(config=config):
            networks = _comma_list(pool.network for pool in config.pools.values())
            log.info("config", network=networks, subnets=_comma_list(config.pools.values()), **backend_fields(config))
            for fault in config.ignored:
                log.warning("config.ignored", reason=fault)
        self._health.solved("config")

    def _against_our_lease(self, config: NetworkConfig) -> str:
        """Why the lease that this node has does not allow it."""
        inputs = self._current.inputs
        own, first = inputs.own, min(config.pools)
        if own is None:
            return ""
        if first != own.first.subnet.family:  # by whose part a lease is found to be ours
            return (
                f"the new config's first family is {FAMILIES[first].text}, the running one's"
                f" {FAMILIES[own.first.subnet.family].text}; the running config is kept: restart the agent"
            )
        for end in own.ends if not inputs.lost else ():  # what is lost need not fit
            if end.subnet.family in config.pools and not self._fits(config, end.subnet):
                drain = "delete its Node" if inputs.settings.kube else "restart the agent"
                return (
                    f"the new config ({_comma_list(config.pools.values())}) does not contain our subnet {end.subnet};"
                    f" the running config is kept: drain this node and {drain}"
                )
        return ""

    def _fits(self, config: NetworkConfig, subnet: Prefix) -> bool:
        """Whether we may hold a subnet: on Kubernetes the cluster gave it, and SubnetLen, Min and Max are not asked."""
        pool = config.pool(subnet.family)
        if pool is None:
            return False
        settings = self._current.inputs.settings
        if settings.kube:
            return pool.network.covers(subnet)
        return pool.allows(subnet) or (subnet in settings.subnets and not asked_fault(config, subnet))


def _comma_list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def network_status(config: NetworkConfig | None) -> Mapping[str, object] | None:
    """For the status."""
    if config is None:
        return None
    shown = {name: value for name, value in config.backend._asdict().items() if name != "psk"}  # a secret
    return {
        "subnets": {
            FAMILIES[family].text.lower(): {
                "network": str(pool.network),
                "length": pool.length,
                "first": str(pool.subnet(0)),
                "last": str(pool.subnet(pool.size - 1)),
                "size": pool.size,
            }
            for family, pool in config.pools.items()
        },
        "backend": {"type": config.backend.type, **shown},
    }


def backend_fields(config: NetworkConfig) -> Mapping[str, object]:
    """The backend's part, for log and status."""
    fields = {**config.backend._asdict(), "type": config.backend.type}
    return {
        name: fields[name] or "the underlay's" if name == "mtu" else fields[name]
        for name in ("type", "vni", "port", "port6", "mtu", "mode", "direct_routing")
        if name in fields
    }
