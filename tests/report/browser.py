"""A page in headless Chromium: what it drew, what went wrong, what it asked the network for.

`from report.browser import Browser, browser` gives a test module the fixture `browser`. Without
Chromium its tests are skipped. To look at a page:

    python tests/report/browser.py page.html laptop.png:1280:light phone.png:390:dark
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-color-profile=srgb",
]  # fmt: skip


def chromium() -> tuple[str, str]:
    """Chromium and its driver; skips the test where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    return browser, driver


class Browser:
    """A headless Chromium. `open` a file, then ask."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> Browser:
        """Opens a page on a screen of so many CSS pixels and waits until its charts are drawn."""
        self.resize(width, height)
        self.dark(dark)
        self.errors(), self.requests()  # forget those of the page before
        self.driver.get("about:blank")
        self.driver.get(path.resolve().as_uri())
        return self.drawn()

    def resize(self, width: int, height: int = 900) -> Browser:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        return self

    def dark(self, dark: bool, *, paper: bool = False) -> Browser:
        """Sets the theme that the reader's system prefers; `paper` is for print."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = {"media": "print" if paper else "screen", "features": [feature]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def drawn(self) -> Browser:
        """Waits until every chart that is in sight has marks."""
        undrawn = """return [...document.querySelectorAll('.plot')]
            .some(plot => plot.clientWidth && !plot.querySelector('svg path[d]'))"""
        self.wait(lambda: not self.run(undrawn))
        return self

    def wait(self, condition: Callable[[], Any]) -> None:
        """Waits until the condition holds."""
        WebDriverWait(self.driver, 20, 0.05).until(lambda _: condition())

    def unfolded(self) -> Browser:
        """Opens every part that is folded away."""
        self.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        return self.drawn()

    def find(self, selector: str) -> WebElement:
        """Returns the only element that the selector matches."""
        (found,) = self.driver.find_elements("css selector", selector)
        return found

    def errors(self) -> list[str]:
        """Returns the errors in the console since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Returns the addresses that the page loaded, its own among them."""
        events = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        urls = [
            e["params"]["request"]["url"]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if url != "about:blank"]

    def marks(self) -> list[int]:
        """Returns how many marks each chart has."""
        count = """return [...document.querySelectorAll('.plot')].map(plot =>
            plot.querySelectorAll('.role-mark path[d], .role-mark text').length)"""
        return [int(number) for number in self.run(count)]

    def picture(self, path: Path) -> None:
        """Saves a picture of the whole page."""
        taken = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True}
        )
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def started() -> Iterator[Browser]:
    """Starts a browser and ends it with the block."""
    binary, driver = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found


def main(page: str, *pictures: str) -> None:
    """Pictures of a page, each "file:width:light" or "file:width:dark"."""
    with started() as browser:
        for picture in pictures:
            file, width, theme = picture.split(":")
            browser.open(Path(page), width=int(width), dark=theme == "dark")
            browser.resize(
                int(width), int(browser.run("return document.documentElement.scrollHeight"))
            )
            browser.picture(Path(file))
            print(file, browser.marks(), browser.errors(), browser.requests())


if __name__ == "__main__":
    main(*sys.argv[1:])
