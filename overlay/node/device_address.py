"""The address of the tunnel device: its subnet's first, at full length, as flannel's."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lease.model import WIDTH, Prefix, ip_text
from overlay.kernel.route.entries import Address
from overlay.kernel.route.links import Links


def ensure_address(
    links: Links, index: int, base: int, networks: Collection[Prefix], there: Iterable[Address]
) -> list[str]:
    """The subnet's base on the device, at full length, and no other address of the networks that are or were this node's:
    the first is the source of what the node sends. What was done, for the log.

    The new one comes before an old one goes: the last address of a device takes its routes with it, silently.
    """
    mine = [address for address in there if address.oif == index]
    family = next(iter(networks)).family
    full = WIDTH[family]
    did = []
    if not any(address.address == base and address.length == full for address in mine):
        links.add_address(index, base, full)
        did.append(f"added {ip_text(family, base)}/{full}")
    for address in mine:
        ours = any(network.holds(address.address) for network in networks)
        if ours and (address.address, address.length) != (base, full):
            links.remove_address(index, address.address, address.length)
            did.append(f"removed {ip_text(family, address.address)}/{address.length}")
    return did
