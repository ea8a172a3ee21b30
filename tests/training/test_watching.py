"""Evaluation while training: the best step, the early end, and both of them after a kill."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lorakin as lk
from lorakin.training import checkpoint_manifest, run_directory, watching
from lorakin.training import train as training
from lorakin.training.metrics_file import Metrics
from lorakin.training.recipe import Recipe
from training.saved import same

Write = Callable[..., str]
Make = Callable[..., Recipe]


def run(recipe: Recipe, resume: bool = False) -> tuple[training.Result, str]:
    text = io.StringIO()
    console = Console(file=text, width=200)
    return training.train(training.prepare(recipe, console, resume)), text.getvalue()


def resumed(out: str) -> training.Result:
    return run(run_directory.resumed_recipe(None, {"out": out}), resume=True)[0]


def held_out(out: str) -> dict[int, float]:
    rows = Metrics(Path(out) / "metrics.jsonl", writes=False).rows()
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def killed(out: str, copy: Path, *lost: int) -> str:
    """A copy of a run's directory, as if the run had been killed before these checkpoints."""
    shutil.copytree(out, copy)
    (copy / "adapter_model.safetensors").unlink()
    for step in lost:
        shutil.rmtree(copy / "checkpoints" / f"checkpoint-{step}")
    return str(copy)


@pytest.mark.usefixtures("pictures")
def test_evaluations_change_nothing_that_is_trained(make: Make) -> None:
    plain, watched = make("plain"), make("watched", eval_every=5)
    run(plain)
    result, shown = run(watched)
    assert same(plain.out, watched.out)
    figures = held_out(watched.out)
    assert list(figures) == [0, 5, 10, 12]
    assert figures[12] == result.after.loss == list(held_out(plain.out).values())[-1]
    assert f"step 5/12  held out loss {figures[5]:.3f}" in shown and "  grad " in shown
    assert len([line for line in shown.splitlines() if "held out loss" in line]) == 3


def test_the_best_step_is_kept_and_found_again_after_a_kill(make: Make, tmp_path: Path) -> None:
    recipe = make("out", keep="best", eval_every=6, steps=30)
    result, shown = run(recipe)
    figures = {step: loss for step, loss in held_out(recipe.out).items() if step}
    best = min(figures, key=lambda step: figures[step])
    assert list(figures) == [6, 12, 18, 24, 30] and best < 24, "else the test shows nothing"
    assert (result.ending.best_step, result.after.loss) == (best, figures[best])
    assert f"kept step {best}" in shown
    assert f"kept step {best}" in (Path(recipe.out) / "README.md").read_text()
    assert same(recipe.out, Path(recipe.out) / "checkpoints" / f"checkpoint-{best}")
    left = {path.name for path in (Path(recipe.out) / "checkpoints").iterdir()}
    assert left == {f"checkpoint-{step}" for step in (best, 24, 30)}, "the best beside the last two"
    for name, lost in (("early", [30]), ("at the end", [])):
        out = killed(recipe.out, tmp_path / name, *lost)
        again = resumed(out)
        assert same(out, recipe.out) and held_out(out) == held_out(recipe.out)
        assert again.ending == result.ending and again.after.loss == result.after.loss
    gone = killed(recipe.out, tmp_path / "gone", best)
    with pytest.raises(lk.AdapterError, match=f"checkpoint-{best}"):
        resumed(gone)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_stops_early_and_so_does_a_resumed_one(make: Make, tmp_path: Path, keep: str) -> None:
    recipe = make("out", keep=keep, eval_every=2, early_stopping=2, steps=40)
    result, shown = run(recipe)
    figures = {step: loss for step, loss in held_out(recipe.out).items() if step}
    *_, best, _one, _two = figures
    assert result.steps == max(figures) < 40 and min(figures, key=lambda s: figures[s]) == best
    assert f"stopped after step {result.steps} of 40" in shown
    assert json.loads(json.dumps(result.as_dict()))["steps"] == result.steps
    assert result.after.loss == figures[best if keep == "best" else result.steps]
    checkpoints = sorted((Path(recipe.out) / "checkpoints").glob("checkpoint-*"))
    numbers = [checkpoint_manifest.number_of(path) or 0 for path in checkpoints]
    out = killed(recipe.out, tmp_path / "half", *([max(numbers)] if len(numbers) > 1 else []))
    assert resumed(out).ending == result.ending
    assert same(out, recipe.out) and held_out(out) == held_out(recipe.out)
    if keep == "best":  # the last checkpoint remembers that it was the end
        out = killed(recipe.out, tmp_path / "whole")
        assert resumed(out).ending == result.ending and same(out, recipe.out)


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": "best", "save_every": 0},
        {"keep": "best", "save_every": 4, "eval_every": 2},
        {"early_stopping": 6, "eval_every": 2},
        {"schedule": "reduce_lr_on_plateau", "eval_every": 6},
        {"keep": "worst"},
        {"eval_every": 0},
        {"report_to": ["printer"]},
    ],
)
def test_what_could_not_work_is_refused_before_anything_is_written(
    make: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(lk.SettingError):
        run(make("out", **settings))
    assert not (tmp_path / "out").exists()


def test_tensorboard_is_told_what_the_metrics_say(make: Make) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = make("out", eval_every=2, steps=4, report_to="tensorboard")
    run(recipe)
    (file,) = Path(recipe.out).rglob("events.out.tfevents.*")
    read = events.EventAccumulator(str(file)).Reload()
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    rows = Metrics(Path(recipe.out) / "metrics.jsonl", writes=False).rows()
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows if "loss" in row})
    held = {event.step: event.value for event in read.Scalars("eval/loss")}
    assert held == pytest.approx({n: v for n, v in held_out(recipe.out).items() if n})
    assert {"train/grad_norm", "train/learning_rate"} <= set(read.Tags()["scalars"])


def test_a_missing_reporter_is_named_before_training(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.is_wandb_available", lambda: False)
    with pytest.raises(lk.SettingError, match="pip install wandb"):
        run(make("out", report_to=["tensorboard", "wandb"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("pictures")
def test_of_equal_figures_the_lower_loss_is_better(
    make: Make, bert_dir: str, write_rows: Write
) -> None:
    rows = [{"text": f"the cat sat {n}", "label": "ab"[n % 2]} for n in range(8)]
    prepared = training.prepare(
        make(
            "out", model=bert_dir, data=write_rows(rows), eval_data=write_rows(rows, "held.jsonl")
        ),
        Console(quiet=True),
    )

    def score(accuracy: float, loss: float) -> float:
        figures = {"eval_accuracy": accuracy, "eval_loss": loss}
        return watching.score_of(prepared, figures)[watching.SCORE]

    assert score(1.0, 0.2) > score(1.0, 0.4) > score(1.0, 40.0) > score(0.9999, 0.0)
    assert score(1.0, math.nan) == 1.0


@pytest.mark.usefixtures("pictures")
def test_a_classifier_is_judged_by_its_metric(make: Make, bert_dir: str, write_rows: Write) -> None:
    words = ("cat", "dog", "bird", "tree")
    rows = [
        {"text": f"the {word} {verb}", "label": "yes" if word in ("cat", "bird") else "no"}
        for word in words
        for verb in ("sat", "ran", "flew")
    ]
    data, held = write_rows(rows * 2, "labelled.jsonl"), write_rows(rows, "held-labelled.jsonl")
    common = {"model": bert_dir, "data": data, "eval_data": held, "eval_every": 2}
    recipe = make("out", **common, keep="best", metric="matthews")
    result, shown = run(recipe)
    metrics = Metrics(Path(recipe.out) / "metrics.jsonl", writes=False).rows()
    figures = {
        row["step"]: (row["eval_matthews"], -row["eval_loss"])
        for row in metrics[1:]
        if "eval_loss" in row
    }
    assert len({metric for metric, _ in figures.values()}) < len(figures), "else none are equal"
    assert result.ending.best_step == max(figures, key=lambda step: figures[step])
    assert result.after.metrics["matthews"].value == max(figures.values())[0]
    assert "score" not in shown
    assert "the best by matthews" in shown and "accuracy" in shown
    with pytest.raises(lk.SettingError, match="f2"):
        run(make("other", **common, metric="f2"))
