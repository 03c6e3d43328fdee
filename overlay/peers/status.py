"""Peers and differences for the status: each peer as the records say it, and how its entries stand."""

from __future__ import annotations

from typing import Any

from lease.model import ip_text, mac_text
from lease.records.packed import number, unpack
from overlay.peers import plan


class Peers:
    """All peers as they were, still packed: the owner thread hands them over in a moment, and who asked writes them out."""

    def __init__(self, node: plan.Node | None, packed: tuple[bytes, ...], missing: dict[int, int]) -> None:
        """missing: of a peer's number, its entries that are not as they should be, as bits by table."""
        self._node, self._packed, self._missing = node, packed, missing

    def __len__(self) -> int:
        return len(self._packed)

    def json(self) -> list[dict[str, Any]]:
        """As JSON values."""
        return [] if self._node is None else [self._peer(self._node, each) for each in self._packed]

    def _peer(self, node: plan.Node, packed: bytes) -> dict[str, Any]:
        lease = unpack(packed)
        family = node.network.family
        end = lease.endpoint(family)
        assert end is not None
        bits = self._missing.get(number(end.subnet), 0)
        missing = [table.name for place, table in enumerate(node.backend.tables) if bits & 1 << place]
        return {
            "subnet": str(end.subnet),
            "public_ip": ip_text(family, end.public_ip),
            "vtep_mac": mac_text(end.mac) if end.mac is not None else "",
            **({"public_key": end.vtep} if end.key else {}),
            "node_name": node_name(lease.node),
            "path": "direct" if plan.is_direct(plan.entries(node, lease)) else node.backend.type,
            "ok": not missing,
            "missing": missing,
        }


def node_name(identity: str) -> str:
    """The node's name in a record's identity (hash/name/MAC, or a Node's name), "" where it has none."""
    parts = identity.split("/")
    return parts[1] if len(parts) == 3 else identity if len(parts) == 1 else ""
