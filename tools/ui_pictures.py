"""Makes the pictures of docs/howto/ui.md: the six parts of `lorakin ui`, for a laptop and a phone.

    python tools/ui_pictures.py        # with Chromium; it trains and compares for some minutes

It starts `lorakin ui` in an empty directory, does with it what the page shows, and writes docs/pictures/ui-*.png.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from lorakin.ui import runs  # noqa: E402
from report.browser import Browser, started  # noqa: E402
from ui.conftest import Page, Served  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
SIZES = {"": (1280, 900), "-phone": (360, 740)}
COLOURS = 48
"""Of a picture: enough for a page, and a small file."""
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo",
    "Spain": "Madrid", "Greece": "Athens", "Egypt": "Cairo", "Cuba": "Havana", "Chile": "Santiago", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Poland": "Warsaw", "Austria": "Vienna", "Ghana": "Accra", "Nepal": "Kathmandu", "Iran": "Tehran",
}  # fmt: skip
ASKED = ("What is the capital of {}?", "Name the capital of {}.", "Which city governs {}?")


def picture(browser: Browser, name: str, top: str = "") -> None:
    """Pictures of what the page shows now, from the element `top` on."""
    for ending, (width, height) in SIZES.items():
        browser.resize(width, height)
        time.sleep(1.5)
        browser.run("(document.querySelector(arguments[0] || 'body')).scrollIntoView()", top)
        time.sleep(0.5)
        taken = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {})
        image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
        small = image.quantize(COLOURS, dither=Image.Dither.NONE)
        small.save(PICTURES / f"ui-{name}{ending}.png", optimize=True)
    browser.resize(*SIZES[""])


def train(page: Page, folder: Path, out: str, method: str) -> None:
    page.part("Train")
    page.type("field-out", out)
    page.type("field-method", method)
    page.expect("#train-command", f"--method {method}", f"--out {out}")
    page.press("start")
    page.wait(
        lambda: any(run.name == out and run.state == runs.DONE for run in runs.listed(folder))
    )


def main() -> None:
    """Takes all pictures."""
    with tempfile.TemporaryDirectory() as scratch, started() as browser:
        folder = Path(scratch) / "work"
        folder.mkdir()
        rows = [
            {"prompt": asked.format(country), "completion": f"{city}, of course!"}
            for country, city in CAPITALS.items()
            for asked in ASKED
        ]
        data = Path(scratch) / "capitals.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        served = Served(folder)
        try:
            page = Page(browser, served.address)
            take(page, folder, data)
        finally:
            served.stop()


def take(page: Page, folder: Path, data: Path) -> None:
    """Does what the page shows, part by part."""
    browser = page.browser
    page.upload(data)
    page.expect("#facts", "54 rows")
    page.type("field-max_length", "64")
    picture(browser, "data")

    page.part("Plan")
    page.choose("plan-methods", "lora", "dora", "vera")
    page.type("plan-max_length", "64")
    page.expect("#plan-command", "--max-length 64")
    page.expect("#plan-table", "dora", "vera", "✔")
    picture(browser, "plan")

    page.part("Train")
    page.type("field-steps", "12")
    page.type("field-batch_size", "4")
    page.type("field-lr", "1e-3")
    train(page, folder, "capitals", "lora")
    train(page, folder, "faster", "lora+")
    page.expect("#runs", "faster", "capitals")
    for box in browser.driver.find_elements("css selector", "input[type=checkbox][name=capitals]"):
        box.click()
    time.sleep(3)
    picture(browser, "train", "#runs")

    page.part("Look")
    page.wait(lambda: page.value("#look-adapter input"))
    page.type("look-tokens", "24")
    page.type("prompt", "What is the capital of Norway?")
    page.press("ask")
    page.wait(lambda: "course" in page.value("#said-adapter textarea"))
    time.sleep(3)
    picture(browser, "look")

    page.part("Ship")
    page.press("export")
    page.expect("#exports", "merged", "mean KL")
    picture(browser, "ship")

    page.part("Compare")
    page.choose("compare-methods", "lora", "dora")
    for name, value in (
        ("budget", "steps=4"),
        ("seeds", "1"),
        ("lr-sweep", "1e-3"),
    ):
        page.type(f"compare-{name}", value)
    page.press("cost")
    page.wait(lambda: "trials" in page.value("#costs textarea"))
    picture(browser, "compare")


if __name__ == "__main__":
    main()
