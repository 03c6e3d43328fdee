"""Status: an immutable picture of the agent, and its JSON. What serve, the operator's command and tests read.

The JSON is an interface with a version (SCHEMA, docs/reference.md): within one, names are only added.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lease.families import V6
from overlay.api.family import SECOND
from overlay.control.health import Past, Problem, rank

SCHEMA = 1


class Lazy(Protocol):
    """A section that is written out by who asked, not by the owner thread: 20,000 peers take a while."""

    def json(self) -> list[dict[str, Any]]:
        """As JSON values."""


class Status(NamedTuple):
    """All of it. sections: each controller's, by name; counters: by name; past: problems that are over; mends_per_minute: of
    each of the last minutes, the last one last, how often something was put right."""

    version: str
    node_name: str
    uptime_s: float
    ready: bool
    problems: Mapping[str, Problem]
    sections: Mapping[str, Any]
    counters: Mapping[str, int]
    past: Sequence[Past] = ()
    mends_per_minute: Sequence[int] = ()
    pid: int = 0
    network_namespace: str = ""
    """As /proc/PID/ns/net reads."""
    files: Mapping[str, str] = {}
    """Where it writes, by what its flags are called."""

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        sections = dict(self.sections)
        refused = [*{**sections.pop("unreadable_records", {}), **sections.pop("refused_records", {})}.items()]
        second = sections.pop(f"refused_records{SECOND}", {})
        refused += [(key, f"its {V6.text} part: {reason}") for key, reason in second.items()]
        made: dict[str, Any] = {
            "schema": SCHEMA,
            "version": self.version,
            "node_name": self.node_name,
            "uptime_s": self.uptime_s,
            "process": {"pid": self.pid, "network_namespace": self.network_namespace, **self.files},
            "ready": self.ready,
            "problems": list(self._problems()),
            "history": [
                {"subject": each.subject, "text": each.text, "since": _time(each.since), "until": _time(each.until)}
                for each in self.past
            ],
            "mends_per_minute": list(self.mends_per_minute),
            **{name: _plain(value) for name, value in sections.items()},
            "refused_records": [{"key": key, "reason": reason} for key, reason in refused],
            "counters": dict(self.counters),
        }
        return made

    def _problems(self) -> Iterator[dict[str, Any]]:
        for subject, problem in sorted(self.problems.items(), key=lambda item: rank(item[0])):
            yield {
                "subject": subject,
                "text": problem.text,
                "since": _time(problem.since),
                "keeps_unready": not problem.harmless,
            }


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _plain(value: Any) -> Any:
    return value.json() if hasattr(value, "json") else value
