"""A file of metrics that is looked at while it is written, against reading it whole."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lorakin.errors import DataError
from lorakin.training.followed_metrics import FollowedMetrics
from lorakin.training.metrics_file import Metrics


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def test_each_look_gives_what_reading_the_whole_file_does(tmp_path: Path) -> None:
    """A run is killed and resumed at random; each look is as good as a first one."""
    path = tmp_path / "metrics.jsonl"
    drawn, followed, step = random.Random(0), FollowedMetrics(path), 0
    assert followed.rows() == []
    metrics = Metrics(path)
    for _ in range(400):
        if drawn.random() < 0.05:
            step = max(0, step - drawn.randrange(20))
            metrics = Metrics(path, from_step=step)
        for _ in range(drawn.randrange(4)):
            step += 1
            metrics.add(step, loss=drawn.random())
        if drawn.random() < 0.5:
            assert followed.rows() == metrics.rows()
    assert step > 100
    path.unlink()
    assert followed.rows() == []


def test_only_what_is_new_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(n, loss=1.0) for n in range(100)))
    followed = FollowedMetrics(path)
    followed.rows()
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    with path.open("a") as file:
        file.write(line(100, loss=0.5) + '{"step": 101, "lo')
    assert followed.rows()[-1] == {"step": 100, "loss": 0.5} and len(parsed) == 1
    with path.open("a") as file:
        file.write('ss": 0.25}\n')
    assert followed.rows()[-1] == {"step": 101, "loss": 0.25} and len(parsed) == 2


def test_a_line_that_is_no_row_is_said_each_time_until_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "[]\n")
    followed = FollowedMetrics(path)
    for _ in range(2):
        with pytest.raises(DataError, match="line 2"):
            followed.rows()
    path.write_text(line(1) + line(2))
    assert [row["step"] for row in followed.rows()] == [1, 2]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        FollowedMetrics(tmp_path).rows()
