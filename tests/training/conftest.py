"""Runs of these tests draw no loss curve, which takes longer than their training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakin.training.metrics_file import Metrics
from lorakin.training.recipe import Recipe


@pytest.fixture
def pictures() -> None:
    """For tests that look at the loss curve: it is drawn."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Metrics, path: Path) -> None:
        path.write_bytes(b"no picture")

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Metrics, "plot", touch)


@pytest.fixture
def make(
    model_dir: str,
    chat_rows: list[dict[str, str]],
    write_rows: Callable[..., str],
    tmp_path: Path,
) -> Callable[..., Recipe]:
    """Recipes of runs whose held-out loss falls and then rises: other answers are right there."""
    held = [{**row, "completion": "the tree is on the cat"} for row in chat_rows[:8]]
    common: dict[str, Any] = {
        "model": model_dir,
        "data": write_rows(chat_rows, "train.jsonl"),
        "eval_data": write_rows(held + chat_rows[:4], "held.jsonl"),
        "rank": 4,
        "lr": 1e-2,
        "steps": 12,
        "dtype": "float32",
        "dropout": 0.2,
    }
    return lambda out, **more: Recipe(**common | {"out": str(tmp_path / out)} | more)
