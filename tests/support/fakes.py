"""A kernel in memory, as far as controllers ask one: links, addresses, routes, nftables tables. Each fake has the part of the
real class that is used; a fault can be planted in any of them."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any

from lease.families import V4
from lease.model import ip_number
from overlay.control.inputs import Inputs, Underlay
from overlay.kernel.netlink import KernelError
from overlay.kernel.route.entries import Address, FoundRoute, Link
from overlay.kernel.route.link_wire import DeviceAttributes, VxlanDevice
from overlay.kernel.route.lookup import AnyRoute, Packet, Rule, Way
from overlay.settings.settings import Settings


def link(ifindex: int, name: str, kind: str = "", **more: Any) -> Link:
    return Link(
        ifindex, name, more.pop("up", True), 1500, more.pop("mac", 0x020000000000 + ifindex), kind, True, True
    )._replace(**more)


def address(ifindex: int, text: str, length: int = 24) -> Address:
    return Address(4, ifindex, ip_number(text, 4), length, 0, False, False, True)


class FakeKernel:
    """Links, addresses, routes and tables; `refuse` makes every request fail with that error number."""

    def __init__(self) -> None:
        self.refuse = 0
        self.there: dict[int, Link] = {2: link(2, "eth0")}
        self.addresses_there: list[Address] = [address(2, "192.168.1.2")]
        self.routes_there: list[FoundRoute] = []
        self.ways: dict[int, Way | None] = {}
        self.vxlans: dict[str, DeviceAttributes] = {}
        self.tables: dict[tuple[str, str], dict[str, set[bytes]]] = {}
        self.forms: dict[tuple[str, str], Any] = {}
        """Of tables that were made here."""
        self.done: list[str] = []
        self.port = 1
        self._seq = 0

    def _asked(self, what: str) -> None:
        if self.refuse:
            raise KernelError(self.refuse, f"{what}: refused")
        self.done.append(what)

    # --- RequestSocket
    def links(self) -> list[Link]:
        self._asked("links")
        return list(self.there.values())

    def addresses(self, family: Any) -> list[Address]:
        assert family is V4
        return list(self.addresses_there)

    def routes(self, family: Any) -> list[FoundRoute]:
        assert family is V4
        return list(self.routes_there)

    def lookup(self, family: Any, address: int, source: int = 0, oif: int = 0) -> Way | None:
        assert family is V4
        del source
        return self.ways.get(address, Way(oif or 2, ip_number("192.168.1.2", 4), 0))

    def way(self, family: Any, packet: Packet) -> Way:
        return self.lookup(family, packet.address) or Way(0, 0, 0, 0, errno.ENETUNREACH)

    def rules(self, family: Any) -> list[Rule]:
        assert family is V4
        return []

    def routes_of(self, family: Any, table: int) -> list[AnyRoute]:
        del table
        assert family is V4
        return []

    def take_seqs(self, count: int) -> int:
        first, self._seq = self._seq + 1, self._seq + count + 1
        return first

    def execute(self, messages: list[bytes], first: int, count: int = 0) -> dict[int, Any]:
        del first, count
        self._asked(f"{len(messages)} messages")
        return {}

    # --- Links
    def all(self) -> list[Link]:
        return list(self.there.values())

    def read(self, name: str) -> DeviceAttributes | None:
        self._asked(f"read {name}")
        return self.vxlans.get(name)

    def create(self, device: VxlanDevice) -> None:
        name, vni, port, local, lower, mtu, mac, gbp, learning = device
        self._asked(f"create {name}")
        index = max(self.there, default=0) + 1
        self.vxlans[name] = DeviceAttributes(
            index, "vxlan", False, mtu, mac, vni, port, local, lower, gbp, learning, True, ""
        )
        self.there[index] = link(index, name, "vxlan", mac=mac, up=False)

    def set_up(self, index: int) -> None:
        self._asked(f"up {index}")
        self.there[index] = self.there[index]._replace(up=True)
        name = self.there[index].name
        self.vxlans[name] = self.vxlans[name]._replace(up=True)

    def delete(self, index: int) -> None:
        self._asked(f"delete {self.there[index].name}")
        self.vxlans.pop(self.there[index].name, None)
        del self.there[index]

    def add_address(self, index: int, address: int, length: int) -> None:
        self._asked(f"address {length}")
        self.addresses_there.append(Address(4, index, address, length, 0, False, False, True))

    # --- NetfilterSocket
    def has(self, family: str, name: str) -> bool:
        return (family, name) in self.tables

    def remove(self, family: str, name: str) -> bool:
        self._asked(f"remove {name}")
        return self.tables.pop((family, name), None) is not None

    def is_formed(self, table: Any) -> bool:
        self._asked(f"look at {table.name}")
        key = (table.family, table.name)
        return key in self.tables and self.forms.get(key, table) == table

    def replace(self, table: Any, elements: Any) -> None:
        self._asked(f"make {table.name}")
        self.forms[table.family, table.name] = table
        self.tables[table.family, table.name] = {name: set(keys) for name, keys in elements.items()}

    replace_judging = replace

    def drop_beside(self, table: Any) -> None:
        """None is made here."""

    def elements(self, table: Any, one: Any) -> list[bytes]:
        return sorted(self.tables.get((table.family, table.name), {}).get(one.name, ()))

    def element_slices(self, table: Any, one: Any) -> Iterator[tuple[list[bytes], bool]]:
        yield self.elements(table, one), False

    def change(self, table: Any, add: Any, take: Any) -> None:
        sets = self.tables.get((table.family, table.name))
        if sets is None:
            raise KernelError(errno.ENOENT, f"{table.name}: no such table")
        for name, keys in add.items():
            sets.setdefault(name, set()).update(keys)
        for name, keys in take.items():
            sets.setdefault(name, set()).difference_update(keys)

    def close(self) -> None:
        """Nothing to close."""

    def counted(self, table: Any, counter: str) -> int:
        del table, counter
        return 0

    def pod_end(self, link: Link) -> None:
        del link


def underlay(**more: Any) -> Underlay:
    from lease.model import prefix

    there = Underlay(
        "eth0", 2, 1500, 0x020000000002, ip_number("192.168.1.2", 4), ip_number("192.168.1.2", 4),
        (prefix("192.168.1.0/24"),), True, "it routes to the store",
    )  # fmt: skip
    return there._replace(**more)


def by_index(links: Iterable[Link]) -> dict[int, Link]:
    return {one.ifindex: one for one in links}


def inputs(**more: Any) -> Inputs:
    """Those of a node that has its lease and its device."""
    from lease.config import parse_config
    from overlay.control.inputs import Tunnel
    from tests.support.make import lease

    eth0, tunnel = link(2, "eth0"), link(3, "flannel.1", "vxlan")
    addresses = [address(2, "192.168.1.2"), address(3, "10.244.2.0", 32)]
    made = Inputs(
        Settings(run_dir="/run/overlay-test", cni_conf_dir=""),
        parse_config('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'),
        True,
        lease("10.244.2.0/24", "192.168.1.2", "0a:00:00:00:00:02")._replace(created=0, modified=0),
        False,
        by_index([eth0, tunnel]),
        {4: {(a.oif, a.address, a.length): a for a in addresses}},
        {4: underlay()},
        {4: Tunnel("flannel.1", 3, 1450)},
    )
    return made._replace(**more)


class FakeFeeds:
    """Which resources are asked for (policy/sources.py)."""

    def __init__(self) -> None:
        self.running: set[str] = set()

    def start(self, name: str) -> None:
        self.running.add(name)

    def stop(self, name: str) -> None:
        self.running.discard(name)
