"""subnet.env and the CNI network list: their content, and what those that are there say.

Source: flannel pkg/subnet/subnet.go WriteSubnetFile (content, order, modes), its cni-conf.json, and the CNI specification.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lease.model import WIDTH, Endpoint, Prefix, ip_number, ip_text, prefix
from overlay.process.files import text_of

CONFLIST = "10-flannel.conflist"
"""flannel's name, so that a node has one network list whichever agent runs."""
NETWORK_NAME = "cbr0"
"""flannel's network name: pods attached under it can still be detached."""

_SUBNET_OF = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
_NETWORK_OF = {4: "FLANNEL_NETWORK", 6: "FLANNEL_IPV6_NETWORK"}
LEASE_FILE = "lease.json"
"""Below --run-dir: which record is ours, for `overlay release`."""


class PodNetwork(NamedTuple):
    """Of one family: the network, and our subnet of it."""

    network: Prefix
    subnet: Prefix


def lease_file(key: str, ends: Sequence[Endpoint], networks: Iterable[Prefix]) -> str:
    """The content of LEASE_FILE. ends: of each family, by the first of which the record is found to be ours."""
    first = ends[0]
    fields: dict[str, Any] = {
        "key": key,
        "public_ip": ip_text(first.subnet.family, first.public_ip),
        "vtep_mac": first.vtep,
        "networks": [str(network) for network in networks],
    }
    for end in ends[1:]:
        fields["public_ipv6"] = ip_text(end.subnet.family, end.public_ip)
    return json.dumps(fields) + "\n"


_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a field of LEASE_FILE may end with, whatever somebody made of the file."""


def _recorded(run_dir: str, name: str) -> Any:
    """A field of LEASE_FILE. Raises one of _UNUSABLE."""
    return json.loads(text_of(f"{run_dir}/{LEASE_FILE}"))[name]


def recorded_networks(run_dir: str) -> list[Prefix]:
    """The networks of LEASE_FILE, [] where it names none."""
    try:
        return [prefix(text) for text in _recorded(run_dir, "networks")]
    except _UNUSABLE:
        return []


def recorded_public_ip(run_dir: str, family: int) -> int:
    """The public IP of LEASE_FILE, 0 where there is none of that family."""
    for name in ("public_ipv6", "public_ip") if family == 6 else ("public_ip",):
        with suppress(*_UNUSABLE):
            return ip_number(_recorded(run_dir, name), family)
    return 0


def subnet_env(pods: Iterable[PodNetwork], mtu: int, ip_masq: bool) -> str:
    """The file as flannel writes it. mtu: the least of the families' (flannel writes IPv4's, which IPv6 packets exceed)."""
    lines = []
    for network, subnet in pods:
        gateway = f"{ip_text(subnet.family, subnet.base + 1)}/{subnet.length}"
        lines += [f"{_NETWORK_OF[subnet.family]}={network}", f"{_SUBNET_OF[subnet.family]}={gateway}"]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}"]
    return "\n".join(lines) + "\n"


def previous_subnet(path: str, family: int) -> Prefix | None:
    """The subnet of a family in an old subnet.env; None where there is none, or none that can be read."""
    subnet = _of_env(path).get(_SUBNET_OF[family])
    return subnet if subnet is not None and subnet.family == family and subnet.length < WIDTH[family] else None


def networks_of(path: str) -> list[Prefix]:
    """The networks that a subnet.env names, [] where there is none."""
    found = _of_env(path)
    return [found[name] for name in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK") if name in found]


def _of_env(path: str) -> dict[str, Prefix]:
    """The prefixes of a subnet.env, by name; of two lines the first counts."""
    try:
        text = text_of(path)
    except OSError:
        return {}
    found: dict[str, Prefix] = {}
    for line in text.splitlines():
        name, _, value = line.strip().removeprefix("export ").partition("=")
        if not name.strip().startswith("FLANNEL_"):
            continue  # whatever somebody made of the file: megabytes of it are read in a moment
        with suppress(ValueError):
            found.setdefault(name.strip(), prefix(value.strip().strip("\"'")))
    return found


def network_list(pods: Sequence[PodNetwork], mtu: int, bridge: str, data_dir: str, waits_for: str = "") -> str:
    """The CNI network list: bridge, host-local and portmap on our lease; of two families a pod gets an address of each.

    waits_for: a file without which no pod is made: host-local reads it as resolvConf when it gives an address, and not when
    it takes one back. After a boot subnet.env, which stands in /run, is not there until the agent has written it, so pods
    wait, as they do with flannel's plugin; what stands in it means nothing to a resolver (no line is a nameserver's).

    ipMasq stays false: the bridge plugin would masquerade pod-to-pod traffic between nodes. Masquerade is ours.
    """
    ipam: dict[str, object] = {
        "type": "host-local",
        "ranges": [[{"subnet": str(each.subnet)}] for each in pods],
        "routes": [{"dst": str(each.network)} for each in pods],
    }
    if waits_for:
        ipam["resolvConf"] = waits_for
    if data_dir:
        ipam["dataDir"] = data_dir
    plugins = [
        {
            "type": "bridge",
            "bridge": bridge,
            "mtu": mtu,
            "isGateway": True,
            "isDefaultGateway": True,
            "hairpinMode": True,
            "ipMasq": False,
            "ipam": ipam,
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    return json.dumps({"name": NETWORK_NAME, "cniVersion": "0.3.1", "plugins": plugins}, indent=2) + "\n"


def render_list(
    template: bytes,
    plain: str,
    mtu: int,
    ip_masq: bool,
    bridge_of: Callable[[str], str] = lambda name: name,
) -> str:
    """flannel's cni-conf.json as a list that needs no flannel plugin: its entry of type flannel becomes bridge and
    host-local on our lease, its delegate's values kept; other entries stay as they are.

    plain: what `network_list` makes, whose bridge and dataDir are taken. bridge_of: the bridge in place of one that the
    delegate names (bridge_name). Source: the flannel CNI plugin, flannel_linux.go.

    Raises:
        ValueError: the template cannot be used; says where and what is allowed.
    """
    try:
        found = json.loads(template)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:100]}") from None
    if isinstance(found, dict) and "plugins" not in found and isinstance(found.get("type"), str):
        found = _as_list(found)
    plugins = found.get("plugins") if isinstance(found, dict) else None
    if not isinstance(plugins, list) or not all(isinstance(entry, dict) for entry in plugins):
        raise ValueError('"plugins" must be a list of objects, as in flannel\'s cni-conf.json')
    bridge = json.loads(plain)["plugins"][0]
    ours = _Ours(bridge, mtu, ip_masq, bridge_of)
    made = [_rendered(entry, ours) for entry in plugins]
    name = found.get("name") or NETWORK_NAME
    whole = {**found, "name": name, "cniVersion": found.get("cniVersion") or "0.3.1", "plugins": made}
    try:
        return json.dumps(whole, indent=2) + "\n"
    except RecursionError:
        raise ValueError("nested too deep") from None


class _Ours(NamedTuple):
    """What takes the place of an entry of type flannel: our own bridge entry, and what of our lease goes into it."""

    plain: dict[str, Any]
    mtu: int
    ip_masq: bool
    bridge_of: Callable[[str], str]


def _rendered(entry: Any, ours: _Ours) -> Any:
    if not isinstance(entry, dict):
        return entry
    if entry.get("type") == "flannel":
        return _bridge(entry, ours)
    delegates = entry.get("delegates")
    if isinstance(delegates, list):  # multus
        return {**entry, "delegates": [_rendered(each, ours) for each in delegates]}
    if isinstance(entry.get("plugins"), list):  # a delegate may be a list itself
        return {**entry, "plugins": [_rendered(each, ours) for each in entry["plugins"]]}
    return entry


def _as_list(single: dict[str, Any]) -> dict[str, Any]:
    """A network configuration of one plugin as the list that it stands for (CNI specification, 1.0 "network configuration
    lists"); a meta plugin's `delegates` (multus) are looked into."""
    outer = ("name", "cniVersion", "disableCheck")
    plugin = {key: value for key, value in single.items() if key not in outer}
    return {**{key: single[key] for key in outer if key in single}, "plugins": [plugin]}


def _bridge(entry: dict[str, Any], ours: _Ours) -> dict[str, Any]:
    delegate, ipam = entry.get("delegate") or {}, entry.get("ipam") or {}
    if not isinstance(delegate, dict) or not isinstance(ipam, dict):
        raise ValueError("delegate and ipam of the entry of type flannel must be objects")
    if wrong := {"name", "ipam"} & delegate.keys():
        raise ValueError(f"delegate.{min(wrong)}: not allowed (nor by flannel); ipam stands beside delegate")
    routes, plain = ipam.get("routes") or [], ours.plain
    if not isinstance(routes, list):
        raise ValueError("ipam.routes must be a list")
    kind = delegate.get("type", "bridge")
    bridge = {"type": kind, "mtu": ours.mtu, "ipMasq": not ours.ip_masq}
    if kind == "bridge":
        bridge |= {"bridge": plain["bridge"], "isGateway": True}
    named = delegate.get("bridge")
    if kind == "bridge" and isinstance(named, str) and named:
        delegate = {**delegate, "bridge": ours.bridge_of(named)}
    return {
        **bridge,
        **delegate,
        "ipam": {
            **plain["ipam"],
            **ipam,
            "type": "host-local",
            "ranges": plain["ipam"]["ranges"],
            "routes": [*routes, *plain["ipam"]["routes"]],
        },
    }


def listed_subnet(path: str, family: int) -> Prefix | None:
    """The subnet of a family that an existing network list gives addresses of, None where it names none."""
    try:
        for plugin in _plugins(text_of(path)):
            for group in (plugin.get("ipam") or {}).get("ranges") or []:
                for each in group:
                    if (found := prefix(each["subnet"])).family == family:
                        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def names_plugin(path: str, kind: str) -> bool:
    """Whether an existing network list names a plugin of that type."""
    try:
        return any(plugin.get("type") == kind for plugin in _plugins(text_of(path)))
    except (OSError, ValueError):
        return False


def preferred(folder: str, subnet: Prefix) -> str:
    """The file by which a container runtime makes pods in place of our list, "" where there is none: it takes the first by
    name (libcni's ConfFiles, containerd, CRI-O). One that ends in flannel's plugin, in our subnet or in our list by
    multus is as good as ours. Raises OSError."""
    for name in sorted(os.listdir(folder)):
        if name == CONFLIST:
            return ""
        if not name.endswith((".conf", ".conflist", ".json")):
            continue
        path = f"{folder}/{name}"
        try:
            kinds = {kind for plugin in _plugins(text_of(path)) if isinstance(kind := plugin.get("type"), str)}
        except OSError:
            continue
        if kinds and not kinds & {"flannel", "multus", "multus-shim"} and listed_subnet(path, subnet.family) != subnet:
            return name
    return ""


def bridges_in(content: str) -> set[str]:
    """The bridges that a network list attaches pods to."""
    named = (plugin.get("bridge") for plugin in _plugins(content) if plugin.get("type") == "bridge")
    return {name for name in named if isinstance(name, str) and name}


def _plugins(content: str) -> list[dict[str, Any]]:
    """All plugins of a list, those that others delegate to as well; [] of what is none."""
    found: list[dict[str, Any]] = []
    try:
        there = [json.loads(content)]
    except (ValueError, RecursionError):
        return []
    while there:
        each = there.pop(0)
        if isinstance(each, dict):
            found.append(each)
            for key in ("plugins", "delegates"):
                there += each[key] if isinstance(each.get(key), list) else []
    return found


def bridge_name(subnet: Prefix, bridges: Iterable[tuple[str, frozenset[int]]], first: str = "cni0") -> str:
    """The bridge for pods of a subnet: `first`, unless that one serves another subnet (its pods keep it).

    bridges: the existing interfaces and their addresses. The bridge plugin refuses a bridge with another address ("already
    has an IP address different from").
    """
    there = dict(bridges)
    stem = "cni" if first == "cni0" else f"{first[:12]}-"  # IFNAMSIZ: 15 characters
    names = [first, *(f"{stem}{number}" for number in range(1, len(there) + 2))]
    for name in names:
        if any(subnet.holds(address) for address in there.get(name, ())):
            return name
    return next(name for name in names if not there.get(name))
