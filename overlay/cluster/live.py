"""The files that an operator may change while the agent runs: --live-settings, the network config, cni-conf.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from overlay.cluster.network import NetworkConfigInput
from overlay.control.controller import Handler, Source
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.peers.plan import underlay_within
from overlay.process.log import log
from overlay.process.watched import FileText
from overlay.settings.settings import Settings, SettingsError, read_live


class LiveFiles(Source):
    """Them, as inputs. One that vanished says nothing: its last content is kept. (A kubelet takes the ConfigMap away from a
    container whose pod is deleted, before it ends it.)"""

    name = "live"

    def __init__(
        self,
        current: CurrentInputs,
        health: Health,
        network: NetworkConfigInput,
        set_log_level: Callable[[str], None],
    ) -> None:
        self._current, self._health, self._network, self._set_log_level = current, health, network, set_log_level
        self._at_start = current.inputs.settings
        self._seen: set[str] = set()
        """Files that were there once."""
        self._missing: set[str] = set()
        """Files that were logged as missing."""
        self._refused: FileText | None = None
        """Settings that this node's lease does not allow."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What the thread that reads files posts."""
        return {FileText: self._on_file}

    def wants(self, inputs: Inputs) -> object:
        """What a file may be refused for."""
        return inputs.own, inputs.lost

    def reconcile(self, wants: object) -> bool:
        """What was refused may be right now."""
        del wants
        self._network.judge_again()
        if self._refused is not None:
            self._on_live(self._refused)
        return False

    def _on_file(self, event: FileText) -> bool:
        subject = f"file {event.what}"
        if event.text is None and event.what in self._seen:
            words = f"{event.path} is gone; its last content is kept"
            self._health.problem(subject, words, harmless=True)
            return False
        if event.text is not None:
            self._seen.add(event.what)
            self._health.solved(subject)
        elif event.what not in self._missing:
            self._missing.add(event.what)
            log.warning(
                "file.missing", path=event.path, effect="as if it said nothing; it is read as soon as it is there"
            )
        if event.what == "cni-conf":
            self._current.set(cni_template=event.text)
        elif event.what == "net-conf":
            self._network.read(event.text)
        elif event.what == "live-settings":
            self._on_live(event)
        return False

    def _on_live(self, event: FileText) -> None:
        self._refused = None
        try:
            live = self._at_start if event.text is None else read_live(event.text, self._at_start)
            if (fault := self._taking_ours(live)) is not None:
                self._refused = event
                raise SettingsError(fault)
        except SettingsError as error:
            words = f"{event.path}: {error}; the previous settings stay in effect"
            self._health.problem("live-settings", words, harmless=True)
            return
        self._health.solved("live-settings")
        now = self._current.inputs.settings
        live = live._replace(public_ip=now.public_ip, public_ipv6=now.public_ipv6)
        if self._current.set(settings=live):
            log.info(
                "live_settings",
                log_level=live.log_level,
                ip_masq=live.ip_masq,
                fully_random=live.fully_random,
                forward_rules=live.forward_rules,
                underlay_cidr=", ".join(map(str, live.underlay_cidrs)) or "anywhere",
                vxlan_guard=live.vxlan_guard,
                pod_antispoof=live.pod_antispoof,
                pod_lift=live.pod_lift,
                network_policy=live.network_policy,
                cluster_network_policy=live.cluster_network_policy,
                groups=live.groups,
            )
            self._set_log_level(live.log_level)

    def _taking_ours(self, live: Settings) -> str | None:
        """Why it cannot be: the underlay would be where our pods are."""
        inputs = self._current.inputs
        for end in inputs.own.ends if inputs.own is not None else ():
            pool = inputs.pool(end.subnet.family)
            for there in (
                underlay_within(pool.network, live.underlay_cidrs_of(end.subnet.family)) if pool is not None else ()
            ):
                if there.overlaps(end.subnet):
                    return f"underlay-cidr: {there} touches our subnet {end.subnet}, where this node's pods are"
        return None
