"""net-conf.json -> NetworkConfig: every default, every refusal. Pure.

Source: flannel pkg/subnet/config.go (fields, defaults), pkg/backend/vxlan/vxlan.go (Backend), recorded in
docs/compatibility.md together with each place where we do what flannel's documentation promises instead of its code.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import NamedTuple

from lease.backend_config import BackendConfig, WireguardConfig, backend_config
from lease.families import FAMILIES
from lease.fields import ConfigError, Fields, show
from lease.model import WIDTH, Prefix, ip_number, ip_text, prefix

_CIDR = re.compile(r"[0-9a-fA-F.:]+/[0-9]{1,3}")


class Pool(NamedTuple):
    """The subnets of one family: `length`-bit subnets of `network` from `first` to `last` (bases, inclusive)."""

    network: Prefix
    length: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """How many subnets it has."""
        return ((self.last - self.first) >> (WIDTH[self.network.family] - self.length)) + 1

    def subnet(self, index: int) -> Prefix:
        """The subnet at a place of 0..size-1."""
        step = WIDTH[self.network.family] - self.length
        return Prefix(self.network.family, self.first + (index << step), self.length)

    def place(self, subnet: Prefix) -> int | None:
        """The place of a subnet, None where it is none of these."""
        if not self.allows(subnet):
            return None
        return (subnet.base - self.first) >> (WIDTH[self.network.family] - self.length)

    def touched_by(self, there: Prefix) -> int:
        """How many of the subnets share an address with a prefix."""
        step = WIDTH[self.network.family] - self.length
        low, high = max(self.first, there.base >> step << step), min(self.last, there.last >> step << step)
        return max(0, ((high - low) >> step) + 1) if there.family == self.network.family else 0

    def allows(self, subnet: Prefix) -> bool:
        """Whether a node may hold that subnet under this config."""
        return (
            subnet.family == self.network.family
            and subnet.length == self.length
            and self.first <= subnet.base <= self.last
        )

    def __str__(self) -> str:
        family = self.network.family
        return f"{self.subnet(0)} .. {ip_text(family, self.last)}/{self.length}"


class NetworkConfig(NamedTuple):
    """What every node of the network agrees on."""

    v4: Pool | None
    v6: Pool | None
    backend: BackendConfig
    ignored: tuple[str, ...] = ()
    """What is wrong with parts that nothing uses, one line each."""

    def pool(self, family: int) -> Pool | None:
        """The subnets of a family, None where it is not enabled."""
        return self.v4 if family == 4 else self.v6

    @property
    def pools(self) -> dict[int, Pool]:
        """The subnets of the enabled families."""
        return {family: pool for family in FAMILIES if (pool := self.pool(family)) is not None}


_FIELDS = frozenset(
    name.lower()
    for name in (
        *("EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend"),
        *(f"{lead}{name}" for lead in ("", "IPv6") for name in ("Network", "SubnetLen", "SubnetMin", "SubnetMax")),
    )
)


def parse_config(text: str | bytes) -> NetworkConfig:
    """Read net-conf.json.

    Raises:
        ConfigError: one line naming the field, its value and what is allowed there.
    """
    try:
        value = json.loads(text)
        return _read(value)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error


def _read(value: object) -> NetworkConfig:
    if not isinstance(value, dict):
        raise ConfigError(f"{show(value)} must be an object like {{'Network': '10.244.0.0/16'}}")
    fields = Fields("", value)
    with_v4, with_v6 = fields.get("EnableIPv4", bool, True), fields.get("EnableIPv6", bool, False)
    fields.get("EnableNFTables", bool, False)  # accepted: our rules are nftables always
    if not with_v4 and not with_v6:
        raise ConfigError("EnableIPv4: false and EnableIPv6: false leave no network; enable one of them")
    pools: dict[int, Pool | None] = {4: None, 6: None}
    ignored: list[str] = []
    for family, enabled in ((4, with_v4), (6, with_v6)):
        if enabled:
            pools[family] = _pool(fields, family)
        elif (fault := _fault_of_unused(fields, family)) is not None:
            ignored.append(f"{fault} (ignored: EnableIPv{family} is false)")
    backend = fields.part("Backend")
    ignored += fields.unknown(_FIELDS)
    made, unused = backend_config(backend)
    if with_v6 and made.type == "ipip":
        raise ConfigError(
            "Backend.Type: 'ipip' carries IPv4 alone, and EnableIPv6 is true; switch that off, or take another"
        )
    needed = made.mode if isinstance(made, WireguardConfig) else ""
    if (needed == "ipv4" and not with_v4) or (needed == "ipv6" and not with_v6):
        raise ConfigError(f"Backend.Mode: {show(needed)} has no underlay: EnableIPv{needed[-1]} is false")
    return NetworkConfig(pools[4], pools[6], made, (*ignored, *unused))


def _fault_of_unused(fields: Fields, family: int) -> str | None:
    """What is wrong with the part of a family that is switched off: it stops nothing, but a typing error should not wait for
    the switch. A whole address space (`::/0`, as k3s writes) means none."""
    name = f"{_lead(family)}Network"
    if not fields.has(name):
        return None
    with suppress(ValueError):  # what is no prefix is a fault, which _pool says
        if prefix(fields.get(name, str, "")).length == 0:
            return None
    try:
        _pool(fields, family)
    except ConfigError as error:
        return str(error)
    return None


def _lead(family: int) -> str:
    """What the names of a family's fields begin with."""
    return "" if family == 4 else "IPv6"


def _pool(fields: Fields, family: int) -> Pool:
    """The subnets of one family, with flannel's defaults: a first subnet left out, the last one included."""
    lead, width = _lead(family), WIDTH[family]
    longest, default_len = (30, 24) if family == 4 else (126, 64)
    network = _network(fields, f"{lead}Network", family)
    len_name = f"{lead}SubnetLen"
    if not fields.get(len_name, int, 0):
        if network.length > longest - 2:
            raise ConfigError(f"{lead}Network: {network} is too small; allowed is /{longest - 2} or larger")
        length = max(default_len, network.length + 2)
    else:
        length = fields.get(len_name, int, 0)
        if not network.length + 2 <= length <= longest:
            raise ConfigError(
                f"{len_name}: {show(length)} must be from {network.length + 2} (Network {network} has to hold at least"
                f" four subnets) to {longest}"
            )
    step = 1 << (width - length)
    first = _boundary(fields, f"{lead}SubnetMin", network, length, network.base + step)
    last = _boundary(fields, f"{lead}SubnetMax", network, length, network.last + 1 - step)
    if first > last:
        raise ConfigError(
            f"{lead}SubnetMin: {ip_text(family, first)} must not lie above {lead}SubnetMax {ip_text(family, last)}"
        )
    return Pool(network, length, first, last)


_NO_NETWORK = {
    4: {
        "0.0.0.0/8": "this network",
        "127.0.0.0/8": "loopback",
        "169.254.0.0/16": "link-local",
        "224.0.0.0/4": "multicast",
    },
    6: {"::/16": "unspecified, loopback, mapped IPv4", "fe80::/10": "link-local", "ff00::/8": "multicast"},
}
"""Addresses that no pod can have (RFC 6890)."""


def _network(fields: Fields, name: str, family: int) -> Prefix:
    example = "10.244.0.0/16" if family == 4 else "fd00:10:244::/48"
    text = fields.get(name, str, "")
    if not text:
        raise ConfigError(f"{name}: missing; it must be a prefix like {example}")
    try:
        if not _CIDR.fullmatch(text):
            raise ValueError
        network = prefix(text)
        if network.family != family:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{name}: {show(text)} must be an IPv{family} prefix like {example}") from None
    for text, what in _NO_NETWORK[family].items():
        if network.overlaps(prefix(text)):
            raise ConfigError(f"{name}: {network} must not touch {text} ({what}); use one like {example}")
    return network


def _boundary(fields: Fields, name: str, network: Prefix, length: int, default: int) -> int:
    """SubnetMin or SubnetMax: an address in the network, on a subnet boundary. 0.0.0.0 and :: mean the default."""
    text = fields.get(name, str, "")
    if not text:
        return default
    allowed = f"the base address of a /{length} inside {network}"
    try:
        address = ip_number(text, network.family)
    except ValueError:
        raise ConfigError(f"{name}: {show(text)} must be {allowed}") from None
    if address == 0:
        return default
    if not network.holds(address) or address & ((1 << (WIDTH[network.family] - length)) - 1):
        raise ConfigError(f"{name}: {text} must be {allowed}")
    return address
