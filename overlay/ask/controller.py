"""The controller that lets other nodes' agents ask this one: listens at the VTEP and at the underlay's address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lease.families import FAMILIES
from lease.model import ip_text
from overlay.api.serve import TcpDoor
from overlay.ask.client import NoAnswer, secret_in
from overlay.ask.server import Asked, AskRoutes, handler
from overlay.control.controller import CannotReconcile, Controller, Waiting
from overlay.control.health import Health
from overlay.control.inputs import Inputs
from overlay.node.standing import backend_in_force


class _Wants(NamedTuple):
    secret_file: str
    port: int
    addresses: tuple[str, ...]
    public_ips: tuple[str, ...]


class AskController(Controller):
    """Listens where it is switched on."""

    name = "asking"
    harmless = True

    def __init__(self, health: Health, routes: AskRoutes) -> None:
        self._health, self._routes = health, routes
        self._doors: dict[str, TcpDoor] = {}
        self._wants: _Wants | None = None

    def wants(self, inputs: Inputs) -> object:
        """Where it listens: nowhere without a secret."""
        settings = inputs.settings
        if not settings.ask_secret_file:
            return None
        addresses: list[str] = []
        public_ips: list[str] = []
        for family, tunnel in sorted(inputs.tunnels.items()):
            under, end = inputs.underlays.get(family), inputs.end(family)
            backend = backend_in_force(inputs, FAMILIES[family])
            if under is not None and end is not None and tunnel.ifindex and backend is not None:
                own = (end.subnet.base, under.local) if backend.has_vteps else (under.local,)
                addresses += (ip_text(family, each) for each in own)
                public_ips.append(ip_text(family, under.public_ip))
        if not addresses:
            return Waiting("for a lease and a device")
        return _Wants(settings.ask_secret_file, settings.ask_port, tuple(addresses), tuple(public_ips))

    def reconcile(self, wants: Any) -> bool:
        """Listen. Raises CannotReconcile: no secret, or the port is another's; OSError."""
        try:
            secret_in(wants.secret_file)
        except NoAnswer as error:
            raise CannotReconcile(f"{error}; other agents are not answered") from error
        if self._wants != wants:
            self._close()
            answered = Asked(wants.secret_file, self._routes, also=wants.public_ips)
            self._doors = {each: TcpDoor(each, wants.port, handler(answered), "asked") for each in wants.addresses}
            self._wants = wants
        taken = [address for address, door in self._doors.items() if not door.open()]
        if taken:
            raise CannotReconcile(
                f"--ask-port {wants.port} is another process's at {', '.join(taken)}: ss -ltnp sport = {wants.port}"
            )
        return False

    def _close(self) -> None:
        for door in self._doors.values():
            door.close()
        self._doors, self._wants = {}, None

    def withdraw(self) -> Iterator[str]:
        """Listen no more."""
        self._close()
        return iter(())

    def status(self) -> Mapping[str, object]:
        """`asking`: where other agents are answered, None: nowhere."""
        wants = self._wants
        if wants is None:
            return {"asking": None}
        return {"asking": {"port": wants.port, "addresses": list(wants.addresses), "secret_file": wants.secret_file}}
