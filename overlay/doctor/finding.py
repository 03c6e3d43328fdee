"""A finding of `overlay doctor`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple


class State(Enum):
    """WARN: it works, and may not for long, or not for all. UNKNOWN: it could not be tried: never called well."""

    OK = "ok"
    WARN = "warning"
    WRONG = "wrong"
    UNKNOWN = "not tried"


class Finding(NamedTuple):
    """subject: what was looked at; what: was found; why: it matters; mend: what to do, a command where there is one. fix:
    does that, where it is safe: nothing that runs is interrupted, and it can be undone."""

    subject: str
    state: State
    what: str
    why: str = ""
    mend: str = ""
    fix: Callable[[], None] | None = None


Findings = Iterator[Finding]


def ok(subject: str, what: str) -> Finding:
    """It is as it should be."""
    return Finding(subject, State.OK, what)


def unknown(subject: str, what: str, mend: str = "") -> Finding:
    """It could not be looked at."""
    return Finding(subject, State.UNKNOWN, what, "", mend)
