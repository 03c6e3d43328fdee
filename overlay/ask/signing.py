"""How a question of one agent to another, and the answer, are known to be theirs: an HMAC by a shared secret (RFC 2104).

The secret never goes over the network. A question carries the time and a number used once, and is for one address: nobody
replays it, now, after a restart, or elsewhere. An answer is signed with its question's signature. Neither is encrypted.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

HEADER = "overlay-signature"
WITHIN_S = 60
"""So far the clocks of two nodes may differ; a number used once is remembered for twice as long."""
LEAST = 16
"""Bytes that a secret has at least."""


class Question(NamedTuple):
    """path: with its query; to: the address that is asked; at_s: seconds since the epoch; once: a number, in hexadecimal."""

    path: str
    to: str
    at_s: int
    once: str


class NotSigned(ValueError):
    """One line: what is wrong with a signature."""


def signature(secret: bytes, question: Question) -> str:
    """Of a question."""
    return _hmac(secret, ("question", question.path, question.to, str(question.at_s), question.once))


def answer_signature(secret: bytes, asked: str, status: int, body: str) -> str:
    """Of the answer to the question that has the signature `asked`."""
    return _hmac(secret, ("answer", asked, str(status), body))


def header(secret: bytes, question: Question) -> str:
    """What a request carries."""
    return f"{question.at_s} {question.once} {signature(secret, question)}"


def read_header(text: str, path: str, to: str) -> tuple[Question, str]:
    """A question and its signature, from what a request carries. Raises NotSigned."""
    parts = text.split()
    if len(parts) != 3 or not (parts[0].isascii() and parts[0].isdigit()) or len(parts[0]) > 12 or len(parts[1]) > 64:
        raise NotSigned("it is not signed")
    return Question(path, to, int(parts[0]), parts[1]), parts[2]


def same(one: str, other: str) -> bool:
    """Whether two signatures are the same, in a time that does not depend on where they differ."""
    from hmac import compare_digest

    return compare_digest(one.encode(), other.encode())


class Once:
    """The numbers that were used lately."""

    MOST = 4096

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def is_new(self, once: str, now_s: int) -> bool:
        """Whether a number was not used within the time in which a question counts; it is, from now on. Where there are too
        many nothing counts as new."""
        for each in [each for each, at in self._used.items() if at < now_s - 2 * WITHIN_S]:
            del self._used[each]
        if once in self._used or len(self._used) >= self.MOST:
            return False
        self._used[once] = now_s
        return True


def secret_of(text: str) -> bytes:
    """The secret in a file. Raises ValueError: too short."""
    secret = text.strip().encode()
    if len(secret) < LEAST:
        raise ValueError(f"a secret of {len(secret)} bytes: it needs {LEAST} at least (openssl rand -hex 32)")
    return secret


def _hmac(secret: bytes, parts: Iterable[str]) -> str:
    import hmac  # with OpenSSL, 3.5 MiB: only where agents ask each other

    made = hmac.new(secret, digestmod="sha256")
    for part in parts:
        data = part.encode()
        made.update(len(data).to_bytes(4, "big") + data)
    return made.hexdigest()
