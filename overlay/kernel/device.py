"""Make, adopt, mend a link: by pyroute2's messages, since these operations are rare and need no speed.

Its message classes alone, over our own socket: IPRoute and what comes with it cost 10 MiB and 90 ms.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from overlay.kernel import wire
from overlay.kernel.netlink import KernelError, RequestSocket

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
        self._requests = RequestSocket()

    def close(self) -> None:
        """Close its socket."""
        self._requests.close()

    def read(self, name: str) -> VxlanAttributes | None:
        """The device of a name, None where there is none. Raises KernelError."""
        message = ifinfmsg()
        message["attrs"] = [("IFLA_IFNAME", name)]
        try:
            found = self._requests.ask(lambda seq: _encoded(message, wire.RTM_GETLINK, wire.NLM_F_REQUEST, seq))
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return None
            raise KernelError(error.errno, f"reading {name}: {_words(error)}") from error
        shown = ifinfmsg(found)
        shown.decode()
        return _attributes(shown)

    def create(
        self, name: str, vni: int, port: int, local: str, lower: int, mtu: int, mac: str, gbp: bool, learning: bool
    ) -> None:
        """Make a vxlan device, down. The MAC is set with it, so that no udev rule can put its own. Raises KernelError."""
        data: list[tuple[str, Any]] = [
            ("IFLA_VXLAN_ID", vni),
            ("IFLA_VXLAN_PORT", port),
            ("IFLA_VXLAN_LOCAL", local),
            ("IFLA_VXLAN_LINK", lower),
            ("IFLA_VXLAN_LEARNING", int(learning)),
        ]
        if gbp:
            data.append(("IFLA_VXLAN_GBP", True))
        attributes = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu), _vxlan_info(data)]
        doing = f"making {name} (vni {vni}, port {port}, local {local}, mtu {mtu})"
        self._link(doing, attributes, flags=wire.NLM_F_CREATE | wire.NLM_F_EXCL)

    def change_vxlan(self, index: int, vni: int, local: str, lower: int, learning: bool) -> None:
        """Change what a vxlan lets change; FDB and traffic stay. Raises KernelError."""
        data = [
            ("IFLA_VXLAN_ID", vni),
            ("IFLA_VXLAN_LOCAL", local),
            ("IFLA_VXLAN_LINK", lower),
            ("IFLA_VXLAN_LEARNING", int(learning)),
        ]
        self._link(f"changing the vxlan device to local {local}", [_vxlan_info(data)], index)

    def set_mtu(self, index: int, mtu: int) -> None:
        """Raises KernelError (EINVAL above what the lower device bears)."""
        self._link(f"setting MTU {mtu}", [("IFLA_MTU", mtu)], index)

    def set_mac(self, index: int, mac: str) -> None:
        """Takes the device's neighbours with it. Raises KernelError."""
        self._link(f"setting MAC {mac}", [("IFLA_ADDRESS", mac)], index)

    def set_up(self, index: int) -> None:
        """Raises KernelError."""
        self._link("setting the device up", [], index, up=True)

    def delete(self, index: int) -> None:
        """Delete a link; one that is gone already is no error. Raises KernelError."""
        self._link("deleting the device", [], index, kind=wire.RTM_DELLINK, harmless=(errno.ENODEV,))

    def add_address(self, index: int, address: str, length: int) -> None:
        """Add an IPv4 address; one that is there is no error. Raises KernelError."""
        flags = wire.NLM_F_CREATE | wire.NLM_F_EXCL
        self._address(f"adding {address}/{length}", wire.RTM_NEWADDR, flags, index, address, length, (errno.EEXIST,))

    def remove_address(self, index: int, address: str, length: int) -> None:
        """Remove an IPv4 address; one that is gone is no error. Raises KernelError."""
        harmless = (errno.EADDRNOTAVAIL, errno.ENODEV)
        self._address(f"removing {address}/{length}", wire.RTM_DELADDR, 0, index, address, length, harmless)

    def _link(
        self,
        doing: str,
        attributes: list[tuple[str, Any]],
        index: int = 0,
        flags: int = 0,
        up: bool = False,
        kind: int = wire.RTM_NEWLINK,
        harmless: tuple[int, ...] = (),
    ) -> None:
        message = ifinfmsg()
        message["index"], message["attrs"] = index, attributes
        if up:
            message["flags"] = message["change"] = wire.IFF_UP
        self._do(doing, message, kind, flags, harmless)

    def _address(
        self, doing: str, kind: int, flags: int, index: int, address: str, length: int, harmless: tuple[int, ...]
    ) -> None:
        message = ifaddrmsg()
        message["family"], message["index"], message["prefixlen"] = wire.AF_INET, index, length
        message["attrs"] = [("IFA_LOCAL", address), ("IFA_ADDRESS", address)]
        self._do(doing, message, kind, flags, harmless)

    def _do(self, doing: str, message: Any, kind: int, flags: int, harmless: tuple[int, ...]) -> None:
        seq = self._requests.take_seqs(1)
        encoded = _encoded(message, kind, wire.NLM_F_REQUEST | flags, seq)
        refusal = self._requests.execute([encoded], seq).get(0)
        if refusal is not None and refusal.errno not in harmless:
            raise KernelError(refusal.errno, f"{doing}: {refusal}")


def _vxlan_info(data: list[tuple[str, Any]]) -> tuple[str, Any]:
    return "IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]}


def _encoded(message: Any, kind: int, flags: int, seq: int) -> bytes:
    message["header"].update(type=kind, flags=flags, sequence_number=seq)
    message.encode()
    return bytes(message.data)


def _words(error: KernelError) -> str:
    return str(error.strerror or error)


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
