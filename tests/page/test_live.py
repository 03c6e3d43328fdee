"""The page as an agent serves it: it asks again, opens the ladder, and traces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from overlay.api.serve import TcpDoor
from overlay.ask.server import Refused
from overlay.page.server import Page, handler
from overlay.page.token import token_of
from tests.support.made_cluster import status, subnet
from tests.support.ports import free_port

SECRET = b"0123456789abcdef"


def probe(name: str, answered: int) -> dict[str, Any]:
    return {
        "name": name,
        "address": "10.0.0.1",
        "packet_bytes": None,
        "sent": 3,
        "answered": answered,
        "rtt_us": 99 if answered else None,
        "refused": "",
    }


def check(source: str, destination: str) -> dict[str, Any]:
    assert {source, destination} == {subnet(0), subnet(1)}
    if source == subnet(1):
        raise Refused("n1 was asked: connection refused")
    return {
        "state": "unreachable", "verdict": "its VTEP does not answer", "remedy": "let UDP 8472 pass", "look_ups": [],
        "far_side": ["n1 says: <b>nothing</b>"], "probes": [probe("underlay", 3), probe("VTEP", 0)],
    }  # fmt: skip


def trace(source: str, destination: str) -> dict[str, Any]:
    steps = [
        {"node": "n0", "step": f"came from {source}", "counted": 3, "of_the_answer": False},
        {"node": "n1", "step": f"given to {destination}", "counted": 0, "of_the_answer": False},
    ]
    return {
        "verdict": "dropped",
        "text": "dropped at n1",
        "because": ["a rule"],
        "notes": [],
        "rounds": [{"verdict": "dropped", "sent": 3, "steps": steps}],
    }


@pytest.fixture
def served(tmp_path):
    """Its address, and the status that it shows, which may be altered."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    now = status(0, 3, {(0, 1)})
    port = free_port()
    door = TcpDoor(
        "127.0.0.1", port, handler(Page(lambda: json.loads(json.dumps(now)), trace, check, str(secret), True)), "page"
    )
    assert door.open()
    yield f"http://127.0.0.1:{port}/?token={token_of(SECRET)}", now
    door.close()


def until(browser: Any, what: Any) -> None:
    WebDriverWait(browser, 20).until(lambda _: what())


def text(browser: Any, selector: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, selector).text)


def test_the_ladder_of_a_pair_is_opened_both_ways(browser, served):
    browser.get(served[0])
    browser.find_element(By.CSS_SELECTOR, "[data-key='p0-1']").send_keys(Keys.ENTER)
    next(each for each in browser.find_elements(By.TAG_NAME, "button") if each.text == "ask both now").click()
    until(browser, lambda: "its VTEP does not answer" in text(browser, "#details"))
    details = text(browser, "#details")
    for words in (
        "3 of 3",
        "0 of 3",
        "let UDP 8472 pass",
        "n1 says: <b>nothing</b>",
        "n1 was asked: connection refused",
    ):
        assert words in details


def test_a_packets_path_is_drawn_by_trace(browser, served):
    browser.get(served[0])
    browser.find_element(By.CSS_SELECTOR, "[data-key='p0-1']").send_keys(Keys.ENTER)
    form = browser.find_element(By.CSS_SELECTOR, "#details form")
    form.find_element(By.NAME, "source").send_keys("10.100.0.2")
    form.find_element(By.NAME, "destination").send_keys("10.100.1.2", Keys.ENTER)
    until(browser, lambda: "dropped at n1" in text(browser, "#details"))
    steps = browser.find_elements(By.CSS_SELECTOR, "ol.way li")
    assert [(each.text, each.get_attribute("class")) for each in steps] == [
        ("n0: came from 10.100.0.2 — 3 of 3", "ok"), ("n1: given to 10.100.1.2 — 0 of 3", "bad"),
    ]  # fmt: skip


def test_it_asks_again_and_who_uses_the_keyboard_stays_where_he_was(browser, served):
    address, now = served
    browser.get(address)
    assert text(browser, "#problems") == "none of 1 agents that were asked says that anything is wrong"
    browser.find_element(By.CSS_SELECTOR, "[data-key='p0-2']").send_keys("")
    browser.execute_script("document.querySelector('[data-key=\"p0-2\"]').focus()")
    now["problems"] = [
        {"subject": "carrier", "text": "eth0 has no carrier", "since": "2026-11-28T03:00:00Z", "keeps_unready": True}
    ]
    until(browser, lambda: "eth0 has no carrier" in text(browser, "#problems"))
    assert browser.execute_script("return document.activeElement.dataset.key") == "p0-2"


def test_without_the_token_nothing_is_asked_of_anybody(browser, served):
    browser.get(served[0].partition("?")[0])
    browser.find_element(By.CSS_SELECTOR, "[data-key='p0-1']").send_keys(Keys.ENTER)
    next(each for each in browser.find_elements(By.TAG_NAME, "button") if each.text == "ask both now").click()
    until(browser, lambda: "needs a token" in text(browser, "#details"))
