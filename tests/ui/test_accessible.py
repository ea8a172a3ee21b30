"""What axe-core finds on the page for readers with disabilities: `make ui`.

It sees names, roles and contrast. Whether a screen reader's user finds their way, it does not see.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from report.browser import Browser
from ui.conftest import PARTS, Page, Served

AXE = Path(__file__).parents[2] / ".venv" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
OF_GRADIO = {"aria-prohibited-attr", "label-content-name-mismatch"}
"""What Gradio's own components have: a name on an empty chart, which has no role; and a field for
files whose name differs from its text."""

pytestmark = pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: `make ui`")


@pytest.fixture
def with_a_run(served: Served) -> Served:
    """A page that has a run to list and to draw."""
    folder = served.folder / "adapter"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: dora\n")
    (folder / "adapter_config.json").write_text("{}")
    rows = [{"step": n, "loss": 1 / n, "learning_rate": 1e-3} for n in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.txt").write_text("$ lorakin train\nstep 1\n")
    return served


def found_by_axe(browser: Browser) -> list[str]:
    """Returns what axe-core finds: rule, element, why."""
    browser.run(AXE.read_text(encoding="utf-8"))
    ask = """const done = arguments[0];
        axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']})
            .then(found => done(found.violations.flatMap(
                rule => rule.nodes.map(node => [rule.id, node.html, node.failureSummary]))))"""
    found: list[Any] = browser.driver.execute_async_script(ask)
    return [
        f"{rule}: {element[:200]}: {why}" for rule, element, why in found if rule not in OF_GRADIO
    ]


@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(with_a_run: Served, browser: Browser, rows: Path, width: int) -> None:
    page = Page(browser, with_a_run.address, width=width)
    page.upload(rows)
    page.expect("#facts", "40 rows")
    for name in PARTS:
        page.part(name)
        for dark in (False, True):
            browser.dark(dark)
            time.sleep(2.5)  # colours fade, and the plan and the list of runs come
            assert found_by_axe(browser) == [], (name, dark)
    browser.dark(False)
