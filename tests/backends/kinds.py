"""The networks that the contract of backends is tried in."""

from __future__ import annotations

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """backend: of the network config; devices: by family, "" where there is none; mtu: of pods on an underlay of 1500."""

    name: str
    backend: dict[str, Any]
    families: tuple[int, ...]
    devices: dict[int, str]
    mtu: int
    needs_no_module: bool = True

    def __str__(self) -> str:
        return f"{self.name} {'+'.join(f'IPv{family}' for family in self.families)}"


def _wireguard(name: str, *families: int, device6: str = "flannel-wg-v6", **more: Any) -> Kind:
    backend = {"Type": "wireguard", **more}
    return Kind(name, backend, families, {4: "flannel-wg", 6: device6}, 1420)


KINDS = (
    Kind("host-gw", {"Type": "host-gw"}, (4,), {4: ""}, 1500),
    Kind("host-gw", {"Type": "host-gw"}, (4, 6), {4: "", 6: ""}, 1500),
    _wireguard("wireguard", 4),
    _wireguard("wireguard", 4, 6),
    _wireguard("wireguard", 6),
    _wireguard("wireguard auto", 4, 6, device6="flannel-wg", Mode="auto"),
    Kind("ipip", {"Type": "ipip"}, (4,), {4: "flannel.ipip"}, 1480, needs_no_module=False),
    Kind(
        "ipip direct", {"Type": "ipip", "DirectRouting": True}, (4,), {4: "flannel.ipip"}, 1480, needs_no_module=False
    ),
)
