"""What stands in the way of policies, in words for the status. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from overlay.control.health import NOT_ENFORCED
from overlay.policy.cluster import Cluster
from overlay.policy.feeds import PODS

NAMED = 3
"""So many things are named in a problem."""
REFUSED, UNREAD = "policies refused", "policies unread"


class How(NamedTuple):
    """wanted: --network-policy; ipvs: whether kube-proxy's IPVS is there; stands: whether the kernel has a table; failed:
    why it refused the last change, "": it did not."""

    wanted: bool
    ipvs: bool
    stands: bool
    failed: str


def problems(cluster: Cluster, unread: Mapping[str, str], absent: Collection[str], how: How) -> dict[str, str]:
    """By subject; "": nothing. unread: resources that cannot be read just now, and why; absent: those of them that the API
    server does not know."""
    refused = {**cluster.refused, **{f"pod {key}": why for key, why in cluster.unusable.items()}}
    words = "; ".join(f"{key}: {reason}" for key, reason in sorted(refused.items())[:NAMED])
    more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    known = cluster.listed - set(absent)
    lacking = "; ".join(
        f"{name}: {why}: {'what was known stays enforced' if name in known else 'what they say is not known'}"
        for name, why in sorted(unread.items())
    )
    return {
        REFUSED: words and f"{words}{more}; what cannot be used is not enforced",
        UNREAD: lacking,
        NOT_ENFORCED: _not_enforced(cluster, unread, how),
    }


def _not_enforced(cluster: Cluster, unread: Mapping[str, str], how: How) -> str:
    count, wide = len(cluster.written) or int(cluster.any), cluster.left_out
    if count and not how.wanted:
        return f"{count + wide} policies exist, and none is enforced: --network-policy is false"
    if count and PODS in unread and PODS not in cluster.listed and not how.stands:
        return f"{count} policies exist, and none is enforced: pods cannot be read: {unread[PODS]}"
    if count and how.failed:
        return f"policies changed, and the kernel refuses the change: {how.failed}: what was enforced before stays"
    if count and how.ipvs:
        return f"{count} policies exist, and kube-proxy's IPVS goes past them: use its nftables or iptables mode"
    if wide:
        return f"{wide} ClusterNetworkPolicies exist, and none is enforced: --cluster-network-policy is false"
    return ""
