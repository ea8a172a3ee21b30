"""metrics.jsonl and importance.json: what a run appends and reads again, and what a stranger may
have put in their place.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import lorakin as lk
import soak
from lorakin.storage.summary import importance_in
from lorakin.training.metrics_file import Metrics
from lorakin.training.recipe_file import read_recipe
from lorakin.training.yaml_values import parse_settings

COUNT = soak.count("LORAKIN_FUZZ", 400)
ROWS: list[dict[str, Any]] = [
    {"step": 0, "rows": 12345, "eval_loss": 2.0, "eval_count": 30},
    {"step": 1, "loss": 1.5, "learning_rate": 1e-4, "memory_bytes": 10**9},
    {"step": 2, "loss": math.nan},
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_back_and_later_ones_are_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", ROWS)
    assert str(Metrics(path, writes=False).rows()) == str(ROWS)
    metrics = Metrics(path, from_step=1)
    metrics.add(2, loss=1.25)
    assert metrics.rows() == [*ROWS[:2], {"step": 2, "loss": 1.25}]
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    assert len(metrics.rows()) == 3, "what a kill cut off is left out"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"loss": 1.0}, "step is missing"),
        ({"step": "1"}, "step is .1."),
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step"),
        ({"step": 10**30}, "step"),
        ({"step": 1, "loss": "x"}, "loss is 'x'"),
        ({"step": 1, "loss": None}, "loss"),
        ({"step": 1, "loss": [1]}, "loss"),
        ({"step": 0, "eval_loss": 1.0, "eval_count": math.nan}, "eval_count"),
        ([1], "it is"),
        (3, "it is"),
    ],
)
def test_what_is_no_row_is_named(row: Any, named: str, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", [ROWS[0], row])
    with pytest.raises(lk.DataError, match=rf"metrics\.jsonl, line 2 .*{named}"):
        Metrics(path, writes=False).rows()


def test_mutated_metrics(tmp_path: Path) -> None:
    chance = random.Random(9)
    whole = written(tmp_path / "whole.jsonl", ROWS * 3).read_bytes()
    refused = 0
    for _ in range(COUNT):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.choice(
                [0, 10, 34, 44, 91, 93, 123, 125, 255, 57]
            )
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        metrics = Metrics(tmp_path / "metrics.jsonl", writes=False)
        try:
            metrics.rows()
            metrics._points("loss")
        except lk.DataError:
            refused += 1
    assert COUNT // 4 < refused < COUNT


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.usefixtures("pictures")
def test_links_are_not_followed(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.write_text("mine")
    out.mkdir()
    for name in ("metrics.jsonl", "loss.png"):
        (out / name).symlink_to(mine)
    metrics = Metrics(out / "metrics.jsonl")
    metrics.add(1, loss=2.0)
    metrics.plot(out / "loss.png")
    assert mine.read_text() == "mine"
    assert metrics.rows() == [{"step": 1, "loss": 2.0}]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(lk.OutputError):
        metrics.add(2, loss=1.0)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "value",
    ['"x"', "NaN", "-1", "true", "1e40", "{}", "9" * 5000, "[" * 10**5, "\x00"],
    ids=lambda value: value[:4],
)
def test_an_importance_that_is_none(value: str, tmp_path: Path) -> None:
    assert importance_in(tmp_path) == {}
    for content in (f"[{value}]", f'{{"a": {value}}}'):
        (tmp_path / "importance.json").write_text(content)
        with pytest.raises(lk.AdapterError, match=r"importance\.json"):
            importance_in(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_pipes_are_no_files(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "importance.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(lk.SettingError):
        read_recipe(tmp_path / "recipe.yaml", {})
    with pytest.raises(lk.DataError):
        Metrics(tmp_path / "metrics.jsonl", writes=False).rows()
    with pytest.raises(lk.AdapterError):
        importance_in(tmp_path)


def test_settings_unfold_nothing(tmp_path: Path) -> None:
    for value in ("[&a [x, x], *a, *a]", "!!python/name:os.system", "[" * 5000):
        with pytest.raises(lk.SettingError):
            parse_settings([f"ratio={value}"])
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d\nout: o\nepochs: .inf\n")
    with pytest.raises(lk.SettingError):
        read_recipe(tmp_path / "recipe.yaml", {})
