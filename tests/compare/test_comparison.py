"""`lorakin compare` for real: every trial a process, on a tiny model; killed and gone on with; and what it refuses."""

from __future__ import annotations

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
from comparison_page.browser import Browser, browser
from rich.console import Console

from conftest import WORDS
from lorakin.cli.app import run as cli
from lorakin.compare import comparison as comparing
from lorakin.compare import schedule
from lorakin.compare.arms import BASE, FULL
from lorakin.compare.results import DIVERGED, DONE, FAILED, SEED, SWEEP, ResultRow, Results
from lorakin.errors import OutputError, SettingError
from lorakin.report import comparison_page

__all__ = ["browser"]


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
        "--methods": "vera lora-fa,lora+ adalora", "--budget": "steps=6", "--seeds": "2", "--lr-sweep": "1e-2,1e30",
        "--batch-size": "4", "--dtype": "float32", "--rank": "2",
    } | {f"--{name.replace('_', '-')}": value for name, value in more.items()}  # fmt: skip
    return [
        "compare",
        "--model",
        model,
        "--data",
        str(data),
        "--out",
        str(out),
        *(part for flag in flags.items() for part in flag),
    ]


def rows_of(out: Path) -> list[ResultRow]:
    return Results(out / comparing.RESULTS).rows


@pytest.fixture(scope="module")
def finished(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A comparison that was killed twice while it ran, and then went to its end."""
    folder = tmp_path_factory.mktemp("compare")
    data, out = write(folder / "rows.jsonl"), folder / "out"
    asked = arguments(model_dir, data, out, devices="cpu,cpu")
    command = [sys.executable, "-c", "from lorakin.cli import main; main()", *asked]
    for seen in (1, 4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until = time.monotonic() + 120
        while (
            not (out / comparing.RESULTS).exists()
            or len((out / comparing.RESULTS).read_bytes().splitlines()) < seen
        ):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.3)  # in the midst of the next trial
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not [child for child in alive if "forkserver" in " ".join(child.cmdline())], (
            "a killed comparison left trials running"
        )
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return out, json.loads(done.stdout), asked


def test_killed_and_gone_on_with_it_ran_everything_once(finished: Any) -> None:
    out, _, _ = finished
    trials = Counter((row.trial.arm, row.trial.lr, row.trial.seed) for row in rows_of(out))
    wanted = {("base", None, 0): 1}
    for name in ("lora", "vera", "adalora", "full"):
        wanted |= {(name, 1e-2, 0): 1, (name, 1e30, 0): 1, (name, 1e-2, 1): 1}
    assert trials == wanted


def test_what_diverged_is_kept_and_what_cannot_run_is_marked(finished: Any) -> None:
    out, result, _ = finished
    diverged = [row for row in rows_of(out) if row.status == DIVERGED]
    assert {row.trial.arm for row in diverged} >= {"lora", "vera", "full"}
    assert all(
        (row.trial.lr == 1e30 and "the loss became" in row.reason) or "held-out loss" in row.reason
        for row in diverged
    )
    assert not [row for row in rows_of(out) if row.status == FAILED]
    refused = {arm["arm"]: arm["refused"] for arm in result["arms"] if arm["refused"]}
    assert refused.keys() == {"lora-fa,lora+"}
    assert "do not combine" in refused["lora-fa,lora+"]
    assert any("Left out: lora-fa,lora+, because" in sentence for sentence in result["verdict"])
    assert any("Trials that diverged" in sentence for sentence in result["verdict"])


def test_the_figures_are_those_of_the_runs(finished: Any) -> None:
    """The report loss again, by `lorakin evaluate` on the adapter that was kept."""
    out, result, _ = finished
    row = next(row for row in rows_of(out) if row.trial.arm == "vera" and row.trial.stage == SEED)
    kept = out / comparing.TRIALS / row.trial.name
    recipe = yaml.safe_load((kept / "recipe.yaml").read_text())
    assert (recipe["seed"], recipe["lr"], recipe["steps"]) == (1, 1e-2, 6)
    from lorakin.training.evaluate import evaluate_rows

    again = evaluate_rows(
        recipe["model"], str(kept), str(out / "data" / "report.jsonl"), dtype="float32"
    )
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


def test_adapters_that_lost_and_whole_models_are_cleared_away(finished: Any) -> None:
    out, _, _ = finished
    kept = {path.name for path in (out / comparing.TRIALS).iterdir() if path.is_dir()}
    best = {row.trial.name for row in rows_of(out) if row.status == DONE and row.trial.lr == 1e-2}
    assert kept == {name for name in best if not name.startswith((FULL, BASE))}
    assert len(list((out / comparing.TRIALS).glob("*.log"))) == len(rows_of(out))


def test_all_arms_with_one_seed_saw_the_same_rows_in_the_same_order(finished: Any) -> None:
    """Before the first step has any effect, the loss is the base's on the first batch."""
    out, _, _ = finished
    first = {
        (row.trial.arm, row.trial.seed): row.losses[0]
        for row in rows_of(out)
        if row.status == DONE and row.losses
    }
    for seed in (0, 1):
        assert len({loss for (_, of), loss in first.items() if of == seed}) == 1
    assert len(set(first.values())) == 2


def test_run_again_it_only_says_its_verdict(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result, command = finished
    before = (out / comparing.RESULTS).read_bytes()
    assert cli([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert (out / comparing.RESULTS).read_bytes() == before


def test_another_comparison_in_its_place_is_refused(finished: Any) -> None:
    _, _, command = finished
    for flag, value, match in (
        ("--seeds", "3", "seeds is 2, here 3"),
        ("--rank", "3", "rank is 2, here 3"),
    ):
        changed = list(command)
        changed[changed.index(flag) + 1] = value
        with pytest.raises(SettingError, match=match):
            _comparison(changed)


def _comparison(command: list[str]) -> None:
    options = dict(zip(command[1::2], command[2::2], strict=True))
    comparison = comparing.Comparison(
        model=options["--model"], data=options["--data"], out=options["--out"], methods=options["--methods"].split(),
        budget=options["--budget"], seeds=int(options["--seeds"]), sweep=options["--lr-sweep"], rank=int(options["--rank"]),
        recipe={"batch_size": 4, "dtype": "float32"},
    )  # fmt: skip
    with comparing.locked(comparison):
        raise AssertionError("it was let in")


def test_the_report_in_a_browser(finished: Any, browser: Browser) -> None:
    out, _, _ = finished
    browser.open(out / comparing.REPORT).unfolded()
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
    cells = "return [...document.querySelectorAll('table')[0].tBodies[0].rows].map(row => row.cells[arguments[0]].dataset.value)"
    browser.find("section#s2 .table:first-of-type thead th:nth-child(6) button").click()
    trained = [float(value) for value in browser.run(cells, 5) if value is not None]
    assert len(trained) == 4
    assert trained == sorted(trained)
    browser.open(out / comparing.REPORT, width=360)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("count", [0, 1, 3, 6, 10])
def test_an_unfinished_comparison_has_a_report_too(finished: Any, count: int) -> None:
    """As it would be had it been interrupted there."""
    out, _, asked = finished
    options = dict(zip(asked[1::2], asked[2::2], strict=True))
    comparison = comparing.Comparison(
        model=options["--model"], data=options["--data"], out=str(out), methods=options["--methods"].split(), rank=2, seeds=2,
        budget=options["--budget"], sweep=options["--lr-sweep"], recipe={"batch_size": 4, "dtype": "float32"},
    )  # fmt: skip
    study = comparing.prepare(comparison, Console(quiet=True))
    study.results.rows = study.results.rows[:count]
    html = comparison_page.html(study, comparison_page.findings(study))
    assert "<strong>Unfinished</strong>: about" in html
    assert ("There is nothing to compare with yet" in html) == (
        not schedule.chosen("lora", study.results.rows)
    )


def test_two_at_once_in_one_directory_are_refused(model_dir: str, tmp_path: Path) -> None:
    comparison = comparing.Comparison(
        model=model_dir, data="rows.jsonl", out=str(tmp_path / "out"), methods=["vera"]
    )
    with (
        comparing.locked(comparison),
        pytest.raises(OutputError, match="in use by another lorakin compare"),
        comparing.locked(comparison),
    ):
        pass


def test_a_classifier_is_compared_by_accuracy_with_its_head_alone(
    bert_dir: str, tmp_path: Path, capsys: Any
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [
        {"text": f"{WORDS[n % 9]} {WORDS[n % 25]}", "label": ("low", "high")[n % 9 < 4]}
        for n in range(200)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = arguments(
        bert_dir, data, out, methods="lora-drop", lr_sweep="1e-2", seeds="1", budget="steps=8"
    )
    assert cli([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measure"] == "accuracy"
    assert [arm["arm"] for arm in found["arms"]] == ["lora", "lora-drop", "base", "head", "full"]
    trained = {arm["arm"]: arm["trainable_parameters"] for arm in found["arms"]}
    assert trained["head"] == 32 * 2 + 2
    assert trained["full"] > trained["lora"] > trained["lora-drop"] > trained["head"]
    (row,) = [row for row in rows_of(out) if row.trial.arm == "lora-drop"]
    assert row.importance.keys() == row.layers.keys() - {"classifier"}
    assert set(row.own) < row.importance.keys()
    page = (out / comparing.REPORT).read_text()
    assert "lora-drop: Importance by layer and module" in page
    assert "The probe of lora-drop comes on top" in page


def test_a_budget_of_minutes_gives_each_method_its_own_steps(
    model_dir: str, tmp_path: Path, capsys: Any
) -> None:
    data, out = write(tmp_path / "rows.jsonl"), tmp_path / "out"
    more = {"budget": "minutes=0.01", "methods": "vera", "lr_sweep": "1e-2", "seeds": "1"}
    assert cli([*arguments(model_dir, data, out, **more), "--json"]) == 0
    json.loads(capsys.readouterr().out)
    rows = rows_of(out)
    timing = {row.trial.arm: row for row in rows if row.trial.stage == "timing"}
    assert timing.keys() == {"lora", "vera", "full"}
    for row in rows:
        if row.trial.stage == SWEEP and row.status == DONE:
            assert row.steps == int(0.6 / timing[row.trial.arm].step_seconds)


def test_a_budget_that_fits_no_trial(model_dir: str, tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "rows.jsonl")
    assert cli(arguments(model_dir, data, tmp_path / "a", budget="steps=2")) == 2
    assert "--budget steps=2 fits no trial: a run needs at least 4 steps" in capsys.readouterr().err
    assert cli(arguments(model_dir, data, tmp_path / "b", budget="steps=9,params=50")) == 2
    assert (
        "at rank 1 it trains 928 numbers, more than the 50 of the budget"
        in capsys.readouterr().err.replace("\n", " ")
    )
    assert not (tmp_path / "a").exists()
    assert (
        cli(
            [
                *arguments(
                    model_dir,
                    data,
                    tmp_path / "c",
                    budget="minutes=1e-6",
                    methods="vera",
                    seeds="1",
                ),
                "--json",
            ]
        )
        == 2
    )
    assert "the budget fits no trial: a step takes" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": "lots"}, "--budget takes steps=…, minutes=…"),
        ({"budget": "params=5"}, "needs steps=… or minutes=…"),
        ({"budget": "steps=x"}, "expected a positive number such as 200 or 500k, not 'x'"),
        ({"methods": "dorra"}, "did you mean 'dora'"),
        ({"lr_sweep": "fast"}, "--lr-sweep takes auto, or such as 1e-4,3e-4, not 'fast'"),
        ({"seeds": "0"}, "--seeds must be at least 1"),
        ({"devices": "cuda:7"}, "there is no 'cuda:7' here"),
        ({"set": "ratoi=3"}, "has no setting 'ratoi'"),
        ({"rank": "1000"}, "rank 1000 is above what"),
        ({"rank_above": "lower"}, "lower"),
        ({"targets": "nothing"}, "nothing"),
        ({"batch_size": "99"}, "64 rows are too few to compare on"),
        (
            {"max_length": "4"},
            "64 rows (64 rows without an answer within --max-length) are too few to compare on",
        ),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    model_dir: str, tmp_path: Path, capsys: Any, more: dict[str, str], message: str
) -> None:
    assert cli(arguments(model_dir, write(tmp_path / "rows.jsonl"), tmp_path / "out", **more)) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out" / comparing.RESULTS).exists()


def test_a_directory_of_something_else_is_left_alone(
    model_dir: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert cli(arguments(model_dir, write(tmp_path / "rows.jsonl"), tmp_path / "out")) == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err.replace("\n", " ")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
