"""The page in a real browser, over real runs of the packaged model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

import soak
from lorakin.ui import runs
from lorakin.ui.ticks import SECONDS
from report.browser import Browser
from ui.conftest import PARTS, Page, Served, questions

pytestmark = pytest.mark.model
WEIGHTS = "adapter_model.safetensors"


def fill_in(page: Page, model: str, rows: Path, *, steps: int, out: str) -> None:
    """Uploads rows, looks at them, and fills in the form of a short run."""
    page.type("field-model", model)
    page.upload(rows)
    page.expect("#facts", "40 rows, ", "prompt/completion")
    page.type("field-max_length", "64")
    page.part("Train")
    page.type("field-out", out)
    page.type("field-steps", str(steps))
    page.type("field-batch_size", "32")
    page.expect("#train-command", f"--steps {steps}", "--batch-size 32", f"--out {out}")


def state_of(folder: Path, name: str) -> str:
    return next((run.state for run in runs.listed(folder) if run.name == name), "")


def test_from_an_empty_directory_to_a_merged_model(
    served: Served, browser: Browser, model: str, rows: Path
) -> None:
    page = Page(browser, served.address)
    page.type("field-model", model)
    page.upload(rows)
    page.expect("#facts", "40 rows, ", "prompt/completion")
    page.expect("#example-0", "what did the", "on the")
    page.type("field-max_length", "64")

    page.part("Plan")
    page.type("plan-max_length", "64")
    page.type("plan-batch_size", "2")
    page.choose("plan-methods", "lora", "dora,lora+")
    page.expect("#plan-table", "lora+,dora", "✔")

    page.part("Train")
    page.type("field-steps", "10")
    page.type("field-batch_size", "2")
    page.expect("#train-command", "--max-length 64", "--steps 10", "--batch-size 2")
    page.expect("#train-recipe", f"model: {model}", "steps: 10")
    command = page.text("#train-command")
    page.press("start")
    page.wait(lambda: state_of(served.folder, "adapter") == runs.DONE)
    page.expect("#runs", "adapter", "done", "10")
    page.wait(lambda: page.there("#curve-0 canvas"))

    words = command[command.index("lorakin") :].replace("--out adapter", "--out typed").split()
    subprocess.run(
        [sys.executable, "-m", *words], cwd=served.folder, check=True, capture_output=True
    )
    clicked, typed = (load_file(served.folder / name / WEIGHTS) for name in ("adapter", "typed"))
    assert clicked.keys() == typed.keys() and all(clicked[key].equal(typed[key]) for key in clicked)

    page.part("Look")
    page.wait(lambda: "adapter" in page.value("#look-adapter input"))
    page.type("look-tokens", "8")
    page.type("prompt", "what did the fast cat sat on")
    page.press("ask")
    page.wait(lambda: page.value("#said-base textarea") and page.value("#said-adapter textarea"))
    page.press("inspect")
    page.wait(lambda: page.there("#inspected iframe"))

    page.part("Ship")
    page.wait(lambda: "adapter" in page.value("#ship-adapter input"))
    page.expect("#serve-command", "vllm serve merged")
    page.press("export")
    page.expect("#exports", "merged", "done", "mean KL")
    assert (served.folder / "merged" / "model.safetensors").is_file()

    console = browser.driver.get_log("browser")
    assert [entry["message"] for entry in console if entry["level"] == "SEVERE"] == []
    assert browser.run("return Object.keys(localStorage).filter(k => /history/.test(k))") == []
    here = f"127.0.0.1:{served.port}"
    strange = [url for url in browser.requests() if url.startswith("http") and here not in url]
    assert strange == []


def test_a_run_outlives_the_server_and_two_pages_show_the_same(
    served: Served, browser: Browser, model: str, rows: Path
) -> None:
    page = Page(browser, served.address)
    fill_in(page, model, rows, steps=100_000, out="long")
    page.press("start")
    folder = served.folder / "long"
    page.wait(lambda: state_of(served.folder, "long") == runs.RUNNING and runs.read(folder).step)
    page.press("start")  # a busy directory
    page.problem("long")
    browser.requests()
    time.sleep(3 * SECONDS)
    page.problem("long")  # it stays
    asked = [url for url in browser.requests() if url.endswith("/queue/join")]
    assert len(asked) <= 4, "more than the timer"
    served.kill()
    before = runs.read(folder).step
    page.wait(lambda: runs.read(folder).step > before)

    served.start()
    page = Page(browser, served.address)
    page.part("Train")
    page.expect("#runs", "long", "running")
    browser.driver.switch_to.new_window("tab")
    other = Page(browser, served.address)
    other.part("Train")
    other.expect("#runs", "long", "running")

    other.press("pause")
    other.expect("#runs", "paused")
    first, second = browser.driver.window_handles
    shown = other.text("#runs")
    browser.driver.switch_to.window(first)
    page.wait(lambda: page.text("#runs") == shown)
    at = runs.read(folder).step

    page.press("resume")
    page.wait(lambda: runs.read(folder).step > at)
    page.expect("#runs", "running")
    page.press("stop")
    page.expect("#runs", "done", "stopped after step")
    assert (folder / "adapter_config.json").is_file()
    browser.driver.switch_to.window(second)
    browser.driver.close()
    browser.driver.switch_to.window(first)


@pytest.mark.skipif(not soak.is_slow(), reason="minutes of trials: `make ui`")
def test_a_comparison(served: Served, browser: Browser, model: str, rows: Path) -> None:
    rows.write_text("".join(questions("sat", "ran", "flew", "is")))
    page = Page(browser, served.address)
    page.type("field-model", model)
    page.upload(rows)
    page.expect("#facts", "80 rows, ")
    page.type("field-max_length", "64")
    page.part("Compare")
    page.choose("compare-methods", "lora")
    small = {"budget": "steps=4", "seeds": "1", "lr-sweep": "1e-3"}
    for name, value in small.items():
        page.type(f"compare-{name}", value)
    page.press("cost")
    page.wait(lambda: "about 3 trials, 4 steps each" in page.value("#costs textarea"))
    assert not (served.folder / "comparison").exists()
    page.type("compare-budget", "steps=5")
    page.wait(lambda: not page.value("#costs textarea"), "what other options cost")
    page.type("compare-budget", "steps=4")
    page.expect("#compare-command", "--max-length 64", "--lr-sweep 1e-3")
    page.press("compare")
    page.expect("#trials", "lora-lr0.001-seed0", "done")
    page.wait(lambda: state_of(served.folder, "comparison") == runs.DONE)
    page.press("report")
    page.wait(lambda: page.there("#compare-report iframe"))
    assert "report.html" in page.value("#compare-log textarea")


def test_what_is_wrong_is_a_sentence(
    served: Served, browser: Browser, model_dir: str, rows: Path, tmp_path: Path
) -> None:
    page = Page(browser, served.address)
    page.type("field-model", model_dir)
    page.upload(rows)
    page.expect("#facts", "40 rows, ")
    page.type("field-data", str(tmp_path / "nowhere.jsonl"))
    page.press("preview")
    page.problem("nowhere.jsonl")
    assert "40 rows" not in page.text("#facts"), "it was of other data"
    page.wait(lambda: not page.there("#lengths .vega-embed"), "the chart of other data")
    page.wait(lambda: "what did the" not in page.text("#example-0"), "an example of other data")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a"}\n{"prompt"\n')
    page.type("field-data", str(wrong))
    page.press("preview")
    page.problem("wrong.jsonl': line 2 cannot be read as JSON")

    page.type("field-data", str(rows))
    page.type("field-max_length", "1")  # is answered when one leaves the field
    page.problem("--max-length 1")
    page.type("field-max_length", "64")
    page.expect("#facts", "40 rows, ")

    page.part("Plan")
    page.expect("#plan-table", "lora")
    page.choose("plan-methods", "nonsense")
    page.problem("nonsense")
    page.wait(lambda: "lorakin" not in page.text("#plan-command"), "a command of other options")

    page.part("Train")
    page.press("pause")
    page.problem("no run is chosen")
    page.type("field-out", "../elsewhere")
    page.problem("'../elsewhere' is not the name of a directory")
    page.type("field-out", "adapter")
    page.type("field-rank", "many")
    page.problem("--rank is 'many'")
    page.wait(lambda: "lorakin" not in page.text("#train-command"))
    page.type("field-rank", "4")
    page.type("field-method", "nonsense")
    page.problem("nonsense")
    page.part("Compare")
    page.type("compare-budget", "steps=1")
    page.problem("--budget steps=1 fits no trial")
    assert "Traceback" not in page.text("body")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB, with little room left."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_a_sentence(full: Path, browser: Browser, rows: Path) -> None:
    served = Served(full.parent, "--runs", "full")
    try:
        (full / "filling").write_bytes(b"x" * 64 * 1024)
        page = Page(browser, served.address)
        page.upload(rows)
        page.problem("the disk is full")
    finally:
        served.stop()


def test_each_part_fits_a_phone_and_names_its_fields(served: Served, browser: Browser) -> None:
    page = Page(browser, served.address, width=360)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    nameless = """return [...document.querySelectorAll('input:not([type=hidden]), textarea, select')]
        .filter(one => one.offsetParent && !one.labels?.length && !one.getAttribute('aria-label')
            && !one.getAttribute('aria-labelledby'))
        .map(one => one.outerHTML.slice(0, 200))"""
    for name in PARTS:
        page.part(name)
        for dark in (False, True):
            browser.dark(dark)
            time.sleep(0.3)
            assert browser.run(wide) <= 0, name
            assert browser.run(nameless) == [], name
    browser.dark(False)
