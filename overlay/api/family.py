"""One family's view of a status: the sections of IPv6 under the names that those of IPv4 have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overlay.control.health import FIRST

SECOND = "_ipv6"
"""Sections of the status that are of IPv6 end so, and its fields in the lease."""


def families(found: Mapping[str, Any]) -> list[int]:
    """Those that the network has, in order; IPv4 where nothing is known of it yet."""
    subnets = (found.get("network") or {}).get("subnets") or {}
    return [number for number in (4, 6) if f"ipv{number}" in subnets] or [FIRST]


def of_family(found: Mapping[str, Any], family: int) -> dict[str, Any]:
    """The status, with the sections of a family under plain names. lease: None where it has no subnet of it."""
    made = {name: section for name, section in found.items() if not name.endswith(SECOND)}
    lease = found.get("lease")
    if family != FIRST:
        made |= {name.removesuffix(SECOND): section for name, section in found.items() if name.endswith(SECOND)}
    if lease and (":" in lease["subnet"]) != (family != FIRST):
        own = {name.removesuffix(SECOND): value for name, value in lease.items() if name.endswith(SECOND)}
        made["lease"] = {**lease, **own} if own and family != FIRST else None
    return made


def of_address(found: Mapping[str, Any], address: str) -> tuple[int, dict[str, Any]]:
    """The family of an address or prefix, and its view."""
    family = 6 if ":" in address else 4
    return family, of_family(found, family)
