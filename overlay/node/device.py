"""This node's own vxlan device: adopted, changed live where the kernel can, made again only where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from lease.model import Prefix, ip_text, mac_text
from overlay.backends.vxlan import DeviceFound, DeviceSpec, live_changes, replace_reason
from overlay.kernel.netlink import KernelError
from overlay.kernel.route.entries import Address
from overlay.kernel.route.link_wire import VxlanAttributes
from overlay.kernel.route.links import Links, read_sysctl, write_sysctl

LOOSE = "2"


class Ensured(NamedTuple):
    """The device after `ensure`. lost: its routes and neighbours had gone, silently; made: so had its FDB. did: what was
    done, for the log; why: why it was made again."""

    ifindex: int
    lost: bool
    made: bool
    did: dict[str, str]
    why: str


def ensure(links: Links, spec: DeviceSpec) -> Ensured:
    """Make the device what it must be; it is up afterwards.

    Raises:
        KernelError: the kernel refused a step; what was done before stays.
    """
    did: dict[str, str] = {}
    why = ""
    attributes = links.read(spec.name)
    if attributes is not None and (reason := replace_reason(spec, found(spec.name, attributes))) is not None:
        why = reason
        links.delete(attributes.ifindex)
        attributes = None
    made = attributes is None
    if attributes is None:
        links.create(
            spec.name,
            spec.vni,
            spec.port,
            spec.local,
            spec.lower,
            spec.mtu,
            spec.mac,
            spec.gbp,
            spec.learning,
        )
        did["made"] = spec.name
        attributes = links.read(spec.name)
        if attributes is None:
            raise KernelError(19, f"{spec.name} vanished while it was made")
    changes = live_changes(spec, found(spec.name, attributes))
    index = attributes.ifindex
    if changes.keys() & {"local", "lower", "learning"}:
        links.change_vxlan(index, spec.vni, spec.local, spec.lower, spec.learning)
    if "mtu" in changes:
        links.set_mtu(index, spec.mtu)
    if "mac" in changes:
        links.set_mac(index, mac_text(spec.mac))
    if "up" in changes:
        links.set_up(index)
    did |= {name: change for name, change in changes.items() if not made}
    return Ensured(index, "up" in changes, made, did, why)


def found(name: str, attributes: VxlanAttributes) -> DeviceFound:
    """What rtnetlink showed, as the backend compares it."""
    return DeviceFound(
        attributes.ifindex,
        attributes.up,
        attributes.kind,
        DeviceSpec(
            name,
            attributes.vni,
            attributes.port,
            attributes.local,
            attributes.lower,
            attributes.mtu,
            attributes.mac,
            attributes.gbp,
            attributes.learning,
        ),
        attributes.checksums,
        attributes.special,
    )


def ensure_address(links: Links, index: int, base: int, network: Prefix, there: Iterable[Address]) -> list[str]:
    """The subnet's base /32 on the device, and no other address of the network. What was done, for the log.

    The new one comes before an old one goes: the last address of a device takes its routes with it, silently.
    """
    mine = [address for address in there if address.oif == index]
    did = []
    if not any(address.address == base and address.length == 32 for address in mine):
        links.add_address(index, base, 32)
        did.append(f"added {ip_text(4, base)}/32")
    for address in mine:
        if network.holds(address.address) and (address.address, address.length) != (base, 32):
            links.remove_address(index, address.address, address.length)
            did.append(f"removed {ip_text(4, address.address)}/{address.length}")
    return did


def wanted_sysctls(device: str, lower: str, direct_routing: bool, read: Callable[[str], str | None]) -> dict[str, str]:
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
    for name in (device, lower) if direct_routing else (device,):
        if read(f"net/ipv4/conf/{name}/forwarding") == "0":
            wrong[f"net/ipv4/conf/{name}/forwarding"] = "1"
    if read(f"net/ipv6/conf/{device}/accept_ra") not in (None, "0"):
        wrong[f"net/ipv6/conf/{device}/accept_ra"] = "0"
    return wrong


def ensure_sysctls(device: str, lower: str, direct_routing: bool) -> dict[str, str]:
    """Set what is wrong; what was set. Raises KernelError."""
    wrong = wanted_sysctls(device, lower, direct_routing, read_sysctl)
    for name, value in wrong.items():
        write_sysctl(name, value)
    return wrong
