"""Make, adopt, mend a link: by pyroute2, since these operations are rare and need no speed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from overlay.kernel.netlink import KernelError

SYSCTL = Path("/proc/sys")
_net = SYSCTL / "net"


def sysctls_at(net: str) -> None:
    """Where /proc/sys/net is to be found: a container has /proc/sys read-only, and the host's own mounted elsewhere."""
    global _net  # noqa: PLW0603 (set once, at the start)
    _net = Path(net)


def _sysctl(name: str) -> Path:
    return _net / name.removeprefix("net/") if name.startswith("net/") else SYSCTL / name


class VxlanAttributes(NamedTuple):
    """A device as rtnetlink shows it. For one that is no vxlan, vni and port are -1.

    checksums: udpcsum set, no zero checksum for IPv6. special: what flannel's form never has, in words.
    """

    ifindex: int
    kind: str
    up: bool
    mtu: int
    mac: int
    vni: int
    port: int
    local: int
    lower: int
    gbp: bool
    learning: bool
    checksums: bool
    special: str


class Links:
    """Operations on links and addresses of this network namespace."""

    def __init__(self) -> None:
        self._ipr = IPRoute()

    def close(self) -> None:
        """Close its socket."""
        self._ipr.close()

    def read(self, name: str) -> VxlanAttributes | None:
        """The device of a name, None where there is none. Raises KernelError."""
        with _as_kernel_error(f"reading {name}"):
            try:
                found = list(self._ipr.get_links(ifname=name))
            except NetlinkError as error:
                if error.code == errno.ENODEV:
                    return None
                raise
        return _attributes(found[0]) if found else None

    def create(
        self, name: str, vni: int, port: int, local: str, lower: int, mtu: int, mac: str, gbp: bool, learning: bool
    ) -> None:
        """Make a vxlan device, down. The MAC is set with it, so that no udev rule can put its own. Raises KernelError."""
        attributes: dict[str, Any] = {
            "kind": "vxlan",
            "ifname": name,
            "vxlan_id": vni,
            "vxlan_port": port,
            "vxlan_local": local,
            "vxlan_link": lower,
            "vxlan_learning": int(learning),
            "address": mac,
            "mtu": mtu,
        }
        if gbp:
            attributes["vxlan_gbp"] = True
        with _as_kernel_error(f"making {name} (vni {vni}, port {port}, local {local}, mtu {mtu})"):
            self._ipr.link("add", **attributes)

    def change_vxlan(self, index: int, vni: int, local: str, lower: int, learning: bool) -> None:
        """Change what a vxlan lets change; FDB and traffic stay. Raises KernelError."""
        with _as_kernel_error(f"changing the vxlan device to local {local}"):
            self._ipr.link(
                "set",
                index=index,
                kind="vxlan",
                vxlan_id=vni,
                vxlan_local=local,
                vxlan_link=lower,
                vxlan_learning=int(learning),
            )

    def set_mtu(self, index: int, mtu: int) -> None:
        """Raises KernelError (EINVAL above what the lower device bears)."""
        with _as_kernel_error(f"setting MTU {mtu}"):
            self._ipr.link("set", index=index, mtu=mtu)

    def set_mac(self, index: int, mac: str) -> None:
        """Takes the device's neighbours with it. Raises KernelError."""
        with _as_kernel_error(f"setting MAC {mac}"):
            self._ipr.link("set", index=index, address=mac)

    def set_up(self, index: int) -> None:
        """Raises KernelError."""
        with _as_kernel_error("setting the device up"):
            self._ipr.link("set", index=index, state="up")

    def delete(self, index: int) -> None:
        """Delete a link; one that is gone already is no error. Raises KernelError."""
        with _as_kernel_error("deleting the device"):
            try:
                self._ipr.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise

    def add_address(self, index: int, address: str, length: int) -> None:
        """Add an IPv4 address; one that is there is no error. Raises KernelError."""
        with _as_kernel_error(f"adding {address}/{length}"):
            try:
                self._ipr.addr("add", index=index, address=address, prefixlen=length)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise

    def remove_address(self, index: int, address: str, length: int) -> None:
        """Remove an IPv4 address; one that is gone is no error. Raises KernelError."""
        with _as_kernel_error(f"removing {address}/{length}"):
            try:
                self._ipr.addr("del", index=index, address=address, prefixlen=length)
            except NetlinkError as error:
                if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    raise


def read_sysctl(name: str) -> str | None:
    """A sysctl by its path below /proc/sys, None where there is none."""
    try:
        return _sysctl(name).read_text().strip()
    except OSError:
        return None


def write_sysctl(name: str, value: str) -> None:
    """Raises KernelError (a read-only /proc/sys, as in an unprivileged container)."""
    try:
        _sysctl(name).write_text(value)
    except OSError as error:
        raise KernelError(
            error.errno or errno.EIO, f"sysctl {name}={value}: {error.strerror}; set it on the host"
        ) from error


@contextlib.contextmanager
def _as_kernel_error(doing: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise KernelError(
            error.code, f"{doing}: {errno.errorcode.get(error.code, error.code)} ({os.strerror(error.code)})"
        ) from error
    except KernelError:
        raise
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, f"{doing}: {error}") from error


def _attributes(link: Any) -> VxlanAttributes:
    info = link.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info is not None else None) or ""
    data = info.get_attr("IFLA_INFO_DATA") if info is not None and kind == "vxlan" else None
    mac = link.get_attr("IFLA_ADDRESS") or "00:00:00:00:00:00"
    has = _reader(data)
    special = [
        words
        for words, there in (
            (f"group {has('IFLA_VXLAN_GROUP')}", has("IFLA_VXLAN_GROUP")),
            ("an IPv6 group", has("IFLA_VXLAN_GROUP6")),
            ("external (collect metadata) mode", has("IFLA_VXLAN_COLLECT_METADATA")),
            ("l2miss", has("IFLA_VXLAN_L2MISS")),
        )
        if there
    ]
    return VxlanAttributes(
        ifindex=link["index"],
        kind=kind,
        up=bool(link["flags"] & 1),
        mtu=link.get_attr("IFLA_MTU") or 0,
        mac=int(mac.replace(":", ""), 16) if len(mac) == 17 else 0,
        vni=has("IFLA_VXLAN_ID") if data is not None else -1,
        port=has("IFLA_VXLAN_PORT") if data is not None else -1,
        local=_ip(has("IFLA_VXLAN_LOCAL")),
        lower=has("IFLA_VXLAN_LINK") or 0,
        gbp=has("IFLA_VXLAN_GBP") is not None and has("IFLA_VXLAN_GBP") is not False,
        learning=bool(has("IFLA_VXLAN_LEARNING")),
        checksums=bool(has("IFLA_VXLAN_UDP_CSUM"))
        and not has("IFLA_VXLAN_UDP_ZERO_CSUM6_TX")
        and not has("IFLA_VXLAN_UDP_ZERO_CSUM6_RX"),
        special=" and ".join(special),
    )


def _reader(data: Any) -> Any:
    return data.get_attr if data is not None else (lambda _name: None)


def _ip(text: str | None) -> int:
    if not text:
        return 0
    return int.from_bytes(bytes(int(part) for part in text.split(".")), "big")
