"""The records of the store, as they come: lists and changes, sorted into our own, peers', what cannot be read, the network
config, and what an operator wrote on our own Node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from lease.families import FAMILIES
from lease.model import Lease, Refused
from lease.records.annotations import Hints
from lease.records.packed import Leases
from lease.store import Changes, ConfigText, Gone, Snapshot, StoreDown
from lease.tenure.events import Renewed
from overlay.cluster.flaps import LEAST_S, MOST_S, Flaps
from overlay.cluster.network import NetworkConfigInput, network_status
from overlay.cluster.ownership import Ownership
from overlay.control.controller import Handler, Source
from overlay.control.health import Health, few
from overlay.control.inputs import CurrentInputs
from overlay.peers.refusals import Refusals
from overlay.process.log import log

STALE_S = 120.0
"""Where the store gave no list for so long, joins and leaves are missed, and the node is not ready."""
NAMED = 3
"""So many keys are named in a problem."""
CUT = 300
"""So many characters of what the store said stand in a debug line."""


class PeerRecords(Protocol):
    """Who takes the records of others (peers.datapath.Datapath)."""

    def replace(self, leases: Leases, own: str) -> None:
        """A list, with all that it has; own: the key of our own record, which is no peer's."""

    def change(self, records: Mapping[str, Lease | None]) -> Collection[str]:
        """What came, changed or went (None) at once; the keys of those that are peers now, were, or are others."""

    def record(self, key: str) -> Lease | None:
        """The record of a key as it was taken last, None: there is none."""

    def refused_of(self, key: str) -> bool:
        """Whether the record of a key is refused."""


class RecordsSource(Source):
    """Sorts what the store's thread posts."""

    name = "store"

    def __init__(
        self,
        current: CurrentInputs,
        health: Health,
        peers: Sequence[PeerRecords],
        ownership: Ownership,
        network: NetworkConfigInput,
        refusals: Refusals,
        place: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        """peers: of each family; place: the store and prefix, for messages."""
        self._current, self._health, self._peers, self._ownership = current, health, peers, ownership
        self._network, self._refusals, self._place = network, refusals, place
        self._unreadable: dict[str, str] = {}
        self._contact = clock()
        """When the store last said anything."""
        self._clock, self._down = clock, ""
        self._changed: dict[str, Lease | None] = {}
        """What records of others say now, since they were settled last; None: there is none any more."""
        self._flaps = Flaps(clock)
        self._down_since: float | None = None
        self._stale = False
        """That was reported."""
        self._kube = current.inputs.settings.kube
        self._flags = current.inputs.settings
        self._hints = Hints()
        self._node_public_ips: dict[int, int] = {}
        """By family, the last that could be read."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What the store's thread posts."""
        return {
            Snapshot: self._on_snapshot,
            Changes: self._on_changes,
            StoreDown: self._on_down,
            Renewed: lambda _event: self._touch(),
        }

    def _touch(self) -> bool:
        self._contact = self._clock()
        return False

    def _on_snapshot(self, snapshot: Snapshot) -> bool:
        self._touch()
        if self._down:
            log.info("store.back", store=self._place(), records=len(snapshot.leases))
        if log.debugging:
            count, refused = len(snapshot.leases), len(snapshot.refused)
            log.debug("store.list", records=count, unreadable=refused, config_bytes=len(snapshot.config or b""))
        self._down, self._down_since, self._stale = "", None, False
        self._health.solved("store")
        if not self._kube:  # there the config is a file, which was read already
            self._network.read(snapshot.config)
        self._on_hints(snapshot.hints)
        self._unreadable = {key: refused.reason for key, refused in snapshot.refused.items()}
        for key, reason in self._unreadable.items():
            self._refusals.report(key, reason)
        self._current.set(listed=True)
        self._ownership.list_came(snapshot)
        self._changed.clear()
        leases = self._flaps.listed(snapshot.leases)
        for peers in self._peers:
            peers.replace(leases, self._ownership.key)
        self._ownership.check_rivals()
        return False

    def _on_changes(self, changes: Changes) -> bool:
        self._touch()
        self._ownership.changes_came()
        if log.debugging:
            for change in changes.changes:
                # of a config the length alone: a pre-shared key stands in it
                text = f"{len(change.text or b'')} bytes of config" if isinstance(change, ConfigText) else str(change)
                log.debug("store.change", what=text[:CUT])
        for change in changes.changes:
            if isinstance(change, ConfigText):
                self._network.read(change.text)
            elif isinstance(change, Hints):
                self._on_hints(change)
                self._ownership.recheck()
            else:
                self._on_change(change)
        return bool(self._changed)

    def _on_change(self, change: Lease | Refused | Gone) -> None:
        self._unreadable.pop(change.key, None)
        lease = change if isinstance(change, Lease) else None
        if lease is None:
            self._ownership.record_gone(change.key)
        if isinstance(change, Refused):
            self._unreadable[change.key] = change.reason
        if change.key == self._ownership.key:
            self._ownership.record_seen(lease)
        else:
            self._changed[change.key] = lease

    def _on_hints(self, hints: Hints) -> None:
        """What an operator wrote on our own Node."""
        self._health.report("annotations", "; ".join(hints.faults), harmless=True)
        for family in FAMILIES:
            address = hints.public_ip.get(family, 0)
            if address is not None and address != self._node_public_ips.get(family, 0):
                self._node_public_ips[family] = address
                address = address or self._flags.public_ip_of(family)
                self._current.set(settings=self._current.inputs.settings.with_public_ip(family, address))
        if hints != self._hints:
            self._ownership.recheck()
        self._hints = hints

    def _on_down(self, down: StoreDown) -> bool:
        if not self._down:
            log.warning(
                "store.down",
                store=self._place(),
                reason=down.reason,
                effect="retried; datapath and peers stay as they are",
            )
        self._down = down.reason
        if self._down_since is None:
            self._down_since = self._clock()
        self._report()
        return False

    def _report(self) -> None:
        since = self._down_since
        if since is not None and self._clock() >= since + STALE_S:
            self._stale = True
            missed = f"no list for {STALE_S / 60:.0f} minutes, so that who joins or leaves is not seen"
            self._health.problem("store", f"{missed}: {self._down}", outside=True)
        elif self._down and (self._current.inputs.config is None or not self._current.inputs.listed):
            self._health.problem("store", self._down, harmless=True)

    def reconcile(self, wants: object) -> bool:
        """Settle what changed, of each key its last state; and say so where the list is older than it should be."""
        del wants
        self._report()
        held = self._flaps.held()
        changed, self._changed = self._changed, {}
        self._settle(self._flaps.changes(changed, self._known) if changed else {})
        self._settle(self._flaps.over())
        if held != self._flaps.held():
            self._report_flaps(held, self._flaps.held())
        return False

    def _known(self, key: str) -> Lease | None:
        """What a record said when it was settled last, of whichever family."""
        return next((found for peers in self._peers if (found := peers.record(key)) is not None), None)

    def _settle(self, records: dict[str, Lease | None]) -> None:
        records.pop(self._ownership.key, None)  # it became ours since it was seen
        if not records:
            return
        turned = {key for peers in self._peers for key in peers.change(records)}
        for key in records.keys() & self._unreadable.keys():
            self._refusals.report(key, self._unreadable[key])  # to the tables it is gone
        self._flaps.had_effect(records if turned - records.keys() else turned)
        for key, lease in records.items():
            if lease is not None and any(peers.refused_of(key) for peers in self._peers):
                self._ownership.check_rival(lease)

    def _report_flaps(self, before: Sequence[str], held: Sequence[str]) -> None:
        for key in sorted({*held}.difference(before)):
            log.warning(
                "record.flapping", key=key, effect="what it said before counts until it is the same for a while"
            )
        for key in sorted({*before}.difference(held)):
            log.info("record.flapping_over", key=key)
        named = few(held, len(held), NAMED)
        self._health.report(
            "flapping records",
            f"{named}: changed again and again, so that traffic goes where they said before until they are the same for"
            f" some seconds ({LEAST_S:.0f} to {MOST_S:.0f}): find out who writes them"
            if held
            else "",
            harmless=True,
        )

    def due(self) -> float | None:
        """When the list is too old, when a record that flapped may count."""
        stale = None if self._down_since is None or self._stale else self._down_since + STALE_S
        return min((at for at in (stale, self._flaps.due()) if at is not None), default=None)

    def unready(self) -> str:
        """Whether the first list is in."""
        return "" if self._current.inputs.listed else "for the first list from the store"

    def status(self) -> Mapping[str, object]:
        """`store`, `network`, and of `refused_records` those that cannot be read."""
        return {
            "store": {
                "type": "kubernetes" if self._kube else "etcd",
                "address": self._place(),
                "up": not self._down,
                "error": self._down,
                "contact_age_s": round(self._clock() - self._contact),
            },
            "network": network_status(self._current.inputs.config),
            "unreadable_records": dict(self._unreadable),
            "flapping_records": list(self._flaps.held()),
        }
