"""`lorakin compare` for real, on a tiny model: killed, continued, refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from conftest import WORDS
from lorakin.cli.app import run as cli
from lorakin.compare import directory, next_trials
from lorakin.compare.arms import BASE, FULL
from lorakin.compare.comparison import Comparison
from lorakin.compare.preparation import prepare
from lorakin.compare.results import DIVERGED, DONE, FAILED, SEED, SWEEP, ResultRow, Results
from lorakin.errors import OutputError, SettingError
from lorakin.report import comparison_page
from lorakin.training.evaluate import evaluate_rows
from report.browser import Browser, browser

__all__ = ["browser"]
SHARED: dict[str, Any] = {"rank": 2, "recipe": {"batch_size": 4, "dtype": "float32"}}


def write(path: Path, count: int = 64) -> Path:
    """Rows that a tiny model can learn: the answer repeats the question's words."""
    rows = []
    for n in range(count):
        words = [WORDS[n % 9], WORDS[9 + n % 7], WORDS[16 + n % 5]]
        rows.append({"prompt": " ".join(words), "completion": " ".join(reversed(words))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model: str, data: Path, out: Path, **more: str) -> list[str]:
    flags = {
        "--methods": "vera lora-fa,lora+ adalora",
        "--budget": "steps=6",
        "--seeds": "2",
        "--lr-sweep": "1e-2,1e30",
        "--batch-size": "4",
        "--dtype": "float32",
        "--rank": "2",
        "--devices": "cpu,cpu",
        "--model": model,
        "--data": str(data),
        "--out": str(out),
    } | {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    return ["compare", *(part for flag in flags.items() for part in flag)]


def asked_by(command: list[str], **changes: Any) -> Comparison:
    """The comparison that a command line of `arguments` asks for."""
    options = dict(zip(command[1::2], command[2::2], strict=True))
    return Comparison(
        model=options["--model"],
        data=options["--data"],
        out=options["--out"],
        methods=options["--methods"].split(),
        budget=options["--budget"],
        sweep=options["--lr-sweep"],
        **{"seeds": 2, **SHARED, **changes},
    )


def result_of(command: list[str]) -> dict[str, Any]:
    """Runs the command here, and returns what it prints as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli([*command, "--json"]) == 0
    return dict(json.loads(printed.getvalue()))


def rows_of(out: Path) -> list[ResultRow]:
    results = Results(out / directory.RESULTS)
    results.set_failed_aside()
    return results.rows


def killed_in_the_midst(command: list[str], results: Path, seen: int) -> None:
    """Starts the command, kills it once it has `seen` results, and waits for its trials to end."""
    code = [sys.executable, "-c", "from lorakin.cli import main; main()"]
    process = subprocess.Popen(
        [*code, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not results.exists() or len(results.read_bytes().splitlines()) < seen:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)  # in the midst of the next trial
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=15)
    left = [child for child in alive if "forkserver" in " ".join(child.cmdline())]
    assert not left, "a killed comparison left trials running"


@pytest.fixture(scope="module")
def finished(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A comparison of which a trial died, that was killed while it ran, and then continued."""
    folder = tmp_path_factory.mktemp("compare")
    data, out = write(folder / "rows.jsonl"), folder / "out"
    command = arguments(model_dir, data, out)
    killed_in_the_midst(command, out / directory.RESULTS, seen=3)
    first, *others = rows_of(out)
    assert len(others) < 12
    kept = [ResultRow(first.trial, FAILED, "killed"), *others]
    (out / directory.RESULTS).write_text("".join(row.as_json() + "\n" for row in kept))
    return out, result_of(command), command


def test_killed_and_continued_it_ran_everything_once(finished: Any) -> None:
    out, _, _ = finished
    died = Results(out / directory.RESULTS).rows[0]
    assert died.status == FAILED
    assert died.trial in [row.trial for row in rows_of(out)]
    trials = Counter((row.trial.arm, row.trial.lr, row.trial.seed) for row in rows_of(out))
    wanted = {("base", None, 0): 1}
    for name in ("lora", "vera", "adalora", "full"):
        wanted |= {(name, 1e-2, 0): 1, (name, 1e30, 0): 1, (name, 1e-2, 1): 1}
    assert trials == wanted


def test_what_diverged_is_kept_and_what_cannot_run_is_marked(finished: Any) -> None:
    out, result, _ = finished
    rows = rows_of(out)
    diverged = {(row.trial.arm, row.trial.lr) for row in rows if row.status == DIVERGED}
    assert diverged >= {("lora", 1e30), ("vera", 1e30), ("full", 1e30)}
    assert all(row.reason for row in rows if row.status == DIVERGED)
    assert not [row for row in rows if row.status == FAILED]
    refused = {arm["arm"]: arm["refused"] for arm in result["arms"] if arm["refused"]}
    assert refused.keys() == {"lora-fa,lora+"}
    assert any(refused["lora-fa,lora+"] in sentence for sentence in result["verdict"])
    assert any("diverged" in sentence for sentence in result["verdict"])


def test_the_figures_are_those_of_the_runs(finished: Any) -> None:
    """`lorakin evaluate` finds the same report loss for the adapter that was kept."""
    out, result, _ = finished
    row = next(row for row in rows_of(out) if row.trial.arm == "vera" and row.trial.stage == SEED)
    kept = out / directory.TRIALS / row.trial.name
    recipe = yaml.safe_load((kept / "recipe.yaml").read_text())
    assert (recipe["seed"], recipe["lr"], recipe["steps"]) == (1, 1e-2, 6)
    report = str(out / directory.DATA / "report.jsonl")
    again = evaluate_rows(recipe["model"], str(kept), report, dtype="float32")
    assert row.report is not None
    assert again.loss == pytest.approx(row.report["loss"], rel=1e-5)

    vera = next(arm for arm in result["arms"] if arm["arm"] == "vera")
    assert vera["trainable_parameters"] == row.trained == 2 * (7 * 256 + 3 * 32 + 2 * 16 + 2 * 48)
    assert row.frozen == 256 * (48 + 48)
    assert len(row.losses) == 6
    assert row.step_seconds > 0
    assert row.peak_bytes > 0
    assert [step for step, _ in row.moves] == [1, 2, 3, 4, 5, 6]
    assert row.layers.keys() == row.moves[-1][1].keys()


def test_adapters_that_lost_and_whole_models_are_deleted(finished: Any) -> None:
    out, _, _ = finished
    trials = out / directory.TRIALS
    kept = {path.name for path in trials.iterdir() if path.is_dir()}
    best = {row.trial.name for row in rows_of(out) if row.status == DONE and row.trial.lr == 1e-2}
    assert kept == {name for name in best if not name.startswith((FULL, BASE))}
    assert len(list(trials.glob("*.log"))) == len(rows_of(out))


def test_all_arms_with_one_seed_saw_the_same_rows_in_the_same_order(finished: Any) -> None:
    """Before the first step has an effect, the loss is the base's on the first batch."""
    out, _, _ = finished
    first = {
        (row.trial.arm, row.trial.seed): row.losses[0]
        for row in rows_of(out)
        if row.status == DONE and row.losses
    }
    for seed in (0, 1):
        assert len({loss for (_, of), loss in first.items() if of == seed}) == 1
    assert len(set(first.values())) == 2


def test_run_again_it_only_says_its_verdict(finished: Any) -> None:
    out, result, command = finished
    before = (out / directory.RESULTS).read_bytes()
    assert result_of(command) == result
    assert (out / directory.RESULTS).read_bytes() == before


@pytest.mark.parametrize("changes", [{"seeds": 4}, {"rank": 7}])
def test_another_comparison_in_its_place_is_refused(finished: Any, changes: dict[str, int]) -> None:
    ((name, value),) = changes.items()
    comparison = asked_by(finished[2], **changes)
    with pytest.raises(SettingError, match=rf"{name} is 2, not {value}"):
        with directory.locked(comparison):
            raise AssertionError("it was let in")


def test_the_report_in_a_browser(finished: Any, browser: Browser) -> None:
    out, _, _ = finished
    browser.open(out / directory.REPORT).unfolded()
    assert browser.errors() == []
    assert len(browser.requests()) == 1
    marks = browser.marks()
    assert len(marks) > 15
    assert all(marks)
    titles = [h.text for h in browser.driver.find_elements("css selector", "figure.chart h3")]
    for part in (
        "Quality against trained parameters",
        "Training loss",
        "Learning-rate sweeps",
        "Change of magnitude",
        "adalora: Ranks",
    ):
        assert any(title.startswith(part) for title in titles), titles

    browser.find("section#s2 .table:first-of-type thead th:nth-child(6) button").click()
    cells = browser.run(
        """return [...document.querySelectorAll('table')[0].tBodies[0].rows]
        .map(row => row.cells[5].dataset.value)"""
    )
    trained = [float(value) for value in cells if value is not None]
    assert len(trained) == 4
    assert trained == sorted(trained)
    browser.open(out / directory.REPORT, width=360)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_an_unfinished_comparison_has_a_report_too(finished: Any) -> None:
    """The report after any number of trials, as if the comparison had been interrupted there."""
    comparison_run = prepare(asked_by(finished[2]), Console(quiet=True))
    rows = comparison_run.results.rows
    for count in (0, 1, 3, 6, 10):
        comparison_run.results.rows = rows[:count]
        found = comparison_page.findings_of(comparison_run)
        assert "<strong>Unfinished</strong>" in comparison_page.html(comparison_run, found)
        assert (found.standings[0].quality is None) == (
            not next_trials.rows_at_best_rate("lora", rows[:count], "loss")
        )


def test_a_comparison_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison = Comparison(model="m", data="d.jsonl", out=str(out), methods=["vera"])
    with pytest.raises(ZeroDivisionError), directory.locked(comparison):
        raise ZeroDivisionError
    assert not out.exists()
    out.mkdir()
    with directory.locked(comparison):
        (out / directory.SETTINGS).touch()
    assert (out / directory.SETTINGS).exists()


def test_two_at_once_in_one_directory_are_refused(tmp_path: Path) -> None:
    comparison = Comparison(model="m", data="d.jsonl", out=str(tmp_path / "out"), methods=["vera"])
    with directory.locked(comparison):
        with pytest.raises(OutputError, match="in use"), directory.locked(comparison):
            raise AssertionError("it was let in")


def test_a_classifier_is_compared_by_accuracy_with_its_head_alone(
    bert_dir: str, tmp_path: Path
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [
        {"text": f"{WORDS[n % 9]} {WORDS[n % 25]}", "label": ("low", "high")[n % 9 < 4]}
        for n in range(200)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"methods": "lora-drop", "lr_sweep": "1e-2", "seeds": "1", "budget": "steps=8"}
    found = result_of(arguments(bert_dir, data, out, **settings))
    assert found["measure"] == "accuracy"
    names = [arm["arm"] for arm in found["arms"]]
    assert names == ["lora", "lora-drop", "base", "head", "full", "constant"]
    trained = {arm["arm"]: arm["trainable_parameters"] for arm in found["arms"]}
    assert trained["head"] == 32 * 2 + 2
    assert trained["full"] > trained["lora"] > trained["lora-drop"] > trained["head"]
    (row,) = [row for row in rows_of(out) if row.trial.arm == "lora-drop"]
    assert row.importance.keys() == row.layers.keys() - {"classifier"}
    assert set(row.own) < row.importance.keys()
    page = (out / directory.REPORT).read_text()
    assert "lora-drop: Importance by layer and module" in page
    assert "The probe of lora-drop" in page


def test_a_budget_of_minutes_gives_each_method_its_own_steps(
    model_dir: str, tmp_path: Path
) -> None:
    data, out = write(tmp_path / "rows.jsonl"), tmp_path / "out"
    settings = {"budget": "minutes=0.01", "methods": "lora", "lr_sweep": "1e-2", "seeds": "1"}
    result_of(arguments(model_dir, data, out, **settings))
    rows = rows_of(out)
    timing = {row.trial.arm: row for row in rows if row.trial.stage == "timing"}
    assert timing.keys() == {"lora", "full"}
    for row in rows:
        if row.trial.stage == SWEEP and row.status == DONE:
            assert row.steps == int(0.6 / timing[row.trial.arm].step_seconds)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"budget": "lots"}, "'lots'"),
        ({"budget": "params=5"}, "'params=5'"),
        ({"budget": "steps=x"}, "'x'"),
        ({"budget": "steps=2"}, "steps=2"),
        ({"budget": "steps=9,params=50"}, "928"),
        ({"methods": "dorra"}, "'dora'"),
        ({"lr_sweep": "fast"}, "'fast'"),
        ({"seeds": "0"}, "--seeds"),
        ({"devices": "cuda:7"}, "'cuda:7'"),
        ({"set": "ratoi=3"}, "'ratoi'"),
        ({"rank": "1000"}, "rank 1000"),
        ({"rank_above": "lower"}, "'lower'"),
        ({"targets": "nothing"}, "nothing"),
        ({"batch_size": "99"}, "64 rows"),
        ({"max_length": "4"}, "--max-length"),
        ({"max_rows": "20"}, "20 rows"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    model_dir: str, tmp_path: Path, capsys: Any, more: dict[str, str], named: str
) -> None:
    """The error names what the user wrote."""
    assert cli(arguments(model_dir, write(tmp_path / "rows.jsonl"), tmp_path / "out", **more)) == 2
    assert named in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out" / directory.RESULTS).exists()


def test_classes_are_not_packed(bert_dir: str, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "the cat {n}", "label": {n % 2}}}\n' for n in range(99)))
    assert cli([*arguments(bert_dir, data, tmp_path / "out"), "--packing"]) == 2
    assert "--packing" in capsys.readouterr().err
    assert not (tmp_path / "out" / directory.RESULTS).exists()


def test_a_directory_of_something_else_is_left_alone(
    model_dir: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert cli(arguments(model_dir, write(tmp_path / "rows.jsonl"), tmp_path / "out")) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err.replace("\n", "")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
