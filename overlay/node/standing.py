"""The backend by which packets of this node go now: that of the tunnel that stands (Inputs.standing). Pure."""

from __future__ import annotations

from lease.families import FAMILIES, Family
from overlay.backends.base import Backend
from overlay.backends.choose import backend_of
from overlay.control.inputs import Inputs


def backend_in_force(inputs: Inputs, family: Family) -> Backend | None:
    """Of a family; None while there is no network config."""
    config = inputs.backend(family.number)
    return backend_of(config, family) if config is not None else None


def network_in_force(inputs: Inputs) -> int | None:
    """The number of the first family's network, by which tables of no family are named; None as above."""
    if inputs.config is None:
        return None
    backend = backend_in_force(inputs, FAMILIES[min(inputs.config.pools)])
    return backend.network if backend is not None else None
