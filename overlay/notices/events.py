"""Problems as Kubernetes' objects. Pure.

Sources: k8s.io/api/core/v1 (Event, NodeCondition); kubectl describe node looks for Events whose object has the Node's
name as its uid, as kubelet writes them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from overlay.control.health import NOT_ENFORCED, Problem

CONDITION = "OverlayReady"
COMPONENT, NAMESPACE = "overlayd", "default"
LONGEST = 1000
"""Characters of a message (the API server takes 1024)."""


class Notice(NamedTuple):
    """Something to tell. gone: the problem is over; key: of the Event."""

    subject: str
    text: str
    gone: bool


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[Notice]:
    """What to tell, from what was told and what is wrong now, texts by subject."""
    came = [Notice(subject, text, False) for subject, text in now.items() if subject not in before]
    went = [Notice(subject, text, True) for subject, text in before.items() if subject not in now]
    return [*came, *went]


def settled(problems: Mapping[str, Problem], now_s: float, after_s: float) -> dict[str, str]:
    """The problems that have lasted for so long."""
    return {subject: each.text for subject, each in problems.items() if now_s - each.since >= after_s}


def event(node: str, notice: Notice, now_s: float) -> dict[str, Any]:
    """An Event on a Node."""
    at = _time(now_s)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{_name(node)}.overlay.", "namespace": NAMESPACE},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
        "type": "Normal" if notice.gone else "Warning",
        "reason": reason(notice.subject) + ("Solved" if notice.gone else ""),
        "message": _cut(f"over: {notice.text}" if notice.gone else notice.text),
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }


class Says(NamedTuple):
    """What a condition says."""

    ready: bool
    reason: str
    message: str


def says(ready: bool, why: str, problems: Mapping[str, Problem]) -> Says:
    """Of readiness, and of the one problem that costs no packet and still nobody may miss."""
    if not ready:
        return Says(False, "OverlayIsNotReady", why)
    reach = "pods reach all others, as far as this node knows"
    if (fault := problems.get(NOT_ENFORCED)) is not None:
        return Says(True, reason(NOT_ENFORCED), f"{reach}; but {fault.text}")
    return Says(True, "OverlayIsReady", reach)


def condition(says: Says, now_s: float) -> dict[str, str]:
    """A condition of a Node."""
    return {
        "type": CONDITION,
        "status": "True" if says.ready else "False",
        "reason": says.reason,
        "message": _cut(says.message),
        "lastHeartbeatTime": _time(now_s),
        "lastTransitionTime": _time(now_s),
    }


def reason(subject: str) -> str:
    """A subject as an Event's reason: letters alone, each word with a capital."""
    words = re.findall(r"[A-Za-z0-9]+", subject)
    return "Overlay" + "".join(word[:1].upper() + word[1:] for word in words)


def _name(node: str) -> str:
    return re.sub(r"[^a-z0-9.-]", "-", node.lower())[:200]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
