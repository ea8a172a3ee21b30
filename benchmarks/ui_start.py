"""Times `lorakin ui` from the command to a usable page in a browser, beside `import torch`.

It also says what an open page takes of a processor while nobody does anything.

python -m benchmarks.ui_start --rounds 5        # with Chromium
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report.browser import Browser, started
from ui.conftest import Page, Served

SETTLED, WATCHED = 15.0, 20.0
"""Seconds until an open page has nothing left to do, and then those for which it is watched."""


def import_seconds() -> float:
    """Returns the seconds of a process that imports torch."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begun


def page_seconds(browser: Browser) -> float:
    """Returns the seconds from `lorakin ui` until a field of the page can be typed into."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        served = Served(Path(folder))
        try:
            Page(browser, served.address)
            return time.perf_counter() - begun
        finally:
            served.stop()


def idle_shares(browser: Browser) -> tuple[float, float]:
    """Returns the parts of a core that the server and the browser take, with the runs in view."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(Path(folder))
        try:
            Page(browser, served.address).part("Train")
            time.sleep(SETTLED)
            processes = [
                psutil.Process(p.pid) for p in (served.process, browser.driver.service.process)
            ]
            before = [work_of(process) for process in processes]
            time.sleep(WATCHED)
            server, shown = (
                (work_of(process) - was) / WATCHED
                for process, was in zip(processes, before, strict=True)
            )
            return server, shown
        finally:
            served.stop()


def work_of(process: psutil.Process) -> float:
    """Returns the processor's seconds of a process and those that it started."""
    family = [process, *process.children(recursive=True)]
    return sum(one.cpu_times().user + one.cpu_times().system for one in family)


def said(seconds: Sequence[float]) -> str:
    """Returns the median of several figures, and their range.

    >>> said([1.0, 3.0, 2.0])
    '2.0 (1.0–3.0)'
    """
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"


def main() -> None:
    """Prints both times, and their difference, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with started() as browser:
        page_seconds(browser)  # files are cached from here on
        pairs = [(import_seconds(), page_seconds(browser)) for _ in range(rounds)]
        server, shown = idle_shares(browser)
    print(f"import torch: {said([torch for torch, _ in pairs])} s")
    print(f"lorakin ui, to a usable page: {said([page for _, page in pairs])} s")
    print(f"the page beyond torch: {said([page - torch for torch, page in pairs])} s")
    print(f"an idle page: {server:.1%} of a core in the server, {shown:.1%} in the browser")


if __name__ == "__main__":
    main()
