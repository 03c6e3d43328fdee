"""The other node's part of a trace: what its agent answers, and how it is asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lease.families import FAMILIES
from lease.model import ip_text, prefix
from overlay.api.family import of_family
from overlay.ask.client import COUNTED_S, NoAnswer, ask_agent, path_of, secret_in
from overlay.ask.server import Refused
from overlay.kernel.netlink import KernelError, error_text
from overlay.trace.end import End, Looked, Passed
from overlay.trace.node import NotTraceable
from overlay.trace.paths import BEGIN, END
from overlay.trace.points import Gap, Point
from overlay.trace.probe import PROTOCOLS, Probe

MOST, FORGOTTEN_S = 16, 60.0
"""So many are counted at once; what was begun is taken away after so long, whatever becomes of who asked."""


class Traces:
    """Those that other nodes have begun here."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """status: this agent's, of now."""
        self._status = status
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._ends: dict[str, End] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        """Of those that are over: who did not get the answer asks again."""
        self._timers: dict[str, threading.Timer] = {}

    def begin(self, words: Mapping[str, str]) -> dict[str, Any]:
        """Count a probe from now on; `id`: by which to end it. Raises Refused."""
        probe = _probe_of(words)
        with self._lock:
            if len(self._timers) >= MOST:
                raise Refused(f"{MOST} traces are under way here: try again in {FORGOTTEN_S:.0f} s")
            try:
                end = End(of_family(self._status(), probe.version), probe)
            except (NotTraceable, KernelError) as error:
                raise Refused(str(error)) from error
            if not end.arrives:
                end.close()
                raise Refused(f"{ip_text(probe.version, probe.destination)} is of no pod here")
            try:
                end.begin()
            except KernelError as error:
                end.close()
                raise Refused(error_text(error)) from error
            name = os.urandom(8).hex()
            self._ends[name] = end
            timer = self._timers[name] = threading.Timer(FORGOTTEN_S, self._forget, (name,))
            timer.daemon = True
            timer.start()
        return {"id": name, "node": end.node.name}

    def _forget(self, name: str) -> None:
        with self._lock:
            end = self._ends.pop(name, None)
            self._answers.pop(name, None)
            self._timers.pop(name, None)
        if end is not None:
            end.close()

    def close(self) -> None:
        """Count no more: the agent ends."""
        for name, timer in list(self._timers.items()):
            timer.cancel()
            self._forget(name)

    def end(self, words: Mapping[str, str]) -> dict[str, Any]:
        """What was counted, and what the look-ups say; who asks again meanwhile waits for the same. Raises Refused."""
        with self._ending:
            return self._end(words.get("id", ""))

    def _end(self, name: str) -> dict[str, Any]:
        with self._lock:
            end = self._ends.pop(name, None)
            if name in self._answers:
                return self._answers[name]
        if end is None:
            raise Refused(f"there is no such trace, or it was begun over {FORGOTTEN_S:.0f} s ago")
        try:
            passed = [_as_values(each) for each in end.passed()]
            looked = [[gap.name, back, lines] for (gap, back), lines in end.looked(self._status()).items()]
        except KernelError as error:
            raise Refused(error_text(error)) from error
        finally:
            end.close()
        found = {"passed": passed, "looked": looked}
        with self._lock:
            if name in self._timers:
                self._answers[name] = found
        return found


def _probe_of(words: Mapping[str, str]) -> Probe:
    """Raises Refused."""
    try:
        numbers = {name: int(words[name]) for name in ("source", "destination", "port", "ident", "ip_id", "size")}
        protocol, version = words["protocol"], int(words.get("version", "4"))
    except (KeyError, ValueError) as error:
        raise Refused(f"not a question of a trace: {error}") from error
    if version not in FAMILIES:
        raise Refused("not a question of a trace: an unknown family")
    longest = (1 << FAMILIES[version].bits) - 1, 0xFFFF
    fits = all(0 <= number <= longest[name not in ("source", "destination")] for name, number in numbers.items())
    if not fits or protocol not in PROTOCOLS:
        raise Refused("not a question of a trace: a number out of range, or an unknown protocol")
    return Probe(protocol=protocol, version=version, **numbers)


def _as_values(passed: Passed) -> dict[str, Any]:
    point = passed.point
    return {"what": point.what, "gap": point.gap.name, "back": point.back, "counts": dict(passed.counts)}


# --- who asks


class AskedEnd:
    """The other node's, begun."""

    def __init__(self, ask: Callable[[str], dict[str, Any]], name: str, node: str) -> None:
        self._ask, self._name, self._node = ask, name, node

    def end(self) -> tuple[list[Passed], list[Passed], Looked]:
        """As run.FarEnd. Raises NotTraceable."""
        try:
            found = self._ask(path_of(END, {"id": self._name}))
            passed = [
                Passed(
                    self._node,
                    Point(str(each["what"]), Gap[each["gap"]], "", "", back=bool(each["back"])),
                    {str(seen): int(count) for seen, count in each["counts"].items()},
                )
                for each in found["passed"]
            ]
            looked = {(Gap[name], bool(back)): [str(line) for line in lines] for name, back, lines in found["looked"]}
        except NoAnswer as error:
            raise NotTraceable(f"{self._node} did not say what it counted: {error}") from error
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise NotTraceable(f"{self._node} answers what this version does not understand") from error
        return [each for each in passed if not each.point.back], [each for each in passed if each.point.back], looked


def ask_run(found: Mapping[str, Any], source: int, path: str, words: Mapping[str, str]) -> dict[str, Any]:
    """A whole trace, by the agent of the node that a pod is on. found: a view of the pod's family. Raises NotTraceable."""
    peer = next((each for each in found["peers"] if prefix(each["subnet"]).holds(source)), None)
    if peer is None:
        raise NotTraceable(f"{words['source'][:60]} is in no node's subnet")
    return ask_of(found, peer["subnet"], path, words)


def ask_of(found: Mapping[str, Any], subnet: str, path: str, words: Mapping[str, str]) -> dict[str, Any]:
    """What the agent of a node answers, by its subnet. Raises NotTraceable."""
    peer = next((each for each in found["peers"] if each["subnet"] == subnet), None)
    if peer is None:
        raise NotTraceable(f"no node has {subnet[:40]}")
    name, vtep = peer["node_name"] or peer["public_ip"], peer["subnet"].partition("/")[0]
    try:
        return _asker(found, name, (peer["public_ip"], vtep))(path_of(path, words))
    except NoAnswer as error:
        raise NotTraceable(f"{name} was asked: {error}") from error


def _asker(found: Mapping[str, Any], name: str, addresses: tuple[str, ...]) -> Callable[[str], dict[str, Any]]:
    """Asks another node's agent by a path. Raises NotTraceable; what it gives raises NoAnswer."""
    asking = found.get("asking")
    if not asking:
        raise NotTraceable(f"{name} was not asked: agents do not ask each other here (--ask-secret-file)")
    return lambda path: ask_agent(addresses, asking["port"], secret_in(asking["secret_file"]), path, COUNTED_S)


def ask_far(found: Mapping[str, Any], vtep: str, public_ip: str, name: str, probe: Probe) -> AskedEnd:
    """Have another node's agent count a probe. found: this one's status. Raises NotTraceable: why it does not."""
    # beside the tunnel first: what the tunnel loses may be the answer
    ask = _asker(found, name, (public_ip, vtep))
    try:
        begun = ask(path_of(BEGIN, probe._asdict()))
    except NoAnswer as error:
        raise NotTraceable(f"{name} was asked, and gave no answer (does flannel run there?): {error}") from error
    with suppress(KeyError):
        return AskedEnd(ask, str(begun["id"]), name)
    raise NotTraceable(f"{name} answers what this version does not understand")
