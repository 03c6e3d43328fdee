"""The page in a real browser, at three sizes, with the keyboard, and judged by axe. `make page-test` runs these."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.made_cluster import SILENT, SINCE, made, subnet

PROBLEM = {"subject": "unreachable", "text": f"n1: {SILENT}", "since": SINCE, "keeps_unready": False}
PAST = {"subject": "carrier", "text": "eth0 has no carrier", "since": SINCE, "until": "2026-11-28T03:01:00Z"}
SIZES = {
    "3": lambda: made(3, {(0, 1), (1, 0)}, problems=[PROBLEM], history=[PAST]),
    "100": lambda: made(100, {(each, 7) for each in range(100)} | {(7, each) for each in range(100)}, silent={9}),
    "5000": lambda: made(5000, {(0, 77), (0, 4000)}, refused_records=[{"key": "10.1.2.0-24", "reason": "no PublicIP"}]),
}


@pytest.fixture(scope="module")
def axe() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None, "axe is missing: .ci/page-setup"
    return (Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text()


def text(browser, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


@pytest.mark.parametrize("size", SIZES)
def test_it_is_accessible_at_every_size_in_both_schemes(show, scheme, axe, size):
    """WCAG 2.2 AA and axe's best practices, also with details open."""
    browser = show(SIZES[size](), f"{size}-{scheme}")
    form = browser.find_element(By.ID, "search")
    form.find_element(By.NAME, "from").send_keys("n0")
    form.find_element(By.NAME, "to").send_keys("n1")
    form.find_element(By.TAG_NAME, "button").click()
    browser.execute_script(axe)
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(done, (e) => done(String(e)));"
    )
    said = [(each["id"], [node["html"][:150] for node in each["nodes"][:3]]) for each in found["violations"]]
    assert said == []
    assert len(found["passes"]) > 15, "it looked"


def test_three_nodes_are_drawn_with_an_edge_for_each_direction(show):
    browser = show(SIZES["3"]())
    edges = browser.find_elements(By.CSS_SELECTOR, "#picture svg g[data-key^=p]")
    labels = {edge.get_attribute("aria-label") for edge in edges}
    assert len(edges) == 6
    assert "n0 to n1: does not answer, MTU" not in labels
    assert {"n0 to n1: does not answer", "n1 to n0: does not answer", "n0 to n2: answers, 82 µs, MTU 1450"} <= labels
    colors = {edge.get_attribute("class") for edge in browser.find_elements(By.CSS_SELECTOR, "#picture path.edge")}
    assert colors == {"edge ok", "edge bad"}
    assert "UDP 8472" in text(browser, "#problems")
    assert SINCE in text(browser, "#problems")


def test_a_click_opens_what_was_found_both_ways(show):
    browser = show(SIZES["3"]())
    browser.execute_script("document.querySelector('#picture').scrollIntoView()")
    where = browser.execute_script(
        "const path = document.querySelector('[data-key=\"p0-1\"] .hit'), matrix = path.getScreenCTM();"
        "const point = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(matrix); return [point.x, point.y];"
    )
    ActionChains(browser).move_by_offset(*map(round, where)).click().perform()
    ActionChains(browser).move_by_offset(*(-round(each) for each in where)).perform()
    details = text(browser, "#details")
    assert "n0 to n1: does not answer" in details
    assert "n1 to n0: does not answer" in details
    assert SILENT in details
    browser.find_element(By.CSS_SELECTOR, "[data-key='n0']").click()
    details = text(browser, "#details")
    assert "eth0 has no carrier" in details, "the history of a node"
    assert "now" in details
    assert subnet(0) in details


def test_the_keyboard_alone_is_enough(show):
    browser = show(SIZES["3"]())
    browser.find_element(By.CSS_SELECTOR, "[data-key='p1-0']").send_keys(Keys.ENTER)
    assert text(browser, "#details h3") == "n1 to n0"
    browser = show(SIZES["100"]())
    browser.find_element(By.CSS_SELECTOR, "[data-at='0/0']").send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert browser.switch_to.active_element.get_attribute("data-at") == "1/1"
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert "n1 to n2: answers" in text(browser, "#details")
    stops = browser.find_elements(By.CSS_SELECTOR, "#picture [tabindex='0']")
    assert len(stops) == 1, "one stop for tab in ten thousand cells"


def test_a_hundred_nodes_are_a_heat_map_by_network_beside_what_is_wrong(show):
    browser = show(SIZES["100"]())
    cells = browser.find_elements(By.CSS_SELECTOR, ".heat [role=gridcell]")
    assert len(cells) == 100 * 100
    assert len(browser.find_elements(By.CSS_SELECTOR, ".heat .bad")) >= 99 + 98
    assert "192.168.0.0/24, 192.168.1.0/24, 192.168.2.0/24" in text(browser, "#picture")
    assert len(browser.find_elements(By.CSS_SELECTOR, ".heat .none")) == 99, (
        "of the one that gave no answer nothing is known"
    )
    assert text(browser, "#worst tbody tr td").startswith("n7"), "of whom most say so"
    assert "1 gave no answer" in text(browser, "#skew")
    assert "not the same everywhere" in text(browser, "#skew"), "two versions"


def test_five_thousand_are_counted_and_a_hundred_shown(show):
    browser = show(SIZES["5000"]())
    assert "5000 nodes" in text(browser, "#title")
    facts = text(browser, "#facts")
    assert "n0: answers 4997" in facts
    assert "n0: does not answer 2" in facts
    assert "100 of 5000 nodes are shown" in text(browser, "#legend")
    worst = text(browser, "#worst")
    assert "n77" in worst
    assert "n4000" in worst
    assert "no PublicIP" in text(browser, "#refused")
    assert "5000 of 16384 subnets are taken (31 %)" in text(browser, "#range")
    assert "in the last 4 minutes" in text(browser, "#mends")


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("n3", "n4", "n3 to n4: answers"),
        ("192.168.0.5", "10.100.4.17", "n3 to n4: answers"),
        ("n3", "nobody", "no node has nobody"),
        ("n3", "n3", "n3"),
    ],
)
def test_search_finds_by_name_address_and_pod(show, source, target, words):
    browser = show(SIZES["100"]())
    form = browser.find_element(By.ID, "search")
    form.find_element(By.NAME, "from").send_keys(source)
    form.find_element(By.NAME, "to").send_keys(target, Keys.ENTER)
    assert words in text(browser, "#details")


def test_words_of_others_are_words(show):
    """A node's name, a record's reason: no markup, no script."""
    evil = "</script><script>window.hurt=1</script><img src=x onerror='window.hurt=1'>"
    browser = show(
        made(3, node_name=evil, problems=[{**PROBLEM, "text": evil}], refused_records=[{"key": evil, "reason": evil}])
    )
    assert evil in text(browser, "#problems")
    browser.find_element(By.CSS_SELECTOR, "[data-key='n0']").click()
    assert browser.execute_script("return window.hurt") is None
    assert browser.find_elements(By.CSS_SELECTOR, "img") == []


def test_a_narrow_window_has_no_sideways_scrolling(show, browser):
    size = browser.get_window_size()
    browser.set_window_size(500, 900)
    try:
        shown = show(SIZES["3"](), "narrow")
        assert shown.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.set_window_size(size["width"], size["height"])
