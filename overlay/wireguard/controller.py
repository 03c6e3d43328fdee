"""The WireGuard devices of this node: key, port and peers, by difference. The devices themselves are node/device.py's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from lease.backend_config import WireguardConfig
from lease.families import FAMILIES
from overlay.backends.wireguard import device_name, listen_port
from overlay.control.controller import Controller, Handler, Waiting
from overlay.control.health import Health, few
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.control.schedule import Cadence
from overlay.kernel.events import LinkSeen
from overlay.kernel.wireguard.device import NO_KEY, Place, WgDevice, WgPeer
from overlay.process.log import log
from overlay.wireguard.keys import KeyHolder
from overlay.wireguard.peers import Keyed, Of, differing, wanted

NAMED = 3
SLICE = 500
"""Peers put at once."""
LINGER_S = 0.2
"""A key whose subnets another has now stays on the device for so long, with none: what is on its way by it still arrives."""
LEAST_S = 5.0
"""A device with few peers is read so often: the kernel notifies of no change."""


class Device(Protocol):
    """A device, of the kernel or of a program."""

    program: str

    def read(self) -> WgDevice: ...
    def set(self, key: bytes, port: int) -> None: ...
    def put(self, peers: Mapping[bytes, WgPeer | None]) -> None: ...
    def close(self) -> None: ...


class _Wanted(NamedTuple):
    """One device. ifindex, makes: another one has no peers."""

    name: str
    ifindex: int
    makes: int
    port: int
    of: Of


class _Wants(NamedTuple):
    devices: tuple[_Wanted, ...]
    public_key: bytes


class _State:
    """What is known of one device. sent: the place that each peer was given last; found: its peers, as read or put last;
    todo: keys to be gone through; given: the key and port that we gave it; read: it was, and nothing failed since."""

    def __init__(self, wants: _Wanted, device: Device) -> None:
        self.wants, self.device = wants, device
        self.sent: dict[bytes, Place | None] = {}
        self.found: dict[bytes, WgPeer] = {}
        self.todo: dict[bytes, None] = {}
        self.given: tuple[bytes, int] | None = None
        self.lingering: dict[bytes, float] = {}
        """Keys that are to be removed, and when."""
        self.read = False
        self.lacking: dict[bytes, str] = {}
        """Keys of peers that no underlay of this node leads to, with one of their records."""

    def over(self, now: float) -> list[bytes]:
        """The keys that have lingered long enough."""
        return [key for key, at in self.lingering.items() if at <= now]


class WireguardController(Controller):
    """Key, port and peers of the devices, before peers' routes lead there. The kernel notifies of none of them: they are
    read again now and then."""

    name = "wireguard"
    reports = ("endpoints",)
    rechecked = False

    def __init__(
        self,
        current: CurrentInputs,
        health: Health,
        holder: KeyHolder,
        tables: Sequence[Keyed],
        open_device: Callable[[str], Device],
        clock: Callable[[], float],
    ) -> None:
        """tables: of peers, by family. open_device: given its name; raises KernelError."""
        self._current, self._health = current, health
        self._holder, self._tables, self._open, self._clock = holder, tables, open_device, clock
        self._states: dict[str, _State] = {}
        self._cadence = Cadence(clock, LEAST_S)
        self._counts: Counter[str] = Counter()

    @property
    def handles(self) -> Mapping[type, Handler]:
        """A device that came or went."""
        return {LinkSeen: lambda event: event.link.name in self._states}

    def wants(self, inputs: Inputs) -> object:
        """Which devices there are, and what makes their peers; the peers are the tables'."""
        if inputs.config is None:
            return Waiting("for a network config")
        config = inputs.config.backend
        if not isinstance(config, WireguardConfig):
            return None
        if not inputs.public_key:
            return Waiting("for a key")
        if not inputs.tunnels:
            return Waiting("for the tunnel device")
        able = tuple(sorted(inputs.underlays))
        by_name: dict[str, list[int]] = {}
        for family in sorted(inputs.tunnels):
            by_name.setdefault(device_name(config.mode, FAMILIES[family]), []).append(family)
        devices = []
        for name, families in by_name.items():
            tunnel = inputs.tunnels[families[0]]
            if not tunnel.ifindex:
                return Waiting("for the tunnel device")
            of = Of(config.mode, tuple(families), able, config.psk or NO_KEY, config.keepalive_s)
            devices.append(_Wanted(name, tunnel.ifindex, tunnel.makes, listen_port(config, FAMILIES[families[0]]), of))
        return _Wants(tuple(devices), inputs.public_key)

    def reconcile(self, wants: _Wants) -> bool:
        """One slice. Raises KernelError: it is all read again."""
        self._forget({each.name for each in wants.devices})
        whole = self._clock() >= self._cadence.at or wants.public_key != self._current.inputs.published_key
        if whole:
            self._cadence.began()
        began = time.thread_time()
        stale: set[bytes] = set().union(*(table.stale for table in self._tables))
        anew = any(table.all_stale for table in self._tables)
        more, refused = False, None
        for each in wants.devices:
            try:
                more = self._one(each, whole or anew, stale) or more
            except OSError as error:  # the other family's goes on
                refused = error
        if refused is not None:
            raise refused
        for table in self._tables:
            table.stale.clear()
            table.all_stale = False
        self._health.report("endpoints", self._lacking(), harmless=True)
        # which the lease's controller, before this, is to see
        more |= self._current.set(published_key=wants.public_key)
        self._cadence.spent(time.thread_time() - began)
        if whole:
            self._cadence.ended()
        return more

    def _one(self, each: _Wanted, whole: bool, stale: set[bytes]) -> bool:
        """One slice of one device; whether there is more. Raises KernelError."""
        state = self._states.get(each.name)
        if state is None or state.wants[:4] != each[:4]:
            self._forget(self._states.keys() - {each.name})
            state = self._states[each.name] = _State(each, self._open(each.name))
        try:
            if whole or not state.read or state.wants != each:
                state.wants = each
                self._read(state)
            state.todo.update(dict.fromkeys(stale))
            state.todo.update(dict.fromkeys(state.over(self._clock())))
            return self._put(state)
        except OSError:
            state.read = False
            raise

    def _read(self, state: _State) -> None:
        """Whole, and what is not a peer's. Raises KernelError."""
        there, wants = state.device.read(), state.wants
        given = self._holder.private, wants.port
        if (there.private_key, there.port) != given:
            state.device.set(*given)
            altered = state.given == given
            self._counts["mended"] += altered
            write_log = log.warning if altered else log.info
            write_log("wireguard.mended" if altered else "wireguard", device=wants.name, port=wants.port)
        state.given = given
        if state.read and (others := _altered(state.found, there.peers)):
            self._counts["mended"] += others
            log.warning("wireguard.mended", device=wants.name, peers=others, effect="put back as they should be")
        state.found = dict(there.peers)
        keys = {key for table in self._tables_of(state) for key in table.keys}
        state.todo = dict.fromkeys((*keys, *(there.peers.keys() - keys)))
        state.read = True

    def _tables_of(self, state: _State) -> list[Keyed]:
        return [table for table in self._tables if table.family in state.wants.of.families]

    def _put(self, state: _State) -> bool:
        """One slice of what differs; whether there is more. Raises KernelError."""
        tables, batch = self._tables_of(state), dict[bytes, WgPeer | None]()
        gone: dict[bytes, WgPeer | None] = {}
        while state.todo and len(batch) + len(gone) < SLICE:
            key, _ = state.todo.popitem()
            want = wanted(state.wants.of, tables, key)
            self._note(state, tables, key, want)
            change = differing(state.found.get(key), want, state.sent.get(key))
            if change is False:
                state.lingering.pop(key, None)
                state.sent[key] = want.place if want is not None else None
                continue
            assert not isinstance(change, bool)
            if change is None:
                gone[key] = None
            else:
                batch[key] = change
                state.lingering.pop(key, None)
                assert want is not None
                state.found[key], state.sent[key] = want, want.place
        taken = {there for peer in batch.values() if peer is not None for there in peer.allowed}
        for key in list(gone):
            if key not in state.lingering and (lost := state.found[key].allowed & taken):
                state.lingering[key] = self._clock() + LINGER_S
                state.found[key] = state.found[key]._replace(allowed=state.found[key].allowed - lost)
            if state.lingering.get(key, 0.0) > self._clock():
                del gone[key]
                continue
            state.lingering.pop(key, None)
            state.found.pop(key, None)
            state.sent.pop(key, None)
        # first those that get a prefix, which takes it from whoever had it: at no moment has it nobody
        try:
            for some in (batch, gone):
                if some:
                    state.device.put(some)
        except OSError:
            for key in batch:  # where it was sent to last is not known: it is put again
                state.sent.pop(key, None)
            raise
        self._counts["put"] += len(batch)
        self._counts["removed"] += len(gone)
        if (batch or gone) and not state.todo:
            log.info("wireguard.peers", device=state.wants.name, put=len(batch), removed=len(gone))
        return bool(state.todo)

    @staticmethod
    def _note(state: _State, tables: Sequence[Keyed], key: bytes, want: WgPeer | None) -> None:
        there = next((record for table in tables for record, _ in table.ends(key)), None)
        if want is None and there is not None:
            state.lacking[key] = there
        else:
            state.lacking.pop(key, None)

    def _lacking(self) -> str:
        """The peers that a record names and no underlay leads to, for the operator."""
        found = [record for state in self._states.values() for record in state.lacking.values()]
        if not found:
            return ""
        mode = next(iter(self._states.values())).wants.of.mode
        names = few(sorted(found), len(found), NAMED)
        return (
            f"pods of {names} are not reached: with Mode {mode} these records name no address of a family that this node has"
            " an underlay of; give their nodes and this one an address of it, or set another Mode in the network config"
        )

    def _forget(self, keep: set[str]) -> None:
        for name in self._states.keys() - keep:
            self._states.pop(name).device.close()

    def due(self) -> float | None:
        """When peers changed, and now and then."""
        if any(table.stale or table.all_stale for table in self._tables) and self._states:
            return 0.0
        lingering = (at for state in self._states.values() for at in state.lingering.values())
        return min((self._cadence.at, *lingering)) if self._states else None

    def unready(self) -> str:
        """Whether all peers were put once."""
        waiting = any(not state.read or state.todo for state in self._states.values())
        return "for WireGuard's peers" if waiting else ""

    def withdraw(self) -> Iterator[str]:
        """Nothing: peers go with their device."""
        self._forget(set())
        self._health.solved("endpoints")
        return iter(())

    def status(self) -> Mapping[str, object]:
        """`wireguard`: the devices."""
        if not self._states:
            return {"wireguard": None}
        return {
            "wireguard": {
                name: {
                    "port": state.wants.port,
                    "program": state.device.program,
                    "peers": len(state.found),
                    "todo": len(state.todo),
                }
                for name, state in self._states.items()
            }
        }

    def counters(self) -> Mapping[str, int]:
        """Peers put, removed, and put back."""
        counts = self._counts
        return {
            "put_wireguard": counts["put"],
            "remove_wireguard": counts["removed"],
            "mended_wireguard": counts["mended"],
        }


def _altered(known: Mapping[bytes, WgPeer], found: Mapping[bytes, WgPeer]) -> int:
    """How many peers are not as we left them. (The place of each may be where it was heard since.)"""
    both = known.keys() & found.keys()
    changed = sum(known[key]._replace(place=None) != found[key]._replace(place=None) for key in both)
    return changed + len(known.keys() ^ found.keys())
