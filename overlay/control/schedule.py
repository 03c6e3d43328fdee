"""When each controller is asked: because what it wants changed, an event concerned it, its time has come, or the minute
is over. What is refused is a problem of the controller's name until it is solved, and tried again with back-off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lease.families import FAMILIES
from lease.model import Prefix, ip_text, mac_text
from overlay.control.controller import CannotReconcile, Controller, Waiting
from overlay.control.health import FIRST, Health, name_of
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.kernel.netlink import error_text
from overlay.process.log import log

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
"""After a refusal; twice as long after each that follows, up to the second."""
RECHECK_S = 60.0
"""How often all controllers are asked, whatever events came."""
PEERS_FIRST_S = 5.0
"""So long after the start the controllers that yield wait while others have more to do."""
SHOWN = 120
"""So many characters of a value stand in a debug line."""
CHECK_SHARE = 4000
"""What costs more with more peers is checked less often where that costs more: it may take a four-thousandth of the time."""


def retry_delay_s(refusals: int, last_s: float = LAST_RETRY_S) -> float:
    """After so many refusals in a row, at least one: 0.1 s, 0.2, 0.4 ... `last_s`."""
    return min(last_s, FIRST_RETRY_S * 2.0 ** min(refusals - 1, 9))


class Retry:
    """When something that was refused is tried again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.refusals = 0
        """In a row."""
        self.at: float | None = None
        """None: nothing waits."""

    def refused(self) -> None:
        """Once more."""
        self.refusals += 1
        self.at = self._clock() + retry_delay_s(self.refusals)

    def succeeded(self) -> None:
        """It was done."""
        self.refusals, self.at = 0, None

    def began(self) -> None:
        """It is under way again; whether it is refused once more comes later."""
        self.at = None

    def waits(self) -> bool:
        """Whether its time has not come."""
        return self.at is not None and self._clock() < self.at


class Cadence:
    """How often something is checked whose cost grows with the number of peers: once a minute, less often where it
    is expensive."""

    def __init__(self, clock: Callable[[], float], least_s: float | None = None) -> None:
        """least_s: once in so long at most."""
        self._clock, self._least_s = clock, RECHECK_S if least_s is None else least_s
        self._cost = 0.0
        self.at = clock() + self._least_s
        """When the next check is due."""
        self.count, self.total_s, self.longest_s = 0, 0.0, 0.0
        """Checks that ended, their CPU seconds in all, and those of the longest slice."""

    @property
    def cost_s(self) -> float:
        """CPU seconds of the check under way, or of the last."""
        return self._cost

    def began(self) -> None:
        """A check begins."""
        self._cost = 0.0
        self.at = self._clock() + self._least_s

    def spent(self, seconds: float) -> None:
        """A slice of it cost so much CPU time."""
        self._cost += seconds
        self.longest_s = max(self.longest_s, seconds)

    def ended(self) -> None:
        """It is over."""
        self.count += 1
        self.total_s += self._cost
        self.at = self._clock() + max(self._least_s, self._cost * CHECK_SHARE)


class _Slot:
    """A controller, and what the scheduler knows of it."""

    def __init__(self, controller: Controller, clock: Callable[[], float]) -> None:
        self.controller = controller
        self.inputs: Inputs | None = None
        self.wants: Any = Waiting("for its first turn")
        self.waits = True
        """What it wants is to wait."""
        self.stale, self.more = True, False
        self.retry = Retry(clock)
        self.after: list[_Slot] = []
        """Those that come before it. Set when all are known."""
        self._timed = type(controller).due is not Controller.due
        self.name = name_of(controller.name, controller.family)
        self._number = controller.family.number if controller.family is not None else 0
        self.off = False
        """The network has no such family, as far as it is known."""
        self.used = controller.family is None or controller.used
        """There may be something to take away when it is switched off."""

    @property
    def harmless(self) -> bool:
        """Whether pods' traffic is as it should be without it: of a second family that does not work here yet it is."""
        return self.controller.harmless or self._is_optional

    @property
    def _is_optional(self) -> bool:
        return self._number > FIRST and _optional(self.inputs)

    @property
    def blocks(self) -> bool:
        """Whether those that come after it wait for it; not for the second family, where that does not work here yet."""
        return self.wants is not None and not self.controller.completed and not (self.waits and self._is_optional)

    def update(self, inputs: Inputs) -> None:
        """What it wants, by the inputs of now."""
        if self._number > FIRST and inputs.config is None:
            self.off = True  # most have none
            wants: object = Waiting("for a network config")
        else:
            self.off = bool(self._number) and inputs.config is not None and inputs.pool(self._number) is None
            wants = None if self.off else self.controller.wants(inputs)
        self.stale = self.stale or wants != self.wants
        self.inputs, self.wants, self.waits = inputs, wants, isinstance(wants, Waiting)
        self.used = self.used or not (self.off or self.waits)

    @property
    def asked(self) -> bool:
        """Whether it has something to see to."""
        return not self.waits and self.wants is not None

    def due(self) -> float | None:
        """When it is asked without an event; what was refused waits for its retry, unless it cannot act now at all."""
        if self.retry.at is not None:
            return None if self.waits else self.retry.at
        if not self._timed or self.waits or self.wants is None:
            return None
        return self.controller.due()

    def may_act(self) -> bool:
        """Whether it has something to do, and all that come before it are done."""
        return not self.waits and not any(slot.blocks for slot in self.after)


def _optional(inputs: Inputs | None) -> bool:
    """Whether IPv6 stands beside IPv4, and this node has no address or no subnet of it."""
    if inputs is None or inputs.pool(FIRST) is None:
        return False
    return any(inputs.underlays.get(number) is None or inputs.end(number) is None for number in FAMILIES)


_MACS, _ADDRESSES = ("mac",), ("base", "address", "local", "public_ip")
"""Names of numbers that are shown as people write them."""


def _short(wants: Any) -> str:
    """For a debug line: what a controller wants, its longest fields cut."""
    if wants is None:
        return "nothing (switched off)"
    if not hasattr(wants, "_asdict"):
        return _cut(wants)
    return " ".join(f"{name}={_cut(value, name)}" for name, value in wants._asdict().items())


def _cut(value: Any, name: str = "") -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, Prefix):
        return str(value)
    if isinstance(value, int) and value and name in _MACS:
        return mac_text(value)
    if isinstance(value, int) and value and name in _ADDRESSES:
        return ip_text(4 if value < 1 << 32 else 6, value)
    if isinstance(value, (tuple, frozenset)) and any(isinstance(each, Prefix) for each in value):
        return ",".join(map(str, value))
    text = repr(value)  # of settings without their secrets
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Schedule:
    """All controllers, in the order of dependence. Belongs to the owner thread."""

    def __init__(
        self, controllers: Sequence[Controller], current: CurrentInputs, health: Health, clock: Callable[[], float]
    ) -> None:
        self._current, self._health, self._clock = current, health, clock
        self._slots = [_Slot(controller, clock) for controller in controllers]
        names = [slot.name for slot in self._slots]
        assert len(set(names)) == len(names), f"two controllers of one name: {names}"
        for slot in self._slots:
            slot.after = [other for other in self._slots if other.controller.name in slot.controller.after]
        self._handlers: dict[type, list[tuple[_Slot, Callable[[Any], bool]]]] = {}
        for slot in self._slots:
            for event, handler in slot.controller.handles.items():
                self._handlers.setdefault(event, []).append((slot, handler))
        self._next_recheck = clock() + RECHECK_S
        self._peers_first_until = clock() + PEERS_FIRST_S

    @property
    def controllers(self) -> list[Controller]:
        """All of them, in order."""
        return [slot.controller for slot in self._slots]

    def working(self) -> list[Controller]:
        """Those whose family the network has, in order."""
        return [slot.controller for slot in self._slots if not slot.off]

    def handle(self, event: Any) -> None:
        """Hand an event to those whose it is. An event that nobody handles is a bug: LookupError."""
        for slot, handler in self._handlers[type(event)]:
            if handler(event):
                slot.stale = True

    def run_pass(self) -> bool:
        """Ask each controller that has a reason to be asked, once. Whether there is more to do at once."""
        now = self._clock()
        self._health.optional = _optional(self._current.inputs)
        if now >= self._next_recheck:
            self._next_recheck = now + RECHECK_S
            for slot in self._slots:
                slot.stale = slot.stale or slot.controller.rechecked
        more = False
        for slot in self._slots:  # at each event of a storm: what has no reason to be asked costs next to nothing
            if slot.inputs is not self._current.inputs:
                asked = slot.asked
                slot.update(self._current.inputs)
                if asked and not slot.asked:
                    own = (slot.controller.name,) if slot.retry.refusals else ()
                    for subject in (*slot.controller.reports, *own):
                        self._health.solved(name_of(subject, slot.controller.family))
            if not slot.stale and not slot.more and ((at := slot.due()) is None or at > now):
                continue
            if slot.controller.yields and more and now < self._peers_first_until:
                continue
            if slot.may_act():
                more = self._ask(slot) or more
        # who stands earlier in the order may want something else by what a later one found
        return more or any(slot.inputs is not self._current.inputs for slot in self._slots)

    def _ask(self, slot: _Slot) -> bool:
        if not log.debugging:
            return self._ask_now(slot)
        name, began = slot.name, time.perf_counter()
        try:
            return self._ask_now(slot)
        finally:
            took, known = round((time.perf_counter() - began) * 1e6), self._health.problems().get(name)
            problem = known.text if known is not None else ""
            log.debug("controller", name=name, wants=_short(slot.wants), took_us=took, more=slot.more, problem=problem)

    def _ask_now(self, slot: _Slot) -> bool:
        controller, wants = slot.controller, slot.wants
        slot.stale = slot.more = False
        if controller.answers_later and slot.name not in self._health.problems():
            slot.retry.succeeded()  # what was begun last
        try:
            if wants is None:
                for line in controller.withdraw() if slot.used else ():
                    log.info("withdrawn", controller=slot.name, removed=line)
            else:
                slot.more = controller.reconcile(wants)
        except (OSError, CannotReconcile) as error:
            slot.retry.refused()
            self._health.problem(slot.name, error_text(error), slot.harmless)
            return False
        if wants is not None and controller.answers_later:
            slot.retry.began()
            return slot.more
        if slot.retry.refusals:  # a controller may have set a problem of its name itself
            self._health.solved(slot.name)
        slot.retry.succeeded()
        controller.completed = True
        return slot.more

    def waiting(self) -> str:
        """Why the node is not ready: what the first controller that waits waits for; "" where none does."""
        for slot in self._slots:
            if slot.waits and not (slot.harmless or slot.off):  # without those pods' traffic is as it should be
                return str(slot.wants.reason)
            if slot.wants is not None and (reason := slot.controller.unready()) and not slot.harmless:
                return reason
        return ""

    def next_due(self) -> float:
        """When a controller is to be asked without an event."""
        return min([self._next_recheck, *self._due_times()])

    def _due_times(self) -> Iterator[float]:
        for slot in self._slots:
            if (at := slot.due()) is not None and slot.may_act():
                yield at
