"""The guard and the pods' ports: when they are looked at, and what is told of them.

Belongs to the agent's owner thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from lease.config import NetworkConfig
from overlay.control.health import Health
from overlay.control.schedule import Steps
from overlay.firewall import antispoof, guard
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.nftables.wire import Table
from overlay.node.links import Host


class Defences:
    """Both of this node."""

    def __init__(
        self, requests: RequestSocket, host: Host, steps: Steps, health: Health, clock: Callable[[], float]
    ) -> None:
        self._sets, self._host, self._steps, self._health, self._clock = NetfilterSocket(), host, steps, health, clock
        self.guard = guard.Guard(self._sets, clock)
        self._pods = antispoof.AntiSpoof(self._sets, requests, clock)

    @property
    def port(self) -> int:
        """The netlink port of our own requests."""
        return self._sets.port

    def next_looks(self) -> Iterator[float]:
        """When something is to be done; what was refused waits for its retry."""
        asked = (("guard", self.guard.next_change), ("pods", self._pods.next_look))
        for name, ask in asked:
            at = None if self._steps.waits(name) else ask()
            if at is not None:
                yield at

    def links_changed(self, config: NetworkConfig | None) -> None:
        """Tell both by which interfaces packets of pods come. config: None while we hold no lease."""
        if config is not None and config.v4 is not None:
            self.guard.pods_behind(self._host.interfaces_in(config.v4.network))
        self._tell_pods()

    def _tell_pods(self) -> None:
        addresses = (each.address for each in self._host.addresses.values())
        self._pods.ports(self._host.links.values(), self._host.bridges, addresses)

    def touched(self, table: str) -> bool:
        """Somebody wrote to that table ("": to some): whether it is not another's alone."""
        guards, pods, due = table.endswith(guard.SUFFIX), table.endswith(antispoof.SUFFIX), self._steps.due
        due.guard = due.guard or guards or not table
        due.pods = due.pods or pods or not table
        return guards or pods

    # --- who may send VXLAN to us

    def look_at_guard(self, config: NetworkConfig) -> bool:
        """Before the first route of a peer, since its answer may be quick. Whether a check of it goes on."""
        steps = self._steps
        if steps.due.guard:
            steps.due.guard_check = False
        steps.step("guard", lambda: self._ensure_guard(config))
        if steps.waits("guard"):
            return False
        steps.tried("guard", lambda: self._go_on_with_guard(config))
        steps.step("strangers", self._name_strangers)
        return self.guard.checking()

    def _ensure_guard(self, config: NetworkConfig) -> None:
        table = _guard_table(config)
        if self._host.settings.vxlan_guard:
            self.guard.ensure(table)
        else:
            self.guard.remove(table)

    def _go_on_with_guard(self, config: NetworkConfig) -> None:
        if self._steps.due.guard_check and self._host.settings.vxlan_guard:
            self._steps.due.guard_check = False
            self.guard.begin_check(_guard_table(config))
        self.guard.check_slice()
        self.guard.apply()

    def _name_strangers(self) -> None:
        there = ", ".join(self.guard.strangers())
        self._health.tell(
            "strange frames",
            there
            and f"VXLAN of our VNI comes from {there}, an address that no peer's record has: it is dropped. If those are"
            " nodes of this network whose frames leave by another address than their PublicIP: --public-ip there, or"
            " --vxlan-guard=false here",
        )

    # --- that each pod sends from its own addresses

    def look_at_pods(self, config: NetworkConfig) -> None:
        """Where it is due, or a pod is to be looked at again."""
        steps = self._steps
        at = None if steps.waits("pods") else self._pods.next_look()
        if not steps.due.pods and at is not None and at <= self._clock():
            steps.tried("pods", self._pods.look)
        steps.step("pods", lambda: self._ensure_pods(config))

    def _ensure_pods(self, config: NetworkConfig) -> None:
        assert config.v4 is not None
        table = antispoof.table(config.backend.vni)
        if self._host.settings.pod_antispoof:
            self._tell_pods()
            self._pods.ensure(table, config.v4.network)
        else:
            self._pods.remove(table)

    # --- what is told

    def mended(self) -> Counter[str]:
        """How often somebody else had altered a table."""
        return Counter(guard=self.guard.mended, pods=self._pods.mended)

    def dropped(self) -> dict[str, int]:
        """What was refused, by whom it was sent; {} where the kernel does not say (the step that keeps it tells why)."""
        try:
            return {**self.guard.dropped(), "spoofed": self._pods.dropped()}
        except OSError:
            return {}


def _guard_table(config: NetworkConfig) -> Table:
    assert config.v4 is not None
    return guard.table(config.backend.vni, config.backend.port, config.v4.network)
