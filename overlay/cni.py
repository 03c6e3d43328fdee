"""subnet.env and the CNI network list: content as pure functions, written atomically, removed when asked.

Source: flannel pkg/subnet/subnet.go WriteSubnetFile (content, order, modes), its cni-conf.json, and the CNI specification.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lease.model import Endpoint, Prefix, ip_text, mac_text, prefix

CONFLIST = "10-flannel.conflist"
"""flannel's name, so that a node has one network list whichever agent runs."""
NETWORK_NAME = "cbr0"
"""flannel's network name: pods attached under it can still be detached."""

LEASE_FILE = "lease.json"
"""Below --run-dir: which record is ours, for `overlay release`."""


def lease_file(key: str, end: Endpoint) -> str:
    """The content of LEASE_FILE."""
    assert end.mac is not None
    fields = {"key": key, "public_ip": ip_text(4, end.public_ip), "vtep_mac": mac_text(end.mac)}
    return json.dumps(fields) + "\n"


def subnet_env(network: Prefix, subnet: Prefix, mtu: int, ip_masq: bool) -> str:
    """The file as flannel writes it."""
    return (
        f"FLANNEL_NETWORK={network}\n"
        f"FLANNEL_SUBNET={ip_text(4, subnet.base + 1)}/{subnet.length}\n"
        f"FLANNEL_MTU={mtu}\n"
        f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}\n"
    )


def previous_subnet(path: str) -> Prefix | None:
    """The subnet of an old subnet.env; None where there is none, or none that can be read."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.strip().removeprefix("export ").partition("=")
        if name.strip() == "FLANNEL_SUBNET":
            try:
                subnet = prefix(value.strip().strip("\"'"))
            except ValueError:
                return None
            return subnet if subnet.family == 4 and subnet.length < 32 else None
    return None


def network_list(network: Prefix, subnet: Prefix, mtu: int, bridge: str, data_dir: str) -> str:
    """The CNI network list: bridge, host-local and portmap on our lease.

    ipMasq stays false: the bridge plugin would masquerade pod-to-pod traffic between nodes. Masquerade is ours.
    """
    ipam: dict[str, object] = {
        "type": "host-local",
        "ranges": [[{"subnet": str(subnet)}]],
        "routes": [{"dst": str(network)}],
    }
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


def bridge_name(subnet: Prefix, bridges: Iterable[tuple[str, frozenset[int]]]) -> str:
    """The bridge for pods of a subnet: cni0, unless that one serves another subnet (its pods keep it).

    bridges: the existing interfaces and their addresses. The bridge plugin refuses a bridge with another address.
    """
    there = dict(bridges)
    names = [f"cni{number}" for number in range(len(there) + 1)]
    for name in names:
        if any(subnet.holds(address) for address in there.get(name, ())):
            return name
    return next(name for name in names if not there.get(name))


def up_to_date(path: str, content: str) -> bool:
    """Whether a file holds exactly that."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace") == content
    except OSError:
        return False


def write_atomically(path: str, content: str) -> None:
    """Put a file in place whole: temporary name beside it, fsync, rename. 0644 whatever the umask, an existing file's
    mode kept, folders 0755: as flannel does. Raises OSError."""
    target = Path(path)
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
    except OSError:
        mode = 0o644
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove(path: str) -> None:
    """Remove a file; one that is gone is no error. Raises OSError."""
    Path(path).unlink(missing_ok=True)
