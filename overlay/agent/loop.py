"""The owner loop: take what is in the inbox, change wanted or found, apply a slice, publish.

Everything is level-triggered: each pass asks what should be from the inputs as they are now (config, underlay, lease,
records) and makes it so. An event only says that something is worth a look; a lost one costs time until the next check.
"""

from __future__ import annotations

import queue
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lease import config as net_config
from lease.config import ConfigError, NetworkConfig
from lease.model import Endpoint, Lease, Prefix, Refused, ip_text, mac_text
from lease.records.annotations import Hints
from lease.records.packed import PUBLIC_IP, Leases, pack
from lease.store import Changes, ConfigText, Gone, Snapshot, StoreDown
from lease.tenure import etcd as tenure
from lease.tenure.claim import Claim, Identity
from lease.tenure.keeper import TenureThread, boottime
from overlay import __version__
from overlay.backends.vxlan import device_name
from overlay.cni import lists as cni
from overlay.control.health import Health
from overlay.control.schedule import Steps
from overlay.firewall import forward
from overlay.firewall.controllers import Defences
from overlay.firewall.worker import FORWARD, NAT, Firewall, Looked, Rules
from overlay.kernel import netlink
from overlay.kernel.netlink import KernelError
from overlay.kernel.route.entries import PROTOCOL, TUNNEL, UNDERLAY
from overlay.node.links import Host
from overlay.node.retained import Retained
from overlay.peers import plan
from overlay.peers.controller import Datapath
from overlay.peers.reconcile import Device
from overlay.process.files import FileText
from overlay.process.log import SILENT_S, log
from overlay.process.rundir import DeviceLock
from overlay.settings.settings import Settings, SettingsError, read_live

if TYPE_CHECKING:
    from overlay.api.status import LeaseStatus, Status  # 8 ms, when somebody asks
    from overlay.node.underlay import Underlay

PUT_RIGHT_S = 60.0
"""So long after our record was put right any other that claims our MAC is looked at."""
FULL_CHECK_S = 60.0
"""How often the kernel is read whole, and the nft table with it."""
LOOK_SHARE = 4000
"""The kernel is read whole less often where that costs more: it may take a four-thousandth of the time."""
DOUBT_GAP_S, DOUBT_SHARE = 0.5, 20
"""After a refusal that contradicts what we believe it is read again: so long after the last time, or 20 times its cost."""
PEERS_FIRST_S = 5.0
"""So long after the start the steps that can wait, wait for the peers."""
TURN_S = 1.0
"""The loop turns at least so often: nobody tells of a file, nor of some sysctls; `healthy` means that it does."""
EVENTS_A_TURN = 20_000
"""So many are taken in before a pass is made, under whatever storm."""
FORWARD_GAP_S = 2.0
LIST_LOOK_S = 0.2
"""Until the first network list stands: the node is not Ready before."""


class Stop(NamedTuple):
    """End the loop; the datapath stays."""

    reason: str
    code: int = 0


class Died(NamedTuple):
    """A thread ended that must not."""

    thread: str
    error: BaseException


class Asked(NamedTuple):
    """Somebody wants the status."""

    answer: queue.SimpleQueue[Status]


class Agent:
    """One node's agent. `run` owns all state; `post` is for every other thread."""

    def __init__(
        self,
        settings: Settings,
        inbox: queue.SimpleQueue[Any],
        place: Callable[[], str],
        store_hosts: Callable[[], dict[str, int | None]],
        identity_of: Callable[[str], Identity],
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._settings, self._place, self._clock = settings, place, clock
        self.config_place = "the store"
        """Where the network config stands, for messages; set before `run`."""
        self._hints = Hints()
        self._node_public_ip = 0
        """The last that could be read."""
        self._identity_of = identity_of
        self.claimer: TenureThread | None = None
        """Set before `run`; it posts to us."""
        self.reconnect: Callable[[], None] = lambda: None
        """Tells the store that our own address changed; set before `run`."""
        self.set_log_level: Callable[[str], None] = lambda _level: None
        """Set before `run`."""
        self.started: Callable[[], None] = lambda: None
        """Called when we are ready for the first time; set before `run`."""
        self._inbox = inbox
        self._requests = netlink.RequestSocket()
        self._host = Host(settings, self._requests, store_hosts)
        self.health = Health(clock)
        self._firewall = Firewall(self.post)
        self._lock = DeviceLock()
        self._steps = Steps(self.health, clock)
        self._due = self._steps.due
        self._defences = Defences(self._requests, self._host, self._steps, self.health, clock)
        rng = random.Random()  # noqa: S311 (spreads load, guards nothing)
        self._path = Datapath(self._requests, clock, rng, self._defences.guard)
        self._started = clock()
        self._next_full = clock() + FULL_CHECK_S
        self._next_dump = 0.0
        self._no_doubt_before = 0.0
        self._look_cost = 0.0
        """CPU seconds of the look under way."""
        self._looks, self._looks_cost, self._longest_slice = 0, 0.0, 0.0
        """How many were made, their CPU seconds in all, and those of the longest slice: an event waits for one at most."""
        self._peers_first_until = clock() + PEERS_FIRST_S
        self._next_turn = 0.0
        # the store's side
        self._unplanned: Leases | None = None
        """The records, until there is a plan for them; then the datapath's table has all but the one at our own key."""
        self._at_our_key: Lease | None = None
        """Ours, or what somebody put there."""
        self._unreadable: dict[str, str] = {}
        self._config: NetworkConfig | None = None
        self._listed: Snapshot | None = None
        self._snapshot_seen = False
        self._store_down = ""
        # our own side
        self._held: Lease | None = None
        self._held_how = ""
        self._put_right_until = 0.0
        """Our record was another's for a moment: who claims our MAC since may be the first to peers."""
        self._expires_at: float | None = None
        self._retained = Retained(self._host, self.health)
        self._looked = False
        """For what an earlier run left: the device's MAC, and the subnet of subnet.env."""
        self._first_mac: int | None = None
        self._previous: Prefix | None = None
        self._files_seen: set[str] = set()
        """Files of an operator that were there once."""
        self._told_twins: set[str] = set()
        """Records with our public IP that were logged."""
        self._counters: Counter[str] = Counter()
        """Devices that somebody else took down or away, and nat tables that somebody altered."""
        self._overruns = 0
        self._ever_ready = self._spoke = False
        self._between = False
        """The lease is lost or its Node is gone, and there is no other yet: no CNI list until then."""

    # --- for other threads -------------------------------------------------------------------------------------------

    def post(self, event: Any) -> None:
        """Put an event into the inbox."""
        self._inbox.put(event)

    def ask_status(self, timeout_s: float = 8.0) -> Status | None:
        """The status, from the loop itself; None when it does not answer."""
        answer: queue.SimpleQueue[Status] = queue.SimpleQueue()
        self.post(Asked(answer))
        try:
            return answer.get(timeout=timeout_s)
        except queue.Empty:
            return None

    @property
    def ports(self) -> tuple[int, int]:
        """The netlink ports of our own requests (rtnetlink, nftables), whose echoes the monitors need not tell."""
        return self._requests.port, self._defences.port

    # --- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until Stop; the exit code."""
        more = False
        while True:
            stop = self._take_in(0.0 if more else self._wait_s())
            if stop is not None:
                log.info("agent.stopped", reason=stop.reason, datapath="stays in place")
                return stop.code
            more = self._pass()
            self.health.turned()
            if not self._spoke and self._clock() - self._started > SILENT_S:
                self._speak()

    def _speak(self) -> None:
        """Write the log lines that were kept while peers came first."""
        self._spoke = True
        log.release()

    def _wait_s(self) -> float:
        now = self._clock()
        times = [self._next_full, self._next_turn, *self._steps.times()]
        # what was refused waits for its retry; whoever waits for another agent has nothing to do at a time
        asked = [self._path.rec.next_retry()]
        if "another agent" not in self.health.problems():
            asked += self._defences.next_looks()
        times += [at for at in asked if at is not None]
        return max(0.0, min(times) - now)

    def _take_in(self, wait_s: float) -> Stop | None:
        """Everything in the inbox, after waiting for the first of it."""
        try:
            event = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        left = EVENTS_A_TURN
        while True:
            if isinstance(event, Stop):
                return event
            if isinstance(event, Died):
                log.error("thread.died", thread=event.thread, error=repr(event.error))
                return Stop(f"thread {event.thread} died", 1)
            _OBSERVE[type(event)](self, event)
            left -= len(event.messages) if isinstance(event, netlink.NeighbourMessages) else 1
            if left <= 0:
                return None
            try:
                event = self._inbox.get_nowait()
            except queue.Empty:
                return None

    def _pass(self) -> bool:
        """Make everything as it should be, in the order of dependence. Whether there is more to do at once."""
        now = self._clock()
        if now >= self._next_full:
            self._next_full = now + FULL_CHECK_S
            # the guard in one go after an event alone
            self._due.everything(dump=now >= self._next_dump, guard=False)
        if now >= self._next_turn:
            self._next_turn = now + TURN_S
            self._due.sysctl = True
            self._due.files = self._due.files or self._host.files_touched()
        self._steps.begin()
        step = self._steps.step
        links = self._due.links
        step("links", self._read_links)
        step("underlay", self._choose_underlay)
        if links:  # with the underlay of today
            self._links_changed()
        self._claim()
        more = False
        if self._held is not None and self._config is not None and self._host.underlay is not None and self._alone():
            step("device", self._ensure_device)
            self._plan()
            if self._path.node is not None:
                more = self._defences.look_at_guard(self._config)
            if self._path.node is not None and TUNNEL in self._path.rec.devices:
                more |= self._look_at_kernel()
            if self._path.dumped:
                more |= self._path.apply()
                if self._path.rec.look_again:
                    self._path.rec.look_again = False
                    self._steps.again("dump", max(self._clock(), self._no_doubt_before))
                if self._path.rec.device_gone:  # told soon; where that got lost:
                    self._steps.again("links")
                    self._steps.again("device")
            if more and self._clock() < self._peers_first_until:
                return True
            self._look_at_rules()
            step("sysctl", self._ensure_sysctls)
            step("reach", self._look_at_reach)
            if self._firewall.looked >= {NAT, FORWARD}:  # no pod before its masquerade
                step("files", self._ensure_files)
            self._defences.look_at_pods(self._config)
        self._tell()
        return more

    def _alone(self) -> bool:
        """Whether the device is ours to keep: two agents with run directories of their own would undo each other's work."""
        device = device_name(self._config_now().backend)
        try:
            pid = self._lock.take(device)
        except OSError as error:
            self.health.problem("another agent", f"nobody can tell whether one keeps {device}: {error.strerror}")
            return False
        who = f"another overlayd (pid {pid or '?'}) keeps {device} on this node"
        words = f"{who}: this one waits until it ends; it should not have been started"
        self.health.tell("another agent", "" if pid is None else words)
        return pid is None

    def _look_at_kernel(self) -> bool:
        """A slice of a look through the kernel, where one is due or under way; whether there is more of it. What is due
        while one is under way is looked at by the next."""
        if not self._path.looking():
            if not self._due.dump:
                return False
            self._due.dump, self._look_cost = False, 0.0
        began = time.thread_time()
        try:
            more = self._path.look(self._host.links)
        except OSError as error:  # the kernel's word, or no descriptor for a socket
            self._steps.refused("dump", str(error))
            return False
        spent = time.thread_time() - began
        self._look_cost += spent
        self._longest_slice = max(self._longest_slice, spent)
        if not more:
            self._looks += 1
            self._looks_cost += self._look_cost
            self._steps.solved("dump")
            self._next_dump = self._clock() + max(FULL_CHECK_S, self._look_cost * LOOK_SHARE)
            self._no_doubt_before = self._clock() + max(DOUBT_GAP_S, self._look_cost * DOUBT_SHARE)
        return more or self._due.dump

    # --- what the store says -----------------------------------------------------------------------------------------

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        if self._store_down:
            log.info("store.back", store=self._place(), records=len(snapshot.leases))
        self._store_down = ""
        self.health.solved("store")
        if not self._settings.kube:  # there the config is a file, which has told it already
            self._set_config(snapshot.config)
        self._on_hints(snapshot.hints)
        self._unreadable = {key: refused.reason for key, refused in snapshot.refused.items()}
        for key, reason in self._unreadable.items():
            self._path.refusals.tell(key, reason)
        self._snapshot_seen = True
        held = self._held
        if held is None:
            self._listed = snapshot
        else:
            self._at_our_key = snapshot.leases.get(held.key)
            if self._at_our_key is None or not self._at_our_key.same_claim(held):
                self._look()
        if held is None or self._path.node is None or self._unplanned is not None:
            self._unplanned = Leases(dict(snapshot.leases.packed))  # the tenure's thread may be reading the other
        else:
            self._path.replace(snapshot.leases, held.key)
            self._look_for_rivals()

    def _on_changes(self, changes: Changes) -> None:
        self._listed = None
        records: dict[str, Lease | None] = {}
        for change in changes.changes:
            if isinstance(change, ConfigText):
                self._set_config(change.text)
            elif isinstance(change, Hints):
                self._on_hints(change)
                self._look()
            else:
                self._on_change(change, records)
        self._path.change(records)
        for key, lease in records.items():
            if lease is not None and key in self._path.table.refused:
                self._look_at_rival(lease)

    def _on_hints(self, hints: Hints) -> None:
        """What an operator wrote on our own Node."""
        self.health.tell("annotations", "; ".join(hints.faults))
        if hints.public_ip is not None and hints.public_ip != self._node_public_ip:
            self._node_public_ip = hints.public_ip
            address = hints.public_ip or self._settings.public_ip
            self._host.settings = self._host.settings._replace(public_ip=address)
            self._host.choose_again = self._due.underlay = True
        if hints != self._hints:
            self._look()
        self._hints = hints

    def _on_file(self, event: FileText) -> None:
        """A file that an operator may change while we run says something new; one that vanished says nothing: what it said
        last is kept. (A kubelet takes the ConfigMap away from a container whose pod is deleted, before it ends it.)"""
        if event.text is None and event.what in self._files_seen:
            self.health.problem(f"file {event.what}", f"{event.path} is gone; what it said last is kept")
            return
        if event.text is not None:
            self._files_seen.add(event.what)
            self.health.solved(f"file {event.what}")
        if event.what == "cni-conf":
            self._host.template = event.text
            self._due.files = True
        elif event.what == "net-conf":
            self._set_config(event.text)
        elif event.what == "live":
            self._set_live(event)

    def _set_live(self, event: FileText) -> None:
        try:
            live = self._settings if event.text is None else read_live(event.text, self._settings)
            self._refuse_taking_ours(live)
        except SettingsError as error:
            self.health.problem("live-settings", f"{event.path}: {error}; what ran until now is kept")
            return
        self.health.solved("live-settings")
        live = live._replace(public_ip=self._host.settings.public_ip)
        if live != self._host.settings:
            log.info(
                "live_settings",
                log_level=live.log_level,
                ip_masq=live.ip_masq,
                fully_random=live.fully_random,
                forward_rules=live.forward_rules,
                underlay_cidr=", ".join(map(str, live.underlay_cidrs)) or "anywhere",
                vxlan_guard=live.vxlan_guard,
                pod_antispoof=live.pod_antispoof,
            )
            self._host.settings = live
            self.set_log_level(live.log_level)
            self._due.nat = self._due.forward = self._due.files = self._due.guard = self._due.pods = True

    def _refuse_taking_ours(self, live: Settings) -> None:
        """Raises SettingsError: the underlay would be where our pods are."""
        if self._config is None or self._config.v4 is None or self._held is None or self._held.v4 is None:
            return
        subnet = self._held.v4.subnet
        for there in plan.underlay_within(self._config.v4.network, live.underlay_cidrs):
            if there.overlaps(subnet):
                raise SettingsError(f"underlay-cidr: {there} touches our subnet {subnet}, where this node's pods are")

    def _on_change(self, change: Lease | Refused | Gone, records: dict[str, Lease | None]) -> None:
        """records: what peers' records are now, None for one that is gone; more is entered."""
        self._unreadable.pop(change.key, None)
        lease = change if isinstance(change, Lease) else None
        if lease is None:
            self._told_twins.discard(change.key)
        if isinstance(change, Refused):
            self._unreadable[change.key] = change.reason
            self._path.refusals.tell(change.key, change.reason)
        if self._held is not None and change.key == self._held.key:
            self._at_our_key = lease
            if lease is None or not lease.same_claim(self._held):
                self._look()
        elif self._unplanned is not None:
            self._unplanned.packed.pop(change.key, None)
            if lease is not None:
                self._unplanned.packed[lease.key] = pack(lease)
        else:
            records[change.key] = lease

    def _on_down(self, down: StoreDown) -> None:
        if not self._store_down:
            log.warning(
                "store.down",
                store=self._place(),
                reason=down.reason,
                effect="retried; datapath and peers stay as they are",
            )
        self._store_down = down.reason
        if self._config is None:
            self.health.problem("store", down.reason)

    def _set_config(self, text: bytes | None) -> None:
        keeps = "" if self._config is None else "; the running config is kept"
        if text is None:
            self.health.problem("config", f"no network config at {self.config_place}; waiting for it{keeps}")
            return
        try:
            config = net_config.parse_config(text)
            if config.v4 is None or config.v6 is not None:
                which = "EnableIPv4: false" if config.v4 is None else "EnableIPv6: true"
                raise ConfigError(f"{which} needs an IPv6 datapath, which is not built yet; allowed is IPv4 alone")
        except ConfigError as error:
            self.health.problem("config", f"{self.config_place}: {error}{keeps}")
            return
        held = self._held.v4 if self._held is not None else None
        if self._config is not None and held is not None and not self._fits(config, held.subnet):
            self.health.problem(
                "config",
                f"the new config ({config.v4}) does not hold our subnet {held.subnet}; the running config is kept:"
                f" drain this node and {'delete its Node' if self._settings.kube else 'restart the agent'}",
            )
            return
        if config != self._config:
            log.info("config", network=str(config.v4.network), subnets=str(config.v4), **_backend_fields(config))
            self._config = config
            self._due.everything()
        self.health.solved("config")

    def _fits(self, config: NetworkConfig, subnet: Prefix) -> bool:
        """Whether we may hold a subnet: on Kubernetes the cluster gave it, and SubnetLen, Min and Max are not asked."""
        assert config.v4 is not None
        return config.v4.network.covers(subnet) if self._settings.kube else config.v4.allows(subnet)

    def _look(self) -> None:
        """Our own record may not be what it should be."""
        if self.claimer is not None:
            self.claimer.look()

    def _look_for_rivals(self) -> None:
        """All records that have something of ours are refused as peers."""
        for lease in self._path.table.waiting():
            self._look_at_rival(lease)

    def _look_at_rival(self, lease: Lease) -> None:
        """Another record that is older than ours and has our subnet or MAC wins; one with our address is told."""
        held = self._held
        if held is None or held.v4 is None or lease.v4 is None:
            return
        older = lease.created < held.created
        same_mac = lease.v4.mac is not None and lease.v4.mac == held.v4.mac
        if (older and (same_mac or lease.v4.subnet.overlaps(held.v4.subnet))) or (
            same_mac and self._clock() < self._put_right_until
        ):
            self._look()
        twin = lease.v4.public_ip == held.v4.public_ip and lease.v4.mac != held.v4.mac
        if twin and lease.key not in self._told_twins:
            self._told_twins.add(lease.key)
            log.warning(
                "public_ip.claimed_twice",
                public_ip=ip_text(4, held.v4.public_ip),
                by=lease.key,
                node=lease.node,
                effect="that record is not used; give one of the two nodes another address",
            )

    # --- our own lease -----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Tell the tenure what we want to hold, when all that belongs to it is known."""
        config, under = self._config, self._host.underlay
        if self.claimer is None or config is None or under is None or not self._snapshot_seen:
            return
        if not self._looked:
            try:
                self._first_mac = self._host.existing_mac(config)
            except KernelError as error:
                self.health.problem("device", str(error))
                return
            self._previous = cni.previous_subnet(self._settings.subnet_file)
            self._looked = True
        claim = Claim(
            config,
            under.public_ip,
            self._first_mac,
            self._identity_of(mac_text(under.mac)),
            self._previous,
            self._settings.take_over,
            self._not_for_pods(config, under),
            under.local,
        )
        self.claimer.claim(claim, self._listed if self._held is None else None)

    def _not_for_pods(self, config: NetworkConfig, under: Underlay) -> tuple[Prefix, ...]:
        """What no subnet of ours may touch."""
        assert config.v4 is not None
        said = plan.underlay_within(config.v4.network, self._host.settings.underlay_cidrs)
        return (*under.on_link, Prefix(4, under.public_ip, 32), *said)

    def _on_held(self, event: tenure.Held) -> None:
        lease = event.lease
        assert lease.v4 is not None
        tell = log.warning if event.loud else log.info
        tell("lease", subnet=str(lease.v4.subnet), public_ip=ip_text(4, lease.v4.public_ip), how=event.how)
        if self._at_our_key is not None and self._at_our_key.key != lease.key:
            self._elsewhere(self._at_our_key)
        self._held, self._held_how, self._between = lease, event.how, False
        self._at_our_key, self._listed = lease, None
        self._retained.held(lease.v4.subnet)
        self._due.device = self._due.nat = self._due.files = True
        self._links_changed()
        if event.loud:
            self._put_right_until = self._clock() + PUT_RIGHT_S
        self._look_for_rivals()
        self.health.solved("lease")

    def _elsewhere(self, lease: Lease) -> None:
        """What stands at a key that was ours is somebody's record like any other."""
        if self._unplanned is None:
            self._unplanned = self._path.table.records()
        self._unplanned.packed[lease.key] = pack(lease)

    def _on_lost(self, event: tenure.Lost) -> None:
        assert event.lease.v4 is not None
        subnet = event.lease.v4.subnet
        self._retained.lost(subnet)
        self._due.reach = True
        self._withdraw_list()
        self.health.problem(
            "lease",
            f"we lost {subnet}: {event.reason}. Pods that run here keep their addresses and their datapath on this node"
            " until they are made again; another subnet is taken for new pods",
        )

    def _on_denied(self, event: tenure.Denied) -> None:
        if event.conflict and self._held is None:
            log.error("lease.conflict", reason=event.reason)
            self.post(Stop(event.reason, 1))
            return
        self.health.problem("lease", event.reason)
        if event.homeless and self._held is not None:
            self._withdraw_list()

    def _withdraw_list(self) -> None:
        """No new pod shall get an address of our subnet, until there is a lease again."""
        self._between = True
        try:
            self._host.withdraw_list()
        except OSError as error:
            self.health.problem("files", f"{error.filename}: {error.strerror}")

    def _on_renewed(self, event: tenure.Renewed) -> None:
        self._expires_at = None if event.left_s is None else self._clock() + event.left_s
        self.health.solved("renewal")

    # --- what the kernel says ----------------------------------------------------------------------------------------

    def _read_links(self) -> None:
        if self._host.read_links():
            self._due.underlay = self._due.device = self._due.files = self._due.reach = True

    def _links_changed(self) -> None:
        if self._held is not None:
            self._retained.find(self._config_now(), self._own().subnet)
        self._defences.links_changed(self._config if self._held is not None else None)

    def _on_link(self, event: netlink.LinkSeen) -> None:
        was_up = (tunnel := self._path.rec.devices.get(TUNNEL)) is not None and tunnel.up
        if self._path.on_link(event.link, event.gone) == TUNNEL:
            self._counters["device"] += was_up  # a deletion is told as down, then as gone
            log.warning("device.gone" if event.gone else "device.down", device=event.link.name, effect="put back")
        self._due.links = True
        if (under := self._host.underlay) is not None and event.link.name == under.name:
            self._due.underlay = True
            if event.gone or not event.link.up:
                # down and up again looks unchanged afterwards, but took the direct routes with it
                self._due.dump = True
        if (device := self._host.device) is not None and event.link.name == device.name:
            self._due.device = True

    def _on_address(self, event: netlink.AddressSeen) -> None:
        self._due.links = True
        device = self._path.rec.devices.get(TUNNEL)
        if device is not None and event.address.oif == device.ifindex:
            self._due.device = True
        # The last address takes the routes with it, silently: read them again.
        if event.gone and any(there.ifindex == event.address.oif for there in self._path.rec.devices.values()):
            self._due.dump = True

    def _on_route(self, event: netlink.RouteSeen) -> None:
        self._path.on_route(event, self._host.links)
        self._due.reach = self._due.reach or event.route.protocol != PROTOCOL

    def _on_overrun(self, _event: netlink.Overrun) -> None:
        self._overruns += 1
        log.warning("monitor.overrun", effect="events were lost; the kernel is read whole again")
        self._path.events_lost()
        self._due.everything()

    def _on_nft(self, event: netlink.NftSeen) -> None:
        if event.table == forward.SHARED_TABLE:
            # kube-proxy writes there, too: looked at a moment later, and once for all its changes of that time
            self._steps.again("forward", self._clock() + FORWARD_GAP_S)
        else:
            ours = self._defences.touched(event.table)
            self._due.nat = self._due.nat or not ours
            self._due.forward = self._due.forward or not event.table

    def _on_sysctl(self, _event: netlink.SysctlSeen) -> None:
        self._due.sysctl = True

    # --- making it so ------------------------------------------------------------------------------------------------

    def _choose_underlay(self) -> None:
        before = self._host.choose_underlay()
        under = self._host.underlay
        assert under is not None
        if before is not None:
            self._due.device = self._due.files = True
            if before.local != under.local:
                self.reconnect()
            if before.ifindex != under.ifindex:
                self._path.rec.device_lost(UNDERLAY, fdb_too=False)
                self._due.dump = True
        self._path.rec.devices[UNDERLAY] = Device(under.ifindex, self._host.underlay_up())

    def _ensure_device(self) -> None:
        before = self._path.rec.devices.get(TUNNEL)
        ensured, lowered = self._host.ensure_device(self._config_now(), self._own())
        # a refused entry may have told us before the kernel's own word came
        if ensured.made and before is not None and before.up:
            self._counters["device"] += 1
            log.warning("device.gone", device=device_name(self._config_now().backend), effect="put back")
        if self._path.set_tunnel(ensured.ifindex, ensured.lost, ensured.made):
            self._due.dump = True
        self._due.sysctl = self._due.files = True
        self.health.tell("mtu", lowered)

    def _look_at_rules(self) -> None:
        """Have the nat table and other people's forward chains looked at, where that is due and not under way."""
        what = frozenset(name for name in (NAT, FORWARD) if getattr(self._due, name))
        if not what or self._firewall.busy:
            return
        self._due.nat = self._due.forward = False
        config, live = self._config_now(), self._host.settings
        assert config.v4 is not None
        rules = Rules(
            config.backend.vni,
            config.backend.port,
            config.v4.network,
            self._own().subnet,
            live.ip_masq,
            live.fully_random,
            live.forward_rules,
        )
        self._firewall.look(rules, what)

    def _on_looked(self, looked: Looked) -> None:
        self._firewall.took(looked)
        self._counters["nat"] += looked.mended
        for what in looked.what:
            if what in looked.refused:
                self._steps.refused(what, looked.refused[what])
            else:
                self._steps.solved(what)
        if FORWARD in looked.what and FORWARD not in looked.refused:
            self.health.tell("forward chain", looked.blocked)

    def _ensure_sysctls(self) -> None:
        self._host.ensure_sysctls(self._config_now())
        self.health.tell("bridge filter", self._host.bridge_filter())

    def _ensure_files(self) -> None:
        rec = self._path.rec
        # an entry that the kernel refuses (and is told and tried again) does not keep the whole node from its pods
        in_sync = not self._between and self._path.dumped and rec.settled()
        try:
            self._host.ensure_files(self._config_now(), self._key(), self._own(), in_sync)
        except ValueError as error:
            self.health.problem("cni", f"{self._settings.cni_conf_template}: {error}")
        else:
            self.health.solved("cni")
            self._links_changed()  # bridges are known since
            if not self._host.listed:
                self._steps.again("files", self._clock() + LIST_LOOK_S)

    def _plan(self) -> None:
        """Wanted entries anew when anything but single records changed."""
        under, held = self._host.underlay, self._held
        assert under is not None
        assert held is not None
        if not self._snapshot_seen:
            return
        device = self._path.rec.devices.get(TUNNEL)
        self._due.reach |= self._retained.let_go(device.ifindex if device is not None else 0)
        lease = held._replace(created=0, modified=0, handle=0)  # a write of our own record changes no peer
        addresses = self._host.underlay_addresses()
        widest = 1 if self._settings.kube else 2
        retained, allowed = tuple(self._retained.subnets), self._host.settings.underlay_cidrs
        node = plan.node_of(self._config_now(), lease, under.on_link, addresses, retained, allowed, widest)
        if node == self._path.node and self._unplanned is None:
            return
        records = self._unplanned if self._unplanned is not None else self._path.table.records()
        self._path.plan(node, records, held.key)
        self._unplanned, self._due.dump, self._due.guard, self._due.pods = None, True, True, True
        self._look_for_rivals()

    def _look_at_reach(self) -> None:
        """Routes that are not ours, and subnets that are not ours any more: what pods suffer from, an operator must see."""
        peer = next(iter(self._path.table.packed.values()), None)
        public_ip = int.from_bytes(peer[PUBLIC_IP], "big") if peer is not None else None
        self.health.tell("routes", self._host.unreachable(self._own().subnet, public_ip))
        self._retained.tell(self._path.table.waiting())

    # --- what is told --------------------------------------------------------------------------------------------------

    def _own(self) -> Endpoint:
        assert self._held is not None
        assert self._held.v4 is not None
        return self._held.v4

    def _key(self) -> str:
        assert self._held is not None
        return self._held.key

    def _config_now(self) -> NetworkConfig:
        assert self._config is not None
        return self._config

    def _tell(self) -> None:
        """Readiness: every condition that must hold, and for how long it has not."""
        log.sum_up()
        if self._expires_at is not None and self._clock() >= self._expires_at:
            self.health.problem("renewal", "the lease was not renewed in time and may be given away: the store is away")
        waiting, differing = self._waits_for(), self._path.rec.differing()
        if not self._spoke and not waiting and not differing:
            self._speak()
        ready = self.health.judge(waiting, differing)
        if ready and not self._ever_ready:
            self._ever_ready = True
            self.started()

    def _waits_for(self) -> str:
        if not self._snapshot_seen:
            return f"for the first list from the store{': ' + self._store_down if self._store_down else ''}"
        if self._config is None:
            return "for a network config"
        if self._host.underlay is None:
            return "for an underlay"
        if self._held is None:
            return "for a lease"
        if not self._path.dumped:
            return "for the kernel to be read"
        return "" if self._firewall.looked >= {NAT, FORWARD} else "for the nat and forward rules"

    def _on_asked(self, asked: Asked) -> None:
        asked.answer.put(self._status())

    def _status(self) -> Status:
        from overlay.api.status import Status

        config, rec, problems = self._config, self._path.rec, self.health.problems()
        mended = self._counters + self._host.mended + rec.mended + self._defences.mended()
        device = rec.devices.get(TUNNEL)
        in_order = device is not None and "device" not in problems
        return Status(
            version=__version__,
            ready=self.health.readiness()[0],
            store=self._place(),
            store_down=self._store_down,
            underlay=str(self._host.underlay or ""),
            network=str(config.v4.network) if config is not None and config.v4 is not None else "",
            lease=self._lease_status(),
            device=self._host.device_status(device.ifindex if device is not None else 0, in_order),
            peers=self._path.peers(),
            problems=problems,
            refused={**self._unreadable, **self._path.table.refused},
            differences=tuple(self._path.differences()),
            in_the_way=tuple(self._path.in_the_way.values()),
            retained=tuple(str(subnet) for subnet in self._retained.subnets),
            counters={f"mended_{kind}": count for kind, count in mended.items()}
            | {f"writes_{kind}": count for kind, count in rec.writes.items()}
            | {
                "monitor_overruns": self._overruns,
                **{f"dropped_{who}": count for who, count in self._defences.dropped().items()},
                "full_checks": self._looks,
                "full_checks_cpu_ms": round(self._looks_cost * 1000),
                "full_check_longest_slice_us": round(self._longest_slice * 1e6),
            },
            uptime_s=round(self._clock() - self._started, 1),
            differing=rec.differing(),
        )

    def _lease_status(self) -> LeaseStatus | None:
        from overlay.api.status import LeaseStatus

        if self._held is None:
            return None
        end = self._own()
        left = None if self._expires_at is None else max(0, round(self._expires_at - self._clock()))
        return LeaseStatus(
            str(end.subnet),
            self._held.key,
            ip_text(4, end.public_ip),
            mac_text(end.mac or 0),
            self._held.node,
            self._held_how,
            left,
        )


def _backend_fields(config: NetworkConfig) -> dict[str, object]:
    backend = config.backend
    return {
        "vni": backend.vni,
        "port": backend.port,
        "mtu": backend.mtu or "the underlay's",
        "direct_routing": backend.direct_routing,
    }


_OBSERVE: dict[type, Callable[[Agent, Any], None]] = {
    Snapshot: Agent._on_snapshot,
    Changes: Agent._on_changes,
    StoreDown: Agent._on_down,
    tenure.Held: Agent._on_held,
    tenure.Lost: Agent._on_lost,
    tenure.Denied: Agent._on_denied,
    tenure.Renewed: Agent._on_renewed,
    netlink.LinkSeen: Agent._on_link,
    netlink.AddressSeen: Agent._on_address,
    netlink.RouteSeen: Agent._on_route,
    netlink.NeighbourMessages: lambda agent, event: agent._path.on_neighbour_messages(event.messages),
    netlink.Overrun: Agent._on_overrun,
    netlink.NftSeen: Agent._on_nft,
    netlink.SysctlSeen: Agent._on_sysctl,
    Asked: Agent._on_asked,
    FileText: Agent._on_file,
    Looked: Agent._on_looked,
}
