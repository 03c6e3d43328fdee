"""What the page is made of, and who may open it."""

from __future__ import annotations

import json
import random

import pytest

from overlay.api.serve import parsed
from overlay.ask.server import Refused
from overlay.page import render
from overlay.page.cluster import SAMPLE, sample
from overlay.page.server import Page
from overlay.page.summary import MOST_ASKED, summary
from overlay.page.token import token_of
from tests.support.made_cluster import SILENT, made, status, subnet

SECRET = b"0123456789abcdef"
TOKEN = token_of(SECRET)


def test_a_cluster_has_each_direction_as_its_first_node_says():
    found = made(3, {(0, 1)})
    pairs = {(pair[0], pair[1]): pair[2] for pair in found["pairs"]}
    assert pairs == {(0, 1): "unreachable", (0, 2): "ok", (1, 0): "ok", (1, 2): "ok", (2, 0): "ok", (2, 1): "ok"}
    (worst,) = found["worst"]
    assert (worst["name"], worst["text"], worst["said_by"], worst["place"]) == ("n1", SILENT, ["n0"], 1)
    assert found["counts"] == {"ok": 1, "unreachable": 1}


def test_of_who_gave_no_answer_nothing_is_called_well():
    found = made(3, silent={1})
    node = found["nodes"][1]
    assert (node["asked"], node["why"]) == ("no answer", "connection refused")
    assert "ready" not in node
    assert not [pair for pair in found["pairs"] if pair[0] == 1]
    assert [pair for pair in found["pairs"] if pair[1] == 1], "others say how they reach it"


def test_of_many_some_are_asked_those_with_troubles_first():
    bad = {(0, each) for each in range(4000, 4010)}
    found = status(0, 5000, bad)
    asked = sample(summary(found, ()), found["peers"], random.Random(1))
    assert len(asked) == SAMPLE - 1
    assert {subnet(each) for each in range(4000, 4010)} <= {peer["subnet"] for peer in asked}
    few = status(0, 50, set())
    assert len(sample(summary(few, ()), few["peers"], random.Random(1))) == 49


def test_nodes_are_grouped_by_the_zone_that_each_says_else_by_their_network():
    found = made(3, silent={1}, zone="zone-a")
    assert [node["group"] for node in found["nodes"]] == ["zone-a", "192.168.0.0/24", "192.168.0.0/24"]


def test_a_summary_is_small_whatever_is_asked():
    found = status(0, 5000, {(0, each) for each in range(1, 3000)})
    made_of_it = summary(found, [subnet(each) for each in range(5000)])
    assert len(made_of_it["reaches"]) == MOST_ASKED - 1, "itself is none of its peers"
    assert len(made_of_it["worst"]) == 20
    assert len(json.dumps(made_of_it)) < 32_000
    assert made_of_it["states"] == {"ok": 2000, "unreachable": 2999}


def test_the_file_holds_its_data_and_loads_nothing():
    evil = "</script><script>alert(1)</script>\u2028"
    html = render.render(made(2, node_name=evil))
    assert html.count("<script") == 2
    assert "http://" not in html.replace("http://www.w3.org/", "")
    start = html.index('id="data">') + len('id="data">')
    assert json.loads(html[start : html.index("</script>", start)])["from"] == evil
    assert "sha256-" in render.policy()


def refuse(_source, _destination):
    raise Refused("no pod has it")


@pytest.fixture
def secret_file(tmp_path) -> str:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return str(path)


def ask(page: Page, target: str, host: str = "127.0.0.1:8474", method: str = "GET"):
    request = parsed(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    (code, _, body), fields = page.answer(request)
    return code, body, fields


def test_who_may_open_it(secret_file):
    inside = Page(
        lambda: status(0, 1, set()), lambda one, other: {"text": f"{one} {other}"}, refuse, secret_file, loopback=True
    )
    outside = Page(lambda: status(0, 1, set()), refuse, refuse, secret_file, loopback=False)
    code, body, fields = ask(inside, "/")
    assert (code, body.startswith("<!doctype html>")) == (200, True)
    assert "Content-Security-Policy: default-src 'none'" in fields
    assert ask(inside, "/data.json")[0] == 200
    assert ask(outside, "/")[0] == ask(outside, "/?token=")[0] == ask(outside, "/data.json?token=x")[0] == 401
    assert ask(outside, f"/?token={TOKEN}")[0] == 200
    assert ask(inside, "/", method="POST")[0] == 405
    assert ask(inside, "/other")[0] == 404


@pytest.mark.parametrize(
    ("host", "code"), [("localhost:1", 200), ("10.0.0.1", 200), ("[::1]:8474", 200), ("evil.example", 403), ("", 403)]
)
def test_it_is_opened_by_address_alone(secret_file, host, code):
    """A name may be made another's while the browser has the page open (DNS rebinding)."""
    page = Page(lambda: status(0, 1, set()), refuse, refuse, secret_file, loopback=True)
    assert ask(page, "/", host)[0] == code


def test_probes_are_sent_for_who_has_the_token(secret_file):
    page = Page(
        lambda: status(0, 1, set()), lambda one, other: {"text": f"{one} {other}"}, refuse, secret_file, loopback=True
    )
    assert "token" in json.loads(ask(page, "/trace.json?source=a&destination=b")[1])["error"]
    assert json.loads(ask(page, f"/trace.json?source=a&destination=b&token={TOKEN}")[1]) == {"text": "a b"}
    refusing = Page(lambda: None, refuse, refuse, secret_file, loopback=True)
    assert json.loads(ask(refusing, f"/trace.json?token={TOKEN}")[1]) == {"error": "no pod has it"}
    assert ask(refusing, "/data.json")[0] == 503
    no_secret = Page(lambda: status(0, 1, set()), refuse, refuse, "", loopback=True)
    assert "token" in json.loads(ask(no_secret, f"/trace.json?token={TOKEN}")[1])["error"]
