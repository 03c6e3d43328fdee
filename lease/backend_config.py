"""The Backend object of net-conf.json -> how nodes reach each other: every default, every refusal. Pure.

Source: flannel pkg/backend/{vxlan,hostgw,ipip,wireguard}; where we do what its documentation promises instead of its code,
docs/compatibility.md says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from lease.families import V4
from lease.fields import ConfigError, Fields, show
from lease.model import key_bytes

MAX_VNI = 9_999_999
"""24 bits are allowed (RFC 7348), and the device is named after it: flannel.N in the 15 characters of IFNAMSIZ."""
DEFAULT_PORT = 8472
"""The kernel's own default, which flannel gets by leaving the attribute out (drivers/net/vxlan/vxlan_core.c)."""
MIN_MTU = 68 + V4.overhead
"""ETH_MIN_MTU of the device plus the least overhead; the kernel refuses less with EINVAL."""
WIREGUARD_PORT, WIREGUARD_PORT6 = 51820, 51821
"""flannel's."""
MIN_MTU_WIREGUARD = 68 + 80
MODES = ("separate", "auto", "ipv4", "ipv6")

_MAC_PREFIX = re.compile(r"[0-9a-fA-F]{2}-[0-9a-fA-F]{2}")


class VxlanConfig(NamedTuple):
    """The Backend object of type vxlan. mtu: the **underlay's** MTU as flannel means it, 0 to follow the underlay."""

    vni: int = 1
    port: int = DEFAULT_PORT
    mtu: int = 0
    direct_routing: bool = False
    gbp: bool = False
    learning: bool = False
    mac_prefix: str = "0E-2A"

    @property
    def type(self) -> str:
        """BackendType in records."""
        return "vxlan"


class HostGwConfig(NamedTuple):
    """The Backend object of type host-gw: nothing can be set. type: BackendType in records; a field, so that no two kinds of
    config are equal."""

    type: str = "host-gw"


class IpipConfig(NamedTuple):
    """The Backend object of type ipip."""

    direct_routing: bool = False
    type: str = "ipip"


class WireguardConfig(NamedTuple):
    """The Backend object of type wireguard. port, port6: to listen on, UDP; mtu: the underlay's, 0 to follow it; psk: the
    pre-shared key of all nodes, b"": none; keepalive_s: 0 for none. mode: which underlay carries which family (MODES)."""

    port: int = WIREGUARD_PORT
    port6: int = WIREGUARD_PORT6
    mtu: int = 0
    psk: bytes = b""
    keepalive_s: int = 0
    mode: str = "separate"
    type: str = "wireguard"

    def __repr__(self) -> str:
        return f"WireguardConfig(port={self.port}, port6={self.port6}, mtu={self.mtu}, mode={self.mode!r}, ...)"  # no secret


BackendConfig = VxlanConfig | HostGwConfig | IpipConfig | WireguardConfig


def backend_config(backend: Fields | None) -> tuple[BackendConfig, list[str]]:
    """The Backend object, and a line for each field that says nothing to it; absent means vxlan, as flannel's documentation
    says (its code takes udp). Raises ConfigError."""
    if backend is None:
        return VxlanConfig(), []
    named = backend.get("Type", str, "")
    read, fields = _KINDS.get(named.lower(), (None, ()))
    if read is None:
        allowed = ", ".join(map(repr, _KINDS))
        raise ConfigError(f"Backend.Type: {show(named)} is not supported; allowed is one of {allowed}")
    return read(backend), backend.unknown(frozenset(("type", *fields)))


def _vxlan(backend: Fields) -> VxlanConfig:
    mac_prefix = backend.get("MacPrefix", str, "0E-2A")
    if not _MAC_PREFIX.fullmatch(mac_prefix) or int(mac_prefix[:2], 16) & 1:
        raise ConfigError(f"Backend.MacPrefix: {show(mac_prefix)} must be two hex bytes of a unicast MAC like '0E-2A'")
    return VxlanConfig(
        vni=_vni(backend),
        port=backend.whole("Port", 0, 65535, 0) or DEFAULT_PORT,
        mtu=_mtu(backend, MIN_MTU),
        direct_routing=backend.get("DirectRouting", bool, False),
        gbp=backend.get("GBP", bool, False),
        learning=backend.get("Learning", bool, False),
        mac_prefix=mac_prefix,
    )


def _mtu(backend: Fields, least: int) -> int:
    """0 where it is absent, or 0."""
    return backend.whole("MTU", least, 65535, 0) if backend.get("MTU", int, 0) else 0


def _vni(backend: Fields) -> int:
    vni = backend.get("VNI", int, 1)
    if MAX_VNI < vni < 1 << 24:
        name = f"flannel.{vni}"
        raise ConfigError(
            f"Backend.VNI: {vni} would name the device {name}, of {len(name)} characters, and Linux allows 15; allowed is 0"
            f" to {MAX_VNI}"
        )
    return backend.whole("VNI", 0, MAX_VNI, 1)


def _wireguard(backend: Fields) -> WireguardConfig:
    mode = backend.get("Mode", str, "") or "separate"
    if mode not in MODES:
        raise ConfigError(f"Backend.Mode: {show(mode)} must be one of {', '.join(map(repr, MODES))}")
    port = backend.whole("ListenPort", 0, 65535, 0) or WIREGUARD_PORT
    port6 = backend.whole("ListenPortV6", 0, 65535, 0) or WIREGUARD_PORT6
    if mode == "separate" and port == port6:
        raise ConfigError(f"Backend.ListenPortV6: {port6} must differ from ListenPort: each device listens on its own")
    return WireguardConfig(
        port,
        port6,
        mtu=_mtu(backend, MIN_MTU_WIREGUARD),
        psk=_psk(backend.secret("PSK")),
        keepalive_s=backend.whole("PersistentKeepaliveInterval", 0, 65535, 0),
        mode=mode,
    )


def _psk(text: str) -> bytes:
    """A pre-shared key; never shown: it is a secret. Raises ConfigError."""
    if not text:
        return b""
    try:
        return key_bytes(text)
    except ValueError as error:
        raise ConfigError(f"Backend.PSK: it must be a key as `wg genpsk` prints one; {error}") from None


_KINDS: dict[str, tuple[Callable[[Fields], BackendConfig], tuple[str, ...]]] = {
    "vxlan": (_vxlan, ("vni", "port", "mtu", "directrouting", "gbp", "learning", "macprefix")),
    "host-gw": (lambda _backend: HostGwConfig(), ()),
    "ipip": (lambda backend: IpipConfig(backend.get("DirectRouting", bool, False)), ("directrouting",)),
    "wireguard": (
        _wireguard,
        ("listenport", "listenportv6", "mtu", "psk", "persistentkeepaliveinterval", "mode"),
    ),
}
"""By type: how the rest of the object is read, and the names of its fields, in lower case."""
