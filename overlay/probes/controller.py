"""The controller that asks whether peers answer, and says which do not. It changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import Lease, Prefix, ip_text
from lease.records.packed import number, prefix_of, subnet_number_of
from overlay.control.controller import Controller, Waiting
from overlay.control.health import Health, few
from overlay.control.inputs import Inputs
from overlay.node.interfaces import gateway_holders
from overlay.node.standing import backend_in_force
from overlay.probes.echo import SMALL, EchoSocket, data_of, refusal_text
from overlay.probes.mesh import BUDGET, INTERVAL_S, Known, Mesh, Probe, Report, Target
from overlay.probes.verdict import Kind, State, Verdict
from overlay.process.log import log

TICK_S = 1.0
STALE_S = 2 * INTERVAL_S
"""After so long without a turn it is said that nobody is asked."""
MOST_READ = 256
"""Answers a turn, and packets of those who ask us; who sends more is not read."""
NAMED = 3
MUCH_LOSS, MANY_VISITS = 0.25, 8
"""A peer that answers, but not so often, is a problem; known by so many visits at least."""


class PeerOfPath(NamedTuple):
    """What is needed of a peer to ask it. name: of its node, "" where it is not known."""

    subnet: Prefix
    public_ip: int
    direct: bool
    name: str


class _Wants(NamedTuple):
    """network, length: of subnets; port: the tunnel's; tunnel_mtu, underlay_mtu; vteps: peers have them; gateway: our pods',
    which is asked from where there are none, so that answers come by the way of pods' packets; 0: we have none yet."""

    network: Prefix
    length: int
    port: int
    tunnel_mtu: int
    underlay_mtu: int
    vteps: bool
    gateway: int = 0


class ProbesController(Controller):
    """Asks the peers of one family, within a budget."""

    name = "probes"
    reports = ("unreachable", "path mtu", "loss")
    harmless = True
    rechecked = False
    yields = True

    def __init__(
        self,
        family: Family,
        health: Health,
        clock: Callable[[], float],
        some_peers: Callable[[int, int], list[PeerOfPath]],
        peer_of: Callable[[int], PeerOfPath | None],
        make_socket: Callable[[Family, Prefix | None, int, int], EchoSocket] = EchoSocket,
    ) -> None:
        """some_peers: so many peers whose entries stand, from a place in their order on; peer_of: one, by its subnet's
        number, None: there is none, or its entries do not stand."""
        self._family, self._health, self._clock = family, health, clock
        self._some_peers, self._peer_of, self._make_socket = some_peers, peer_of, make_socket
        self._port = self._source = 0
        self._place = 0
        """Of the address that peers are asked at, in their subnets: 0, the VTEP, or 1, their pods' gateway."""
        self._mtus = 0, 0
        """The tunnel's, the underlay's."""
        self.mesh = Mesh(lambda: self._port, self._largest)
        self._packed: Collection[bytes] = ()
        self._lengths: set[int] | None = set()
        """Of peers' subnets: nodes may ask for others than the config's. None: to be found."""
        self._credit = 0.0
        """Visits that are due, by the interval."""
        self._socket: EchoSocket | None = None
        self._askers: EchoSocket | None = None
        """What asks us comes by a socket of its own: who asks very often does not take the place of answers."""
        self._of: tuple[Prefix, int, int] | None = None
        """What that listens for."""
        self._turn = self._round = 0
        self._next, self._last = 0.0, 0.0
        self._loss_at, self._lossy = 0.0, ""
        self._told: dict[int, Target] = {}
        """Peers that were logged as wrong."""

    # --- who the peers are (peers.datapath.PeerWatcher)

    def load(self, packed: Collection[bytes]) -> None:
        """These are all peers."""
        self._packed, self._lengths = packed, None
        self.mesh.keep(lambda there: self._peer_of(there) is not None)
        self._credit = float(BUDGET)  # soon after a start all have their turn, where they are few

    def peer_changed(self, was: Lease | None, now: Lease | None) -> None:
        """A peer came, changed or went."""
        before, after = (lease.endpoint(self._family.number) if lease is not None else None for lease in (was, now))
        if before is not None and (after is None or after.subnet != before.subnet):
            self.mesh.gone(number(before.subnet))
        if after is not None:
            self.mesh.came(number(after.subnet))
            if self._lengths is not None:
                self._lengths.add(after.subnet.length)

    # --- asking

    def wants(self, inputs: Inputs) -> object:
        """Where from it is asked. While our own side is not whole nothing is said of peers."""
        if not inputs.settings.probes:
            return None
        family = self._family.number
        pool, under, tunnel = inputs.pool(family), inputs.underlays.get(family), inputs.tunnels.get(family)
        backend = backend_in_force(inputs, self._family)
        if backend is None or pool is None or under is None or tunnel is None or inputs.own is None:
            return Waiting("for a lease")
        if not (family in inputs.synced_families and under.up and under.carrier and tunnel.ifindex):
            return Waiting("for peers to be in the kernel, and a link")
        outer = backend.outer()
        port = outer.port if outer is not None else 0
        gateway = 0 if backend.has_vteps else self._gateway(inputs)
        return _Wants(pool.network, pool.length, port, tunnel.mtu, under.mtu, backend.has_vteps, gateway)

    def _gateway(self, inputs: Inputs) -> int:
        end = inputs.end(self._family.number)
        if end is None or not gateway_holders(end.subnet, inputs.addresses_of(self._family.number).values()):
            return 0
        return end.subnet.base + 1

    def reconcile(self, wants: Any) -> bool:
        """Take the answers, send what is due. Raises OSError: no raw socket."""
        self._port, self._mtus = wants.port, (wants.tunnel_mtu, wants.underlay_mtu)
        self._place, self._source = 0 if wants.vteps else 1, wants.gateway
        if self._lengths is None:
            found = (subnet_number_of(each, self._family.number) for each in self._packed)
            self._lengths = {there & 0xFF for there in found if there is not None}
        lengths = self._lengths | {wants.length}
        listened = (wants.network, max(lengths), self._place)
        if self._socket is None or self._askers is None or self._of != listened:
            self._close()
            self._socket = self._make_socket(self._family, None, 0, 0)
            self._askers = self._make_socket(self._family, *listened)
            self._of = listened
        now = self._clock()
        self._take(self._socket, self._askers, lengths, now)
        if now < self._next:
            return False
        passed = min(now - self._last, 5.0) if self._last else TICK_S
        self._last, self._next = now, now + TICK_S
        self.mesh.expire(now)
        for probe in self._due(now, passed):
            self._send(self._socket, probe, now)
        self._report()
        return False

    def _take(self, echoes: EchoSocket, askers: EchoSocket, lengths: Iterable[int], now: float) -> None:
        for seen in echoes.seen(MOST_READ):
            if seen.answer:
                self.mesh.answered(seen.sequence, seen.source, seen.at_ns, now)
        asked = {seen.source - self._place << 8 for seen in askers.seen(MOST_READ) if not seen.answer}
        for there in (base | length for base in asked for length in lengths):
            if self._peer_of(there) is not None:
                self.mesh.heard(there, now)

    def _due(self, now: float, passed: float) -> Iterator[Probe]:
        doubtful = list(self.mesh.doubtful(now, self._target_of))
        yield from doubtful
        left, asked = BUDGET - len(doubtful), set[int]()
        for there in self.mesh.first(left):
            target = self._target_of(there)
            if target is None:
                self.mesh.later(there)
            else:
                asked.add(there)
                yield Probe(target, Kind.VTEP_FULL)
        self._credit = min(
            self._credit + len(self._packed) * passed / INTERVAL_S, float(min(BUDGET, len(self._packed)))
        )
        left = min(left - len(asked), int(self._credit))
        self._credit -= max(left, 0)
        for peer in self._next_peers(left):
            target = self._target(peer)
            if target.number not in asked and not self.mesh.in_doubt(target.number):
                yield self.mesh.visit(target, bool(self._round % 2))

    def _target_of(self, there: int) -> Target | None:
        """How a peer is asked, None where its entries do not stand."""
        peer = self._peer_of(there)
        return None if peer is None else self._target(peer)

    def _target(self, peer: PeerOfPath) -> Target:
        return Target(
            number(peer.subnet), peer.subnet.base + self._place, peer.public_ip, peer.direct, self._place != 0
        )

    def _next_peers(self, count: int) -> list[PeerOfPath]:
        """So many in turn, each once."""
        if count <= 0:
            return []
        if self._turn >= len(self._packed):
            self._turn = 0
            self._round += 1
        peers = self._some_peers(self._turn, count)
        self._turn += count
        return peers

    def _largest(self, target: Target, by_tunnel: bool = True) -> int:
        return self._mtus[0] if by_tunnel and not target.direct else self._mtus[1]

    def _send(self, echoes: EchoSocket, probe: Probe, now: float) -> None:
        mtu = probe.mtu or self._largest(probe.target, probe.kind.by_tunnel)
        size = data_of(self._family, mtu) if probe.kind.full or probe.mtu else SMALL
        address = probe.target.vtep if probe.kind.by_tunnel else probe.target.public_ip
        sequence = self.mesh.sent(probe, now, time.time_ns())
        refused = echoes.send(address, sequence, size, self._source if probe.kind.by_tunnel else 0)
        if refused:
            self.mesh.refused(sequence, refusal_text(refused), now)

    def due(self) -> float | None:
        """Each second."""
        return self._next if self._socket is not None else None

    def withdraw(self) -> Iterator[str]:
        """Ask nobody any more."""
        self._close()
        self._told.clear()
        for subject in self.reports:
            self._health.solved(subject)
        return iter(())

    def _close(self) -> None:
        for each in (self._socket, self._askers):
            if each is not None:
                each.close()
        self._socket = self._askers = None

    # --- what is said

    def _report(self) -> None:
        by_state: dict[State, list[tuple[Target, str, str]]] = {}
        for target, verdict in self.mesh.wrong():
            by_state.setdefault(verdict.state, []).append((target, verdict.text, verdict.remedy))
        lost = [*by_state.get(State.REFUSED, ()), *by_state.get(State.UNREACHABLE, ())]
        # logged by peer: the lines of these problems change with each
        self._health.note("unreachable", self._text(lost), harmless=True)
        self._health.note("path mtu", self._text(by_state.get(State.PATH_MTU, [])), harmless=True)
        self._health.note("loss", self._loss(), harmless=True)
        self._log({target.number: (target, text) for those in by_state.values() for target, text, _ in those})

    def _log(self, wrong: Mapping[int, tuple[Target, str]]) -> None:
        for there in self._told.keys() - wrong.keys():
            target = self._told.pop(there)
            if self._peer_of(there) is not None:
                log.info("peer.answers", **self._words(target))
        for there in wrong.keys() - self._told.keys():
            target, text = wrong[there]
            self._told[there] = target
            log.warning("peer.unreachable", **self._words(target), reason=text)

    def _words(self, target: Target) -> dict[str, str]:
        peer, family = self._peer_of(target.number), self._family.number
        return {
            "subnet": str(prefix_of(target.number, family)),
            "public_ip": ip_text(family, target.public_ip),
            "node": peer.name if peer is not None else "",
        }

    def _loss(self) -> str:
        """Looked for now and then: it is known by many visits."""
        if self._clock() >= self._loss_at:
            self._loss_at = self._clock() + INTERVAL_S
            lossy = sorted(self.mesh.lossy(MUCH_LOSS, MANY_VISITS), key=lambda item: -item[1])
            named = few((f"{self._name(there)} ({lost:.0%})" for there, lost in lossy), len(lossy), NAMED)
            self._lossy = f"packets to or from {named} are lost: the share of the last probes" if lossy else ""
        return self._lossy

    def _name(self, there: int) -> str:
        peer = self._peer_of(there)
        if peer is None:
            return str(prefix_of(there, self._family.number))
        address = ip_text(self._family.number, peer.public_ip)
        return f"{peer.name} {address}" if peer.name else address

    def _text(self, found: list[tuple[Target, str, str]]) -> str:
        """One line: who (a few, then a count), what was found, what to do; by what was found most."""
        if not found:
            return ""
        groups: dict[tuple[str, str], list[Target]] = {}
        for target, text, remedy in found:
            groups.setdefault((text, remedy), []).append(target)
        lines = []
        for (text, remedy), targets in sorted(groups.items(), key=lambda item: -len(item[1])):
            every = len(targets) == len(self._packed) > 1
            named = few((self._name(target.number) for target in targets), len(targets), NAMED)
            who = f"all {len(targets)} peers, each" if every else named
            hint = "so it is this node, most likely; " if every else ""
            lines.append(f"{who}: {text}; {hint}{remedy}")
        return ". ".join(lines)

    def status(self) -> Mapping[str, object]:
        """`reachability`: of each peer what its probes say."""
        now = self._clock()
        asking = self._socket is not None and now - self._last < STALE_S
        known = self.mesh.known() if asking else None
        return {"reachability": Reachability(known, self._family, tuple(self._packed), now)}

    def counters(self) -> Mapping[str, int]:
        """Probes sent, answered, lost, refused by this node's kernel."""
        return {f"probes_{what}": count for what, count in self.mesh.counts.items()}


_NOT_NOW = Report(
    Verdict(State.UNTRIED, "not asked now: this node waits for its own link or lease"), None, None, 0, None
)


class Reachability:
    """Each peer's report, written out by whoever asked."""

    def __init__(self, known: Known | None, family: Family, packed: tuple[bytes, ...], now: float) -> None:
        """known: None while nobody is asked, so that what was answered before says nothing of now."""
        self._known, self._family, self._packed, self._now = known, family, packed, now

    def json(self) -> list[dict[str, Any]]:
        """As JSON values."""
        return [self._peer(there) for there in self._numbers()]

    def _numbers(self) -> Iterator[int]:
        for each in self._packed:
            if (there := subnet_number_of(each, self._family.number)) is not None:
                yield there

    def counts(self) -> dict[str, int]:
        """How many peers are in each state."""
        found = Counter(self._report(there).verdict.state for there in self._numbers())
        return {state.name.lower(): found[state] for state in State}

    def _report(self, there: int) -> Report:
        return _NOT_NOW if self._known is None else self._known.report(there, self._now)

    def _peer(self, there: int) -> dict[str, Any]:
        report = self._report(there)
        return {
            "subnet": str(prefix_of(there, self._family.number)),
            "state": report.verdict.state.name.lower(),
            "text": report.verdict.text,
            "path_mtu": report.verdict.path_mtu or None,
            "answered_age_s": _rounded(report.answered_s),
            "heard_age_s": _rounded(report.heard_s),
            "rtt_us": report.rtt_us if report.answered_s is not None else None,
            "loss": None if report.loss is None else round(report.loss, 3),
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
