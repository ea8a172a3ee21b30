"""Schedules of the learning rate: each runs, resumes to the bit, and what is wrong with one is said
before a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

import lorakin as lk
import soak
from lorakin.cli.app import run as command
from lorakin.training import run_directory
from lorakin.training import train as training
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe
from lorakin.training.schedules import NAMES, WATCHERS, check, check_evaluations, taken
from training.saved import tensors

LR, STEPS, WARMUP = 0.02, 6, 0.2
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 0.001, "power": 2},
    "inverse_sqrt": {"timescale": 3},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 10.0},
    "cosine_with_min_lr": {"min_lr": 0.005},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": {"patience": 0, "min_lr": 0.001, "factor": 0.5, "threshold": 10.0},
}
"""Arguments of schedules that need or have some; the thresholds are such that no loss is ever
better.
"""


@pytest.fixture
def recipe(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Callable[..., str], tmp_path: Path
) -> Recipe:
    data = write_rows(chat_rows[:12], "train.jsonl")
    return Recipe(
        model=model_dir,
        data=data,
        eval_data=data,
        out=str(tmp_path / "out"),
        rank=2,
        lr=LR,
        steps=STEPS,
        dtype="float32",
        warmup=WARMUP,
        save_every=2,
        batch_size=4,
    )


def run(recipe: Recipe, resume: bool = False) -> None:
    training.train(training.prepare(recipe, Console(quiet=True), resume))


def rows(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def rates(folder: str | Path) -> list[float]:
    return [row["learning_rate"] for row in rows(folder) if "learning_rate" in row]


@pytest.mark.parametrize("name", NAMES if soak.is_slow() else ("cosine", *WATCHERS))
def test_each_runs_and_resumes_to_the_bit(name: str, recipe: Recipe, tmp_path: Path) -> None:
    recipe.schedule, recipe.schedule_args = name, NEEDED.get(name, {})
    run(recipe)
    there = tmp_path / "half"
    shutil.copytree(recipe.out, there)
    shutil.rmtree(there / "checkpoints" / "checkpoint-6")
    before = tensors(recipe.out)
    run(run_directory.resumed_recipe(None, {"out": str(there)}), resume=True)
    assert before.keys() == tensors(there).keys() and all(
        torch.equal(before[key], t) for key, t in tensors(there).items()
    )
    assert rates(there) == rates(recipe.out)
    seen = rates(recipe.out)
    assert len(seen) == STEPS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    own: Any = transformers.get_scheduler(
        name, optimizer, int(WARMUP * STEPS), STEPS, NEEDED.get(name, {})
    )
    losses = {row["step"]: row["eval_loss"] for row in rows(recipe.out) if "eval_loss" in row}
    for step, rate in enumerate(seen, 1):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimizer.step()
        if name not in WATCHERS:
            own.step()
        elif step % 2 == 0:
            own.step(losses[step])
    assert len(set(seen)) == 1 if name == "constant" else len(set(seen)) > 1


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("cosinus", {}, "schedule"),
        ("cosine", {"min_lr": 1e-5}, "min_lr"),
        ("constant", {"min_lr": 1e-5}, "none"),
        ("linear", {"num_training_steps": 3}, "num_training_steps"),
        (
            "cosine_with_min_lr",
            {},
            "--schedule-arg",
        ),
        ("cosine_warmup_with_min_lr", {}, "min_lr"),
        ("cosine_with_min_lr", {"min_lr": "small"}, "small"),
        ("cosine_with_min_lr", {"min_lr": 1e-4, "min_lr_rate": 0.5}, "Only"),
        ("cosine_with_min_lr", {"min_lr": 1.0}, "--lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 6},
            "steps",
        ),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "sudden"}, "sudden"),
        ("polynomial", {"lr_end": 0.5}, "lr_end"),
        ("polynomial", {"power": "two"}, "cannot"),
        ("reduce_lr_on_plateau", {"factor": 2}, "Factor"),
        ("reduce_lr_on_plateau", {"mode": "up"}, "mode"),
        ("reduce_lr_on_plateau", {"min_lr": 0.02}, "--lr"),
        ("greedy", {"min_lr": 0.5}, "below"),
    ],
)
def test_what_is_wrong_is_said_at_once(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(lk.SettingError, match=said):
        check(name, arguments, LR, STEPS, WARMUP)
    with pytest.raises(lk.SettingError, match=said):
        Recipe(
            model="nowhere",
            data="nothing",
            out="x",
            schedule=name,
            schedule_args=arguments,
            lr=LR,
            steps=STEPS,
            warmup=WARMUP,
        )


def test_a_schedule_that_follows_the_held_out_loss_needs_evaluations(recipe: Recipe) -> None:
    check_evaluations("cosine", {}, 0)
    check_evaluations("reduce_lr_on_plateau", {"patience": 1}, 3)
    with pytest.raises(lk.SettingError):
        check_evaluations("reduce_lr_on_plateau", {}, 5)
    recipe.schedule, recipe.schedule_args = "reduce_lr_on_plateau", {"patience": 2}
    with pytest.raises(lk.SettingError):
        run(recipe)
    assert not Path(recipe.out).exists()


def test_the_steps_of_an_epoch_count(recipe: Recipe) -> None:
    recipe.steps, recipe.epochs = None, 1
    recipe.schedule, recipe.schedule_args = "warmup_stable_decay", {"num_decay_steps": 50}
    with pytest.raises(lk.SettingError):
        run(recipe)


def test_arguments_on_the_command_line_and_in_recipes(
    recipe: Recipe, tmp_path: Path, capsys: Any
) -> None:
    given = [
        "train",
        "--model",
        recipe.model,
        "--data",
        *recipe.data,
        "--eval-data",
        *recipe.data,
        "--dtype",
        "float32",
    ]
    given += ["--steps", "2", "--rank", "2", "--lr", "0.02", "--schedule", "cosine_with_min_lr"]
    assert command([*given, "--out", str(tmp_path / "a")]) == 2
    assert "--schedule-arg name=value" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert command([*given, "--out", str(tmp_path / "a"), "--schedule-arg", "min_lr=5e-3"]) == 0
    assert read_recipe(tmp_path / "a" / "recipe.yaml", {}).schedule_args == {"min_lr": 0.005}
    other = read_recipe(tmp_path / "a" / "recipe.yaml", {"schedule": "linear", "out": "b"})
    assert other.schedule_args == {}, "they are another schedule's"
    assert command([*given, "--out", str(tmp_path / "c"), "--schedule-arg", "min_lr"]) == 2
    assert "--schedule-arg takes NAME=VALUE" in capsys.readouterr().err


def test_what_can_be_given() -> None:
    assert taken("constant") == taken("constant_with_warmup") == taken("linear") == ()
    assert taken("polynomial") == ("lr_end", "power")
    assert {"patience", "factor", "min_lr"} <= set(taken("reduce_lr_on_plateau"))
