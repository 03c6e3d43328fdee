"""One family's view of a status: the sections of IPv6 under the names that those of IPv4 have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lease.families import FAMILIES, Family
from lease.model import Prefix, prefix
from overlay.control.health import FIRST

SECOND = "_ipv6"
"""Sections of the status that are of IPv6 end so, and its fields in the lease."""


def families(found: Mapping[str, Any]) -> list[int]:
    """Those that the network has, in order; IPv4 where nothing is known of it yet."""
    subnets = (found.get("network") or {}).get("subnets") or {}
    return [number for number in (4, 6) if f"ipv{number}" in subnets] or [FIRST]


def of_family(found: Mapping[str, Any], family: int) -> dict[str, Any]:
    """The status, with the sections of a family under plain names. lease: None where it has no subnet of it."""
    made: dict[str, Any] = {"family": family}
    made |= {name: section for name, section in found.items() if not name.endswith(SECOND)}
    lease = found.get("lease")
    devices = (found.get(name) or {} for name in ("device", f"device{SECOND}"))
    mtus = [device["mtu"] for device in devices if "mtu" in device]
    made["pods_mtu"] = min(mtus, default=0)  # subnet.env has one for all: the smaller one
    if family != FIRST:
        made |= {name.removesuffix(SECOND): section for name, section in found.items() if name.endswith(SECOND)}
    if lease and (":" in lease["subnet"]) != (family != FIRST):
        own = {name.removesuffix(SECOND): value for name, value in lease.items() if name.endswith(SECOND)}
        made["lease"] = {**lease, **own} if own and family != FIRST else None
    return made


def primary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The view of the first family of the network."""
    return of_family(found, families(found)[0])


def family_of(view: Mapping[str, Any]) -> Family:
    """The family of a view."""
    return FAMILIES[view.get("family", FIRST)]


def network_of(view: Mapping[str, Any]) -> Prefix:
    """The pod network of a view's family."""
    return prefix(view["network"]["subnets"][f"ipv{view.get('family', FIRST)}"]["network"])


def has_vteps(view: Mapping[str, Any]) -> bool:
    """Whether peers have an address of their own on a device."""
    return bool(view["network"]["backend"]["type"] != "host-gw")


def views(found: Mapping[str, Any], target: str | None) -> list[dict[str, Any]]:
    """The views in which a target is looked for: of an address its family's, of a name, or None, all."""
    known = families(found)
    if target and (":" in target or target.replace(".", "").replace("/", "").isdigit()):
        wanted = 6 if ":" in target else 4
        known = [wanted] if wanted in known else known
    return [of_family(found, family) for family in known]
