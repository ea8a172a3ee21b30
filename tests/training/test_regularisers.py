"""NEFTune and label smoothing: the losses are those of transformers' Trainer with the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from rich.console import Console

import lorakin as lk
from lorakin.training import run_trainer
from lorakin.training import train as training
from lorakin.training.batches import AnswerCollator, answer_loss, class_loss, smoothed
from lorakin.training.recipe import Recipe
from lorakin.training.token_labels import IGNORED

Make = Callable[..., Recipe]


@pytest.fixture
def make(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Callable[..., str], tmp_path: Path
) -> Make:
    data = write_rows(chat_rows, "train.jsonl")
    common: dict[str, Any] = {
        "model": model_dir, "data": data, "eval_data": data, "lr": 1e-2, "steps": 4,
        "dtype": "float32", "save_every": 0, "accumulate": 2,
    }  # fmt: skip
    return lambda out, **more: Recipe(**common | {"out": str(tmp_path / out)} | more)


def our_losses(recipe: Recipe) -> list[float]:
    training.train(training.prepare(recipe, Console(quiet=True)))
    lines = (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def losses_of_transformers(recipe: Recipe, collator: Any = None, **arguments: Any) -> list[float]:
    """The losses of transformers' own Trainer, which is given every position's logits."""
    run = training.prepare(recipe, Console(quiet=True))
    plain = run_trainer.arguments(run) | {"neftune_noise_alpha": None} | arguments
    trainer = transformers.Trainer(
        model=run.loaded.model,
        args=transformers.TrainingArguments(**plain),
        train_dataset=datasets.Dataset.from_list(run.train.examples),
        data_collator=collator or AnswerCollator(0, logits_to_keep=False),
    )
    trainer.train()
    run.directory_lock.release()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"neftune_alpha": 5.0}, {"neftune_noise_alpha": 5.0}),
        ({"label_smoothing": 0.2}, {"label_smoothing_factor": 0.2}),
        ({"label_smoothing": 0.2, "fuse": True}, {"label_smoothing_factor": 0.2}),
    ],
)
def test_losses_are_those_of_transformers(
    make: Make, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    plain = our_losses(make("plain"))
    found = our_losses(make("ours", **ours))
    expected = losses_of_transformers(make("theirs"), **theirs)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] != pytest.approx(plain[0], abs=1e-3), "it does something"


def test_shares_outside_their_range(make: Make) -> None:
    for settings in ({"label_smoothing": 1.0}, {"neftune_alpha": -1.0}):
        with pytest.raises(lk.SettingError):
            make("out", **settings)


def test_label_smoothing_of_classes(
    make: Make, bert_dir: str, write_rows: Callable[..., str]
) -> None:
    rows = [{"text": f"the {a} sat", "label": b} for a, b in (("cat", "yes"), ("dog", "no"))] * 8
    data = write_rows(rows, "labelled.jsonl")
    common = {"model": bert_dir, "data": data, "eval_data": data, "accumulate": 1}
    found = our_losses(make("ours", **common, label_smoothing=0.2))
    theirs = make("theirs", **common)
    pads = transformers.DataCollatorWithPadding(
        transformers.AutoTokenizer.from_pretrained(bert_dir)
    )
    expected = losses_of_transformers(theirs, pads, label_smoothing_factor=0.2)
    assert found == pytest.approx(expected, abs=1e-5)
    numbers = write_rows([{"text": row["text"], "score": 0.5} for row in rows], "numbers.jsonl")
    with pytest.raises(lk.SettingError, match="label_smoothing"):
        our_losses(
            make(
                "number", model=bert_dir, data=numbers, eval_data=numbers, task="regression",
                columns={"text": "text", "label": "score"}, label_smoothing=0.1,
            )
        )  # fmt: skip


@pytest.mark.parametrize("loss", [class_loss, answer_loss])
def test_smoothed_losses_are_those_of_the_label_smoother(loss: Callable[..., torch.Tensor]) -> None:
    """Of transformers; a causal model's logits are one place before their labels."""
    torch.manual_seed(0)
    outputs = transformers.modeling_outputs.TokenClassifierOutput(logits=torch.randn(3, 5, 7))
    labels = torch.randint(0, 7, (3, 5)).where(torch.rand(3, 5) < 0.6, IGNORED)
    theirs = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.3, ignore_index=IGNORED)
    expected = theirs(outputs, labels, shift_labels=loss is answer_loss)
    assert smoothed(loss, 0.3)(outputs, labels) == pytest.approx(float(expected), rel=1e-6)
