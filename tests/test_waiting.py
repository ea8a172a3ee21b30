"""Bars: shown for what takes long, on a terminal, where the command asked for them."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from lorakin import waiting


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.05)


def shown(seconds: float, is_terminal: bool = True) -> str:
    file = io.StringIO()
    with waiting.show_on(Console(file=file, force_terminal=is_terminal, width=80)):
        with waiting.waiting("the outer"):
            for _ in waiting.tracked([1, 2], "the inner"):
                time.sleep(seconds / 2)
    return file.getvalue()


def test_a_bar_appears_after_a_while_and_vanishes() -> None:
    out = shown(0.6)
    assert "the outer" in out and "the inner" in out and "1/2" in out
    assert out.rstrip().endswith("\x1b[2K\x1b[?25h")  # the line is cleared


def test_what_is_quick_shows_nothing() -> None:
    assert shown(0.0) == ""


def test_nothing_in_a_file_nor_without_a_command() -> None:
    assert shown(0.3, is_terminal=False) == ""
    assert list(waiting.tracked(iter("ab"), "letters")) == ["a", "b"]


def test_other_threads_show_nothing() -> None:
    file = io.StringIO()

    def work() -> None:
        with waiting.waiting("in a thread"):
            time.sleep(0.2)

    with waiting.show_on(Console(file=file, force_terminal=True)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert file.getvalue() == ""


def test_an_error_ends_the_bar() -> None:
    def fails() -> None:
        with waiting.waiting("what fails"):
            time.sleep(0.3)
            print(1 / 0)

    file = io.StringIO()
    with waiting.show_on(Console(file=file, force_terminal=True)):
        with pytest.raises(ZeroDivisionError):
            fails()
        length = len(file.getvalue())
        time.sleep(0.2)
        assert len(file.getvalue()) == length
