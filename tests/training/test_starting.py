"""`--adapter`: a run that trains an existing adapter further."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lorakin as lk
import soak
from conftest import small
from lorakin.family import FAMILY
from lorakin.training import run_directory
from lorakin.training import train as training
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.models import load_model
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe
from training.saved import same, tensors

Make = Callable[..., Recipe]


@pytest.fixture
def make(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Callable[..., str], tmp_path: Path
) -> Make:
    data = write_rows(chat_rows, "train.jsonl")
    common: dict[str, Any] = {
        "model": model_dir, "data": data, "eval_data": data, "lr": 1e-2, "steps": 6,
        "dtype": "float32", "save_every": 0,
    }  # fmt: skip
    return lambda out, **more: Recipe(**common | {"out": str(tmp_path / out)} | more)


MEMBERS = [member.word for member in FAMILY]
PROBED = {"lora-drop": {"keep": 5, "probe_epochs": 1, "sample": 0.5}, "lora-ga": {"rank": 4}}


def run(recipe: Recipe, resume: bool = False) -> training.Result:
    return training.train(training.prepare(recipe, Console(quiet=True), resume))


@pytest.mark.parametrize("words", ["dora", "lora+"])
def test_it_begins_where_the_adapter_was(make: Make, words: str, tmp_path: Path) -> None:
    first = make("first", method=words, rank=4, targets=["q_proj", "v_proj"])
    began = run(first)
    recipe = make("second", adapter=first.out)
    result = run(recipe)
    assert result.before.loss == pytest.approx(began.after.loss, rel=1e-6)
    assert result.after.loss < result.before.loss
    assert result.trainable_parameters == began.trainable_parameters
    saved = read_recipe(Path(recipe.out) / "recipe.yaml", {})
    assert (saved.adapter, saved.method, saved.rank) == (first.out, words, 4)
    card = (Path(recipe.out) / "README.md").read_text()
    assert "first" in card and str(tmp_path) not in card
    again = make("again", adapter=first.out, method=words, rank=4, save_every=3)
    run(again)
    assert same(again.out, recipe.out)
    shutil.rmtree(Path(again.out) / "checkpoints" / "checkpoint-6")
    run(run_directory.resumed_recipe(None, {"out": again.out}), resume=True)
    assert same(again.out, recipe.out)


def test_its_steps_are_those_of_a_loop_over_lk_load(make: Make) -> None:
    """The independent truth: transformers' Trainer on `lk.load(…, trainable=True)`."""
    first = make("first", rank=4)
    run(first)
    recipe = make("second", adapter=first.out, steps=3)
    prepared = training.prepare(recipe, Console(quiet=True))
    loaded = load_model(recipe.model, "float32")
    theirs = lk.load(loaded.model, first.out, trainable=True)
    for (name, mine), (same_name, other) in zip(
        prepared.adapter.tensors.named_parameters(), theirs.tensors.named_parameters(), strict=True
    ):
        assert name == same_name and mine.requires_grad == other.requires_grad
        assert torch.equal(mine, other)
    prepared.directory_lock.release()


@pytest.mark.parametrize(
    "word", MEMBERS if soak.is_slow() else ["adalora", "delta-lora", "lora-drop", "lora-ga", "vera"]
)
def test_every_member_goes_on(make: Make, word: str) -> None:
    declared = {} if word == "lora-drop" else dict(small(word).test_settings)
    probe = PROBED.get(word, {})
    first = make("first", method=word, settings=declared | probe)
    run(first)
    recipe = make("second", adapter=first.out)
    result = run(recipe)
    loss = evaluate_rows(recipe.model, first.out, recipe.data, dtype="float32").loss
    assert result.before.loss == pytest.approx(loss, rel=1e-5)
    assert not same(first.out, recipe.out)


def test_peft_files_go_on(make: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_model(make("first").model, "float32").model
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    config.task_type, config.init_lora_weights = "CAUSAL_LM", False
    torch.manual_seed(0)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    recipe = make("second", adapter=str(tmp_path / "theirs"))
    result = run(recipe)
    loss = evaluate_rows(recipe.model, str(tmp_path / "theirs"), recipe.data, dtype="float32").loss
    assert result.before.loss == pytest.approx(loss, rel=1e-5)
    assert result.after.loss < result.before.loss
    assert tensors(recipe.out).keys() == tensors(tmp_path / "theirs").keys()


def test_a_classifier_goes_on_with_its_head_and_classes(
    make: Make, bert_dir: str, write_rows: Callable[..., str]
) -> None:
    rows = [{"text": f"the {a} sat", "label": b} for a, b in (("cat", "yes"), ("dog", "no"))] * 8
    data = write_rows(rows, "labelled.jsonl")
    common = {"model": bert_dir, "data": data, "eval_data": data}
    first = make("first", **common)
    began = run(first)
    other = write_rows(rows[1:] + rows[:1], "other.jsonl")  # the classes come in another order
    result = run(make("second", **common | {"data": other}, adapter=first.out))
    assert result.before == began.after
    labels = read_recipe(Path(first.out) / "recipe.yaml", {}).labels or []
    with pytest.raises(lk.SettingError, match="labels"):
        run(make("third", **common, adapter=first.out, labels=labels[::-1]))


@pytest.mark.parametrize(
    "flags",
    [
        {"rank": 8}, {"method": "dora"}, {"alpha": 1.0}, {"settings": {"ratio": 8}},
        {"targets": ["q_proj"]}, {"bias": "all"}, {"dropout": 0.5},
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(make: Make, flags: dict[str, Any], tmp_path: Path) -> None:
    first = make("first", rank=4, steps=1)
    run(first)
    with pytest.raises(lk.SettingError):
        run(make("second", adapter=first.out, **flags))
    assert not (tmp_path / "second").exists()


def test_the_default_method_is_a_contradiction_if_it_is_given(make: Make) -> None:
    first = make("first", method="dora", steps=1)
    run(first)
    common = {"model": first.model, "data": first.data, "out": "o", "adapter": first.out}
    assert read_recipe(None, common).adapter == first.out
    with pytest.raises(lk.SettingError, match="dora"):
        read_recipe(None, common | {"method": "lora"})
    with pytest.raises(lk.AdapterError):
        run(make("second", adapter=str(Path(first.out) / "nothing")))
