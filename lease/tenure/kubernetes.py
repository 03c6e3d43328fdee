"""Our own lease on Kubernetes: the podCIDR the cluster gave our Node, published as flannel's annotations.

The counterpart of tenure.py: nothing is allocated or renewed here; what we wrote is compared, and put right.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from lease.families import FAMILIES
from lease.kube.client import ApiError
from lease.model import Endpoint, Lease, Prefix, ip_number, mac_text
from lease.records.annotations import Names, encode, hints, uid_number
from lease.records.codec import BadRecord, vxlan_data
from lease.records.packed import Leases
from lease.store import LeaseExpired, RecordChanged, Snapshot
from lease.stores.kubernetes import UNAVAILABLE, NodeGone, NodeView
from lease.tenure.allocate import MACS_S, MOST_MACS, choose_mac
from lease.tenure.claim import Claim
from lease.tenure.events import Denied, Disputed, Held, Lost, Partial, Renewed, TenureEvent
from lease.tenure.recent import Recent

TRIES = 5
"""A Node that is made again under our hands is read again so often before we pause."""
REFUSED = (400, 401, 403, 413)
"""What an API server says when trying again does not help: an operator must see it, also while we hold."""
CHECK_S = 300.0
"""Annotations are watched; the condition is not in what we watch: our own Node is read whole so often."""
READY = "OverlayReady"
"""The condition by which the agent says how it is (overlay.notices)."""
REASON, MESSAGE = "FlannelIsUp", "Flannel is running on this node"
"""flannel's words: others may look for them."""


class OwnNode(Protocol):
    """What a NodeTenure needs of the store."""

    def known(self) -> Leases:
        """The other nodes' leases as last seen."""

    def own(self) -> NodeView:
        """Our own Node. Raises NodeGone, StoreUnavailable."""

    def write(self, uid: str, annotations: dict[str, str | None], *conditions: dict[str, str]) -> None:
        """One patch. Raises RecordChanged, StoreUnavailable."""


class NodeTenure:
    """Makes Node and Claim agree. No thread; `TenureThread` turns it."""

    def __init__(
        self,
        store: OwnNode,
        names: Names,
        node_name: str,
        set_condition: bool,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """set_condition: set NetworkUnavailable to False once `network_up`."""
        self._store, self._names, self._name, self._rng = store, names, node_name, rng
        self._set_condition = set_condition
        self.network_up = False
        """The datapath is in place; set by the agent's main."""
        self.held: Lease | None = None
        self.unreported: list[TenureEvent] = []
        self._denied = ""
        self._last_macs: dict[int, int | None] = {}
        """By family, of a lease we held: the device keeps it when the podCIDR is another."""
        self._partial = ""
        """Why the lease lacks a family, as it was told last."""
        self._clock = clock
        self._macs_left = Recent(MOST_MACS, MACS_S)
        """When we last took another MAC, since an older Node had ours."""

    def settle(self, claim: Claim, snapshot: Snapshot | None = None) -> list[TenureEvent]:
        """Make our Node say what we hold; what happened. Raises StoreUnavailable."""
        del snapshot  # of our own Node the state of this moment counts
        why = ""
        for _ in range(TRIES):
            try:
                return self._with_unreported(self._settle(claim, self._store.own()))
            except NodeGone as gone:
                # its podCIDR is free, and a Node that comes back may get another
                why = f"{gone}; is --node-name (NODE_NAME) right, and does its kubelet run?"
                return self._with_unreported(self._deny(why, displaced=True))
            except RecordChanged as changed:
                why = str(changed)
            except ApiError as refused:
                if refused.code not in REFUSED:
                    raise
                return self._with_unreported(self._deny(str(refused)))
        return self._with_unreported(self._deny(f"{why}; it changed {TRIES} times while it was written"))

    @property
    def unfinished(self) -> bool:
        """A Node's lease is written at once."""
        return False

    def _with_unreported(self, events: list[TenureEvent]) -> list[TenureEvent]:
        """These, after what happened in a settling that was broken off."""
        unreported, self.unreported = self.unreported, []
        return [*unreported, *events]

    def renew(self) -> Renewed:
        """Whether all still stands as written. Raises LeaseExpired when it must be settled again, StoreUnavailable."""
        if self._denied or self.held is None:
            raise LeaseExpired(self._denied)
        try:
            view = self._store.own()
        except RecordChanged as error:
            raise LeaseExpired(str(error)) from error
        if self._differing(self.held, view) or self._condition(view) is not None:
            raise LeaseExpired("our Node does not say what we wrote")
        if any(self._older_overlap(end.subnet, view.created) for end in self.held.ends):
            raise LeaseExpired("an older Node has our podCIDR")
        return Renewed(None)

    @staticmethod
    def _subnet(claim: Claim, held: Lease) -> Prefix | None:
        """The subnet by which a lease is ours."""
        end = claim.end(held)
        return end.subnet if end is not None else None

    def _settle(self, claim: Claim, view: NodeView) -> list[TenureEvent]:
        subnet = view.subnets.get(claim.family.number)
        if self.held is not None and self._subnet(claim, self.held) != subnet:
            now = f"podCIDR {subnet}" if subnet is not None else "no podCIDR yet"
            # reported in any case: the device keeps the pods of it, whatever fails later
            self.unreported.append(Lost(self.held, f"Node {self._name} was made again, with {now}"))
            self._last_macs = {end.subnet.family: end.mac for end in self.held.ends}
            self.held = None
        if (why := self._fault(claim, view, subnet)) is not None:
            return self._deny(why)
        assert subnet is not None, "that is a fault"
        if older := self._older_overlap(subnet, view.created):
            return self._deny(
                f"podCIDR {subnet} of Node {self._name} overlaps that of Node {older}, which is older;"
                f" delete Node {self._name} and let its kubelet register it again",
                displaced=True,
            )
        end = claim.endpoint(subnet, self._public_ip(claim, view), self._mac(claim, view))
        other, why = self._second(claim, view)
        ends = [end, *([other] if other is not None else [])]
        lease = claim.lease(self._name, ends, self._name, view.created, uid_number(view.uid))
        differing, condition = self._differing(lease, view), self._condition(view)
        if differing or condition is not None:
            self._store.write(view.uid, differing, *([condition] if condition is not None else []))
        ours = self._our_mac(claim.family.number)
        if None not in (ours, end.mac) and ours != end.mac:
            self._macs_left.add(self._clock())
        same = self.held is not None and self.held == lease and not self._denied
        self.held, self._denied = lease, ""
        told = [Partial(why)] if why != self._partial else []
        self._partial = why
        return [*([] if same and not differing else [Held(lease, f"podCIDR of Node {self._name}")]), *told]

    def _second(self, claim: Claim, view: NodeView) -> tuple[Endpoint | None, str]:
        """Our part of the other family; None: there is none for now, and why, "" where the network has none."""
        other = FAMILIES[6 if claim.family.number == 4 else 4]
        if not claim.wants_family(other.number):
            return None, ""
        held = self.held.endpoint(other.number) if self.held is not None else None
        part = claim.of_second()
        if part is None:
            return held, "" if held is not None else f"this node has no {other.text} address of its own"
        subnet = view.subnets.get(other.number)
        why = self._fault(part, view, subnet)
        if why is None and subnet is not None and (older := self._older_overlap(subnet, view.created)):
            why = f"podCIDR {subnet} of Node {self._name} overlaps that of Node {older}, which is older"
        if why is not None or subnet is None:
            return (
                None,
                f"{why}; a Node's podCIDRs never change: delete the Node, and let its kubelet register it again",
            )
        return part.endpoint(subnet, self._public_ip(part, view), self._mac(part, view)), ""

    def _public_ip(self, claim: Claim, view: NodeView) -> int:
        """What peers are to send to. A typing error must not take an address away that peers need: what was published
        before holds, by us or (at a start) by whoever ran here."""
        overwrite = hints(view.annotations, self._names).overwrite.get(claim.family.number, 0)
        if overwrite is not None:
            return overwrite or claim.public_ip
        family = claim.family.number
        held = self.held.endpoint(family) if self.held is not None else None
        if held is not None:
            return held.public_ip
        try:
            return ip_number(view.annotations.get(self._names.public_ip[family], ""), family)
        except ValueError:
            return claim.public_ip

    def _fault(self, claim: Claim, view: NodeView, subnet: Prefix | None) -> str | None:
        """Why the Node's podCIDR of the claim's family cannot be our subnet, whatever the other Nodes have."""
        network = claim.pool.network
        if view.fault:
            return f"Node {self._name}: {view.fault}"
        if not view.subnets:
            return (
                f"Node {self._name} has no podCIDR yet; waiting for one (kube-controller-manager gives it with"
                f" --allocate-node-cidrs --cluster-cidr={network})"
            )
        if subnet is None:
            only = ", ".join(str(there) for there in view.subnets.values())
            return f"Node {self._name} has podCIDR {only} only; it needs one of {claim.family.text}, as Network {network} is"
        if not network.covers(subnet):
            return (
                f"podCIDR {subnet} of Node {self._name} is outside Network {network}:"
                " net-conf.json's Network must be the cluster CIDR"
            )
        if there := next((there for there in claim.avoid if there.overlaps(subnet)), None):
            return f"podCIDR {subnet} of Node {self._name} overlaps our underlay {there}"
        return None

    def _older_overlap(self, subnet: Prefix, created: int) -> str | None:
        older = (other for other in self._store.known().overlapping(subnet) if other.created < created)
        return next((other.key for other in older), None)

    def _deny(self, why: str, displaced: bool = False) -> list[TenureEvent]:
        self._denied = why
        return [Denied(why, displaced=displaced)]

    def _differing(self, lease: Lease, view: NodeView) -> dict[str, str | None]:
        return {name: text for name, text in encode(lease, self._names).items() if view.annotations.get(name) != text}

    def _condition(self, view: NodeView) -> dict[str, str] | None:
        """The condition to write; None where it is as it should be, or not to be written (yet)."""
        if not self._set_condition or not self.network_up or view.unavailable == "False":
            return None
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "type": UNAVAILABLE,
            "status": "False",
            "reason": REASON,
            "message": MESSAGE,
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }

    def _mac(self, claim: Claim, view: NodeView) -> int | None:
        """The MAC we hold, the device's, else our annotation's, else a new one; none that an older Node has, unless one
        follows us to each that we take: agents that run saw us with it first. None where the backend has none."""
        if not claim.wants_mac:
            return None
        known = self._store.known()

        def free(mac: int) -> bool:
            return all(other.created >= view.created for other in known.with_mac(mac))

        held = self._our_mac(claim.family.number)
        if held is not None and not free(held) and self._macs_left.often(self._clock()):
            older = min(known.with_mac(held), key=lambda other: other.created).key
            text = f"Node {older} has our MAC {mac_text(held)}, too, and follows us where we take another"
            self.unreported.append(Disputed(text))
            return held
        for mac in (held, claim.device_mac, self._published(claim, view)):
            if mac is not None and free(mac):
                return mac
        while True:
            drawn = choose_mac((), self._rng)
            if free(drawn):
                return drawn

    def _our_mac(self, family: int) -> int | None:
        end = self.held.endpoint(family) if self.held is not None else None
        return end.mac if end is not None else self._last_macs.get(family)

    def _published(self, claim: Claim, view: NodeView) -> int | None:
        try:
            return vxlan_data(json.loads(view.annotations.get(self._names.data[claim.family.number], "")), "")[1]
        except (BadRecord, ValueError, RecursionError):
            return None

    def withdraw(self, dry_run: bool = False) -> list[str]:
        """Take our annotations and condition off the Node; what was taken away (dry_run: would be). Raises RecordChanged,
        StoreUnavailable."""
        view = self._store.own()
        nothing = Lease(self._name, "", None, None, "", 0, 0, 0)
        ours = [name for name in encode(nothing, self._names) if name in view.annotations]
        away = [UNAVAILABLE] if self._set_condition and view.reason == REASON else []
        away += [READY] if READY in view.conditions else []
        conditions = [{"$patch": "delete", "type": each} for each in away]
        if (ours or conditions) and not dry_run:
            self._store.write(view.uid, dict.fromkeys(ours), *conditions)
        return ours
