"""The sysctls that pods' traffic needs, and the one that is the operator's to set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.families import V4, Family
from overlay.control.controller import Controller, Handler, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.kernel.events import Overrun, SysctlSeen
from overlay.kernel.route.links import read_sysctl, write_sysctl
from overlay.node.standing import backend_in_force
from overlay.process.log import log

LOOSE = "2"
CHECK_EVERY_S = 1.0
"""The kernel notifies of some of them only: all are read so often."""


def wanted_sysctls(
    device: str, lower: str, direct_routing: bool, bridges: Iterable[str], read: Callable[[str], str | None]
) -> dict[str, str]:
    """The sysctls that pods' traffic needs, those that are wrong only.

    rp_filter: with DirectRouting one side may send directly and the other through the tunnel; strict drops all of
    that. In force is the higher of `all` and the device's own, and loose (2) is above strict (1).
    """
    wrong: dict[str, str] = {}
    if read("net/ipv4/ip_forward") != "1":
        wrong["net/ipv4/ip_forward"] = "1"
    for name in (device, lower) if direct_routing else (device,):
        strict = "1" in (read("net/ipv4/conf/all/rp_filter"), read(f"net/ipv4/conf/{name}/rp_filter"))
        if strict and read(f"net/ipv4/conf/{name}/rp_filter") != LOOSE:
            wrong[f"net/ipv4/conf/{name}/rp_filter"] = LOOSE
    for name in (device, *bridges, lower) if direct_routing else (device, *bridges):
        if read(f"net/ipv4/conf/{name}/forwarding") == "0":
            wrong[f"net/ipv4/conf/{name}/forwarding"] = "1"
    if device != lower and read(f"net/ipv6/conf/{device}/accept_ra") not in (None, "0"):
        wrong[f"net/ipv6/conf/{device}/accept_ra"] = "0"
    return wrong


def wanted_sysctls_of_ipv6(
    device: str, lower: str, bridges: Iterable[str], routers: Iterable[str], read: Callable[[str], str | None]
) -> dict[str, str]:
    """The same of IPv6, in the order in which they are to be set.

    routers: interfaces that take routes from routers. A kernel that forwards takes none any more, and loses those that it
    has, unless accept_ra is 2 before (Documentation/networking/ip-sysctl.rst): the node's own default route.
    """
    wrong: dict[str, str] = {}
    for name in (device, *bridges):
        if read(f"net/ipv6/conf/{name}/disable_ipv6") == "1":
            wrong[f"net/ipv6/conf/{name}/disable_ipv6"] = "0"
    if device != lower and read(f"net/ipv6/conf/{device}/accept_ra") not in (None, "0"):
        wrong[f"net/ipv6/conf/{device}/accept_ra"] = "0"
    forwards = read(f"{_FORWARDING6}") == "1"
    for name in {lower: None, **dict.fromkeys(() if forwards else routers)}:
        if name != device and read(f"net/ipv6/conf/{name}/accept_ra") == "1":
            wrong[f"net/ipv6/conf/{name}/accept_ra"] = "2"
    if not forwards:
        wrong[_FORWARDING6] = "1"
    return wrong


_FORWARDING6 = "net/ipv6/conf/all/forwarding"


def _ensure(wrong: Mapping[str, str]) -> Mapping[str, str]:
    """Set what is wrong; what was set. Raises KernelError."""
    for name, value in wrong.items():
        write_sysctl(name, value)
    return wrong


def bridge_filter_fault(read: Callable[[str], str | None], family: Family = V4) -> str:
    """Why a Service may not answer pods of its own node, "" where nothing stands in the way: kube-proxy's rules must see
    packets between ports of one bridge (flannel does not start without that)."""
    name = f"net/bridge/bridge-nf-call-{'iptables' if family is V4 else 'ip6tables'}"
    value = read(name)
    if value == "1":
        return ""
    what = "there is no br_netfilter" if value is None else f"{name.replace('/', '.')} is {value}"
    return (
        f"{what}: a Service whose pod runs on the same node as its client may not answer;"
        f" on the host: modprobe br_netfilter && sysctl {name.replace('/', '.')}=1"
    )


class _Wants(NamedTuple):
    """ifindex: of the device: one that was made again has sysctls as the kernel makes them."""

    ifindex: int
    device: str
    lower: str
    direct_routing: bool
    bridges: tuple[str, ...]
    with_services: bool
    first: bool
    """Its family is the network's first."""
    routers: tuple[str, ...] = ()
    """Other interfaces that may take routes from routers."""


class SysctlController(Controller):
    """Them, for one family."""

    name = "sysctl"
    reports = ("bridge filter",)
    yields = True

    def __init__(self, current: CurrentInputs, family: Family, health: Health, clock: Callable[[], float]) -> None:
        self._current, self._family, self._health, self._clock = current, family, health, clock
        self._next = 0.0
        self._set: set[str] = set()
        """Those that we set once: what is wrong again, somebody altered."""
        self._found_right: _Wants | None = None
        """For these all was right, at the end of the last check."""
        self._mended = 0

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What the kernel notifies of them."""
        return {SysctlSeen: lambda _event: True, Overrun: lambda _event: True}

    def wants(self, inputs: Inputs) -> object:
        """Of which interfaces."""
        number = self._family.number
        tunnel, under = inputs.tunnels.get(number), inputs.underlays.get(number)
        backend = backend_in_force(inputs, self._family)
        if tunnel is None or under is None or backend is None:
            return Waiting("for the tunnel device")
        services = inputs.settings.kube and bool(inputs.bridges) and inputs.settings.pod_lift == "off"
        direct = backend.reaches_directly
        bridges = tuple(sorted(inputs.bridges))
        if self._family is V4:
            return _Wants(tunnel.ifindex, tunnel.name, under.name, direct, bridges, services, True)
        routers = sorted(link.name for link in inputs.links.values() if not (link.loopback or link.master))
        first = inputs.pool(V4.number) is None
        return _Wants(
            tunnel.ifindex, tunnel.name, under.name, direct, bridges, services and first, first, tuple(routers)
        )

    def reconcile(self, wants: Any) -> bool:
        """Set what is wrong. Raises KernelError."""
        self._next = self._clock() + CHECK_EVERY_S
        if self._found_right is not None and self._found_right.ifindex != wants.ifindex:
            self._set = {name for name in self._set if f"/{wants.device}/" not in name}
        if did := _ensure(self._wrong(wants)):
            names = ", ".join(f"{name.replace('/', '.')}={value}" for name, value in did.items())
            if again := did.keys() if wants == self._found_right else did.keys() & self._set:
                self._mended += len(again)
                log.warning("sysctl.mended", set=names, effect="put back as pods need it; does another program set it?")
            else:
                log.info("sysctl", set=names)
            self._set |= did.keys()
        self._found_right = wants
        fault = bridge_filter_fault(read_sysctl, self._family)
        if wants.first:
            self._current.set(bridge_filtered=not fault)
        self._health.report("bridge filter", fault if wants.with_services else "", harmless=True)
        return False

    def _wrong(self, wants: _Wants) -> Mapping[str, str]:
        if self._family is V4:
            return wanted_sysctls(wants.device, wants.lower, wants.direct_routing, wants.bridges, read_sysctl)
        return wanted_sysctls_of_ipv6(wants.device, wants.lower, wants.bridges, wants.routers, read_sysctl)

    def due(self) -> float | None:
        """Soon."""
        return self._next

    def counters(self) -> Mapping[str, int]:
        """How often one was put back."""
        return {"mended_sysctl": self._mended}

    def withdraw(self) -> Iterator[str]:
        """They stay: others may need them by now, and nobody knows what they were."""
        return iter(())
