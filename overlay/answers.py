"""What other nodes' agents, and the page, are answered; each answer is imported when somebody asks first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from overlay.ask.server import AskRoutes, Refused

if TYPE_CHECKING:
    from overlay.api.serve import Handler
    from overlay.api.status import Status
    from overlay.trace.far import Traces

RUN, CHECK = "/trace/run", "/check"


class Answers:
    """Of one agent."""

    def __init__(self, status: Callable[[], Status | None]) -> None:
        """status: of now; None: the loop is stuck."""
        self._status = status
        self._lock = threading.Lock()
        self._traces: Traces | None = None

    def status(self, _words: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The agent's status. Raises Refused."""
        found = self._status()
        if found is None:
            raise Refused("its loop is stuck")
        return found.json()

    def routes(self) -> AskRoutes:
        """What agents may ask, by path."""
        from overlay.trace.paths import BEGIN, END  # no more than these names

        return {
            "/status": self.status,
            "/summary": self._summary,
            BEGIN: lambda words: self._far().begin(words),
            END: lambda words: self._far().end(words),
            CHECK: lambda words: self.check(words.get("of", ""), words.get("target", ""), ours=True),
            RUN: lambda words: self.run(words.get("source", ""), words.get("destination", ""), ours=True),
        }

    def _summary(self, words: Mapping[str, str]) -> dict[str, Any]:
        from overlay.page.gather import route

        return route(self.status(), words)

    def _far(self) -> Traces:
        from overlay.trace.far import Traces

        with self._lock:
            self._traces = self._traces or Traces(self.status)
            return self._traces

    def close(self) -> None:
        """The agent ends: nothing of ours counts packets any more."""
        with self._lock:
            if self._traces is not None:
                self._traces.close()

    def run(self, source: str, destination: str, ours: bool = False) -> dict[str, Any]:
        """A trace from a pod of this node or, unless `ours`, of another, whose agent is asked then. Raises Refused."""
        from lease.model import ip_number, prefix
        from overlay.api.family import of_family
        from overlay.kernel.netlink import error_text
        from overlay.trace import far
        from overlay.trace.node import NotTraceable
        from overlay.trace.run import Request, trace
        from overlay.trace.values import as_values

        family = 6 if ":" in source else 4
        try:
            ends = ip_number(source, family), ip_number(destination, family)
        except ValueError as error:
            raise Refused(
                f"from {source[:40]!r} to {destination[:40]!r}: two addresses of one family are needed"
            ) from error
        request, found = Request(*ends, "icmp", 0, None, version=family), of_family(self.status(), family)
        lease = found["lease"]
        try:
            if not ours and lease and not prefix(lease["subnet"]).holds(request.source):
                return far.ask_run(found, request.source, RUN, {"source": source, "destination": destination})
            return as_values(request, trace(found, request, self.status))
        except NotTraceable as error:
            raise Refused(str(error)) from error
        except OSError as error:
            raise Refused(error_text(error)) from error

    def check(self, of: str, target: str, ours: bool = False) -> dict[str, Any]:
        """What the node that has the subnet `of` finds of a peer, named by its subnet; else (not `ours`) its agent is asked.
        Raises Refused."""
        from overlay.api.family import of_family
        from overlay.check.run import NotYet, RefusedRecord, Unknown, ask_all, resolve
        from overlay.kernel.netlink import error_text
        from overlay.trace import far
        from overlay.trace.node import NotTraceable

        found = of_family(self.status(), 6 if ":" in of else 4)
        try:
            if not ours and not (found["lease"] and found["lease"]["subnet"] == of):
                return far.ask_of(found, of, CHECK, {"of": of, "target": target})
            goals, _ = resolve(target or None, found)
            if len(goals) != 1:
                raise Refused("of one peer at a time")
            return ask_all(found, goals)[0]
        except (NotYet, RefusedRecord, Unknown, NotTraceable) as error:
            raise Refused(str(error)) from error
        except OSError as error:
            raise Refused(error_text(error)) from error

    def page_handler(self, secret_file: str, loopback: bool) -> type[Handler]:
        """What serves the page."""
        from overlay.page.server import Page, handler

        def known() -> Mapping[str, Any] | None:
            found = self._status()
            return None if found is None else found.json()

        return handler(Page(known, self.run, self.check, secret_file, loopback))
