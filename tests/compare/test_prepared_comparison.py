"""A comparison that is ready to run: what it does with the rows that come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakin.compare.arms import arms_of
from lorakin.compare.comparison import Comparison
from lorakin.compare.prepared_comparison import PreparedComparison, check_anything_ran
from lorakin.compare.results import DONE, REFUSED, TIMING, ResultRow, Results, Trial
from lorakin.compare.split import Parts
from lorakin.errors import SettingError


def comparison_in(out: Path, budget: str) -> PreparedComparison:
    asked = Comparison("m", "d.jsonl", str(out), ["vera"], budget=budget)
    arms = arms_of(asked.methods, asked.size, 200, {}, 0.0)
    return PreparedComparison(
        asked, out, arms, Parts(10, 5, 5, "", None), Results(out / "r.jsonl"), "float32"
    )


def timed(arm: str, seconds: float) -> ResultRow:
    return ResultRow(Trial(arm, TIMING, 1e-3, 0), DONE, step_seconds=seconds)


def test_steps_follow_from_the_time_of_a_step(tmp_path: Path) -> None:
    comparison_run = comparison_in(tmp_path, "minutes=1")
    comparison_run.record_result(timed("lora", 0.5))
    comparison_run.record_result(timed("vera", 2.0))
    assert (comparison_run.steps("lora"), comparison_run.steps("vera")) == (120, 30)
    assert comparison_in(tmp_path, "steps=7").steps("lora") == 7


def test_an_arm_that_is_too_slow_for_the_budget_is_refused(tmp_path: Path) -> None:
    comparison_run = comparison_in(tmp_path, "minutes=1")
    comparison_run.record_result(timed("lora", 16.0))
    (row,) = comparison_run.results.rows
    assert row.status == REFUSED
    assert "16 s" in row.reason
    assert {trial.arm for trial in comparison_run.remaining()} == {"vera"}
    comparison_run.record_result(timed("vera", 60.0))
    with pytest.raises(SettingError, match="minutes=1 is 3 steps"):
        check_anything_ran(comparison_run)
