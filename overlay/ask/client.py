"""Asks another node's agent."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from lease.regular import content
from overlay.ask.signing import HEADER, NotSigned, Question, answer_signature, header, same, secret_of, signature

CONNECTED_S, ANSWERED_S, COUNTED_S = 1.0, 5.0, 25.0
"""To connect; for an answer; for one that needs nft and the rules of others read, on a busy machine."""
LONGEST = 64 << 20


class NoAnswer(Exception):
    """One line for the operator: why another agent gave none."""


class Refusal(NoAnswer):
    """It answered: it does not."""


def secret_in(path: str) -> bytes:
    """The secret of a file. Raises NoAnswer."""
    try:
        return secret_of(content(path).decode())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NoAnswer(f"--ask-secret-file {path}: {reason}") from error


def path_of(route: str, words: Mapping[str, Any]) -> str:
    """A path with its query."""
    from urllib.parse import quote  # when somebody asks

    query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in words.items())
    return f"{route}?{query}" if query else route


def ask_agent(
    addresses: tuple[str, ...], port: int, secret: bytes, path: str, within_s: float = ANSWERED_S
) -> dict[str, Any]:
    """Ask an agent by the first of its addresses at which it answers (its VTEP, its public IP). Raises NoAnswer."""
    reasons = []
    for address in addresses:
        try:
            return _ask(address, port, secret, path, within_s)
        except Refusal:
            raise
        except NoAnswer as error:  # by somebody else, who listens there
            reasons.append(str(error))
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
    raise NoAnswer("; ".join(reasons))


def _ask(address: str, port: int, secret: bytes, path: str, within_s: float) -> dict[str, Any]:
    question = Question(path, address, int(time.time()), os.urandom(16).hex())
    with socket.create_connection((address, port), CONNECTED_S) as connection:
        connection.settimeout(within_s)
        head = f"GET {path} HTTP/1.0\r\nHost: {address}\r\n{HEADER}: {header(secret, question)}\r\n\r\n"
        connection.sendall(head.encode())
        data = bytearray()
        end = time.monotonic() + within_s
        while chunk := connection.recv(1 << 16):
            data += chunk
            if len(data) > LONGEST or time.monotonic() > end:
                raise NoAnswer(f"{address}: its answer does not end")
    return _read(address, secret, signature(secret, question), bytes(data))


def _read(address: str, secret: bytes, asked: str, data: bytes) -> dict[str, Any]:
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").splitlines()
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    try:
        status, text = int(lines[0].split()[1]), body.decode()
        if not same(fields.get(HEADER, ""), answer_signature(secret, asked, status, text)):
            raise NotSigned("it has another secret, or is no agent of this network")
        answer = json.loads(text)
    except (NotSigned, ValueError, IndexError) as error:
        raise NoAnswer(
            f"{address}: {error if isinstance(error, NotSigned) else 'its answer is not understood'}"
        ) from error
    if status != 200:
        raise Refusal(f"{address}: {answer.get('error', status)}")
    return dict(answer)
