"""Recipes: from YAML, flags over them, written so that they run again."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorakin as lk
from lorakin.training.recipe import Recipe, read_recipe

NEEDED = {"model": "m", "data": "d", "out": "o"}


def test_flags_win_and_what_is_written_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d\nout: o\nlr: 2e-4\nrank: 8\ntargets: q_proj\nepochs: 2\n")
    recipe = read_recipe(path, {"rank": 4, "steps": 10, "alpha": None, "targets": []})
    assert (recipe.rank, recipe.lr, recipe.targets, recipe.steps, recipe.epochs) == (
        4,
        2e-4,
        ["q_proj"],
        10,
        None,
    )
    recipe.save(tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml", {}) == recipe


def test_the_member_takes_its_own_defaults() -> None:
    assert Recipe(**NEEDED).build().members == (lk.LoRA(),)
    assert Recipe(**NEEDED, rank=4, rslora=True).build().members == (lk.LoRA(rank=4, rslora=True),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 2, "epochs": 1}, "steps or epochs, not both"),
        ({"epochs": -1}, "epochs must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"holdout": 1.0}, "holdout must lie between 0 and 1"),
        ({"loss_on": "prompt"}, "loss_on must be 'last' or 'answers' or 'all', not 'prompt'"),
        ({"bias": "some"}, "bias must be none, lora_only, all, not 'some'"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"rank": 2.5}, "rank must be whole, not 2.5"),
        ({"rank": True}, "rank must be whole, not True"),
        ({"chat_template": 1}, "chat_template must be true or false"),
        ({"format": "csv"}, "format must be one of messages"),
        ({"date": "today"}, "date must be a day"),
        ({"data": []}, "data is missing"),
        ({"targets": {"a": 1}}, "targets must be a list of names"),
        ({"model": ["a"]}, "model must be text"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), not -1"),
        ({"seed": None}, "seed must be a number, not None"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(lk.SettingError, match=message):
        Recipe(**{**NEEDED, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "unknown settings: modle; known are: accumulate"),
        ("- a", "holds no settings"),
        ("a: [", "is not YAML"),
        ("model: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("model: m\ndata: d", "--out is missing; give it as a flag or in the recipe"),
    ],
)
def test_recipes_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(lk.SettingError, match=message):
        read_recipe(tmp_path / "r.yaml", {})


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(lk.SettingError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml", {})


def test_methods_and_their_settings() -> None:
    with pytest.raises(lk.SettingError, match="unknown method 'lorra'"):
        Recipe(**NEEDED, method="lorra").build()
    with pytest.raises(lk.SettingError, match="rank must be a whole number"):
        Recipe(**NEEDED, rank=0).build()
