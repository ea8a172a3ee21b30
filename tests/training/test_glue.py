"""GLUE's names: the task and the metric that they stand for, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lorakin as lk
from lorakin.terminal import Terminal
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.glue import GLUE, task_and_metric
from lorakin.training.prepare import prepare
from lorakin.training.recipe import Recipe
from lorakin.training.tasks import kind_of_task
from lorakin.training.train import train
from lorakin.training.watching import deciding_metric

Write = Callable[..., str]
ROWS = [{"sentence": f"the cat sat {n}", "label": n % 2, "idx": n} for n in range(12)]


@pytest.mark.parametrize("name", GLUE)
def test_each_has_a_metric_of_its_task(name: str) -> None:
    task, metric = GLUE[name]
    assert metric in kind_of_task(task).metrics


@pytest.mark.parametrize(
    ("task", "metric", "data", "expected"),
    [
        ("cola", None, ["rows.jsonl"], ("classification", "matthews")),
        ("cola", "f1", ["rows.jsonl"], ("classification", "f1")),
        (None, None, ["nyu-mll/glue:mrpc"], ("classification", "f1")),
        (None, None, ["glue:stsb:train[:50]"], ("regression", "pearson")),
        (None, None, ["nyu-mll/glue:qqp:train", "nyu-mll/glue:qqp:test"], ("classification", "f1")),
        (None, None, ["nyu-mll/glue:qqp:train", "nyu-mll/glue:cola:train"], (None, None)),
        (None, None, ["nyu-mll/glue:rte:train", "rows.jsonl"], (None, None)),
        ("classification", None, ["nyu-mll/glue:cola:train"], ("classification", None)),
        (None, "f1", ["cola.jsonl"], (None, "f1")),
    ],
)
def test_what_names_mean(
    task: str | None, metric: str | None, data: list[str], expected: tuple[str | None, str | None]
) -> None:
    assert task_and_metric(task, metric, data) == expected


def test_its_metric_decides_and_stands_first(
    bert_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    data, out = write_rows(ROWS), str(tmp_path / "out")
    recipe = Recipe(model=bert_dir, data=data, out=out, steps=2, task="cola", eval_every=1)
    assert (recipe.task, recipe.metric) == ("classification", "matthews")
    run = prepare(recipe, Terminal(quiet=True))
    assert deciding_metric(run) == ("matthews", True)
    train(run)
    for task in ("cola", None):  # or as the recipe beside the adapter has it
        found = evaluate_rows(bert_dir, out, data, task=task)
        assert next(iter(found.metrics)) == "matthews"
        assert found.metrics.keys() == {"accuracy", "f1", "matthews"}


def test_an_unknown_name_is_refused(write_rows: Write) -> None:
    with pytest.raises(lk.SettingError):
        Recipe(model="minilm", data=write_rows(ROWS), out="out", task="colla")
