"""Make, adopt, mend a link. What every start does is packed by link_wire.py; the rest goes through pyroute2, since it is
rare and needs no speed.

Of pyroute2 its message classes alone, over our own socket: IPRoute and what comes with it cost 10 MiB and 90 ms.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

from lease.families import V4, Family
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route import link_wire, wire
from overlay.kernel.route.entries import Link
from overlay.kernel.route.link_wire import DeviceAttributes, IpipDevice, VxlanDevice, WireguardDevice

SYSCTL = "/proc/sys"
_net = f"{SYSCTL}/net"


def sysctls_at(net: str) -> None:
    """Where /proc/sys/net is to be found: a container has /proc/sys read-only, and the host's own mounted elsewhere."""
    global _net  # noqa: PLW0603 (set once, at the start)
    _net = net


def _sysctl(name: str) -> str:
    return f"{_net}/{name.removeprefix('net/')}" if name.startswith("net/") else f"{SYSCTL}/{name}"


class Links:
    """Operations on links and addresses of this network namespace."""

    def __init__(self, family: Family = V4) -> None:
        """family: of the addresses, and of vxlan devices' underlay."""
        self._requests, self._family = RequestSocket(), family

    def close(self) -> None:
        """Close its socket."""
        self._requests.close()

    def all(self) -> list[Link]:
        """All links. Raises KernelError."""
        return list(self._requests.links())

    def read(self, name: str) -> DeviceAttributes | None:
        """The device of a name, None where there is none. Raises KernelError."""
        try:
            found = self._requests.ask(lambda seq: link_wire.link_by_name(seq, name))
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return None
            raise KernelError(error.errno, f"reading {name}: {error.strerror or error}") from error
        return link_wire.parse_device(found)

    def create(self, device: VxlanDevice | IpipDevice | WireguardDevice) -> None:
        """Make it, down. Of a vxlan the MAC is set with it, so that no udev rule can put its own. Raises KernelError."""
        if isinstance(device, IpipDevice):
            ipip = device
            self._do(
                f"making {ipip.name} (local {self._text(ipip.local)})", lambda seq: link_wire.ipip_create(seq, ipip)
            )
            return
        if isinstance(device, WireguardDevice):
            made = device
            self._do(f"making {made.name} (wireguard)", lambda seq: link_wire.wireguard_create(seq, made))
            return
        doing = (
            f"making {device.name} (vni {device.vni}, port {device.port}, local {self._text(device.local)},"
            f" mtu {device.mtu})"
        )
        self._do(doing, lambda seq: link_wire.vxlan_create(self._family, seq, device))

    def change(self, index: int, device: VxlanDevice | IpipDevice | WireguardDevice) -> None:
        """Change what a device of its kind lets change; FDB and traffic stay. Raises KernelError."""
        local = self._text(device.local)
        if isinstance(device, IpipDevice):
            ipip = device
            self._do(f"changing {ipip.name} to local {local}", lambda seq: link_wire.ipip_change(seq, index, ipip))
            return
        assert isinstance(device, VxlanDevice), "of a WireGuard device nothing is changed so"
        data = [
            ("IFLA_VXLAN_ID", device.vni),
            ("IFLA_VXLAN_LOCAL" if self._family is V4 else "IFLA_VXLAN_LOCAL6", local),
            ("IFLA_VXLAN_LINK", device.lower),
            ("IFLA_VXLAN_LEARNING", int(device.learning)),
        ]
        self._link(f"changing the vxlan device to local {local}", [_vxlan_info(data)], index)

    def set_mtu(self, index: int, mtu: int) -> None:
        """Raises KernelError (EINVAL above what the lower device allows)."""
        self._link(f"setting MTU {mtu}", [("IFLA_MTU", mtu)], index)

    def set_mac(self, index: int, mac: str) -> None:
        """Takes the device's neighbours with it. Raises KernelError."""
        self._link(f"setting MAC {mac}", [("IFLA_ADDRESS", mac)], index)

    def set_down(self, index: int) -> None:
        """Down: its routes and neighbours go with that. Raises KernelError."""
        self._do("setting the device down", lambda seq: link_wire.link_up(seq, index, False))

    def set_up(self, index: int) -> None:
        """Raises KernelError."""
        self._do("setting the device up", lambda seq: link_wire.link_up(seq, index))

    def delete(self, index: int) -> None:
        """Delete a link; one that is gone already is no error. Raises KernelError."""
        self._link("deleting the device", [], index, kind=wire.RTM_DELLINK, harmless=(errno.ENODEV,))

    def add_address(self, index: int, address: int, length: int) -> None:
        """Add an address; one that is there is no error. Raises KernelError."""
        doing = f"adding {self._text(address)}/{length}"
        self._do(doing, lambda seq: link_wire.address_add(self._family, seq, index, address, length), (errno.EEXIST,))

    def remove_address(self, index: int, address: int, length: int) -> None:
        """Remove an address; one that is gone is no error. Raises KernelError."""
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

        message = ifaddrmsg()
        message["family"], message["index"], message["prefixlen"] = self._family.af, index, length
        message["attrs"] = [("IFA_LOCAL", self._text(address)), ("IFA_ADDRESS", self._text(address))]
        harmless = (errno.EADDRNOTAVAIL, errno.ENODEV)
        self._do(f"removing {self._text(address)}/{length}", _encoder(message, wire.RTM_DELADDR), harmless)

    def _text(self, address: int) -> str:
        return socket.inet_ntop(self._family.af, self._family.packed(address))

    def _link(
        self,
        doing: str,
        attributes: list[tuple[str, Any]],
        index: int,
        kind: int = wire.RTM_NEWLINK,
        harmless: tuple[int, ...] = (),
    ) -> None:
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

        message = ifinfmsg()
        message["index"], message["attrs"] = index, attributes
        self._do(doing, _encoder(message, kind), harmless)

    def _do(self, doing: str, build: Callable[[int], bytes], harmless: tuple[int, ...] = ()) -> None:
        seq = self._requests.take_seqs(1)
        refusal = self._requests.execute([build(seq)], seq).get(0)
        if refusal is not None and refusal.errno not in harmless:
            raise KernelError(refusal.errno, f"{doing}: {refusal}")


def _vxlan_info(data: list[tuple[str, Any]]) -> tuple[str, Any]:
    return "IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]}


def _encoder(message: Any, kind: int) -> Callable[[int], bytes]:
    def encode(seq: int) -> bytes:
        message["header"].update(type=kind, flags=wire.NLM_F_REQUEST, sequence_number=seq)
        message.encode()
        return bytes(message.data)

    return encode


def read_sysctl(name: str) -> str | None:
    """A sysctl by its path below /proc/sys, None where there is none."""
    try:
        file = os.open(_sysctl(name), os.O_RDONLY | os.O_CLOEXEC)  # a third of open()'s system calls: read every 5 s
    except OSError:
        return None
    try:
        return os.read(file, 4096).decode("ascii").strip()
    except OSError:
        return None
    finally:
        os.close(file)


def client_ports() -> tuple[int, int]:
    """The first and last port that the kernel gives to clients; of a vxlan device the source ports, one for each flow
    (include/net/udp.h udp_flow_src_port)."""
    low, _, high = (read_sysctl("net/ipv4/ip_local_port_range") or "32768\t60999").partition("\t")
    return int(low), int(high)


def write_sysctl(name: str, value: str) -> None:
    """Raises KernelError (a read-only /proc/sys, as in an unprivileged container)."""
    try:
        with open(_sysctl(name), "w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        raise KernelError(
            error.errno or errno.EIO, f"sysctl {name}={value}: {error.strerror}; set it on the host"
        ) from error
