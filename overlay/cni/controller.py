"""The files that pods are made by, and those by which other programs and later runs know this node: subnet.env, the CNI
network list, which record is ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lease.families import FAMILIES
from lease.model import Endpoint, Prefix
from lease.regular import Stamp, stamp
from overlay.backends.choose import backend_of
from overlay.cni import lists
from overlay.cni.lists import PodNetwork
from overlay.control.controller import Controller, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.node.interfaces import addresses_by_name
from overlay.node.owned import Owned
from overlay.process.files import read_text, remove, up_to_date, write_atomically
from overlay.process.log import log
from overlay.settings.flags import DEFAULT_SUBNET_FILE
from overlay.settings.settings import Settings

CHECK_EVERY_S = 1.0
"""No event reports a file: each is checked so often, which costs next to nothing."""

NEW_PODS = "new pods"
_POLICIES, _LIFT = "policies are in this node's kernel", "packets between pods of this node pass it (problem `pods`)"


class _Wants(NamedTuple):
    """files: content by path; the network list: its path ("": none is kept), its content, or why there is none that could
    be used (fault). subnets: those of our lease. may_stand: the list may, since all peers are in the kernel. displaced,
    displacements: by the inputs of these names. subnet_env: its content. held: what is not written yet waits, so that no pod
    is made before policies are in the kernel. policed: there are some, so that what pods of this node send each other must
    pass the node."""

    files: tuple[tuple[str, str], ...]
    subnet_env: str
    held: bool
    policed: bool
    list_path: str
    list_text: str
    fault: str
    subnets: tuple[Prefix, ...]
    may_stand: bool
    displaced: bool
    displacements: int


class CniController(Controller):
    """Them. No pod is made before its masquerade, nor before the node's peers and policies are in the kernel; and none gets
    an address of a subnet that is not ours any more."""

    name = "files"
    reports = ("cni", "cni order", NEW_PODS)
    after = ("nat", "forward")
    yields = True

    def __init__(
        self,
        current: CurrentInputs,
        health: Health,
        owned: Owned,
        clock: Callable[[], float],
        named: Callable[[Iterable[str]], None],
        lifts: Callable[[], bool],
    ) -> None:
        """named: given the bridges that the network list attaches pods to; lifts: whether what pods send each other passes
        the node (firewall.PodsController)."""
        self._current, self._health, self._owned = current, health, owned
        self._clock, self._named, self._lifts = clock, named, lifts
        self._settings: Settings = current.inputs.settings
        self._written: dict[str, tuple[str, Stamp | None]] = {}
        """Files that hold what we want, as we wrote or found them, and what shows that they were touched since."""
        self._listed = False
        """The network list may stand."""
        self._folder: Stamp | None = None
        """What shows that a list came or went."""
        self._displacements = 0
        """As they were when the list was withdrawn last."""
        self._next = 0.0
        self._held = False
        """Some file is not written yet for the policies' sake."""
        self._mended = 0

    def wants(self, inputs: Inputs) -> object:
        """Contents, by the lease and the device."""
        if inputs.own is None or inputs.config is None:
            return Waiting("for a lease")
        ends = [end for end in inputs.own.ends if inputs.pool(end.subnet.family) is not None]
        if not ends:
            return Waiting("for a lease")
        if ends[0].subnet.family not in inputs.tunnels:
            return Waiting("for the tunnel device")
        settings, mtu = inputs.settings, _mtu(inputs, ends)
        # one whose routes are not all away yet stays, so that a next run takes them away
        networks = list(
            dict.fromkeys((*(each.network for each in inputs.config.pools.values()), *self._owned.planned.values()))
        )
        pods = [PodNetwork(inputs.config.pools[end.subnet.family].network, end.subnet) for end in ends]
        marks = sorted((family, tunnel.mark) for family, tunnel in inputs.tunnels.items() if tunnel.mark)
        devices = ((self._owned.device_file(family), mark) for family, mark in marks)  # node/device.py wrote them first
        files = (
            *devices,
            (f"{settings.run_dir}/{lists.LEASE_FILE}", lists.lease_file(inputs.own.key, ends, networks)),
        )
        subnets, env = tuple(end.subnet for end in ends), lists.subnet_env(pods, mtu, settings.ip_masq)
        held = settings.network_policy and settings.knows_policies and not inputs.policies_settled
        policed = inputs.policed is not None
        if not settings.cni_conf_dir:
            return _Wants(files, env, held, policed, "", "", "", subnets, True, False, 0)
        text, fault = _network_list(inputs, pods, mtu)
        path = f"{settings.cni_conf_dir}/{lists.CONFLIST}"
        return _Wants(
            files, env, held, policed, path, text, fault, subnets, inputs.synced, inputs.displaced, inputs.displacements
        )

    def reconcile(self, wants: Any) -> bool:
        """Write what differs. Raises OSError."""
        self._next = self._clock() + CHECK_EVERY_S
        path = wants.list_path
        if wants.displaced or wants.displacements != self._displacements:
            self._listed = False
            self._withdraw_list(path, wants.subnets[0])
            self._displacements = wants.displacements
        self._listed = not wants.displaced and (self._listed or wants.may_stand)
        for subnet in wants.subnets if path and path not in self._written else ():
            old = lists.listed_subnet(path, subnet.family)
            if old is not None and old != subnet and (not self._listed or wants.fault):
                # one that an earlier life left for another subnet goes at once, before a pod gets an address of it
                remove(path)
                log.warning("file.removed", path=path, reason=f"it gives addresses of {old}; our lease is {subnet}")
        self._write(wants.files)
        made_by = [(self._settings.subnet_file, wants.subnet_env)]
        if path and self._listed and not wants.fault:
            self._named(lists.bridges_in(wants.list_text))
            made_by.append((path, wants.list_text))
        held = _POLICIES if wants.held else _LIFT if wants.policed and not self._lifts() else ""
        waiting = [file for file, _ in made_by if held and file not in self._written and not os.path.exists(file)]
        self._write(each for each in made_by if each[0] not in waiting)
        self._held = bool(waiting)
        self._health.report(NEW_PODS, self._of_new_pods(waiting, path, held), outside=True)  # no start waits for it
        fault = f"{self._settings.cni_conf_template}: {wants.fault}" if wants.fault and self._listed else ""
        self._health.report("cni", fault)
        folder = self._settings.cni_conf_dir
        self._folder = stamp(folder) if path else None  # before it is read
        other = lists.preferred(folder, wants.subnets[0]) if path in self._written else ""
        # only the kubelet's runtime goes by the names of files
        self._health.report("cni order", _order(folder, other), harmless=not self._settings.kube, outside=True)
        return False

    def _of_new_pods(self, waiting: list[str], path: str, held: str) -> str:
        """What becomes of them while files wait. path: of the list; held: for what."""
        if not waiting:
            return ""
        env = self._settings.subnet_file
        if path and os.path.exists(path) and env not in read_text(path):
            return f"made before {held}: {path} does not wait for {env}"
        return f"the network list makes none before {held}: not written yet: {', '.join(waiting)}"

    def _withdraw_list(self, path: str, subnet: Prefix) -> None:
        """No new pod shall get an address of a subnet that is not ours any more; the list comes back with the next lease.
        subnet: the one held last, whose list an earlier life may have left."""
        if path and (path in self._written or lists.listed_subnet(path, subnet.family) == subnet):
            remove(path)
            self._written.pop(path, None)
            log.warning("file.removed", path=path, reason="the subnet it gives addresses of may be another node's now")

    def _write(self, files: Iterable[tuple[str, str]]) -> None:
        """Put files in place where they differ."""
        for path, content in files:
            altered, now = self._written.get(path, ("", None))[0] == content, stamp(path)
            if up_to_date(path, content):
                self._written[path] = content, now
                continue
            write_atomically(path, content)
            self._written[path] = content, stamp(path)
            if altered:
                self._mended += 1
                log.warning(
                    "file.mended", path=path, effect="somebody altered or removed it; does another agent write it?"
                )
            else:
                log.info("file.written", path=path)

    def unready(self) -> str:
        """Whether they were seen to once: before that no pod can be made here."""
        return "" if self.completed else "for subnet.env and the network list to be written"

    def due(self) -> float | None:
        """At once where a file is not the one that we saw last; else when they are checked next."""
        now = self._clock()
        if now < self._next:
            return self._next
        if self._held:
            return 0.0
        if any(stamp(path) != before for path, (_, before) in self._written.items()):
            return 0.0
        if self._folder is not None and stamp(self._settings.cni_conf_dir) != self._folder:
            return 0.0
        self._next = now + CHECK_EVERY_S
        return self._next

    def withdraw(self) -> Iterator[str]:
        """Remove the network list, and subnet.env; where flannel has the node again they are flannel's. The files by which
        a later run knows that this node was ours stay until all else is gone."""
        if self._owned.flannel_has_it():
            return
        settings = self._settings
        conflist = f"{settings.cni_conf_dir}/{lists.CONFLIST}" if settings.cni_conf_dir else ""
        for path in (conflist, settings.subnet_file):
            if path and os.path.exists(path):
                remove(path)
                yield path

    def counters(self) -> Mapping[str, int]:
        """How often a file was put back."""
        return {"mended_file": self._mended}


def _mtu(inputs: Inputs, ends: Iterable[Endpoint]) -> int:
    """Pods': the least of the families'."""
    found = []
    for end in ends:
        tunnel, family = inputs.tunnels.get(end.subnet.family), FAMILIES[end.subnet.family]
        device = backend_of(inputs.config.backend, family).tunnel if inputs.config is not None else None
        under = inputs.underlays.get(family.number) or next(iter(inputs.underlays.values()), None)
        if tunnel is not None:
            found.append(tunnel.mtu)
        elif under is not None:
            found.append(device.mtu(under.mtu)[0] if device is not None else under.mtu)
    return min(found)


def _network_list(inputs: Inputs, pods: Sequence[PodNetwork], mtu: int) -> tuple[str, str]:
    """The network list, or ("", why cni-conf.json cannot be used)."""
    settings, subnet = inputs.settings, pods[0].subnet
    there = addresses_by_name(inputs.links, inputs.addresses_of(subnet.family)).items()

    def bridge_of(first: str) -> str:
        return lists.bridge_name(subnet, there, first)

    # only where host and agent surely see the same file: of a container's folders /run/flannel alone is the host's
    same_file = not settings.kube or settings.subnet_file == DEFAULT_SUBNET_FILE
    waits_for = settings.subnet_file if same_file else ""
    plain = lists.network_list(pods, mtu, bridge_of("cni0"), settings.cni_data_dir, waits_for)
    if inputs.cni_template is None:
        return plain, ""
    try:
        return lists.render_list(inputs.cni_template, plain, mtu, settings.ip_masq, bridge_of), ""
    except ValueError as error:
        return "", str(error)


def _order(folder: str, other: str) -> str:
    """What it means that the runtime takes another file."""
    if not other:
        return ""
    return (
        f"{folder}/{other} comes before {lists.CONFLIST}, so that pods are made by it, not in our subnet: remove it, or"
        " rename it"
    )


def bridges_listed(settings: Settings) -> set[str]:
    """The bridges that the network list of this node names."""
    return lists.bridges_in(read_text(f"{settings.cni_conf_dir}/{lists.CONFLIST}")) if settings.cni_conf_dir else set()
