"""Answers other nodes' agents: signed questions alone, at this node's VTEP and public IP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from overlay.api.serve import Handler, Request
from overlay.ask.client import NoAnswer, secret_in
from overlay.ask.signing import HEADER, WITHIN_S, NotSigned, Once, answer_signature, read_header, same, signature

AskRoutes = Mapping[str, Callable[[Mapping[str, str]], dict[str, Any]]]
"""By path, what is answered to the query's words. Raises Refused."""


NO_ROUTES: AskRoutes = MappingProxyType({})


class Refused(Exception):
    """One line for who asked."""


class Asked:
    """What decides whether a question is answered. Shared by the servers of all addresses."""

    def __init__(
        self, secret_file: str, routes: AskRoutes, clock: Callable[[], float] = time.time, also: tuple[str, ...] = ()
    ) -> None:
        """also: addresses that others ask us by though no interface of ours has them (a public IP behind NAT)."""
        self._file, self._routes, self._clock, self._also = secret_file, routes, clock, also
        self._once = Once()
        self._began = int(clock())
        """What was asked before is not known to be used."""

    def answer(self, request: Request, to: str) -> tuple[int, str, str]:
        """Status, body and its signature, "" where the question is not signed with our secret."""
        try:
            secret = secret_in(self._file)
            question, signed = read_header(request.headers.get(HEADER, ""), request.target, to)
            if not any(same(signed, signature(secret, question._replace(to=each))) for each in (to, *self._also)):
                raise NotSigned("it is not signed with this network's secret")
        except NotSigned as error:
            return 401, _error(str(error)), ""
        except NoAnswer:  # this controller says which file, to those whom it concerns
            return 401, _error("this agent has no secret just now"), ""
        status, body = self._signed(question.at_s, question.once, request)
        return status, body, answer_signature(secret, signed, status, body)

    def _signed(self, at_s: int, once: str, request: Request) -> tuple[int, str]:
        now = int(self._clock())
        if abs(now - at_s) > WITHIN_S:
            return 403, _error(f"its clock and ours differ by {now - at_s} s: at most {WITHIN_S} are allowed (NTP?)")
        if at_s < self._began or not self._once.is_new(once, now):
            return 403, _error("this question was asked before, or before this agent started, or there are too many")
        route = self._routes.get(request.path)
        if request.method != "GET" or route is None:
            return 404, _error(f"available: {', '.join(self._routes)}")
        try:
            from urllib.parse import parse_qsl  # when somebody asks

            return 200, json.dumps(route(dict(parse_qsl(request.query)))) + "\n"
        except Refused as error:
            return 409, _error(str(error))


def _error(text: str) -> str:
    return json.dumps({"error": text}) + "\n"


def handler(asked: Asked) -> type[Handler]:
    """For a server at any address."""

    class _AskHandler(Handler):
        def answer(self, request: Request) -> None:
            status, body, signed = asked.answer(request, self.request.getsockname()[0])
            fields = f"{HEADER}: {signed}\r\n" if signed else ""
            self.reply((status, "application/json", body), request.method, fields)

    return _AskHandler
