"""The results file: whole rows or none, whatever happened while it was written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lorakin.errors import DataError
from lorakin.study.results import DONE, SWEEP, Results, Row, Trial

ROW = Row(
    Trial("dora,lora+", SWEEP, 2e-4, 1), DONE, steps=3, tune={"loss": 1.5}, losses=[2.0, math.nan], ranks=[(1, {"a": 2})],
    moves=[(2, {"a": (0.1, 0.2)})], layers={"a": {"norm": 1.0}}, warnings=["so"],
)  # fmt: skip


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


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"trial": {"arm": "a"}, "status": "done"}', "[1]"])
def test_a_line_that_is_no_row_is_told_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(ROW.as_json() + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl, line 2 is no row"):
        Results(path)


def test_names_are_fit_for_directories() -> None:
    assert ROW.trial.name == "dora+lora+-lr0.0002-seed1"
