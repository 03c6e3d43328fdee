"""A real browser (`.ci/page-setup` installs it), headless."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overlay.page.render import render

SHOTS = Path(__file__).parents[2] / "build/page"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    for program in ("chromium", "chromedriver"):
        assert shutil.which(program), f"{program} is missing: .ci/page-setup"
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    for each in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1600",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(300)  # axe looks at ten thousand cells
    yield driver
    driver.quit()


@pytest.fixture(params=["light", "dark"])
def scheme(request, browser) -> str:
    """Both colour schemes."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": request.param}]}
    )
    return str(request.param)


@pytest.fixture
def show(browser, tmp_path) -> Callable[[dict[str, Any]], Any]:
    """Opens the page of a cluster as a file; afterwards nothing was wrong in the browser's console."""

    def opened(cluster: dict[str, Any], name: str = "") -> Any:
        path = tmp_path / "page.html"
        path.write_text(render(cluster), encoding="utf-8")
        browser.get_log("browser")
        browser.get(path.as_uri())
        assert [each for each in browser.get_log("browser") if each["level"] == "SEVERE"] == []
        if name:
            SHOTS.mkdir(parents=True, exist_ok=True)
            browser.save_screenshot(str(SHOTS / f"{name}.png"))
        return browser

    return opened
