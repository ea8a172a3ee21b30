"""The learning-rate range test: its rates, its losses, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import lorakin as lk
from lorakin.cli.app import run as run_command
from lorakin.training import train as training
from lorakin.training.lr_range import RangeTest, find_rate
from lorakin.training.recipe import Recipe


@pytest.fixture
def recipe(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Callable[..., str], tmp_path: Path
) -> Recipe:
    data = write_rows(chat_rows, "train.jsonl")
    return Recipe(model_dir, data, str(tmp_path / "out"), "lora+", eval_data=data, dtype="float32")


def test_rates_grow_by_one_factor_and_the_first_loss_is_that_of_training(
    recipe: Recipe, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = find_rate(recipe, Console(quiet=True), steps=30, lowest=1e-5, highest=1.0)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.rates == pytest.approx(list(np.geomspace(1e-5, 1.0, 30))[: len(found.rates)])
    assert 1e-4 < found.suggestion <= found.lowest <= 1.0
    again = find_rate(recipe, Console(quiet=True), steps=30, lowest=1e-5, highest=1.0)
    assert again == found
    recipe.steps, recipe.lr, recipe.schedule, recipe.warmup = 1, 1e-5, "constant", 0.0
    training.train(training.prepare(recipe, Console(quiet=True)))
    rows = map(json.loads, (Path(recipe.out) / "metrics.jsonl").read_text().splitlines())
    assert found.losses[0] == next(row["loss"] for row in rows if "loss" in row)


def test_the_steepest_fall_of_a_known_curve() -> None:
    """A logistic fall around 1e-3, then a rise: its steepest point is known."""
    rates = np.geomspace(1e-6, 1.0, 61)
    fall = 3 - 2 / (1 + np.exp(-3 * np.log10(rates / 1e-3))) + np.maximum(0, rates - 0.1) * 20
    found = RangeTest(rates.tolist(), fall.tolist(), kept=0.0)
    assert found.suggestion == pytest.approx(1e-3) and 1e-2 < found.lowest < 0.2
    with pytest.raises(lk.SettingError):
        _ = RangeTest(rates.tolist(), rates.tolist()).suggestion


def test_noise_suggests_no_rate() -> None:
    rates, noise = np.geomspace(1e-6, 1.0, 40), np.random.default_rng(0).normal(0.7, 0.05, 40)
    with pytest.raises(lk.SettingError, match="scatters"):
        _ = RangeTest(rates.tolist(), noise.tolist()).suggestion
    falling = noise - np.linspace(0, 0.4, 40)
    assert RangeTest(rates.tolist(), falling.tolist()).suggestion in rates


def test_the_suggestion_lies_below_the_lowest_loss() -> None:
    """A loss that falls ever faster until the test ends."""
    rates = np.geomspace(1e-6, 1.0, 40)
    found = RangeTest(rates.tolist(), (3 - np.geomspace(0.01, 2, 40)).tolist())
    assert found.suggestion < found.lowest == rates[-1]


def test_the_command(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "rates.png"
    words = ["lr-find", "--model", recipe.model, "--data", recipe.data[0], "--dtype", "float32"]
    assert run_command([*words, "--steps", "20", "--picture", str(picture), "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(said["rates"]) == len(said["smoothed"]) and said["suggestion"] in said["rates"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--steps", "3"], ["--from", "1", "--to", "0.1"], ["--from", "0"]):
        assert run_command([*words, *wrong]) == 2
