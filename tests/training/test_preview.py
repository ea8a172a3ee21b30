"""What `lorakin data` shows is what training reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import lorakin as lk
from lorakin.cli.app import app
from lorakin.training.prepare import prepare
from lorakin.training.preview import histogram, preview, recipe_for
from lorakin.training.recipe import Recipe

Write = Callable[..., str]


def rows(count: int = 30) -> list[dict[str, Any]]:
    words = ["the", "cat", "sat", "on", "a", "mat"]
    return [
        {"prompt": " ".join(words[: 1 + n % 6]), "completion": words[n % 5], "id": n}
        for n in range(count)
    ]


def test_it_is_what_a_run_reads(model_dir: str, write_rows: Write, tmp_path: Any) -> None:
    data = write_rows(rows())
    found = preview(recipe_for(model_dir, [data], max_length=9))
    recipe = Recipe(
        model=model_dir, data=data, out=str(tmp_path / "o"), steps=1, max_length=9, dtype="float32"
    )
    run = prepare(recipe, Console(file=io.StringIO()))
    examples = [*run.train.examples, *run.held_out.examples]
    assert sorted(found.lengths) == sorted(len(example["input_ids"]) for example in examples)
    assert found.learned == sum(label != -100 for e in examples for label in e["labels"])
    assert found.dropped == run.train.dropped + run.held_out.dropped
    assert found.cut == run.train.cut + run.held_out.cut
    assert found.held_out[0] == len(run.held_out.examples)
    # 30 rows: 6 prompts × 5 answers, each once
    assert found.doubled == len(examples) - len({str(example) for example in examples})
    assert found.task == "language"
    assert found.unused is not None and "id (in 30 rows)" in found.unused


def test_held_out_rows_that_are_trained_on(model_dir: str, write_rows: Write) -> None:
    data, other = write_rows(rows(12)), write_rows(rows(3), "held.jsonl")
    assert preview(recipe_for(model_dir, [data], eval_data=other)).held_out == (3, 3)


def test_doubled_rows_are_counted(model_dir: str, write_rows: Write) -> None:
    twice = [{"prompt": "the cat", "completion": "sat"}] * 5 + rows(4)
    assert preview(recipe_for(model_dir, [write_rows(twice)])).doubled == 4


def test_labels(bert_dir: str, write_rows: Write) -> None:
    data = write_rows([{"text": "the cat", "label": n % 2} for n in range(10)])
    found = preview(recipe_for(bert_dir, [data]))
    assert (found.task, found.learned) == ("classification", 10)
    assert found.examples[0].plain.endswith("⟦0⟧") or found.examples[0].plain.endswith("⟦1⟧")


def test_bins_hold_every_row_once() -> None:
    lengths = [7, 7, 8, 19, 40, 40]
    bins = histogram(lengths, 40)
    assert sum(count for _, count in bins) == len(lengths)
    assert len(bins) <= 9
    assert "the most that is read" in bins[-1][0]
    assert histogram([3, 3], 10) == [("3", 2)]


def test_the_command(model_dir: str, write_rows: Write) -> None:
    data = write_rows(rows())
    shown = CliRunner().invoke(app, ["data", data, "--model", model_dir, "--json"])
    assert shown.exit_code == 0
    figures = json.loads(shown.stdout)
    assert figures["rows"] == 30 and len(figures["examples"]) == 3
    assert CliRunner().invoke(app, ["data", data, "--model", model_dir]).exit_code == 0


def test_rows_that_training_refuses_are_refused(model_dir: str, write_rows: Write) -> None:
    data = write_rows([*rows(3), {"prompt": None, "completion": "x"}])
    with pytest.raises(lk.DataError):
        preview(recipe_for(model_dir, [data]))
