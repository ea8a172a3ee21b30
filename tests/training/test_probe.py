"""Batches for methods that look at data before they start."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import lorakin as lk
from lorakin.family import Method
from lorakin.training import probe
from lorakin.training.prepare import prepare
from lorakin.training.recipe import Recipe
from lorakin.training.run import PreparedRun


@pytest.fixture
def ready(
    model_dir: str,
    chat_rows: list[dict[str, str]],
    write_rows: Callable[..., str],
    tmp_path: Path,
) -> PreparedRun:
    data, out = write_rows(chat_rows), str(tmp_path / "out")
    recipe = Recipe(model_dir, data, out, eval_data=data, dtype="float32", batch_size=4, steps=2)
    return prepare(recipe, Console(file=io.StringIO()))


def test_the_seed_draws_the_same_rows(ready: PreparedRun) -> None:
    one, again = probe.probe_batches(ready, 0.5), probe.probe_batches(ready, 0.5)
    assert sum(len(batch["labels"]) for batch in one) == round(0.5 * len(ready.train.examples))
    for batch, same in zip(one, again, strict=True):
        assert batch.keys() == same.keys()
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    ready.recipe.seed = 1
    other = probe.probe_batches(ready, 0.5)
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])


def test_as_many_batches_as_there_are_or_may_be(ready: PreparedRun) -> None:
    rows = len(ready.train.examples)
    assert len(probe.probe_batches(ready)) == -(-rows // 4)
    few = probe.probe_batches(ready, most=2)
    assert [len(batch["input_ids"]) for batch in few] == [4, 4]


def test_the_loss_is_the_mean_over_the_answers(ready: PreparedRun) -> None:
    (batch,) = probe.probe_batches(ready, most=1)
    loss = probe.probe_loss(ready)
    assert loss is not None
    model = ready.loaded.model
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    kept, labels = logits[:, batch["logits_to_keep"]], batch["labels"][:, 1:]
    want = torch.nn.functional.cross_entropy(
        kept.flatten(0, 1).double(), labels.flatten(), ignore_index=-100
    )
    assert float(loss(model, batch)) == pytest.approx(float(want), rel=1e-5)


def test_only_methods_that_start_by_data_get_batches(ready: PreparedRun) -> None:
    assert probe.measured_by(ready, Method.of(lk.LoRA())) == {}
    given = probe.measured_by(ready, Method.of(lk.LoRAGA(rank=4, first_batches=3)))
    assert len(given["probe"]) == 3 and given["loss"] is not None
