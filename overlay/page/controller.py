"""The controller that serves the page, where it is switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from overlay.api.serve import Handler, TcpDoor
from overlay.control.controller import CannotReconcile, Controller
from overlay.control.inputs import Inputs

MakeHandler = Callable[[str, bool], type[Handler]]
"""What serves it, with the file of the token's secret ("": none), and whether it is at a loopback address."""


class _Wants(NamedTuple):
    host: str
    port: int
    secret_file: str


class PageController(Controller):
    """Listens."""

    name = "page"
    harmless = True

    def __init__(self, make_handler: MakeHandler) -> None:
        self._make_handler = make_handler
        self._door: TcpDoor | None = None
        self._wants: _Wants | None = None

    def wants(self, inputs: Inputs) -> object:
        """Where it listens."""
        settings = inputs.settings
        return None if settings.page is None else _Wants(*settings.page, settings.ask_secret_file)

    def reconcile(self, wants: Any) -> bool:
        """Listen. Raises CannotReconcile: the port is another's; OSError."""
        if self._wants != wants:
            self._close()
            made = self._make_handler(wants.secret_file, wants.host.startswith("127."))
            self._door, self._wants = TcpDoor(wants.host, wants.port, made, "page"), wants
        assert self._door is not None
        if not self._door.open():
            raise CannotReconcile(
                f"--page: {wants.host}:{wants.port} is another process's: ss -ltnp sport = {wants.port}"
            )
        return False

    def _close(self) -> None:
        if self._door is not None:
            self._door.close()
        self._door, self._wants = None, None

    def withdraw(self) -> Iterator[str]:
        """Listen no more."""
        self._close()
        return iter(())

    def status(self) -> Mapping[str, object]:
        """`page`: where it is served, None: nowhere."""
        wants = self._wants
        return {"page": None if wants is None else {"address": wants.host, "port": wants.port}}
