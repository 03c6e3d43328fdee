"""What the tunnels' devices have in common. Pure."""

from __future__ import annotations

from collections.abc import Mapping


def inner_mtu(configured: int, underlay_mtu: int, overhead: int) -> tuple[int, str]:
    """The tunnel's MTU, and why it is not the configured one ("" when it is). configured: the underlay's, as flannel means
    it, 0 to follow that; overhead: bytes of the outer headers."""
    if configured > underlay_mtu:
        lowered = underlay_mtu - overhead
        return lowered, (
            f"MTU {configured} of the network config is above the underlay's {underlay_mtu}; lowered to that"
            f" (device and pods: {lowered})"
        )
    return (configured or underlay_mtu) - overhead, ""


def changed(pairs: Mapping[str, tuple[str, str]], up: bool) -> dict[str, str]:
    """What is to be changed on a device: attribute -> "old -> new". pairs: of attributes, as found and as wanted; up:
    whether it is, as it is to be."""
    every = {**pairs, "up": ("up" if up else "down", "up")}
    return {name: f"{old} -> {new}" for name, (old, new) in every.items() if old != new}
