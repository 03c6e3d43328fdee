"""This node's own part of the kernel: links and addresses as they are, the underlay chosen from them, the device made of
that, nat table, sysctls and files. Each `ensure_*` compares, and acts only on a difference.

Belongs to the agent's owner thread.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from lease.config import NetworkConfig
from lease.model import Endpoint, Prefix, around, ip_text
from overlay.backends import vxlan
from overlay.cni import lists as cni
from overlay.firewall import forward
from overlay.firewall import nat as masquerade
from overlay.firewall.worker import tables
from overlay.kernel import netlink
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.entries import Address, Link
from overlay.kernel.route.links import Links, read_sysctl
from overlay.node import device as tunnel
from overlay.node import underlay as choice
from overlay.process.files import read_text
from overlay.process.log import log
from overlay.settings.flags import DEFAULT_SUBNET_FILE
from overlay.settings.settings import Settings

if TYPE_CHECKING:
    from overlay.api.status import DeviceStatus

Stamp = tuple[int, int, int]
"""Inode, time of the last write (ns) and size."""


class Host:
    """What of this node's kernel is not peers."""

    def __init__(
        self, settings: Settings, requests: netlink.RequestSocket, store_hosts: Callable[[], dict[str, int | None]]
    ) -> None:
        self.settings, self._requests, self._store_hosts = settings, requests, store_hosts
        self.template: bytes | None = None
        """flannel's cni-conf.json, where there is one."""
        self._links_io = Links()
        self.links: dict[int, Link] = {}
        self.addresses: dict[tuple[int, int, int], Address] = {}
        self.underlay: choice.Underlay | None = None
        self.device: vxlan.DeviceSpec | None = None
        self.choose_again = False
        """The choice itself changed, not only what there is."""
        self.mended: Counter[str] = Counter()
        """Files that somebody else altered or removed."""
        self._written: dict[str, tuple[str, Stamp | None]] = {}
        """Files that hold what we want, as we wrote or found them, and what tells that they were touched since."""
        self.bridges: set[str] = set()
        """Those that our network lists named."""
        self.listed = False
        """The node was in sync once: its network list may stand."""

    def read_links(self) -> bool:
        """Links and addresses; whether they changed. Raises KernelError."""
        links = {link.ifindex: link for link in self._requests.links()}
        addresses = {(a.oif, a.address, a.length): a for a in self._requests.addresses()}
        changed = (links, addresses) != (self.links, self.addresses)
        self.links, self.addresses = links, addresses
        return changed

    def choose_underlay(self) -> choice.Underlay | None:
        """The underlay by today's links; the one before when it changed. Raises UnderlayError, KernelError."""
        there = choice.Interfaces(self.links.values(), self.addresses.values())
        before = self.underlay
        keep = before is not None and not self.choose_again
        found = choice.refresh(self.settings, before, there) if before is not None and keep else None
        if found is None:
            found = choice.choose(self.settings, there, self._requests.lookup, self._store_hosts())
        self.choose_again = False
        if found == before:
            return None
        log.info("underlay", chosen=str(found), was=str(before) if before is not None else None)
        self.underlay = found
        return before or found

    def underlay_up(self) -> bool:
        """Whether the underlay's link is up."""
        link = self.links.get(self.underlay.ifindex) if self.underlay is not None else None
        return link is not None and link.up

    def underlay_addresses(self) -> frozenset[int]:
        """All IPv4 addresses of the underlay's interface."""
        index = self.underlay.ifindex if self.underlay is not None else -1
        return frozenset(a.address for a in self.addresses.values() if a.oif == index)

    def interfaces_in(self, network: Prefix) -> frozenset[int]:
        """The interfaces of the pod network: the tunnel, and bridges or veths of pods, also those of a subnet that this
        node lost. Where the underlay is inside the network its interfaces are none."""
        under = self.underlay
        outside = under.on_link if under is not None else ()
        return frozenset(
            a.oif
            for a in self.addresses.values()
            if network.holds(a.address)
            and (under is None or a.oif != under.ifindex)
            and not any(prefix.holds(a.address) for prefix in outside)
        )

    def existing_mac(self, config: NetworkConfig) -> int | None:
        """The MAC of the device that an earlier run or flannel left. Raises KernelError."""
        there = self._links_io.read(vxlan.device_name(config.backend))
        return there.mac if there is not None and there.kind == "vxlan" else None

    def ensure_device(self, config: NetworkConfig, own: Endpoint) -> tuple[tunnel.Ensured, str]:
        """The device of our lease, with its address; what was done, and why its MTU is not the configured one ("" when
        it is). Raises KernelError."""
        under = self.underlay
        assert under is not None
        assert config.v4 is not None
        assert own.mac is not None
        backend = config.backend
        mtu, lowered = vxlan.device_mtu(backend, under.mtu)
        spec = vxlan.DeviceSpec(
            vxlan.device_name(backend), backend.vni, backend.port, under.local, under.ifindex, mtu, own.mac,
            backend.gbp, backend.learning,
        )  # fmt: skip
        old = self.device.name if self.device is not None else read_text(self._device_file())
        ensured = tunnel.ensure(self._links_io, spec)
        if ensured.did:
            log.info("device", device=spec.name, **({"because": ensured.why} if ensured.why else {}), **ensured.did)
        there = self._requests.addresses()
        if did := tunnel.ensure_address(self._links_io, ensured.ifindex, own.subnet.base, config.v4.network, there):
            log.info("device.address", device=spec.name, did=", ".join(did))
        if old not in ("", spec.name):
            self._drop_device(old)
        self.device = spec
        return ensured, lowered

    def ensure_sysctls(self, config: NetworkConfig) -> None:
        """Raises KernelError."""
        if self.device is None or self.underlay is None:
            return
        if did := tunnel.ensure_sysctls(self.device.name, self.underlay.name, config.backend.direct_routing):
            log.info("sysctl", **{name.replace("/", "."): value for name, value in did.items()})

    def bridge_filter(self) -> str:
        """Why a Service may not answer pods of its own node, "" where nothing stands in the way: kube-proxy's rules must see
        packets between ports of one bridge (flannel does not start without that)."""
        if not self.settings.kube or not self.bridges:
            return ""
        name = "net/bridge/bridge-nf-call-iptables"
        value = read_sysctl(name)
        if value == "1":
            return ""
        what = "there is no br_netfilter" if value is None else f"{name.replace('/', '.')} is {value}"
        return (
            f"{what}: a Service whose pod runs on the same node as its client may not answer;"
            " on the host: modprobe br_netfilter && sysctl net.bridge.bridge-nf-call-iptables=1"
        )

    def ensure_files(self, config: NetworkConfig, key: str, own: Endpoint, in_sync: bool) -> None:
        """subnet.env, the CNI network list, and which record is ours. Raises OSError, and ValueError
        where cni-conf.json cannot be used, when all else is done.

        in_sync: all peers are in the kernel. The first network list waits for that, since it makes the node Ready; one
        that an earlier life left for another subnet goes at once, before a pod gets an address of it.
        """
        path = f"{self.settings.cni_conf_dir}/{cni.CONFLIST}"
        self.listed = self.listed or in_sync or not self.settings.cni_conf_dir
        old = cni.listed_subnet(path) if path not in self._written else None
        stale = old is not None and old != own.subnet
        if stale and not self.listed:
            self._remove_list(path, old, own)
        if self.device is None:
            return
        assert config.v4 is not None
        network, mtu, settings = config.v4.network, self.device.mtu, self.settings
        files = {
            self._device_file(): self.device.name,
            f"{settings.run_dir}/{cni.LEASE_FILE}": cni.lease_file(key, own),
            settings.subnet_file: cni.subnet_env(network, own.subnet, mtu, settings.ip_masq),
        }
        self._write(files)
        if settings.cni_conf_dir and self.listed:
            bridge = cni.bridge_name(own.subnet, self._interface_addresses().items())
            # only where host and agent surely see the same file: of a container's folders /run/flannel alone is the host's
            same_file = not settings.kube or settings.subnet_file == DEFAULT_SUBNET_FILE
            waits_for = settings.subnet_file if same_file else ""
            content = cni.network_list(network, own.subnet, mtu, bridge, settings.cni_data_dir, waits_for)
            if self.template is not None:
                try:
                    content = cni.render_list(self.template, content, network, mtu, settings.ip_masq)
                except ValueError:
                    if stale:
                        self._remove_list(path, old, own)
                    raise
            self.bridges |= cni.bridges_in(content)
            self._write({path: content})
            self._clear_unfinished()

    def withdraw_list(self) -> None:
        """No new pod shall get an address of a subnet that is not ours any more; the list comes back with the next lease.
        Raises OSError."""
        self.listed = False
        path = f"{self.settings.cni_conf_dir}/{cni.CONFLIST}"
        if self.settings.cni_conf_dir and path in self._written:
            del self._written[path]
            cni.remove(path)
            log.warning("file.removed", path=path, because="the subnet it gives addresses of may be another node's now")

    def _remove_list(self, path: str, old: Prefix | None, own: Endpoint) -> None:
        cni.remove(path)
        log.warning("file.removed", path=path, because=f"it gives addresses of {old}; our lease is {own.subnet}")

    def _write(self, files: dict[str, str]) -> None:
        """Put files in place where they differ. Raises OSError."""
        for path, content in files.items():
            altered, stamp = self._written.get(path, ("", None))[0] == content, _stamp(path)
            if cni.up_to_date(path, content):
                self._written[path] = content, stamp
                continue
            cni.write_atomically(path, content)
            self._written[path] = content, _stamp(path)
            if altered:
                self.mended["file"] += 1
                log.warning(
                    "file.mended", path=path, effect="somebody altered or removed it; does another agent write it?"
                )
            else:
                log.info("file.written", path=path)

    def files_touched(self) -> bool:
        """Whether a file that we keep is not the one that we saw last: a look at each that costs next to nothing."""
        return any(_stamp(path) != stamp for path, (_, stamp) in self._written.items())

    def still_used(self, subnet: Prefix, tunnel: int) -> bool:
        """Whether pods of this node use a subnet that it lost: while an interface other than the tunnel has an address of
        it. A bridge of ours that lost its last port is removed: the bridge plugin never does that, and the connected route
        would keep the new owner's pods from us for ever. Raises KernelError."""
        used = False
        for index in {a.oif for a in self.addresses.values() if subnet.holds(a.address) and a.oif != tunnel}:
            link = self.links.get(index)
            if link is None or link.kind != "bridge" or link.name not in self.bridges or self._ports(index):
                used = True
                continue
            self._links_io.delete(index)
            del self.links[index]
            self.addresses = {key: a for key, a in self.addresses.items() if a.oif != index}
            log.info("bridge.removed", bridge=link.name, because=f"no pod uses it, and {subnet} is another node's now")
        return used

    def lost_subnets(self, config: NetworkConfig, own: Prefix) -> list[Prefix]:
        """Other subnets of the pod network whose gateway is a bridge for pods: this node held them before, and pods may
        run there yet. Those bridges count as ours from here on; one that has any other address is somebody else's."""
        assert config.v4 is not None
        pool, kube, found = config.v4, self.settings.kube, []
        inside = self.interfaces_in(pool.network)
        for link in self.links.values():
            if link.kind != "bridge" or link.ifindex not in inside or not cni.is_bridge_name(link.name):
                continue
            mine = [a for a in self.addresses.values() if a.oif == link.ifindex]
            subnets = [around(a.address, a.length) for a in mine]
            gateways = all(a.address == subnet.base + 1 for a, subnet in zip(mine, subnets, strict=True))
            held = all(
                pool.network.covers(subnet) and subnet.length == own.length if kube else pool.allows(subnet)
                for subnet in subnets
            )
            if gateways and held and own not in subnets:
                self.bridges.add(link.name)
                found += subnets
        return found

    def unreachable(self, own: Prefix, peer: int | None) -> str:
        """What of the node's own routes is missing, in words, with what to do; "" where nothing is. They are not ours to put
        back: the bridge's comes with its address, the underlay's with the interface's. peer: a public IP of one. Raises
        KernelError."""
        found = []
        for index in {a.oif for a in self.addresses.values() if a.address == own.base + 1 and own.length < 31}:
            link = self.links.get(index)
            if link is None or link.kind != "bridge":
                continue
            way = self._requests.lookup(own.base + 2)
            if not link.up:
                found.append(
                    f"{link.name} is down, so nobody reaches the pods of this node: ip link set {link.name} up"
                )
            elif way is None or way[0] != index:
                found.append(
                    f"no route leads {own} to {link.name}, so nobody reaches the pods of this node:"
                    f" ip route replace {own} dev {link.name} proto kernel scope link src {ip_text(4, own.base + 1)}"
                )
        if peer is not None and self._requests.lookup(peer) is None:
            name = self.underlay.name if self.underlay is not None else "the underlay"
            found.append(f"no route leads to {ip_text(4, peer)}, a peer: the routes of {name} are gone (ip route)")
        return "; ".join(found)

    def _clear_unfinished(self) -> None:
        """A pod whose making failed at its address (subnet.env was not there) leaves the bridge without port and MAC, and
        the bridge plugin then fails for ever: "could not set bridge's mac: invalid argument" (1.1.1). Raises KernelError."""
        for link in list(self.links.values()):
            if link.kind == "bridge" and link.name in self.bridges and not link.mac and not self._ports(link.ifindex):
                self._links_io.delete(link.ifindex)
                log.info("bridge.removed", bridge=link.name, because="a pod that could not be made left it unfinished")

    def _ports(self, bridge: int) -> int:
        return sum(link.master == bridge for link in self.links.values())

    def device_status(self, ifindex: int, in_order: bool) -> DeviceStatus | None:
        """For the status."""
        from overlay.api.status import DeviceStatus

        device, under = self.device, self.underlay
        if device is None or under is None:
            return None
        local = ip_text(4, device.local)
        return DeviceStatus(device.name, ifindex, device.vni, device.port, local, under.name, device.mtu, in_order)

    def _interface_addresses(self) -> dict[str, frozenset[int]]:
        return {
            link.name: frozenset(a.address for a in self.addresses.values() if a.oif == link.ifindex)
            for link in self.links.values()
        }

    def _device_file(self) -> str:
        return f"{self.settings.run_dir}/device"

    def _drop_device(self, name: str) -> None:
        """The device of an earlier VNI, ours since our own file names it, and its rules."""
        vni = vxlan.vni_of(name)
        if vni is None:
            log.warning("file.ignored", path=self._device_file(), because=f"{name[:20]!a} is no device of ours")
            return
        there = self._links_io.read(name)
        if there is not None and there.kind == "vxlan":
            log.info("device.removed", device=name, because="the VNI of the network config changed")
            self._links_io.delete(there.ifindex)
        sets = NetfilterSocket()
        try:
            for family, table in tables(vni):
                sets.remove(family, table)
        finally:
            sets.close()
        forward.remove(masquerade.table_name(vni))


def _stamp(path: str) -> Stamp | None:
    """What differs when a file was written or replaced; None where there is none."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns, there.st_size
