"""This node's own tunnel device: adopted, changed live where the kernel can, made again only where it cannot."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lease.backend_config import BackendConfig
from lease.config import NetworkConfig
from lease.families import V4, V6, Family
from lease.model import Prefix, ip_text, mac_text
from overlay.backends.base import DeviceSpec, Lower, TunnelDevice
from overlay.backends.choose import backend_of, mark_of, network_of, tunnel_devices
from overlay.control.controller import CannotReconcile, Controller, Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs, Tunnel
from overlay.kernel.events import AddressSeen, DeviceUnknown, LinkSeen, Overrun
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route.entries import Link
from overlay.kernel.route.link_wire import IpipDevice, VxlanDevice, WireguardDevice
from overlay.kernel.route.links import Links, read_sysctl, write_sysctl
from overlay.node.device_address import ensure_address
from overlay.node.former import SUBJECT as FORMER
from overlay.node.former import Former
from overlay.node.owned import Owned
from overlay.node.standing import backend_in_force
from overlay.process.files import up_to_date, write_atomically
from overlay.process.log import log
from overlay.process.rundir import DeviceLock, Holder

LOCK_RETRY_S = 1.0
"""While another agent has the device: no event reports when that ends."""


def userspace_folder(run_dir: str) -> str:
    """Where the programs that keep WireGuard devices have their sockets."""
    return f"{run_dir}/wireguard"


class Ensured(NamedTuple):
    """The device after `ensure`. lost: its routes and neighbours had gone, silently; made: so had its FDB. did: what was
    done, for the log; why: why it was made again."""

    ifindex: int
    lost: bool
    made: bool
    did: dict[str, str]
    why: str


def ensure(
    links: Links,
    tunnel: TunnelDevice,
    wanted: DeviceSpec,
    before_up: Callable[[str], None] = lambda _name: None,
    folder: str = "",
) -> Ensured:
    """Make the device what it must be; it is up afterwards. before_up: called before it takes frames. folder: for the
    program that keeps a WireGuard device where the kernel has none.

    Raises:
        KernelError: the kernel refused a step; what was done before stays.
    """
    did: dict[str, str] = {}
    why = ""
    found = links.read(wanted.name)
    if found is not None and (reason := tunnel.replace_reason(wanted, found)) is not None:
        why = reason
        links.delete(found.ifindex)
        found = None
    made = found is None
    if found is None:
        _create(links, wanted, folder)
        did["made"] = wanted.name
        found = links.read(wanted.name)
        if found is None:
            raise KernelError(19, f"{wanted.name} vanished while it was made")
    changes = tunnel.live_changes(wanted, found)
    index = found.ifindex
    if changes.keys() - {"mtu", "mac", "up"}:
        links.change(index, wanted)
    if "mtu" in changes:
        links.set_mtu(index, wanted.mtu)
    if "mac" in changes and isinstance(wanted, VxlanDevice):
        links.set_mac(index, mac_text(wanted.mac))
    if "up" in changes:
        before_up(wanted.name)
        links.set_up(index)
    did |= {name: change for name, change in changes.items() if not made}
    return Ensured(index, "up" in changes, made, did, why)


def _create(links: Links, wanted: DeviceSpec, folder: str) -> None:
    """Raises KernelError."""
    try:
        links.create(wanted)
    except KernelError as error:
        if error.errno == errno.EOPNOTSUPP and isinstance(wanted, IpipDevice):
            raise KernelError(error.errno, f"this kernel has no ipip: modprobe ipip ({error})") from error
        if error.errno != errno.EOPNOTSUPP or not isinstance(wanted, WireguardDevice):
            raise
        from overlay.kernel.wireguard import userspace  # subprocess: 2 MiB that no other agent need hold

        pid = userspace.start(wanted.name, folder)
        log.warning("device.userspace", device=wanted.name, pid=pid, reason="this kernel has no WireGuard")


def _enable_ipv6(name: str) -> None:
    """An interface may be made without IPv6 (net.ipv6.conf.default.disable_ipv6), or lose it by a sysctl, of which no link
    event tells. Raises KernelError."""
    sysctl = f"net/ipv6/conf/{name}/disable_ipv6"
    if read_sysctl(sysctl) == "1":
        write_sysctl(sysctl, "0")


class _Beside(NamedTuple):
    """Where the backend has no device: what stands in its place. mark: what names the backend; backend: its config."""

    mark: str
    tunnel: Tunnel
    backend: BackendConfig


class _Wants(NamedTuple):
    """lowered: why its MTU is not the configured one; base: its address; seen: it, as links were read last: another look
    at it is due when that changes; vrf: the underlay's."""

    tunnel: TunnelDevice
    device: DeviceSpec
    lowered: str
    base: int
    network: Prefix
    seen: Link | None
    vrf: int
    backend: BackendConfig


class DeviceController(Controller):
    """The tunnel device of one family, and who keeps it: two agents with run directories of their own would undo each
    other's work."""

    name = "device"
    reports = ("mtu", "another agent", "device lock", FORMER)

    def __init__(
        self,
        current: CurrentInputs,
        family: Family,
        requests: RequestSocket,
        links: Links,
        lock: DeviceLock,
        health: Health,
        owned: Owned,
        leave: Callable[[int, Family, set[str]], bool],
        clock: Callable[[], float],
    ) -> None:
        """leave: takes away what other controllers made for a network, by its number, which this node left with a family;
        whether nothing is left of it. The set has the names of those that are done. Raises OSError."""
        self._current, self._family, self._requests = current, family, requests
        self._health, self._owned, self._leave, self._clock = health, owned, leave, clock
        self._links, self._lock = links, lock
        self._device: DeviceSpec | None = None
        self._marks: list[str] = []
        """What the file of our device names: it, or the backend where it has none, and those before of which something is
        left; empty before it was made sure of."""
        self._vrf: int | None = None
        """The underlay's VRF when the device was made sure of last."""
        self._base: int | None = None
        """The address that it was given."""
        self._networks: set[Prefix] = set()
        """The pod networks that this node is or was in."""
        self.before_up: Callable[[str], None] = lambda _name: None
        """Called before the device may take frames. Set before the loop runs."""
        self.refused: Callable[[int], None] = lambda _network: None
        """Called with the network of a device that was not made, while that of another stands. Set before the loop runs."""
        self._asks_again: float | None = None
        """When the lock is asked for again."""
        self._former = Former(health, clock, self._drop)
        self._lost = 0
        """How often somebody else took it down or away."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """News of the device and of its addresses."""
        return {
            LinkSeen: self._on_link,
            AddressSeen: lambda event: event.address.oif == self._tunnel.ifindex,
            Overrun: self._on_overrun,
            DeviceUnknown: lambda _event: True,
        }

    @property
    def _tunnel(self) -> Tunnel:
        return self._current.inputs.tunnels.get(self._family.number, _NO_TUNNEL)

    def _set(self, tunnel: Tunnel | None) -> None:
        self._current.set_family("tunnels", self._family.number, tunnel)

    def _on_link(self, event: LinkSeen) -> bool:
        """Never coalesced: a device that was down for a moment lost its routes in it, without another word from the
        kernel."""
        tunnel, link = self._tunnel, event.link
        if link.ifindex == tunnel.ifindex and self._device is not None:
            if not event.gone and link.up:
                self._set(tunnel._replace(rising=False))
            elif event.gone or not tunnel.rising:  # else: how it was before we set it up
                self._note_lost(tunnel, link.name, event.gone)
                makes = tunnel.makes + event.gone
                index = 0 if event.gone else tunnel.ifindex
                self._set(tunnel._replace(ifindex=index, up=False, rising=False, downs=tunnel.downs + 1, makes=makes))
        return self._device is not None and link.name == self._device.name

    def _note_lost(self, tunnel: Tunnel, name: str, gone: bool) -> None:
        self._lost += tunnel.up  # a deletion is reported as down, then as gone
        log.warning("device.gone" if gone else "device.down", device=name, effect="put back")

    def _on_overrun(self, _event: Overrun) -> bool:
        if self._tunnel is not _NO_TUNNEL:
            self._set(self._tunnel._replace(rising=False))
        return True

    def wants(self, inputs: Inputs) -> object:
        """The device of our lease, on the underlay of today."""
        number = self._family.number
        pool, under, end = inputs.pool(number), inputs.underlays.get(number), inputs.end(number)
        if inputs.config is None or pool is None:
            return Waiting("for a network config")
        if under is None:
            return Waiting("for an underlay")
        if end is None or inputs.own is None or inputs.own.backend != inputs.config.backend.type:
            return Waiting("for a lease")
        backend = backend_of(inputs.config.backend, self._family)
        tunnel = backend.tunnel
        if tunnel is None:
            there = Tunnel(under.name, under.ifindex, under.mtu, under.up)
            return _Beside(mark_of(backend), there, inputs.config.backend)
        mtu = min(each.mtu for each in inputs.underlays.values()) if tunnel.shared else under.mtu
        device = tunnel.device(Lower(under.ifindex, under.local, mtu), end)
        seen = next((link for link in inputs.links.values() if link.name == device.name), None)
        lowered, base = tunnel.mtu(mtu)[1], end.subnet.base
        return _Wants(tunnel, device, lowered, base, pool.network, seen, under.vrf, inputs.config.backend)

    def reconcile(self, wants: Any) -> bool:
        """Make it so; then it is an input for the others. Raises OSError."""
        mark = wants.mark if isinstance(wants, _Beside) else wants.device.name
        if not self._alone(mark):
            self._asks_again = self._clock() + LOCK_RETRY_S
            self._set(None)
            return False
        self._asks_again = None
        known = self._marks or self._owned.recorded_devices(self._family.number)
        former = [one for one in known if one != mark]
        if mark not in known:  # known before it is made: it may be refused half-way, and another come then
            with suppress(OSError):  # a disk that is full costs no peer; it is said when the device stands
                self._record(self._tunnel, [*known, mark])
        self._former.stands(mark)
        try:
            if isinstance(wants, _Beside):
                tunnel, device, base, self._vrf = wants.tunnel, None, None, None
                self._health.report("mtu", "", harmless=True)
            else:
                tunnel, device, base = self._made(wants), wants.device, wants.base
        except OSError:
            network = network_of(mark)
            if network is not None and self._marks and network != network_of(self._marks[0]):
                self.refused(network)
            raise
        self._device, self._base = device, base
        # first of all peers get onto it, whatever is refused of what stood before
        self._current.set_family("standing", self._family.number, wants.backend)
        self._record(tunnel, [mark, *former])
        if (left := self._former.leave(former, mark)) != former:
            self._record(self._tunnel, [mark, *left])
        return False

    def _record(self, tunnel: Tunnel, marks: list[str]) -> None:
        """By the file a later run knows what is ours: before any table is made for this network, and until nothing is left
        of those before. Raises OSError."""
        self._marks, text = marks, "\n".join(marks)
        if tunnel is not _NO_TUNNEL:
            self._set(tunnel._replace(mark=text))
        file = self._owned.device_file(self._family.number)
        if not up_to_date(file, text):
            write_atomically(file, text)

    def _made(self, wants: _Wants) -> Tunnel:
        """The device, as it is to be. Raises OSError."""
        device = wants.device
        if self._vrf not in (None, wants.vrf) and self._tunnel.ifindex:
            # its socket was bound to the VRF, or to none, when it came up (drivers/net/vxlan: vxlan_open)
            log.info("device", device=device.name, reopened="the underlay's VRF changed")
            self._links.set_down(self._tunnel.ifindex)
        self._vrf = wants.vrf
        if (self._marks and self._device is None) or (self._device and type(self._device) is not type(device)):
            self._set(None)  # what is planned for this one must not be put on that of the backend before
        try:
            folder = userspace_folder(self._current.inputs.settings.run_dir)
            ensured = ensure(self._links, wants.tunnel, device, self.before_up, folder)
        except KernelError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EEXIST):
                raise
            raise KernelError(error.errno, f"{error.strerror}{self._conflicts(wants.tunnel, device)}") from error
        # what is not as we left it, though we want the same, somebody altered (down and gone are counted by their events)
        altered = device == self._device and not ensured.made and bool(ensured.did.keys() - {"up"})
        write_log, event = (log.warning, "device.mended") if altered else (log.info, "device")
        if ensured.did:
            write_log(event, device=device.name, **({"reason": ensured.why} if ensured.why else {}), **ensured.did)
        if self._family is V6:
            _enable_ipv6(device.name)
        there = self._requests.addresses(self._family)
        self._networks |= {wants.network, *self._owned.prefixes(self._family.number)}
        moved = ensure_address(self._links, ensured.ifindex, wants.base, self._networks, there)
        address_altered = device == self._device and wants.base == self._base and not ensured.made
        if moved:
            write_log = log.warning if address_altered else log.info
            write_log("device.address", device=device.name, action=", ".join(moved))
        self._lost += altered + bool(moved and address_altered)
        before = self._tunnel
        if ensured.made and before.up and before.ifindex and before.name == device.name:
            self._note_lost(
                before, device.name, True
            )  # a refused entry may show it before the kernel's own notification
        self._health.report("mtu", wants.lowered, harmless=True)
        other = ensured.ifindex != before.ifindex
        return Tunnel(
            device.name, ensured.ifindex, device.mtu,
            rising=ensured.made or ensured.lost or (before.rising and not other),
            downs=before.downs + ensured.lost,
            makes=before.makes + ensured.made,
            checks=before.checks + 1,
        )  # fmt: skip

    def _conflicts(self, tunnel: TunnelDevice, wanted: DeviceSpec) -> str:
        """Which devices are in the way of one that the kernel refused."""
        found = []
        for link in self._links.all():
            there = link.kind in tunnel.kinds and link.name != wanted.name
            other = self._links.read(link.name) if there else None
            if other is not None and (why := tunnel.conflict(wanted, link.name, other)) is not None:
                found.append(why)
        return "".join(f"; {why}" for why in found)

    def _lock_name(self, device: str) -> str:
        shared = self._family is V6 and "v6" not in device  # both families may go without a device, or by one
        return f"{device}-v6" if shared else device

    def _alone(self, device: str) -> bool:
        try:
            pid = self._lock.take(self._lock_name(device))
        except OSError as error:
            self._health.problem("another agent", f"it is not known whether one manages {device}: {error.strerror}")
            return False
        who = f"another overlayd (pid {pid or '?'}) manages {device} on this node"
        words = f"{who}: this one waits until it ends; it should not have been started"
        self._health.report("another agent", "" if pid is None else words)
        squatter = self._lock.squatters.get(device)
        self._health.report("device lock", _squatted(device, squatter) if squatter is not None else "", harmless=True)
        return pid is None

    def due(self) -> float | None:
        """Again, while another agent has the device, or something of a former network is left."""
        return self._asks_again if self._asks_again is not None else self._former.at

    def existing_mac(self, config: NetworkConfig) -> int | None:
        """The MAC of the device that an earlier run or flannel left. Raises KernelError; CannotReconcile while another agent
        keeps that device: it has the lease that would be ours, too."""
        tunnel = backend_of(config.backend, self._family).tunnel
        if tunnel is not None and not self._alone(tunnel.name):
            raise CannotReconcile(f"another agent keeps {tunnel.name} on this node, and its lease")
        there = self._links.read(tunnel.name) if tunnel is not None else None
        if tunnel is None or there is None or there.kind not in tunnel.kinds:
            return None
        return there.mac or None  # of a vxlan alone it has one

    def _others(self, name: str) -> bool:
        """Whether it is the other family's device as well: WireGuard has modes with one for both."""
        recorded = self._family is V6 and name in self._owned.recorded_devices(V4.number)
        return recorded or name in self._current.inputs.others_devices(self._family.number)

    def _drop(self, name: str, now: str, done: set[str]) -> bool:
        """The device of an earlier network, ours since our own file names it, and what belongs to it. now: the device, or
        backend, in its place; done: as for `leave`. Whether nothing of ours is left. Raises OSError."""
        network = network_of(name)
        if network is None:
            log.warning(
                "file.ignored",
                path=self._owned.device_file(self._family.number),
                reason=f"{name[:20]!a} is not one of our devices",
            )
            return True
        if self._lock.take(self._lock_name(name)) is not None:
            return True  # another agent's by now
        there = self._links.read(name)
        if there is not None and there.kind in tunnel_devices([network], self._family).get(name, ()):
            if self._others(name):
                self._leave_device(there.ifindex, name)
            else:
                log.info("device.removed", device=name, reason="the network config names another device now")
                self._links.delete(there.ifindex)
        if network != network_of(now) and not self._leave(network, self._family, done):
            return False
        if self._lock_name(name) != self._lock_name(now):  # WireGuard's devices of IPv6 have one lock
            self._lock.give_back(self._lock_name(name))
        return True

    def _leave_device(self, ifindex: int, name: str) -> None:
        """Take this family's address from a device that stays the other's. Raises KernelError."""
        end = self._current.inputs.end(self._family.number)
        bases = {self._base, end.subnet.base if end is not None else None}
        for each in self._requests.addresses(self._family):
            if each.oif == ifindex and each.address in bases:
                shown = f"{ip_text(each.family, each.address)}/{each.length}"
                log.info("device.address", device=name, action=f"removed {shown}")
                self._links.remove_address(ifindex, each.address, each.length)

    def withdraw(self) -> Iterator[str]:
        """Delete it; where flannel has the node again it is flannel's."""
        for name, kinds in tunnel_devices(self._owned.networks(), self._family).items():
            there = self._links.read(name)
            if there is None or there.kind not in kinds:
                continue
            if self._others(name):
                self._leave_device(there.ifindex, name)
            elif not self._owned.flannel_has_it():
                self._links.delete(there.ifindex)
                yield f"device {name}, with its routes, neighbours and FDB"
        self._device = self._base = None
        for mark in self._marks:
            self._lock.give_back(self._lock_name(mark))
        self._marks = []
        self._former.forget()
        self._current.set_family("standing", self._family.number, None)
        self._set(None)

    def status(self) -> Mapping[str, object]:
        """`device`."""
        device, under, tunnel = self._device, self._current.inputs.underlays.get(self._family.number), self._tunnel
        backend = backend_in_force(self._current.inputs, self._family)
        if not self._marks or under is None or backend is None or tunnel is _NO_TUNNEL:
            return {"device": None}
        outer = backend.outer()
        vxlan = device if isinstance(device, VxlanDevice) else None
        return {
            "device": {
                "name": tunnel.name,
                "kind": backend.type,
                "index": tunnel.ifindex,
                "mac": mac_text(vxlan.mac) if vxlan is not None else "",
                "vni": vxlan.vni if vxlan is not None else None,
                "port": outer.port if outer is not None else 0,
                "local": ip_text(self._family.number, device.local if device is not None else under.local),
                "lower": under.name,
                "mtu": tunnel.mtu,
                "overhead": backend.overhead,
                "ok": bool(tunnel.ifindex) and tunnel.up and self.name not in self._health.problems(),
            }
        }

    def counters(self) -> Mapping[str, int]:
        """How often it was put back."""
        return {"mended_device": self._lost}


def _squatted(device: str, holder: Holder) -> str:
    who = f"uid {holder.uid}, pid {holder.pid}" if holder.uid >= 0 else "who listens to nobody: ss -xlp"
    return (
        f"a process that is no agent ({who}) has bound overlayd's names for {device}: end it; until then this agent runs,"
        " and a second one on the same device would not be noticed"
    )


_NO_TUNNEL = Tunnel("", 0, 0, up=False)
