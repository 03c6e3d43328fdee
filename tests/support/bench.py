"""One of each controller, on a kernel in memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lease.families import V4
from lease.model import ip_number, prefix
from lease.tenure.claim import Identity
from overlay.cluster.live import LiveFiles
from overlay.cluster.network import NetworkConfigInput
from overlay.cluster.ownership import Ownership
from overlay.cluster.records import RecordsSource
from overlay.cni.controller import CniController
from overlay.control.controller import Controller, Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.firewall import antispoof
from overlay.firewall.controllers import GuardController, PodsController
from overlay.firewall.guard import Guard
from overlay.firewall.rules import ForwardController, NatController
from overlay.node.bridges import BridgesController
from overlay.node.device import DeviceController
from overlay.node.links import LinksSource
from overlay.node.owned import Owned
from overlay.node.sysctls import SysctlController
from overlay.node.underlay_source import UnderlaySource
from overlay.peers.controller import PeersController, PeerTableController
from overlay.peers.datapath import Datapath
from overlay.peers.refusals import Refusals
from overlay.process.rundir import Holder
from overlay.reach import ways
from overlay.reach.controller import ReachController
from overlay.settings.settings import Settings
from tests.support.clock import Clock
from tests.support.fakes import FakeKernel, inputs, underlay

OTHER_MTU = {"underlays": {4: underlay(mtu=1400)}}
RETAINED = {"retained": (prefix("10.244.77.0/24"),)}
CONFIG = '{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'


class NoLock:
    """A DeviceLock; `other` is the pid of whoever has the device."""

    other: int | None = None

    def __init__(self) -> None:
        self.squatters: dict[str, Holder] = {}
        self.taken: set[str] = set()
        self.others: dict[str, int] = {}
        """By device: the pid of whoever has it."""

    def take(self, device: str) -> int | None:
        self.taken.add(device)
        return self.others.get(device, self.other)

    def give_back(self, device: str) -> None:
        self.taken.discard(device)


class Claims:
    """A TenureThread."""

    def __init__(self) -> None:
        self.claims: list[Any] = []
        self.rechecks = 0

    def claim(self, claim: Any, snapshot: Any = None) -> None:
        self.claims.append((claim, snapshot))

    def recheck(self) -> None:
        self.rechecks += 1


class Bench:
    """A kernel, and what a controller is built with."""

    def __init__(self, folder: Path, now: Inputs | None = None) -> None:
        self.kernel: Any = FakeKernel()
        self.clock, self.folder = Clock(), folder
        self.settings = Settings(
            run_dir=str(folder), subnet_file=f"{folder}/subnet.env", cni_conf_dir=str(folder / "cni"), iface=("eth0",)
        )
        self.current = CurrentInputs(self.settings)
        self.current.inputs = (now or inputs())._replace(settings=self.settings)
        self.health, self.owned = Health(self.clock), Owned(self.settings)
        self.posted: list[Any] = []
        self.lifts = True
        """What the controller of the pods' ports says."""
        self.leaving_refused = self.leaves_later = False
        self.lock: Any = NoLock()
        self.claims, self.stopped = Claims(), []
        self.path = Datapath(V4, self.kernel, self.clock, random.Random(1))
        self.network = NetworkConfigInput(self.current, self.health, "the store")

    def reconcile(self, controller: Controller) -> bool:
        """As the scheduler does, once."""
        wants = controller.wants(self.current.inputs)
        assert not isinstance(wants, Waiting), wants
        return controller.reconcile(wants)

    def tell(self, controller: Controller, event: Any) -> bool:
        return bool(controller.handles[type(event)](event))

    def problems(self) -> dict[str, str]:
        return {subject: problem.text for subject, problem in self.health.problems().items()}

    # --- one of each
    def links(self) -> LinksSource:
        return LinksSource(self.current, (V4,), self.kernel)

    def underlay(self) -> UnderlaySource:
        return UnderlaySource(self.current, V4, self.kernel, lambda _family: {}, lambda: self.posted.append("moved"))

    def device(self) -> DeviceController:
        return DeviceController(
            self.current,
            V4,
            self.kernel,
            self.kernel,
            self.lock,
            self.health,
            self.owned,
            lambda network, _family, _done: self.leaves(network),
            self.clock,
        )

    def leaves(self, network: int) -> bool:
        """What other controllers made for a network is asked to be taken away."""
        self.posted.append(network)
        if self.leaving_refused:
            raise OSError(1, "no")
        return not self.leaves_later

    def bridges(self) -> BridgesController:
        return BridgesController(self.current, V4, self.kernel, self.owned)

    def ownership(self) -> Ownership:
        made = Ownership(
            self.current, self.health, self.clock, lambda mac: Identity("m", "node1", mac), {4: lambda _config: None},
            self.stopped.append,
        )  # fmt: skip
        made.claimer = self.claims
        return made

    def records(self) -> RecordsSource:
        own = self.ownership()
        own.held = self.current.inputs.own
        return RecordsSource(
            self.current, self.health, [self.path], own, self.network, Refusals(), lambda: "etcd there", self.clock
        )

    def table(self) -> PeerTableController:
        return PeerTableController(
            self.current, V4, self.path, lambda: "10.244.2.0-24", self.clock, lambda: self.kernel.routes(V4)
        )

    def peers(self) -> PeersController:
        return PeersController(
            self.current, V4, self.path, self.kernel, self.health, self.clock, self.posted.append, self.owned
        )

    def guard(self) -> GuardController:
        made = Guard(V4, self.kernel, self.clock)
        return GuardController(V4, made, self.kernel, self.owned, self.health, self.clock)

    def pods(self) -> PodsController:
        made = antispoof.AntiSpoof(self.kernel, self.kernel, self.clock)
        return PodsController(made, self.kernel, self.owned, self.health, self.clock)

    def nat(self) -> NatController:
        return NatController(V4, self.posted.append, self.health, self.owned)

    def forward(self) -> ForwardController:
        return ForwardController(V4, self.posted.append, self.health, self.owned, self.clock)

    def sysctl(self) -> SysctlController:
        return SysctlController(self.current, V4, self.health, self.clock)

    def reach(self) -> ReachController:
        peer = ways.Peer(prefix("10.244.9.0/24"), ip_number("192.168.1.9", 4), False)
        return ReachController(V4, self.kernel, self.health, self.clock, lambda place, _: [] if place else [peer], list)

    def cni(self) -> CniController:
        return CniController(self.current, self.health, self.owned, self.clock, self.posted.extend, lambda: self.lifts)

    def live(self) -> LiveFiles:
        return LiveFiles(self.current, self.health, self.network, self.posted.append)
