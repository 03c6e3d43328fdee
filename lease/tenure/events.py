"""What happens to our own lease, as values: a TenureThread posts them, the agent's loop takes them."""

from __future__ import annotations

from typing import NamedTuple

from lease.model import Lease


class Held(NamedTuple):
    """The lease is ours. method: how we acquired it; warn: needs an operator's attention."""

    lease: Lease
    method: str
    warn: bool = False


class Lost(NamedTuple):
    """The subnet is not ours any more. The datapath of running pods stays; another is taken for new pods."""

    lease: Lease
    reason: str


class Denied(NamedTuple):
    """No lease for now, and why. conflict: another node claims our public IP. displaced: what we hold may be given to
    another node at any time, so no new pod may get an address of it."""

    reason: str
    conflict: bool = False
    displaced: bool = False


class Renewed(NamedTuple):
    """The etcd lease was kept alive; None: it never expires."""

    left_s: float | None


class Disputed(NamedTuple):
    """Somebody does something to our record, or to what it says of us, again and again; to be looked at again in a while."""

    reason: str


class Partial(NamedTuple):
    """The lease lacks a family that the network has, and why; "": it lacks none."""

    reason: str


TenureEvent = Held | Lost | Denied | Renewed | Disputed | Partial
