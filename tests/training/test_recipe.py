"""Recipes: from YAML, flags over them, written so that they run again."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

import lorakin as lk
from lorakin.inject import biases
from lorakin.inject.placement import RANK_ABOVE
from lorakin.training import recipe_words
from lorakin.training.answers import LOSS_ON
from lorakin.training.recipe import Recipe, kinds
from lorakin.training.recipe_file import read_recipe, write_recipe

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
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml", {}) == recipe


def test_the_member_takes_its_own_defaults() -> None:
    assert Recipe(**NEEDED).build().members == (lk.LoRA(),)
    assert Recipe(**NEEDED, rank=4, rslora=True).build().members == (lk.LoRA(rank=4, rslora=True),)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 2, "epochs": 1},
        {"epochs": -1},
        {"batch_size": 0},
        {"holdout": 1.0},
        {"loss_on": "prompt"},
        {"bias": "some"},
        {"lr": 0},
        {"lr": float("nan")},
        {"lr": "fast"},
        {"rank": 2.5},
        {"rank": True},
        {"chat_template": 1},
        {"format": "csv"},
        {"date": "today"},
        {"data": []},
        {"targets": {"a": 1}},
        {"model": ["a"]},
        {"weight_decay": -1},
        {"seed": -1},
        {"seed": None},
        {"columns": ["prompt"]},
        {"schedule_args": 3},
        {"labels": [1.5]},
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(lk.SettingError, match=next(iter(settings))):
        Recipe(**{**NEEDED, **settings})  # type: ignore[arg-type]


def test_what_yaml_and_users_write_for_a_value() -> None:
    recipe = Recipe(
        **NEEDED, lr="2e-4", steps="1e3", batch_size=4.0, labels=[0, 1], trainable_tokens=100,
        schedule_args={"num_cycles": "5e-1"}, loss_on="answer", weight_decay=1,
    )  # fmt: skip
    assert (recipe.lr, recipe.steps, recipe.batch_size) == (2e-4, 1000, 4)
    assert isinstance(recipe.steps, int) and isinstance(recipe.weight_decay, float)
    assert (recipe.labels, recipe.trainable_tokens) == (["0", "1"], ["100"])
    assert (recipe.schedule_args, recipe.loss_on) == ({"num_cycles": 0.5}, "answers")


def test_its_words_are_those_of_the_rooms_that_use_them() -> None:
    words = {name: typing.get_args(kinds()[name])[0] for name in ("rank_above", "bias", "loss_on")}
    said = {name: typing.get_args(kind) for name, kind in words.items()}
    assert said == {
        "rank_above": RANK_ABOVE,
        "bias": (biases.NO_BIASES, biases.ADAPTED, biases.ALL),
        "loss_on": LOSS_ON,
    }


def test_every_setting_is_an_option_but_those_that_a_run_finds_out() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields - set(recipe_words.ALL_FIELDS) == {"date", "labels"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("modle: m", "modle"),
        ("- a", "r.yaml"),
        ("a: [", "r.yaml"),
        ("model: !!python/object/apply:os.system [ls]", "os.system"),
        ("model: m\ndata: d", "--out"),
    ],
)
def test_recipes_that_are_none(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(lk.SettingError, match=named):
        read_recipe(tmp_path / "r.yaml", {})


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(lk.SettingError, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml", {})


def test_methods_and_their_settings() -> None:
    with pytest.raises(lk.SettingError, match="lorra"):
        Recipe(**NEEDED, method="lorra").build()
    with pytest.raises(lk.SettingError, match="rank"):
        Recipe(**NEEDED, rank=0).build()
