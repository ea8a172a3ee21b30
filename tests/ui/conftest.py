"""`lorakin ui` as a user starts it, and a page of it in headless Chromium."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

import soak
from conftest import interruptible
from lorakin.ui import jobs, runs
from report.browser import Browser, browser

__all__ = ["browser"]

MARGIN = 180.0
"""Seconds to wait for what a busy machine may take long for."""


PARTS = ("Data", "Plan", "Train", "Look", "Compare", "Ship")


class Served:
    """A `lorakin ui` in a process of its own, over a folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.words = folder, words
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "lorakin", "ui", "--no-browser", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *self.words],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            preexec_fn=interruptible,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert self.address in said, said + self.process.stdout.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends it as Ctrl-C does, which is soon, whatever it computes."""
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(60) == 130
        finally:
            self.process.kill()


class Page:
    """A page in a browser: its parts, fields and buttons by the names that the reader sees."""

    def __init__(self, browser: Browser, address: str, *, width: int = 1280) -> None:
        self.browser = browser
        browser.errors(), browser.requests()
        browser.resize(width)
        browser.driver.get("about:blank")
        browser.driver.get(address)
        self.wait(lambda: self.there("#field-model textarea, #field-model input"))

    def there(self, selector: str) -> bool:
        return bool(self.browser.run("return !!document.querySelector(arguments[0])", selector))

    def wait(self, condition: Callable[[], Any], what: str = "") -> None:
        end = time.monotonic() + MARGIN
        while not condition():
            assert time.monotonic() < end, what or self.text("body")
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        found = "return document.querySelector(arguments[0])?.innerText || ''"
        return str(self.browser.run(found, selector))

    def value(self, selector: str) -> str:
        found = "return document.querySelector(arguments[0])?.value || ''"
        return str(self.browser.run(found, selector))

    def part(self, name: str) -> None:
        """Chooses a tab; on a narrow screen the last ones are in a menu."""
        named = """return [...document.querySelectorAll(arguments[0])]
            .find(one => one.offsetParent && one.textContent.trim() === arguments[1])"""

        def is_chosen() -> bool:
            for selector in ("button[role=tab]", ".overflow-dropdown button"):
                if (found := self.browser.run(named, selector, name)) is not None:
                    found.click()
                    return True
            for menu in self.browser.driver.find_elements(
                "css selector", "[aria-label='More tabs']"
            ):
                menu.click() if menu.is_displayed() else None
            return False

        self.wait(is_chosen, name)

    def upload(self, path: Path) -> None:
        """Drops a file; a page that is still being built does not notice it, so it looks."""

        def is_dropped() -> bool:
            for field in self.browser.driver.find_elements(
                "css selector", "#upload input[type=file]"
            ):
                field.send_keys(str(path))
            end = time.monotonic() + 5
            while time.monotonic() < end:
                if path.stem in self.text("#upload"):
                    return True
                time.sleep(0.1)
            return False

        self.wait(is_dropped, f"upload of {path}")

    def type(self, place: str, text: str) -> None:
        """Types into the field of this id, in place of what stood there."""
        selector = f"#{place} textarea, #{place} input"
        self.wait(lambda: self.there(selector), place)
        (field, *_) = self.browser.driver.find_elements("css selector", selector)
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE)
        field.send_keys(text)
        self.leave(field)

    def choose(self, place: str, *values: str) -> None:
        """Chooses these in a field that takes several, in place of what was chosen."""
        self.wait(lambda: self.there(f"#{place} input"), place)
        for found in self.browser.driver.find_elements("css selector", f"#{place} .remove-all"):
            found.click()
        field = self.browser.find(f"#{place} input")
        for value in values:
            field.send_keys(value)
            field.send_keys(Keys.ENTER)
        self.leave(field)

    def leave(self, field: Any) -> None:
        """Leaves a field by the Tab key, and the next one, whose choices may cover others."""
        field.send_keys(Keys.TAB)
        self.browser.run("document.activeElement.blur()")

    def press(self, place: str) -> None:
        self.wait(lambda: self.there(f"#{place}"), place)
        button = self.browser.find(f"#{place}")
        self.browser.run("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def expect(self, selector: str, *words: str) -> None:
        """Waits until all the words stand there."""
        self.wait(
            lambda: all(word in self.text(selector) for word in words),
            f"{words} in {selector}",
        )

    def problem(self, words: str) -> None:
        """Waits for a sentence on what went wrong, which has these words."""
        visible = """return [...document.querySelectorAll('[role=alert].problem')]
            .filter(one => one.offsetParent).map(one => one.innerText).join(' ')"""
        self.wait(lambda: words in self.browser.run(visible), words)


@pytest.fixture(params=["tiny", *(["smollm2"] if soak.is_slow() else [])])
def model(request: pytest.FixtureRequest, model_dir: str) -> str:
    """The model that is typed: a tiny one, and the packaged one with `make ui`."""
    return model_dir if request.param == "tiny" else str(request.param)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "work"
    folder.mkdir()
    found = Served(folder)
    try:
        yield found
    finally:
        found.stop()
        for run in runs.listed(folder):  # they outlive the page
            if run.state == runs.RUNNING:
                jobs.interrupt(run.path)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Questions for a language model to learn, in words that the tiny one knows, too."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(questions("sat", "ran")))
    return path


def questions(*verbs: str) -> list[str]:
    """Lines of JSON: twenty rows for each verb."""
    rows = [
        {
            "prompt": f"what did the {how} {animal} {verb} on",
            "completion": f"it {verb} on the {place}",
        }
        for verb in verbs
        for animal in ("cat", "dog")
        for how in ("fast", "slow", "good", "bad", "one")
        for place in ("mat", "tree")
    ]
    return [json.dumps(row) + "\n" for row in rows]
