"""Serves the page and its data."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from overlay.api.serve import Answer, Handler, Request, as_json, same_for_a_moment, text
from overlay.ask.client import NoAnswer, secret_in
from overlay.ask.server import Refused
from overlay.ask.signing import same
from overlay.page.gather import gather
from overlay.page.render import policy, render
from overlay.page.token import token_of

SAME_FOR_S = 2.0
Run = Callable[[str, str], dict[str, Any]]
"""Traces from one address to another; or checks, from the node of a subnet, that of another. Raises Refused."""


class Page:
    """What is answered at an address. status: this agent's, None: its loop is stuck."""

    def __init__(
        self, status: Callable[[], Mapping[str, Any] | None], trace: Run, check: Run, secret_file: str, loopback: bool
    ) -> None:
        self._status, self._secret_file, self._loopback = status, secret_file, loopback
        self._probing = {"/trace.json": trace, "/check.json": check}
        self._data = same_for_a_moment(self._gather, SAME_FOR_S)

    def answer(self, request: Request) -> tuple[Answer, str]:
        """An answer, and header lines more."""
        words = dict(parse_qsl(request.query))
        if request.method != "GET":
            return text(405, "only GET"), ""
        if not _is_literal(request.headers.get("host", "")):
            return text(403, "open it by an IP address, or localhost"), ""  # a name may be another's (DNS rebinding)
        known = self._has_token(words.get("token", ""))
        if not (self._loopback or known):
            return text(401, "this page needs a token: `overlay page` on the node says the address with it"), ""
        if request.path == "/":
            status, kind, body = self._data()
            if status != 200:
                return (status, kind, body), ""
            fields = (
                f"Content-Security-Policy: {policy()}\r\nReferrer-Policy: no-referrer\r\nCache-Control: no-store\r\n"
            )
            return (200, "text/html; charset=utf-8", render(json.loads(body))), fields
        if request.path == "/data.json":
            return self._data(), ""
        if request.path in self._probing:
            return self._probe(self._probing[request.path], words, known), ""
        return text(404, f"available: /, /data.json, {', '.join(self._probing)}"), ""

    def _gather(self) -> Answer:
        found = self._status()
        return text(503, "the loop is stuck") if found is None else as_json(200, gather(found))

    def _probe(self, run: Run, words: Mapping[str, str], known: bool) -> Answer:
        if not known:
            return as_json(
                200, {"error": "who sends probes from here needs a token: open the page as `overlay page` says"}
            )
        try:
            return as_json(200, run(words.get("source", ""), words.get("destination", "")))
        except Refused as error:
            return as_json(200, {"error": str(error)})

    def _has_token(self, given: str) -> bool:
        if not self._secret_file or not given:
            return False
        try:
            return same(given, token_of(secret_in(self._secret_file)))
        except NoAnswer:
            return False


def _is_literal(host: str) -> bool:
    name = host.rpartition(":")[0] if host.count(":") == 1 or "]:" in host else host
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def handler(page: Page) -> type[Handler]:
    """For a server."""

    class _PageHandler(Handler):
        def answer(self, request: Request) -> None:
            made, fields = page.answer(request)
            self.reply(made, request.method, fields)

    return _PageHandler
