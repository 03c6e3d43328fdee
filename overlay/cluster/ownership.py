"""Our own lease: what we ask for, what we hold, who disputes it, and how long it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from lease.backend_config import WireguardConfig
from lease.config import NetworkConfig
from lease.families import FAMILIES, Family
from lease.model import Lease, Prefix, ip_text, mac_text
from lease.store import Snapshot
from lease.tenure.asked import asked_fault
from lease.tenure.claim import Claim, Identity, Part, PublicKey
from lease.tenure.events import Denied, Disputed, Held, Lost, Partial, Renewed
from overlay.backends.choose import backend_of
from overlay.backends.wireguard import listen_port
from overlay.cni.lists import previous_subnet
from overlay.control.controller import CannotReconcile, Controller, Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs, Underlay
from overlay.peers.plan import underlay_within
from overlay.process.log import log
from overlay.settings.settings import Settings

PUT_RIGHT_S = 60.0
"""So long after our record was put right any other record that claims our MAC is checked."""


PARTIAL_S = 10.0
"""So often it is tried to get the family that the lease lacks: what stands in the way are others' records."""
DISPUTED_S = 60.0
"""A dispute that went on and on is looked at again after so long without news of it."""


class Claimer(Protocol):
    """The part of lease.tenure.keeper.TenureThread used here."""

    def claim(self, claim: Claim, snapshot: Snapshot | None = None) -> None: ...
    def recheck(self) -> None: ...


class _Wants(NamedTuple):
    """family: by whose part a lease is found to be ours; underlay: its; second: the other family's, None: there is none;
    public_key: of WireGuard, b"": none. fault: why peers could not use what would be published."""

    config: NetworkConfig
    family: Family
    underlay: Underlay
    second: Underlay | None
    settings: Settings
    public_key: bytes
    fault: str


class _Earlier(NamedTuple):
    """What an earlier run left of a family: the device's MAC, and the subnet of subnet.env."""

    mac: int | None
    subnet: Prefix | None


class Ownership(Controller):
    """This node's lease. The tenure's thread acquires and renews it, by what is claimed here."""

    name = "lease"
    rechecked = False
    reports = ("disputed record", "public ip", "subnet")
    answers_later = True  # a claim is no lease: only the tenure's word clears a problem

    def __init__(
        self,
        current: CurrentInputs,
        health: Health,
        clock: Callable[[], float],
        identity_of: Callable[[str], Identity] | None,
        existing_macs: Mapping[int, Callable[[NetworkConfig], int | None]],
        stop: Callable[[str], None],
        give_up: Callable[[], Iterator[str]] = lambda: iter(()),
    ) -> None:
        """identity_of: of this node, given its underlay's MAC; None where nothing is claimed (uninstall). existing_macs: by
        family, of the device that is there. stop: ends the agent, with a reason. give_up: takes what the record says to
        others out of the store (uninstall)."""
        self._current, self._health, self._clock = current, health, clock
        self._identity_of, self._existing_macs, self._stop, self._give_up = identity_of, existing_macs, stop, give_up
        self.claimer: Claimer | None = None
        """Set before the loop runs."""
        self.held: Lease | None = None
        """With revisions: by these, disputes are judged."""
        self._method = ""
        self._stopping = False
        self._at_our_key: Lease | None = None
        """Ours, or what somebody put there."""
        self._first_list: Snapshot | None = None
        """Read before anything was held: it saves the tenure another."""
        self._earlier: dict[tuple[int, str], _Earlier] = {}
        """By family and backend, where it was read."""
        self._put_right_until = 0.0
        """Our record was another's for a moment: who claims our MAC since may be the first to peers."""
        self._look_again_at: float | None = None
        self._said, self._refused = "", False
        """The problem that the tenure told last, and whether a claim could not be made since."""
        self._partial_at: float | None = None
        """When to try again for the family that our lease lacks."""
        self._looking_again = False
        """What was in dispute is being settled again."""
        self._expires_at: float | None = None
        self._expired = False
        """It certainly did, and new pods are kept from it."""
        self._logged_rivals: set[str] = set()
        """Records with our public IP that were logged."""
        self.displaced_record: Callable[[Lease], None] = lambda _lease: None
        """Called with the record at a key that was ours: it is somebody's like any other. Set before the loop runs."""
        self.refused_records: Callable[[], Iterable[Lease]] = lambda: ()
        """The records that are not peers, among them those that have something of ours. Set before the loop runs."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What the tenure's thread reports."""
        return {
            Held: self._on_held,
            Lost: self._on_lost,
            Denied: self._on_denied,
            Renewed: self._on_renewed,
            Disputed: self._on_disputed,
            Partial: self._on_partial,
        }

    # --- asking

    def wants(self, inputs: Inputs) -> object:
        """What it is claimed by."""
        if not inputs.listed:
            return Waiting("for the first list from the store")
        if inputs.config is None:
            return Waiting("for a network config")
        first, *other = sorted(inputs.config.pools)
        under = inputs.underlays.get(first)
        if under is None:
            return Waiting("for an underlay")
        second = inputs.underlays.get(other[0]) if other else None
        if isinstance(inputs.config.backend, WireguardConfig) and not inputs.published_key:
            return Waiting("for a key")
        return _Wants(
            inputs.config,
            FAMILIES[first],
            _address(under),
            None if second is None else _address(second),
            inputs.settings,
            inputs.published_key,
            _own_fault(inputs, first) or (_own_fault(inputs, other[0]) if second is not None else ""),
        )

    def reconcile(self, wants: Any) -> bool:
        """Pass it to the tenure. Raises KernelError, CannotReconcile."""
        try:
            self._pass_on(wants)
        except (OSError, CannotReconcile):
            self._refused = True
            raise
        if self._refused:  # the tenure says nothing of a claim that is as before
            self._refused = False
            self._health.report(self.name, self._said)
        return False

    def _pass_on(self, wants: Any) -> None:
        if self._partial_at is not None and self._clock() >= self._partial_at:
            self._partial_at = self._clock() + PARTIAL_S
            self.recheck()
        if self._look_again_at is not None and self._clock() >= self._look_again_at:
            self._look_again_at, self._looking_again = None, True
            self.recheck()
        config, family, under, second, settings, inputs_key, fault = wants
        self._report_asked()
        self._health.report("public ip", fault)
        if fault:
            return  # what is held already holds
        assert self._identity_of is not None
        mac, subnet = self._of_earlier(family, config, settings)
        part = None
        if second is not None:
            other = next(FAMILIES[number] for number in config.pools if number != family.number)
            avoid = _not_for_pods(other, config, second, settings)
            earlier = self._of_earlier(other, config, settings)
            key = self._public_key(inputs_key, config, other)
            asked = self._asked(config, settings, other)
            part = Part(other, second.public_ip, *earlier, avoid, second.local, second.name, key, asked)
        claim = Claim(
            config,
            under.public_ip,
            mac,
            self._identity_of(mac_text(under.mac)),
            subnet,
            settings.take_over,
            _not_for_pods(family, config, under, settings),
            under.local,
            family,
            under.name,
            self._public_key(inputs_key, config, family),
            part,
            self._asked(config, settings, family),
        )
        if self.claimer is not None:
            self.claimer.claim(claim, self._first_list if self.held is None else None)

    def _report_asked(self) -> None:
        """What was asked for by --subnet, and is not held."""
        config, settings = self._current.inputs.config, self._current.inputs.settings
        lines = []
        for asked in settings.subnets if config is not None else ():
            assert config is not None
            end = self.held.endpoint(asked.family) if self.held is not None else None
            if fault := asked_fault(config, asked):
                lines.append(fault)
            elif end is not None and end.subnet != asked:
                lines.append(
                    f"--subnet {asked} is another node's, or a part of it, or touches the underlay: this node keeps"
                    f" {end.subnet} (overlay leases list; it is asked for again at the next start)"
                )
        self._health.report("subnet", "; ".join(lines), harmless=True)

    @staticmethod
    def _asked(config: NetworkConfig, settings: Settings, family: Family) -> Prefix | None:
        """The subnet that this node is to have, None: any."""
        fitting = (each for each in settings.subnets if each.family == family.number and not asked_fault(config, each))
        return next(fitting, None)

    @staticmethod
    def _public_key(key: bytes, config: NetworkConfig, family: Family) -> PublicKey | None:
        backend = config.backend
        return PublicKey(key, listen_port(backend, family)) if isinstance(backend, WireguardConfig) else None

    def _of_earlier(self, family: Family, config: NetworkConfig, settings: Settings) -> _Earlier:
        """Read once. Raises KernelError, CannotReconcile."""
        number, kind = family.number, config.backend.type
        if (number, kind) not in self._earlier:
            mac = self._existing_macs[number](config)
            self._earlier[number, kind] = _Earlier(mac, previous_subnet(settings.subnet_file, number))
        return self._earlier[number, kind]

    def due(self) -> float | None:
        """When to look again at what is in dispute, or whether the family that lacks can be had now."""
        return min((at for at in (self._look_again_at, self._partial_at) if at is not None), default=None)

    def unready(self) -> str:
        """Whether it is held."""
        return "for a lease" if self.held is None else ""

    def recheck(self) -> None:
        """Our own record may not be what it should be."""
        if self.claimer is not None:
            self.claimer.recheck()

    # --- what the store says of our own record

    @property
    def key(self) -> str:
        """The key of our record, "" while none is ours."""
        return self.held.key if self.held is not None else ""

    def list_came(self, snapshot: Snapshot) -> None:
        """A whole list, by which our own record is seen as well."""
        if self.held is None:
            self._first_list = snapshot
        else:
            self.record_seen(snapshot.leases.get(self.held.key))

    def changes_came(self) -> None:
        """The first list is not the latest word any more."""
        self._first_list = None

    def record_seen(self, lease: Lease | None) -> None:
        """What stands at our key; None: nothing that can be read."""
        self._at_our_key = lease
        held = self.held
        if held is not None and (lease is None or not lease.same_claim(held) or lease.handle != held.handle):
            self.recheck()

    def record_gone(self, key: str) -> None:
        """A record went."""
        self._logged_rivals.discard(key)

    # --- disputes

    def check_rivals(self) -> None:
        """All records that have something of ours are refused as peers."""
        for lease in self.refused_records():
            self.check_rival(lease)

    def check_rival(self, lease: Lease) -> None:
        """Another record that is older than ours and has our subnet or MAC wins; one with our address is logged."""
        held = self.held
        if held is None:
            return
        for ours in held.ends:
            theirs = lease.endpoint(ours.subnet.family)
            if theirs is None:
                continue
            older = lease.created < held.created
            same_mac = theirs.identity == ours.identity and bool(ours.vtep)
            if (older and (same_mac or theirs.subnet.overlaps(ours.subnet))) or (
                same_mac and self._clock() < self._put_right_until
            ):
                self.recheck()
            other_vtep = theirs.identity != ours.identity or not ours.vtep
            if theirs.public_ip == ours.public_ip and other_vtep and lease.key not in self._logged_rivals:
                self._logged_rivals.add(lease.key)
                log.warning(
                    "public_ip.claimed_twice",
                    public_ip=ip_text(ours.subnet.family, ours.public_ip),
                    by=lease.key,
                    node=lease.node,
                    effect="that record is not used; give one of the two nodes another address",
                )

    # --- what the tenure says

    def _on_held(self, event: Held) -> bool:
        lease = event.lease
        write_log = log.warning if event.warn else log.info
        subnets = ", ".join(str(end.subnet) for end in lease.ends)
        public_ips = ", ".join(ip_text(end.subnet.family, end.public_ip) for end in lease.ends)
        write_log("lease", subnet=subnets, public_ip=public_ips, method=event.method)
        before = self._at_our_key
        self.held, self._method, self._at_our_key, self._first_list = lease, event.method, lease, None
        if before is not None and before.key != lease.key:
            self.displaced_record(before)
        self._expired = False
        own = lease._replace(created=0, modified=0, handle=0)
        was = self._current.inputs.own
        self._current.set(own=own, displaced=False, lost=False)
        if was is not None and was.first.subnet != own.first.subnet:
            self._current.set(synced_families=frozenset())
        if event.warn:
            self._put_right_until = self._clock() + PUT_RIGHT_S
        self.check_rivals()
        self._report_asked()
        self._say("")
        return False

    def _say(self, problem: str) -> None:
        """What the tenure says of the lease."""
        self._said = problem
        self._health.report(self.name, problem)

    def _on_lost(self, event: Lost) -> bool:
        self._displace()
        self._current.set(lost=True)
        self._say(
            f"we lost {event.lease.first.subnet}: {event.reason}. Pods that run here keep their addresses and their datapath"
            " on this node until they are made again; another subnet is taken for new pods"
        )
        return False

    def _on_denied(self, event: Denied) -> bool:
        if event.conflict and self.held is None:
            if not self._stopping:  # the tenure may say it again before the loop has ended
                self._stopping = True
                log.error("lease.conflict", reason=event.reason)
                self._stop(event.reason)
            return False
        self._say(event.reason)
        if event.displaced and self.held is not None:
            self._displace()
            self._current.set(lost=True)
        return False

    def _on_disputed(self, event: Disputed) -> bool:
        self._health.problem("disputed record", event.reason, harmless=True)
        self._looking_again = False
        self._look_again_at = self._clock() + DISPUTED_S
        return False

    def _on_partial(self, event: Partial) -> bool:
        self._health.report("lease family", event.reason, harmless=True)
        self._partial_at = self._clock() + PARTIAL_S if event.reason else None
        return False

    def _displace(self) -> None:
        """No new pod shall get an address of our subnet, until there is a lease again."""
        count = self._current.inputs.displacements + 1
        self._current.set(displaced=True, displacements=count, synced_families=frozenset())

    def _on_renewed(self, event: Renewed) -> bool:
        self._expires_at = None if event.left_s is None else self._clock() + event.left_s
        if self._looking_again:  # a settling ended without that it was told again
            self._looking_again = False
            self._health.solved("disputed record")
        self._health.solved("renewal")
        if self._expired:
            self._expired = False
            self._current.set(displaced=False)
        return False

    def judge_renewal(self) -> None:
        """Whether it was renewed in time: asked at each pass."""
        if self._expires_at is None or self._clock() < self._expires_at:
            return
        self._health.problem(
            "renewal",
            "the lease was not renewed in time and may be given away: the store is unavailable; no new pod gets an address"
            " of it",
        )
        if not self._expired:
            self._expired = True
            self._displace()

    def withdraw(self) -> Iterator[str]:
        """Take what the record says to others out of the store."""
        yield from self._give_up()

    def status(self) -> Mapping[str, object]:
        """`lease`."""
        held = self.held
        if held is None:
            return {"lease": None}
        end = held.first
        left = None if self._expires_at is None else max(0, round(self._expires_at - self._clock()))
        return {
            "lease": {
                "key": held.key,
                "subnet": str(end.subnet),
                "public_ip": ip_text(end.subnet.family, end.public_ip),
                "vtep_mac": mac_text(end.mac) if end.mac is not None else "",
                **({"public_key": end.vtep} if end.key else {}),
                "identity": held.node,
                "method": self._method,
                "left_s": left,
                **{
                    f"{name}_ipv6": value
                    for other in held.ends[1:]
                    for name, value in (
                        ("subnet", str(other.subnet)),
                        ("public_ip", ip_text(other.subnet.family, other.public_ip)),
                        ("vtep_mac", mac_text(other.mac) if other.mac is not None else ""),
                    )
                },
            }
        }


def _own_fault(inputs: Inputs, family: int) -> str:
    """Why peers could not reach this node by what it would publish of a family."""
    under = inputs.underlays.get(family)
    if inputs.config is None or under is None:
        return ""
    addresses = frozenset(each.address for each in inputs.addresses_of(family).values())
    return backend_of(inputs.config.backend, FAMILIES[family]).fault_of_own(under.public_ip, addresses) or ""


def _address(under: Underlay) -> Underlay:
    """What a claim depends on: not whether its link is up."""
    return under._replace(up=True, carrier=True, neighbours=())


def _not_for_pods(family: Family, config: NetworkConfig, under: Underlay, settings: Settings) -> tuple[Prefix, ...]:
    """What no subnet of ours may touch."""
    pool = config.pool(family.number)
    assert pool is not None, "a config without the family is not taken"
    reserved = underlay_within(pool.network, settings.underlay_cidrs_of(family.number))
    return (*under.on_link, Prefix(family.number, under.public_ip, family.bits), *reserved)
