"""What a user hears while a run is going wrong, each on a real run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lorakin as lk
from lorakin.training import train as training
from lorakin.training.alarms import repeated
from lorakin.training.recipe import Recipe


@pytest.fixture
def run(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Callable[..., str], tmp_path: Path
) -> Callable[..., str]:
    def train(
        before: Callable[[training.PreparedRun], None] = lambda run: None, **changes: Any
    ) -> str:
        data = write_rows(chat_rows, "train.jsonl")
        held = write_rows(
            [{"prompt": "who is it", "completion": "three three tree two tree two"}] * 3,
            "held.jsonl",
        )
        settings = {
            "eval_data": held,
            "dtype": "float32",
            "lr": 1e-2,
            "steps": 40,
            "save_every": 0,
            "schedule": "constant",
        }
        text = io.StringIO()
        recipe = Recipe(model_dir, data, str(tmp_path / "out"), **(settings | changes))
        prepared = training.prepare(recipe, Console(file=text, width=1000))
        before(prepared)
        training.train(prepared)
        return " ".join(text.getvalue().split())

    return train


def test_a_run_that_goes_well_says_nothing(run: Callable[..., str], model_dir: str) -> None:
    shown = run(eval_data=None, holdout=0.2)
    assert "gradient" not in shown
    assert "has not fallen" not in shown


def test_rows_that_stand_on_both_sides(
    run: Callable[..., str], chat_rows: Any, write_rows: Callable[..., str]
) -> None:
    shown = run(
        eval_data=write_rows(
            [*chat_rows[:2], {"prompt": "who", "completion": "a bird yes"}], "both.jsonl"
        ),
        steps=2,
    )
    assert "warning: 2 of 3 held-out rows are trained on, too" in shown
    assert "--eval-data" in shown
    one, other = {"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}
    assert repeated([one], [one, other]) == 1
    assert repeated([{"input_ids": [1], "labels": 1}], [{"input_ids": [1], "labels": 1}]) == 1


def test_a_loss_that_does_not_fall(run: Callable[..., str]) -> None:
    shown = run(lr=1e-9)
    assert "warning: after 20 steps the training loss has not fallen" in shown
    assert "a higher --lr if the loss is flat" in shown


def test_nothing_learned_on_held_out_rows(run: Callable[..., str]) -> None:
    assert "warning: the adapter learned nothing that helps on the held-out rows" in run(lr=0.3)


def test_a_gradient_that_never_comes(run: Callable[..., str]) -> None:
    def cut(prepared: training.PreparedRun) -> None:
        head = prepared.loaded.model.lm_head
        head.register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(),))

    with pytest.warns(lk.LorakinWarning):
        shown = run(before=cut, steps=8)
    assert "warning: the gradient has been exactly zero for 5 steps (now step 5)" in shown
    assert "--targets" in shown


def test_a_gradient_that_explodes(run: Callable[..., str]) -> None:
    def one_wild_step(prepared: training.PreparedRun) -> None:
        calls = iter(range(10_000))

        def wild(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out * 300 if torch.is_grad_enabled() and next(calls) == 30 else out

        prepared.loaded.model.lm_head.register_forward_hook(wild)

    shown = run(before=one_wild_step)
    assert "warning: at step 31 the gradient's norm is" in shown
    assert "a lower --lr" in shown
