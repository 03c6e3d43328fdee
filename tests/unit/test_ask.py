"""Who is answered when agents ask each other."""

from __future__ import annotations

import json
import os
import socket
import threading

import pytest

from overlay.api.serve import TcpDoor, parsed
from overlay.ask import client
from overlay.ask.client import NoAnswer, ask_agent, path_of
from overlay.ask.server import Asked, Refused, handler
from overlay.ask.signing import HEADER, WITHIN_S, Once, Question, header, secret_of
from tests.support.ports import free_port

SECRET = b"0123456789abcdef"


@pytest.fixture
def secret_file(tmp_path) -> str:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    return str(path)


def refuse(_words):
    raise Refused("not today")


@pytest.fixture
def asked(secret_file) -> Asked:
    return Asked(secret_file, {"/status": lambda words: {"words": dict(words)}, "/no": refuse}, lambda: 1_000_000)


def put(asked: Asked, target: str = "/status?a=1", to: str = "10.244.1.0", **more):
    """As it comes over the network, and the answer's status and body."""
    question = Question(
        more.get("signed_for", target), more.get("sent_to", to), more.get("at", 1_000_000), more.get("once", "ab")
    )
    sent = header(more.get("secret", SECRET), question) if "header" not in more else more["header"]
    request = parsed(f"{more.get('method', 'GET')} {target} HTTP/1.0\r\n{HEADER.upper()}: {sent}\r\n\r\n".encode())
    status, body, signed = asked.answer(request, to)
    return status, json.loads(body), signed


def test_who_has_the_secret_is_answered(asked):
    status, found, signed = put(asked)
    assert (status, found, len(signed)) == (200, {"words": {"a": "1"}}, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"secret": b"another secret of 16"},
        {"signed_for": "/status?a=2"},
        {"sent_to": "10.244.2.0"},
        {"header": ""},
        {"header": "1000000 ab"},
        {"header": "x" * 5000},
        {"header": "1000000 ab zzé"},
        {"header": "² a b"},
    ],
)
def test_who_has_not_gets_nothing_and_no_signature(asked, change):
    status, found, signed = put(asked, **change)
    assert (status, signed, list(found)) == (401, "", ["error"])


def test_a_question_counts_once_and_for_a_minute(asked):
    assert put(asked)[0] == 200
    status, found, signed = put(asked)
    assert (status, bool(signed)) == (403, True)
    assert "asked before" in found["error"]
    for away in (-WITHIN_S - 1, WITHIN_S + 1):
        status, found, signed = put(asked, at=1_000_000 + away, once=f"c{away}")
        assert (status, bool(signed)) == (403, True)
        assert f"differ by {-away} s" in found["error"], "signed, so that it can be believed"


def test_numbers_that_were_used_are_forgotten_and_bounded():
    once = Once()
    assert once.is_new("a", 0)
    assert not once.is_new("a", 2 * WITHIN_S)
    assert once.is_new("a", 2 * WITHIN_S + 1)
    for each in range(Once.MOST):
        once.is_new(str(each), 500)
    assert not once.is_new("one more", 500)


def test_what_cannot_be_answered_is_said(asked):
    assert put(asked, "/no")[:2] == (409, {"error": "not today"})
    assert put(asked, "/other", once="b")[0] == 404
    assert put(asked, method="POST", once="c")[0] == 404


@pytest.mark.parametrize("content", [b"", b"short", None])
def test_no_secret_no_answer(tmp_path, content):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    status, found, signed = put(Asked(str(path), {}, lambda: 1_000_000))
    assert (status, signed, found) == (401, "", {"error": "this agent has no secret just now"}), "no path to anybody"
    with pytest.raises(NoAnswer, match="--ask-secret-file"):
        client.secret_in(str(path))


def test_a_secret_that_is_a_pipe_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "secret")
    with pytest.raises(NoAnswer, match="not a regular file"):
        client.secret_in(str(tmp_path / "secret"))


def test_a_question_from_before_this_process_may_have_been_answered(secret_file):
    now = [1_000_000.0]
    asked = Asked(secret_file, {"/status": dict}, lambda: now[0])
    now[0] += 5
    assert put(asked, at=999_999, once="b")[0] == 403
    assert put(asked, at=1_000_001, once="b")[0] == 200


def test_an_agent_behind_nat_is_asked_by_its_public_ip(secret_file):
    asked = Asked(secret_file, {"/status": dict}, lambda: 1_000_000, also=("203.0.113.9",))
    assert put(asked, sent_to="203.0.113.9")[0] == 200
    assert put(asked, sent_to="203.0.113.8", once="b")[0] == 401


def test_a_secret_is_long_enough():
    assert secret_of(" 0123456789abcdef\n") == SECRET
    with pytest.raises(ValueError, match="16 at least"):
        secret_of("0123456789abcde")


# --- over TCP


@pytest.fixture
def door(secret_file):
    """A server on loopback, at a port of its own."""
    port = free_port()
    made = TcpDoor("127.0.0.1", port, handler(Asked(secret_file, {"/status": dict, "/no": refuse})), "asked")
    assert made.open()
    yield port
    made.close()


def test_over_tcp(door):
    ask = lambda path, secret=SECRET: ask_agent(("127.0.0.1",), door, secret, path)  # noqa: E731
    assert ask(path_of("/status", {"a": "b c&d=e"})) == {"a": "b c&d=e"}
    for _ in range(3):
        assert ask("/status") == {}
    with pytest.raises(NoAnswer, match="not today"):
        ask("/no")
    with pytest.raises(NoAnswer, match="another secret"):
        ask("/status", b"another secret of 16")


def test_the_first_address_that_answers_is_taken(door):
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.2", 0))
    assert ask_agent(("127.0.0.2", "127.0.0.1"), door, SECRET, "/status") == {}
    with pytest.raises(NoAnswer, match=r"127\.0\.0\.2: .*refused.*; 127\.0\.0\.3"):
        ask_agent(("127.0.0.2", "127.0.0.3"), door, SECRET, "/status")


def test_somebody_elses_server_does_not_end_the_asking(door):
    """An unprivileged process that has the port of the VTEP."""
    with socket.create_server(("127.0.0.2", door)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n{}")

        threading.Thread(target=answer, daemon=True).start()
        assert ask_agent(("127.0.0.2", "127.0.0.1"), door, SECRET, "/status") == {}
    with pytest.raises(NoAnswer, match="not today"):
        ask_agent(("127.0.0.1", "127.0.0.9"), door, SECRET, "/no")


def test_a_door_that_is_closed_is_closed_and_its_thread_ends(secret_file):
    port = free_port()
    before = threading.enumerate()
    made = TcpDoor("127.0.0.1", port, handler(Asked(secret_file, {})), "asked")
    assert made.open()
    (mine,) = [thread for thread in threading.enumerate() if thread not in before]
    made.close()
    mine.join(10)
    assert not mine.is_alive()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    "answer", [b"", b"\r\n\r\n", b"HTTP/1.0 x\r\n\r\n{}", b"HTTP/1.0 200 OK\r\n\r\n\xff", b"\0" * 3000]
)
def test_rubbish_is_no_answer(answer):
    with pytest.raises(NoAnswer):
        client._read("x", SECRET, "s", answer)
