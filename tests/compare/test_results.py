"""The results file: whole rows or none, whatever happened while it was written."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakin.compare.results import DONE, SWEEP, ResultRow, Results, Trial
from lorakin.errors import DataError, OutputError

ROW = ResultRow(
    Trial("dora,lora+", SWEEP, 2e-4, 1),
    DONE,
    steps=3,
    tune={"loss": 1.5},
    losses=[2.0, math.nan],
    ranks=[(1, {"a": 2})],
    moves=[(2, {"a": (0.1, 0.2)})],
    layers={"a": {"norm": 1.0, "relative": 0.1}},
    warnings=["so"],
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.add(ROW)
    (again,) = Results(tmp_path / "r.jsonl").rows
    assert again.trial == ROW.trial
    assert again.as_json() == ROW.as_json()


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_line_that_a_kill_cut_off_is_cut_away(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    Results(path).add(ROW)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    results = Results(path)
    assert len(results.rows) == 1
    results.add(ROW)
    assert path.read_bytes() == whole + whole
    assert len(Results(path).rows) == 2


@pytest.mark.parametrize(
    "line", ["{}", "nonsense", '{"trial": {"arm": "a"}, "status": "done"}', "[1]"]
)
def test_a_line_that_is_no_row_is_told_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(ROW.as_json() + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl, line 2 "):
        Results(path)


def test_names_are_fit_for_directories() -> None:
    assert ROW.trial.name == "dora+lora+-lr0.0002-seed1"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"trial": {"seed": "/../../../victim"}},
            "trial.seed is '/../../../victim'",
        ),
        ({"trial": {"seed": True}}, "trial.seed"),
        ({"trial": {"seed": -1}}, "trial.seed"),
        ({"trial": {"seed": 10**30}}, "trial.seed"),
        ({"trial": {"lr": "2e-4"}}, "trial.lr"),
        ({"trial": {"lr": None}}, "trial.lr"),
        ({"trial": {"lr": math.nan}}, "trial.lr"),
        ({"trial": {"stage": "../x"}}, "trial.stage"),
        ({"trial": {"more": 1}}, "trial.more"),
        ({"trial": []}, "trial"),
        ({"status": "dona"}, "status"),
        ({"status": ["done"]}, "status"),
        ({"tune": {}}, "tune"),
        ({"tune": {"loss": "1"}}, "tune.loss"),
        ({"report": {"loss": 1.0, "count": math.nan}}, "report"),
        ({"losses": "[/x]\x1b"}, "losses"),
        ({"losses": [1.0, None]}, r"losses[1]"),
        ({"losses": [1e200]}, r"losses[0]"),
        ({"step_seconds": 1e-320}, "step_seconds"),
        ({"ranks": [[1, {"a": 2}], [2, {"b": 2}]]}, "ranks"),
        ({"moves": [[2, {"a": [0.1]}]]}, "moves[0][1].a"),
        ({"layers": {"a": {}}}, "layers"),
        ({"reason": {}}, "reason"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    content = json.loads(ROW.as_json())
    for key, value in change.items():
        content[key] = (
            {**content[key], **value} if key == "trial" and isinstance(value, dict) else value
        )
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(content) + "\n")
    with pytest.raises(DataError, match=rf"r\.jsonl, line 1 .*{re.escape(named)}"):
        Results(path)


def test_deep_nesting_and_endless_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for line in ("[" * 200_000, '{"trial": ' + "9" * 10_000 + "}", '{"trial":' * 50_000):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match="line 1 "):
            Results(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_pipes_and_links_are_no_results(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe"):
        Results(tmp_path / "pipe")
    results = Results(tmp_path / "r.jsonl")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "r.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="link"):
        results.add(ROW)
    assert (tmp_path / "mine").read_text() == "mine"
